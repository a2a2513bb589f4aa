"""A run that is forked off another goes on from there, bitwise, and leaves the other alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from symile_dist.checkpoint.manifest import CheckpointError, complete_checkpoints
from symile_dist.cli import main
from symile_dist.run_directory import load_run, read_run
from symile_dist.tools.fork import fork
from tests.system.conftest import MakeConfig
from tests.system.runs import history, losses, state_digests, train


def fingerprints(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_a_fork_goes_on_from_any_saved_step(make_config: MakeConfig, tmp_path: Path) -> None:
    source = make_config("checkpoint.keep_last=9", f"checkpoint.mirror={tmp_path / 'mirror'}", name="source")
    train(source)
    before = fingerprints(source.run_directory)
    assert fork(source.run_directory, tmp_path / "branch", step="6")["step"] == 6
    branch = load_run(tmp_path / "branch")
    assert (branch.run.name, branch.checkpoint.mirror) == ("branch", None)
    train(branch, resume=True)
    assert state_digests(branch, 12) == state_digests(source, 12)
    assert losses(branch) == losses(source)
    assert [record["step"] for record in history(branch, "event")] == [6]
    (origin,) = read_run(tmp_path / "branch")["lineage"]
    assert (origin["forked_from"], origin["step"]) == (str(source.run_directory), 6)
    assert fingerprints(source.run_directory) == before, "the other run was changed"

    # What cannot be forked is told, and leaves nothing.
    with pytest.raises(ValueError, match="is there already and not empty"):
        fork(source.run_directory, tmp_path / "branch")
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are: 3, 6, 9, 12"):
        fork(source.run_directory, tmp_path / "other", step="5")
    newest = complete_checkpoints(source.run_directory / "checkpoints")[-1][1]
    damaged = next(newest.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"is damaged: .*rank-0000.*take another --step"):
        fork(source.run_directory, tmp_path / "other")
    with pytest.raises(ValueError, match="name"):
        fork(source.run_directory, tmp_path / "a b", step="9")
    assert not list(tmp_path.glob("*other*")) and not list(tmp_path.glob("*a b*"))


def test_fork_tells_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fork", str(tmp_path / "none"), str(tmp_path / "new"), "--json"]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
