"""The run directory: who may write into it, what it keeps, and what it says when it may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from symile_dist.config import Config, ConfigError
from symile_dist.run_directory import (
    CONFIG_FILE,
    RUN_FILE,
    differences,
    load_run,
    prepare,
    read_run,
    update_run,
)

MakeConfig = Callable[..., Config]


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """A config of a run in tmp_path/runs/one, with overrides."""

    def make(*overrides: str) -> Config:
        return make_config(Path("data/train"), f"run.directory={tmp_path}/runs/one", *overrides)

    return make


def attempt(config: Config, fresh: bool = False, resume: bool = False) -> bool:
    return prepare(config, fresh=fresh, resume=resume)


def test_a_new_directory_holds_config_and_status(run: MakeConfig) -> None:
    config = run()
    assert attempt(config) is False
    assert load_run(config.run_directory) == config
    status = read_run(config.run_directory)
    assert (status["status"], status["name"], status["config_digest"]) == ("starting", "test", config.digest())
    assert status["lineage"] == []


def test_the_same_config_goes_on(run: MakeConfig) -> None:
    attempt(run())
    created = read_run(run().run_directory)["created"]
    assert attempt(run()) is True
    assert read_run(run().run_directory)["created"] == created


def test_another_config_is_refused_with_the_differences_and_three_ways_on(run: MakeConfig) -> None:
    attempt(run())
    before = (run().run_directory / CONFIG_FILE).read_text()
    with pytest.raises(ValueError) as caught:
        attempt(run("optimizer.lr=0.5", "seed=3"))
    for words in [
        "holds a run of another config",
        "seed: 0 -> 3",
        "optimizer.lr: 0.001 -> 0.5",
        f"symile-dist resume {run().run_directory}",
        "another run.name",
        "--fresh",
    ]:
        assert words in str(caught.value)
    assert (run().run_directory / CONFIG_FILE).read_text() == before, "a refusal must change nothing"


def test_resume_takes_the_new_config_and_keeps_the_lineage_once_there_are_checkpoints(run: MakeConfig) -> None:
    attempt(run())
    assert attempt(run("seed=1"), resume=True) is True
    assert read_run(run().run_directory)["lineage"] == [], "nothing had been learned with the old config"
    (run().run_directory / "checkpoints" / "step-00000010").mkdir(parents=True)
    attempt(run("seed=2"), resume=True)
    attempt(run("seed=2"), resume=True)
    attempt(run("seed=2", "train.steps=9"), resume=True)
    lineage = read_run(run().run_directory)["lineage"]
    assert [entry["changed"] for entry in lineage] == [["seed: 1 -> 2"], ["train.steps: 4 -> 9"]]
    assert load_run(run().run_directory).train.steps == 9


def test_fresh_moves_the_old_run_aside_and_loses_nothing(run: MakeConfig) -> None:
    directory = run().run_directory
    for seed in (1, 2, 3):  # twice within a second, too
        assert attempt(run(f"seed={seed}"), fresh=True) is False
    aside = sorted(path for path in directory.parent.iterdir() if path != directory)
    assert sorted(load_run(path).seed for path in aside) == [1, 2]
    assert load_run(directory).seed == 3
    assert all(path.name.startswith("one.before-") for path in aside)


def test_a_directory_that_is_no_run_is_left_alone(run: MakeConfig) -> None:
    directory = run().run_directory
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty and not a run directory; choose another run\.directory"):
        attempt(run())
    assert [path.name for path in directory.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_will_do(run: MakeConfig) -> None:
    run().run_directory.mkdir(parents=True)
    assert attempt(run()) is False


def test_places_that_cannot_be_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        attempt(make_config(Path("t"), f"run.directory={tmp_path}/file"))
    for place in (f"{tmp_path}/file/run", "/proc/no-such-place/run"):
        with pytest.raises(ValueError, match=f"{place}: cannot be written: "):
            attempt(make_config(Path("t"), f"run.directory={place}"))


def test_load_run(run: MakeConfig, tmp_path: Path) -> None:
    attempt(run())
    moved = tmp_path / "moved"
    run().run_directory.rename(moved)
    assert load_run(moved).run_directory == moved, "a moved run is where it is"
    assert load_run(moved, ["train.steps=7"]).train.steps == 7
    with pytest.raises(ConfigError, match="unknown key; did you mean 'steps'"):
        load_run(moved, ["train.stps=7"])
    with pytest.raises(ConfigError, match=r"not a run directory \(it has no config\.yaml\)"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="not a run directory"):
        load_run(tmp_path / "nowhere")


def test_update_run_keeps_what_it_does_not_name(tmp_path: Path) -> None:
    update_run(tmp_path, status="running", attempts=1)
    update_run(tmp_path, status="failed")
    content = read_run(tmp_path)
    assert (content["status"], content["attempts"]) == ("failed", 1)
    for damaged in ('{"status": "fail', "null", "[1]", '"x"'):  # nothing depends on it but what people read
        (tmp_path / RUN_FILE).write_text(damaged)
        assert read_run(tmp_path) == {}, damaged


def test_differences_name_keys_that_came_went_or_changed(run: MakeConfig) -> None:
    assert differences(run(), run("run.name=other")) == []
    assert differences(run("objective.x=1"), run("objective.y=2")) == [
        "objective.x: 1 -> None",
        "objective.y: None -> 2",
    ]
    old = run()
    new = old.model_copy(update={"modalities": dict(reversed(old.modalities.items()))})
    assert differences(old, new) == ["order of modalities: a, b, c -> c, b, a"]
