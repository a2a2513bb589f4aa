"""The terminal view of a run's directory, live and ended, and the commands `watch` and `view`."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from symile_dist.cli import main
from symile_dist.metrics.history import HISTORY_FILE, History
from symile_dist.tools.view_command import view
from symile_dist.view.terminal import TREND_POINTS, TerminalView, _Trend
from symile_dist.view.watch import summary, watch
from tests import made_run
from tests.unit.test_terminal_view import recorded


def lines_of(directory: Path, steps: list[Any]) -> list[str]:
    """What `watch` prints where there is no terminal; each of `steps` is called between two looks."""
    output = io.StringIO()
    waits = iter(steps)

    def wait(seconds: float) -> None:
        step = next(waits, None)
        assert step is not None, f"watch goes on after the run has ended:\n{output.getvalue()}"
        step()

    watch(directory, Console(file=output, width=120), wait=wait)
    return output.getvalue().splitlines()


def set_status(directory: Path, status: str) -> None:
    told = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps({**told, "status": status}))


def test_the_panel_of_a_run(tmp_path: Path) -> None:
    made_run.write_run(tmp_path, world_size=1024, slow=5)
    console = recorded()
    watch(tmp_path, console, once=True)
    text = " ".join(console.export_text().split())
    for shown in (
        "made running",
        "step 4000/5000",
        "ETA 0:07",
        "goodput 89.5%",
        "ranks 1,024 of 1,024",
        "slowest: rank 5 in forward",
        "last checkpoint step 4000",
        "restarts 1",
        "skipped steps 3",
        "backward 50%",
        "throughput",
        "restart (step 2600): rank_lost: rank 3 was killed (signal 9) on node-1",
        "back to step 1000",
    ):
        assert shown in text, f"{shown!r} is not in\n{text}"
    assert any(block in text for block in "▂▃▄▅▆▇"), "there are no curves"


def test_once_without_a_terminal_is_text_without_a_frame(tmp_path: Path) -> None:
    made_run.write_run(tmp_path)
    output = io.StringIO()
    watch(tmp_path, Console(file=output, width=100), once=True)
    text = output.getvalue()
    assert text.startswith("made  running") and "goodput 89.5%" in text
    assert not set("╭│\x1b") & set(text)
    assert "█" not in next(line for line in text.splitlines() if line.startswith("step   ")), "a bar of one colour"


def test_a_live_run_line_by_line_until_it_ends(tmp_path: Path) -> None:
    made_run.write_run(tmp_path, last=600)
    with (tmp_path / HISTORY_FILE).open("a") as file:

        def append(*records: dict[str, Any]) -> None:
            file.writelines(map(made_run.line, records))
            file.flush()

        def train(step: int) -> dict[str, Any]:
            return {"kind": "train", "step": step, "time": made_run.BEGIN + step, "loss": 0.25}

        def end() -> None:
            append(train(630), {"kind": "end", "step": 630, "time": made_run.BEGIN + 640, "status": "finished"})
            set_status(tmp_path, "finished")

        lines = lines_of(tmp_path, [lambda: append(train(610)), lambda: append(train(620)), end, lambda: None])
    steps = [line.split("/")[0] for line in lines if line.startswith("step ")]
    assert steps[-4:] == ["step 600", "step 610", "step 620", "step 630"]
    assert lines[-1] == "end (step 630): finished"
    assert len(lines) < 20, "of what was there before only the last records are told"


def test_a_resume_tells_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"name": "r", "status": "running"}))
    writer = History(tmp_path, tensorboard=False)
    for step in range(1, 31):
        writer.write("train", step, loss=1.0)

    def resume() -> None:
        writer.close()
        again = History(tmp_path, resume_step=20, tensorboard=False)
        again.write("event", 20, message="resumed from step 20")
        again.write("train", 21, loss=0.5)
        again.close()
        set_status(tmp_path, "failed")

    lines = lines_of(tmp_path, [resume, lambda: None])
    assert [line for line in lines if "resumed" in line] == ["info (step 20): resumed from step 20"]
    assert [line.split("/")[0] for line in lines if line.startswith("step ")][-2:] == ["step 30", "step 21"]
    assert sum(line.startswith("step 10/") for line in lines) == 0


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(made_run.CONFIG)
    (tmp_path / "run.json").write_text(json.dumps({"name": "made", "status": "starting"}))
    console = recorded()
    watch(tmp_path, console, once=True)
    assert "step -/5000" in console.export_text()
    lines = lines_of(tmp_path, [lambda: None, lambda: set_status(tmp_path, "refused"), lambda: None])
    assert lines == ["run made: 5000 steps"]


def test_a_run_that_is_silent_is_told(tmp_path: Path) -> None:
    made_run.write_run(tmp_path, last=100)
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 1800,) * 2)
    console = recorded()
    watch(tmp_path, console, once=True)
    assert "not heard of for 30 min" in console.export_text()


def test_the_panel_is_drawn_live_and_left(tmp_path: Path) -> None:
    made_run.write_run(tmp_path, status="finished", last=100)
    console = recorded()
    watch(tmp_path, console, wait=lambda seconds: pytest.fail("the run has ended"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[?25h"), "the cursor stayed hidden"


def test_a_trend_keeps_the_whole_run_in_few_values() -> None:
    trend = _Trend()
    for value in range(100_000):
        trend.add(float(value))
    trend.add(float("nan"))
    assert TREND_POINTS / 2 <= len(trend.values) <= TREND_POINTS and trend.values == sorted(trend.values)
    assert trend.values[0] < 1000 and trend.values[-1] > 98_000
    drawn = trend.drawn("01234567")
    assert drawn == "".join(sorted(drawn)) and set(drawn) == set("01234567") and len(drawn) == 40


def test_strange_records_do_not_break_the_panel() -> None:
    view = TerminalView("run", 10, recorded())
    for record in (
        {"kind": "train", "step": 1, "phases": "x", "slowest": 3},
        {"kind": "train", "step": 2, "phases": {"forward": "NaN", "loss": -1}, "slowest": {}},
        {
            "kind": "train",
            "step": 3,
            "phases": {"forward": 1e300, "\x1b[2J": 2},
            "slowest": {"ratio": "NaN", "rank": []},
        },
        {"kind": "goodput", "seconds": {"a": "b", "lost": "Infinity"}},
        {"kind": "goodput", "seconds": 3},
        {"kind": "restart"},
        {"kind": "end", "status": None, "message": []},
        {"kind": "validation", "step": 1, "accuracy/a": "Infinity", "accuracy/b": "x"},
    ):
        for _ in range(2):
            view.update(record)
        view.show()


# -- Commands ----------------------------------------------------------------------------------------------------------


def test_watch_json_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run.write_run(tmp_path / "made")
    with (tmp_path / "made" / HISTORY_FILE).open("a") as file:
        file.write(made_run.line({"kind": "train", "step": 4010, "loss": float("nan")}))
    assert main(["watch", str(tmp_path / "made"), "--json"]) == 0
    text = capsys.readouterr().out
    told = json.loads(text)
    assert told["progress"]["step"] == 4010 and told["latest"]["records"]["train"]["loss"] == "NaN"
    assert told["ranks"]["there"] == 8 and told["goodput"]["goodput"] > 0.8
    assert "verysecret" not in text
    assert summary(tmp_path / "made")["run"]["name"] == "made"


@pytest.mark.parametrize("command", ["watch", "view"])
def test_a_run_that_does_not_exist(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    assert main([command, "nowhere"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("error: nowhere: ") and told.err.count("\n") == 1


def test_a_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    made_run.write_run(tmp_path / "runs" / "made", last=50)
    assert main(["watch", "made", "--once"]) == 0
    assert "step 50/5000" in capsys.readouterr().out


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"address": "127.0.0.1", "port": 0, **values})


def test_view_serves_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run.write_run(tmp_path, last=50)
    seen = []

    def until() -> None:
        url = capsys.readouterr().out.split()[1]
        with urllib.request.urlopen(f"{url}api/run", timeout=10) as reply:
            seen.append(json.load(reply)["sections"]["progress"]["data"]["step"])

    assert view(tmp_path, options(), until) == 0
    assert seen == [50]


def test_view_asks_for_a_token_beyond_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run.write_run(tmp_path, last=50)
    answers = []

    def until() -> None:
        url = capsys.readouterr().out.split()[1]
        port = int(url.split(":")[2].split("/")[0])
        token = url.partition("?token=")[2]
        assert len(token) > 20
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Bearer {token}"}):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/api/run", headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=10) as reply:
                    answers.append(reply.status)
            except urllib.error.HTTPError as error:
                answers.append(error.code)

    view(tmp_path, options(address="0.0.0.0"), until)
    assert answers == [401, 401, 200]


def test_view_says_what_it_cannot_have(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: is taken"):
            view(tmp_path, options(port=port), lambda: None)
    with pytest.raises(ValueError, match="--port 70000"):
        view(tmp_path, options(port=70000), lambda: None)
    with pytest.raises(ValueError, match=r"--address 203\.0\.113\.7: nothing can be served"):
        view(tmp_path, options(address="203.0.113.7"), lambda: None)


def test_view_ends_at_ctrl_c(tmp_path: Path) -> None:
    made_run.write_run(tmp_path, last=50)
    command = [sys.executable, "-m", "symile_dist", "view", str(tmp_path), "--port", "0"]
    # A shell's background jobs are deaf to Ctrl-C, and so would be what they start.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        with urllib.request.urlopen(line.split()[1], timeout=10) as reply:
            assert b"<title>" in reply.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.communicate()


def test_it_needs_no_torch() -> None:
    code = (
        "import sys, symile_dist.view.page, symile_dist.view.watch, symile_dist.tools.view_command\n"
        "sys.exit(' '.join(sorted({'torch', 'ray', 'deepspeed'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"it imports {done.stderr}"
