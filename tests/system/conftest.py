"""Real shards, real Ray, real DeepSpeed, all tiny."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from symile_dist.config import Config, parse_config
from symile_dist.data.manifest import index_directory

MODALITIES = ("a", "b", "c")
DIMENSION = 8


def write_shards(directory: Path, samples: int, seed: int, shards: int = 4) -> None:
    """XOR-like triples: c is the product of the signs of a and b, so that no pair tells anything of a third."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for shard in range(shards):
        with webdataset.TarWriter(str(directory / f"shard-{shard:05d}.tar")) as writer:
            for row in range(shard, samples, shards):
                a, b = generator.choice([-1.0, 1.0], size=(2, DIMENSION)).astype(np.float32)
                sample: dict[str, Any] = {"__key__": f"{row:06d}"}
                for name, value in zip(MODALITIES, (a, b, a * b), strict=True):
                    file = io.BytesIO()
                    np.save(file, value)
                    sample[f"{name}.npy"] = file.getvalue()
                sample["json"] = json.dumps({"class": "".join("01"[int(v > 0)] for v in b)}).encode()
                writer.write(sample)
    index_directory(directory)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train (256 samples), val (40) and test (40)."""
    root = tmp_path_factory.mktemp("shards")
    for split, samples, seed in (("train", 256, 0), ("val", 40, 1), ("test", 40, 2)):
        write_shards(root / split, samples, seed)
    return root


def config_text(shards: Path) -> str:
    modalities = "\n".join(
        f"  {name}: {{member: {name}.npy, decoder: npy, transform: tensor, "
        f"encoder: {{name: mlp, input_dim: {DIMENSION}}}}}"
        for name in MODALITIES
    )
    return f"""
run: {{name: tiny}}
data: {{train: {shards}/train, validation: {shards}/val, test: {shards}/test, loader_processes: 0}}
modalities:
{modalities}
model: {{embedding_dim: 16, logit_scale_init: -1}}
optimizer: {{lr: 1e-2, schedule: constant}}
train: {{steps: 12, global_batch_size: 16, zero_stage: 1, log_every: 1}}
validation: {{every: 6}}
checkpoint: {{every: 3}}
ray: {{num_workers: 2, cpus_per_worker: 1, max_failures: 1}}
"""


MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config(shards: Path, tmp_path: Path) -> MakeConfig:
    """make_config("key=value", ..., name="tiny") -> a config whose run stands in this test's folder."""

    def make(*overrides: str, name: str = "tiny") -> Config:
        place = [f"run.name={name}", f"run.directory={tmp_path / name}"]
        return parse_config(config_text(shards), "tiny.yaml", [*place, *overrides]).config.with_absolute_paths()

    return make


@pytest.fixture
def config_file(shards: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(config_text(shards))
    return path


@pytest.fixture(scope="session")
def shared_ray(shards: Path) -> Iterator[None]:
    """One local Ray for the whole session: a start costs more than a run."""
    from symile_dist.cluster import start_ray

    start_ray(parse_config(config_text(shards), "tiny.yaml", ["ray.num_workers=4"]).config)
    yield
    import ray

    ray.shutdown()
