"""What a cluster holds decides how many ranks an elastic run begins with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from symile_dist.cluster import Node, fitted
from symile_dist.config import Config
from symile_dist.run_directory import tell_run

MakeConfig = Callable[..., Config]


def config_of(make_config: MakeConfig, *overrides: str) -> Config:
    return make_config(Path("shards"), "train.global_batch_size=24", *overrides)


@pytest.mark.parametrize(
    ("resources", "overrides", "world"),
    [
        ({"CPU": 8}, (), 8),
        ({"CPU": 64}, (), 8),
        ({"CPU": 7}, (), 6),  # 7 does not divide 24
        ({"CPU": 5.5}, (), 4),
        ({"CPU": 7}, ("ray.cpus_per_worker=2",), 3),
        ({"CPU": 0.3 * 8}, ("ray.cpus_per_worker=0.3",), 8),
        ({"CPU": 64, "GPU": 3}, ("ray.gpus_per_worker=1",), 3),
        ({"CPU": 2}, (), 2),
    ],
)
def test_as_many_ranks_as_fit_and_divide_the_batch(
    make_config: MakeConfig, resources: dict[str, float], overrides: tuple[str, ...], world: int
) -> None:
    config = config_of(make_config, "ray.num_workers=8", "ray.min_workers=2", *overrides)
    assert fitted(config, [Node("a", resources)]).world_size == world
    assert fitted(config, [Node("a", resources)]).model_dump(exclude={"ray"}) == config.model_dump(exclude={"ray"})


@pytest.mark.parametrize(
    ("resources", "overrides", "words"),
    [
        ({"CPU": 7}, (), r"needs 8 CPUs .* has 7; ray.min_workers lets it go on with fewer"),
        ({"CPU": 5}, ("ray.min_workers=5",), r"it holds 4 ranks that divide the global batch, ray.min_workers is 5"),
        ({"CPU": 64}, ("ray.gpus_per_worker=1", "ray.min_workers=1"), r"8 CPUs and 8 GPUs .* has 64 and 0; it holds 0"),
    ],
)
def test_too_few_are_refused(
    make_config: MakeConfig, resources: dict[str, float], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        fitted(config_of(make_config, "ray.num_workers=8", *overrides), [Node("a", resources)])


def test_more_than_all_is_a_mistake(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match=r"ray.min_workers: 9 is more than ray.num_workers = 8"):
        config_of(make_config, "ray.num_workers=8", "ray.min_workers=9")


def test_a_run_does_not_end_because_its_status_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("symile_dist.run_directory.write_json", full)
    tell_run(tmp_path, status="restarting")
    assert "is out of date: " in caplog.text and "No space left" in caplog.text
