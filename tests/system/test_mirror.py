"""Whole runs with a mirror: a lost directory, another config, a mirror that comes late."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from symile_dist.checkpoint.mirror import Mirror
from tests.system.conftest import MakeConfig
from tests.system.runs import history, state_digests, train


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_run_whose_directory_is_lost_goes_on_from_the_mirror(make_config: MakeConfig, tmp_path: Path) -> None:
    mirrored = f"checkpoint.mirror={tmp_path / 'mirror'}"
    config = make_config("checkpoint.every=6", "validation.every=null", mirrored)
    train(config)
    expected = state_digests(config, 12)
    mirror = Mirror(config)
    assert mirror.steps() == [6, 12]
    # The machine went before the last checkpoint was made.
    mirror.give_up_after(6)
    shutil.rmtree(config.run_directory)
    other = make_config("checkpoint.every=6", "validation.every=null", mirrored, "optimizer.lr=0.5")
    with pytest.raises(ValueError, match=r"holds a run of another config .*optimizer\.lr: 0\.01 -> 0\.5"):
        train(other)
    assert not config.run_directory.exists(), "a refused run left something"
    with pytest.raises(ValueError, match="holds the old run's checkpoints; choose another"):
        train(config, fresh=True)
    train(config)
    assert [record["step"] for record in history(config, "event")] == [6]
    assert state_digests(config, 12) == expected
    assert mirror.steps() == [6, 12]

    # One that is given later has the newest checkpoint at once, though nothing is left to train.
    late = make_config("checkpoint.every=6", "validation.every=null", f"checkpoint.mirror={tmp_path / 'late'}")
    assert train(late, resume=True)["status"] == "finished"
    assert Mirror(late).steps() == [12]
    assert json.loads((config.run_directory / "run.json").read_text())["status"] == "finished"
