"""The terminal view, drawn on a recorded console."""

from __future__ import annotations

import io
import math
import os
from typing import Any

import pytest
from rich.console import Console

from symile_dist.view.terminal import TerminalView, format_record

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 120,
    "time": 1.7e9,
    "samples_seen": 30720,
    "loss": 3.2141,
    "logit_scale": 0.82,
    "learning_rate": 3e-4,
    "grad_norm": 1.25,
    "samples_per_second": 2140.2,
    "data_wait_fraction": 0.012,
    "step_seconds": 0.15,
}
VALIDATION: dict[str, Any] = {
    "kind": "validation",
    "step": 100,
    "loss": 2.5,
    "accuracy/image_from_text+audio": 0.412,
    "alignment": 0.5,
}


def recorded(width: int = 120) -> Console:
    return Console(
        record=True,
        width=width,
        force_terminal=True,
        color_system="256",
        file=io.StringIO(),
        _environ={"TERM": "xterm-256color"},
    )


def plain_console() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=40), output


def drawn(view: TerminalView) -> str:
    console = recorded()
    console.print(view.render())
    return console.export_text()


def test_train_line() -> None:
    assert format_record(TRAIN, 600) == (
        "step 120/600  loss 3.214  logit_scale 0.82  2140 samples/s  data wait 1.2%  ETA 0:01:12"
    )


def test_other_lines() -> None:
    assert format_record(VALIDATION, 600) == (
        "validation at step 100  loss 2.500  image_from_text+audio 41.2%  alignment 0.500"
    )
    assert format_record({"kind": "checkpoint", "step": 100, "time": 1.0}, 600) == "checkpoint at step 100"
    event = {"kind": "event", "step": 7, "message": "rank 3 lost", "level": "warning"}
    assert format_record(event, 600) == "warning (step 7): rank 3 lost"


@pytest.mark.parametrize("value", [math.nan, "NaN"])
def test_nan_is_shown(value: Any) -> None:
    assert "loss nan" in format_record({**TRAIN, "loss": value}, 600)
    view = TerminalView("run", 600, recorded())
    view.update({**TRAIN, "loss": value})
    assert "nan" in drawn(view)


@pytest.mark.parametrize("kind", ["train", "validation", "checkpoint", "event", "unheard-of", None])
def test_missing_and_strange_keys_never_raise(kind: str | None) -> None:
    strange: dict[str, Any] = {key: value for key in TRAIN for value in [None]}
    huge = {"step": 1, "step_seconds": 1e300, "loss": 1e300, "samples_per_second": math.inf, "time": "Infinity"}
    for record in ({}, strange, huge, {"step": "x", "message": None, "metrics_urls": None}):
        for total_steps in (0, 600):
            view = TerminalView("run", total_steps, recorded())
            view.update({**record, "kind": kind})
            view.update({**record, "kind": kind})
            drawn(view)
            format_record({**record, "kind": kind}, total_steps)


def test_plain_view_writes_a_line_per_record() -> None:
    console, output = plain_console()
    view = TerminalView("demo", 600, console)
    assert view.plain
    view.start()
    for record in (TRAIN, VALIDATION, {"kind": "checkpoint", "step": 100}):
        view.update(record)
    view.note("[Errno 28] No space\nleft \x1b[2J", level="error")
    view.stop()
    lines = output.getvalue().splitlines()
    assert lines == [
        "run demo: 600 steps",
        format_record(TRAIN, 600),
        format_record(VALIDATION, 600),
        "checkpoint at step 100",
        "error: [Errno 28] No space left [2J",
    ]


def test_panel_shows_it_all() -> None:
    view = TerminalView("demo", 600, recorded())
    assert not view.plain
    view.update(TRAIN)
    view.update(VALIDATION)
    view.update({"kind": "checkpoint", "step": 110})
    urls = [f"http://127.0.0.1:{port}/metrics" for port in range(9000, 9010)]
    view.update({"kind": "event", "step": 0, "message": "[4] ranks are up", "metrics_urls": urls, "restarts": 2})
    view.update({"kind": "event", "message": "skipped", "level": "warning", "skipped_steps": 3})
    text = drawn(view)
    for shown in (
        "demo",
        "step 120/600",
        "ETA 0:01:12",
        "3.214",
        "0.82",
        "2140",
        "1.2%",
        "1.250",
        "0.0003",
        "step 110",
    ):
        assert shown in text, shown
    for shown in ("validation at step 100", "2.500", "image_from_text+audio 41.2%", urls[0], "and 2 more", "[4] ranks"):
        assert shown in text, shown
    words = " ".join(text.split())
    assert "skipped steps 3" in words and "restarts 2" in words
    assert urls[-1] not in text


def test_panel_without_records_and_only_recent_events() -> None:
    view = TerminalView("demo", 600, recorded())
    assert "step -/600" in drawn(view)
    for number in range(20):
        view.note(f"event {number}.")
    text = drawn(view)
    assert "event 19." in text and "event 14." not in text


def test_live_draws_and_gives_the_terminal_back() -> None:
    console = recorded()
    view = TerminalView("demo", 600, console)
    view.start()
    view.update(TRAIN)
    view.stop()
    view.stop()
    assert isinstance(console.file, io.StringIO)
    assert "3.214" in console.file.getvalue()
    assert console.file.getvalue().endswith("\x1b[?25h"), "the cursor stayed hidden"


def test_eta_ignores_outliers_and_the_time_before_a_restart() -> None:
    view = TerminalView("demo", 600, recorded())
    for step in range(1, 31):
        view.update({**TRAIN, "step": step, "step_seconds": 60.0 if step % 10 == 0 else 0.1})
    assert view.step_seconds == pytest.approx(0.1)
    assert "ETA 0:00:57" in drawn(view)


def test_eta_from_times_where_no_step_seconds_are_given() -> None:
    view = TerminalView("demo", 100, recorded())
    for step, time in ((10, 1000.0), (20, 1005.0), (15, 1100.0), (25, 1105.0)):
        view.update({"kind": "train", "step": step, "time": time})
    assert view.step_seconds == pytest.approx(0.5)


def test_lost_terminal_does_not_stop_the_run() -> None:
    closed = io.StringIO()
    console = Console(file=closed, width=80)
    closed.close()
    TerminalView("demo", 600, console, plain=True).note("nobody hears")

    reading, writing = os.pipe()
    os.close(reading)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "on_broken_pipe", lambda self: (_ for _ in ()).throw(SystemExit(1)))
        pipe = os.fdopen(writing, "w", buffering=1)
        TerminalView("demo", 600, Console(file=pipe, width=80), plain=True).note("nobody hears")
        with pytest.raises(BrokenPipeError):
            pipe.close()
