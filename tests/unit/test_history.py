"""history.jsonl and the TensorBoard files: NaN, kills in mid-write, resumption, a full disk."""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from symile_dist.metrics.history import HISTORY_FILE, History, read_history


def make(directory: Path, resume_step: int | None = None) -> History:
    return History(directory, resume_step, tensorboard=False)


def strict(line: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"not JSON: {constant}")

    return json.loads(line, parse_constant=refuse)


def steps(directory: Path, kind: str) -> list[int]:
    return [record["step"] for record in read_history(directory / HISTORY_FILE) if record["kind"] == kind]


def test_record_round_trip(tmp_path: Path) -> None:
    history = make(tmp_path / "new" / "run")
    returned = history.write("train", 3, samples_seen=96, loss=1.5, name="größe", accuracies={"a": [0.5, 1]})
    history.write("event", 3, message="two\nlines")
    history.close()
    history.close()
    path = tmp_path / "new" / "run" / HISTORY_FILE
    first, second = read_history(path)
    assert first == returned
    assert (first["kind"], first["step"], first["samples_seen"], first["loss"]) == ("train", 3, 96, 1.5)
    assert first["name"] == "größe" and first["accuracies"] == {"a": [0.5, 1]} and first["time"] > 1e9
    assert second["message"] == "two\nlines" and "samples_seen" not in second
    assert len(path.read_text().splitlines()) == 2


def test_nonfinite_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    history = make(tmp_path)
    history.write("train", 1, loss=math.nan, grad_norm=math.inf, low=-math.inf, nested={"x": [math.nan]})
    history.close()
    record = strict((tmp_path / HISTORY_FILE).read_text())
    assert (record["loss"], record["grad_norm"], record["low"]) == ("NaN", "Infinity", "-Infinity")
    (back,) = read_history(tmp_path / HISTORY_FILE)
    assert math.isnan(back["loss"]) and back["grad_norm"] == math.inf and back["low"] == -math.inf
    assert math.isnan(back["nested"]["x"][0])


def test_scalars_of_torch_and_numpy(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    history = make(tmp_path)
    history.write(
        "train", numpy.int64(2), loss=torch.tensor(0.5), scale=numpy.float32(0.25), bad=torch.tensor(math.nan)
    )
    history.close()
    (record,) = read_history(tmp_path / HISTORY_FILE)
    assert (record["step"], record["loss"], record["scale"]) == (2, 0.5, 0.25) and math.isnan(record["bad"])


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    history = make(tmp_path)
    history.write("train", 1, loss=1.0)
    assert steps(tmp_path, "train") == [1]
    history.close()


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_torn_last_line(tmp_path: Path, cut: int) -> None:
    history = make(tmp_path)
    history.write("train", 1, loss=1.0)
    history.write("train", 2, loss=1.0)
    history.close()
    path = tmp_path / HISTORY_FILE
    os.truncate(path, path.stat().st_size - cut)
    kept = [1, 2] if cut == 1 else [1]  # Without its newline alone, the record is whole.
    assert steps(tmp_path, "train") == kept
    history = make(tmp_path)
    history.write("train", 9)
    history.close()
    assert steps(tmp_path, "train") == [*kept, 9]
    assert all(strict(line) for line in path.read_text().splitlines())


def test_damage_in_the_middle_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / HISTORY_FILE
    path.write_bytes(b'{"kind": "train", "step": 1}\n\x00\x00\xff{"kind\n[1]\n{"kind": "train", "step": 2}\n')
    assert steps(tmp_path, "train") == [1, 2]
    assert f"{HISTORY_FILE}:2" in caplog.text and f"{HISTORY_FILE}:3" in caplog.text


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_history(tmp_path / HISTORY_FILE)


def test_resume_keeps_each_step_once_and_all_events(tmp_path: Path) -> None:
    history = make(tmp_path)
    for step in range(1, 8):
        history.write("train", step, loss=0.0)
        if step in (4, 6):
            history.write("checkpoint", step)
            history.write("validation", step, loss=0.0)
    history.write("event", 7, message="rank 1 lost")
    history.close()
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write('{"kind": "train", "st')

    history = make(tmp_path, resume_step=4)
    assert steps(tmp_path, "train") == [1, 2, 3, 4]
    for step in range(5, 10):
        history.write("train", step, loss=1.0)
    history.close()
    assert steps(tmp_path, "train") == list(range(1, 10))
    assert steps(tmp_path, "checkpoint") == [4] and steps(tmp_path, "validation") == [4]
    assert steps(tmp_path, "event") == [7]
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE], "a temporary file was left"


def test_without_resume_step_everything_stays(tmp_path: Path) -> None:
    make(tmp_path).write("train", 5)
    make(tmp_path).close()
    assert steps(tmp_path, "train") == [5]
    make(tmp_path, resume_step=0).close()
    assert steps(tmp_path, "train") == []


def test_failed_rewrite_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path).write("train", 5)
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write("{torn")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    history = make(tmp_path, resume_step=2)
    history.write("train", 6)
    history.close()
    assert history.write_errors == 1
    assert steps(tmp_path, "train") == [5, 6]
    assert [path.name for path in tmp_path.iterdir()] == [HISTORY_FILE]


def test_full_disk_costs_records_not_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = make(tmp_path)
    history.write("train", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores SIGXFSZ: writes beyond the limit come back short, then fail, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        for step in (2, 3, 4):
            history.write("train", step, padding="x" * 600_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    history.write("train", 5)
    history.close()
    assert history.write_errors == 2
    assert caplog.text.count("history is incomplete") == 1
    assert steps(tmp_path, "train") == [1, 2, 5]
    assert all(strict(line) for line in (tmp_path / HISTORY_FILE).read_text().splitlines())


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    history = make(tmp_path / "file" / "run")
    history.write("train", 1)
    history.flush()
    history.close()
    assert history.write_errors >= 1


def test_tensorboard_purges_what_is_replayed(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = History(tmp_path)
    for step in range(1, 7):
        history.write("train", step, loss=float(step), note="text is not drawn")
    history.close()
    history = History(tmp_path, resume_step=3)
    for step in (4, 5):
        history.write("train", step, loss=math.nan if step == 5 else 40.0)
    history.flush()
    history.close()
    assert history.write_errors == 0
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5]
    assert scalars[3].value == 40.0 and math.isnan(scalars[4].value)
    assert accumulator.Tags()["scalars"] == ["train/loss"]


def test_broken_tensorboard_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    history = History(tmp_path)
    history.write("train", 1)
    history.write("train", 2)
    history.close()
    assert history.write_errors == 1 and "tensorboard" in caplog.text
    assert steps(tmp_path, "train") == [1, 2]
