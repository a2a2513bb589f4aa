"""`symile-dist evaluate` on several processes: what one finds."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp

from symile_dist.config import parse_config
from symile_dist.data.manifest import index_directory
from symile_dist.distributed import broadcast_object, gather_objects, rank
from symile_dist.evaluation.embeddings import load_embeddings
from symile_dist.tools.evaluate import evaluate_run
from symile_dist.tools.monitoring.prometheus import free_port
from symile_dist.tools.trained import processes_of_torchrun
from tests.processes import run_distributed
from tests.shards import config_text, write_shards
from tests.untrained import untrained_run


def evaluated(run: str, export: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    results = evaluate_run(run, export=export, metadata=["number"], probe=["b"], resamples=3)
    assert all(other == results for other in gather_objects(results)), "the ranks have different results"
    return {**results, "rank": rank()}


def test_evaluate_on_two_processes(tmp_path: Path) -> None:
    """As torchrun starts them: they read, encode and score a share each; one writes."""
    for split in ("train", "val"):
        index_directory(write_shards(tmp_path / split, (9, 4, 16)))
    overrides = [f"run.directory={tmp_path / 'run'}", f"data.validation={tmp_path / 'val'}"]
    run = untrained_run(parse_config(config_text(tmp_path / "train"), "test", overrides).config)
    alone = evaluated(str(run), str(tmp_path / "one.parquet"))
    both = run_distributed(evaluated, 2, str(run), str(tmp_path / "two.parquet"))
    assert [results["rank"] for results in both] == [0, 1]
    for name in ("retrieval", "samples", "classes", "step"):
        assert both[0][name] == alone[name], name
    # Half as many samples are encoded at once: that rounds otherwise.
    assert both[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for name, row in alone["statistics"]["embeddings"].items():
        assert both[0]["statistics"]["embeddings"][name] == pytest.approx(row, rel=1e-5), name
    assert both[0]["probe"]["b"]["accuracy"] == alone["probe"]["b"]["accuracy"]
    one, two = load_embeddings(tmp_path / "one.parquet"), load_embeddings(tmp_path / "two.parquet")
    assert one.labels == two.labels and one.metadata == two.metadata and len(one.labels) == 29
    for name, vectors in one.vectors.items():
        assert two.vectors[name] == pytest.approx(vectors, abs=1e-5), name


def busy_on_rank_0(number: int, port: int) -> None:
    """As a process of torchrun's, where torch's own patience is a second."""
    os.environ.update(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    short = patch("torch.distributed.distributed_c10d.default_pg_timeout", timedelta(seconds=1))
    with short, processes_of_torchrun(torch.device("cpu")):
        assert gather_objects(rank()) == [0, 1]
        if rank() == 0:
            time.sleep(3)
        assert broadcast_object({"rank": rank()}) == {"rank": 0}


def test_processes_wait_for_one_that_fits_probes_longer_than_torch_waits() -> None:
    mp.spawn(busy_on_rank_0, (free_port(),), nprocs=2)
