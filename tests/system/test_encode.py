"""`shards encode` with real Ray actors: the same bytes however it runs and whatever is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from symile_dist.cli import main
from symile_dist.config import Config, parse_config
from symile_dist.data.loader import open_training
from symile_dist.data.manifest import index_directory, read_manifest
from symile_dist.errors import RunFailed
from symile_dist.tools.features.encode import encode
from symile_dist.tools.features.encoders import FrozenEncoders
from symile_dist.tools.features.recipe import make_recipe
from symile_dist.types import Batch
from tests.features import fingerprints, read_samples
from tests.s3 import new_bucket, s3_endpoint
from tests.shards import DIMENSION, config_text, write_shards

SIZES = (20, 13, 17, 24)
BATCH = 8


class Encoded(NamedTuple):
    folder: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only. Sample 3 lacks modality b."""
    folder = write_shards(tmp_path_factory.mktemp("raw") / "train", SIZES, without={3: ("b",)})
    index_directory(folder)
    return folder


@pytest.fixture(scope="module")
def gate_of_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@pytest.fixture
def gate(gate_of_all: Path) -> Path:
    """Empty, and the same in all tests: its name is an option of the encoder, which the features' plan holds."""
    for path in gate_of_all.iterdir():
        path.unlink()
    return gate_of_all


@pytest.fixture(scope="module")
def undisturbed(raw: Path, gate_of_all: Path, tmp_path_factory: pytest.TempPathFactory, shared_ray: None) -> Encoded:
    """By one actor. Read only."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return Encoded(out, encode(config_of(raw, gate_of_all), out, modalities=["a", "b"], actors=1, batch_size=BATCH))


def overrides_of(gate: Path) -> list[str]:
    encoder = f"{{name: 'tests.system.gated:GatedEncoder', input_dim: {DIMENSION}, folder: {gate}}}"
    return [f"modalities.a.encoder={encoder}", "model.embedding_dim=6", "data.require=2"]


def config_of(raw: Path, gate: Path) -> Config:
    return parse_config(config_text(raw), "raw.yaml", overrides_of(gate)).config.with_absolute_paths()


def batches(config: Config, count: int) -> list[Batch]:
    loader = open_training(config, 0, 0)
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def test_the_number_of_actors_and_a_death_change_no_byte_and_training_reads_the_features(
    raw: Path, gate: Path, undisturbed: Encoded, tmp_path: Path
) -> None:
    config, summary = config_of(raw, gate), undisturbed.summary
    assert summary["complete"] and summary["samples"] == sum(SIZES) and summary["left_out"] == []
    (gate / "die-1").touch()
    encode(config, tmp_path / "two", modalities=["a", "b"], actors=2, batch_size=BATCH)
    assert not list(gate.iterdir()), "no actor died"
    expected = fingerprints(undisturbed.folder)
    assert fingerprints(tmp_path / "two") == expected and len(expected) == 2 * len(SIZES) + 2

    head, _, rest = config_text(raw).partition("data:")
    text = head + summary["config"] + "model:" + rest.partition("model:")[2]
    overrides = ["data.require=2", "data.loader_processes=0", "model.embedding_dim=6"]
    of_features = parse_config(text, "features.yaml", overrides).config
    before, after = batches(config, 3), batches(of_features, 3)
    recipe = make_recipe(config, read_manifest(raw), ["a", "b"], None, "float16", BATCH, "cpu", False)
    encoders = FrozenEncoders(recipe).encoders
    for step, (old, new) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(old.sample_ids, new.sample_ids) and torch.equal(old.present, new.present), step
        assert torch.equal(old.inputs["c"], new.inputs["c"]), "kept as it was"  # type: ignore[arg-type]
        for modality, column in (("a", 0), ("b", 1)):
            with torch.no_grad():
                features = encoders[modality](old.inputs[modality])[old.present[:, column]]
            found = new.inputs[modality][new.present[:, column]]  # type: ignore[index]
            assert found.shape == features.shape and torch.allclose(found, features, atol=2e-3), (step, modality)
    assert not all(batch.present.all() for batch in before), "sample 3 has been seen"


def test_a_shard_over_which_every_actor_dies(
    raw: Path, gate: Path, tmp_path: Path, shared_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("symile_dist.tools.features.actors.ATTEMPTS", 2)
    for number in range(9):
        (gate / f"die-{number}").touch()
    with pytest.raises(RunFailed, match=r"shard-00000\.tar: 2 actors died over it"):
        encode(config_of(raw, gate), tmp_path / "out", modalities=["a"], batch_size=BATCH)
    assert len(list(gate.iterdir())) == 7 and not list((tmp_path / "out").glob("*.tar"))


def test_gpus_that_are_not_there(
    raw: Path, tmp_path: Path, shared_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw.yaml").write_text(config_text(raw))
    out = tmp_path / "out"
    command = ["shards", "encode", "--config", str(tmp_path / "raw.yaml"), "--out", str(out), "--gpus-per-actor", "99"]
    assert main(command) == 2
    assert "1 actors need 99 GPUs (--actors x --gpus-per-actor), Ray has" in capsys.readouterr().err
    assert not out.exists()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, "the command ended before the kill"
        assert time.monotonic() < deadline, "nothing came within 120 s"
        time.sleep(0.01)  # polling files, not synchronisation: the condition decides


@pytest.mark.slow
def test_a_killed_command_over_a_bucket_goes_on_from_the_whole_shards(
    raw: Path, gate: Path, undisturbed: Encoded, tmp_path: Path
) -> None:
    (tmp_path / "raw.yaml").write_text(config_text(raw))
    (gate / "wait").touch()
    out = tmp_path / "killed"
    with s3_endpoint() as endpoint, new_bucket(endpoint) as bucket:
        command = (
            f"shards encode --config {tmp_path}/raw.yaml --out {out} --modalities a,b --batch-size {BATCH}".split()
        )
        command += ["--shards", bucket.upload(raw, "train"), f"data.storage.endpoint_url={endpoint}"]
        process = subprocess.Popen(
            [sys.executable, "-m", "symile_dist.cli", *command, *overrides_of(gate)],
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
        )
        try:
            # The first shard has three batches: its encoder waits in the second one.
            wait_for(lambda: (gate / "waiting").exists(), process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    actor = int((gate / "waiting").read_text())
    wait_for(lambda: not Path(f"/proc/{actor}").exists())  # Ray's processes end with the one that started them
    left = {path.name for path in out.iterdir()}
    assert {name for name in left if name.startswith("shard")} == {"shard-00000.tar", "shard-00000.tar.idx"}
    assert [name for name in left if name.startswith(".shard-00001.tar.")], "nothing was half done"
    (gate / "wait").unlink()
    # The local copy has the bucket's digest: it is the same source.
    summary = encode(config_of(raw, gate), out, modalities=["a", "b"], batch_size=BATCH)
    assert summary["written"] == len(SIZES) - 1 and summary["encoded"] == sum(SIZES[1:])
    assert fingerprints(out) == fingerprints(undisturbed.folder)
    assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.folder.iterdir()}
    assert len(read_samples(out)) == sum(SIZES)
