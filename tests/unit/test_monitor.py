"""What the driver shows of its run, from beginning to end, without Ray."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from symile_dist import monitor as monitor_module
from symile_dist.config import Config, parse_config
from symile_dist.health.restarts import Failure
from symile_dist.metrics.discovery import read_targets
from symile_dist.metrics.exporter import check_address, token_of
from symile_dist.metrics.history import read_history
from symile_dist.metrics.ranks import gathered
from symile_dist.monitor import Monitor, settle

CONFIG = """
run: {name: watched}
data: {train: none}
modalities:
  a: {member: a.npy, decoder: npy, transform: tensor, encoder: identity}
  b: {member: b.npy, decoder: npy, transform: tensor, encoder: identity}
train: {steps: 100, global_batch_size: 16}
ray: {num_workers: 2}
"""
RANKS = [
    {"rank": number, "pid": 7, "host": f"h{number}", "metrics_url": f"http://127.0.0.1:940{number}/metrics"}
    for number in range(2)
]


def config(directory: Path, *overrides: str) -> Config:
    return parse_config(CONFIG, "watched.yaml", [f"run.directory={directory}", *overrides]).config


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    made: list[Monitor] = []

    def begin(*overrides: str) -> Monitor:
        made.append(Monitor(config(tmp_path, *overrides)))
        return made[-1]

    yield begin
    for each in made:
        if each.url:
            each.end("finished", "")


def targets(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "targets.json").read_text())
    return found


def scraped(monitor: Monitor) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(f"{monitor.url}metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_its_metrics_and_where_they_are(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start()
    assert [entry["labels"]["role"] for entry in targets(tmp_path)] == ["driver"]
    monitor.joined({rank["rank"]: rank for rank in RANKS})  # type: ignore[misc]
    found = targets(tmp_path)
    assert [entry["targets"] for entry in found[1:]] == [["127.0.0.1:9400"], ["127.0.0.1:9401"]]
    assert [(entry["labels"]["rank"], entry["labels"]["host"]) for entry in found[1:]] == [("0", "h0"), ("1", "h1")]
    assert len({entry["labels"]["run_id"] for entry in found}) == 1
    with urllib.request.urlopen(f"{monitor.url}targets", timeout=10) as reply:
        assert json.load(reply) == found and reply.headers["Content-Type"] == "application/json"
    values = scraped(monitor)
    assert values[("symile_run_expected_ranks", "")] == 2 and values[("symile_run_target_steps", "")] == 100
    assert values[("symile_global_batch_size_samples", "")] == 16
    assert values[("symile_run_restarts_total", "hang")] == 0
    assert values[("symile_run_time_seconds_total", "init")] > 0
    assert json.loads((tmp_path / "run.json").read_text())["page"] == monitor.url
    with urllib.request.urlopen(monitor.url or "", timeout=10) as page:
        assert b"<html" in page.read()


def test_the_ranks_tell_how_they_do(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start()
    monitor.joined({rank["rank"]: rank for rank in RANKS})  # type: ignore[misc]
    row = gathered({"phases.forward": 0.5, "step_seconds": 1.5}, ["a", "b"], torch_cpu())[0]
    monitor.take({"kind": "ranks", "step": 12, "table": [row, row]})
    monitor.end("finished", "")
    ranks = json.loads((tmp_path / "ranks.json").read_text())
    assert [(each["rank"], each["pid"], each["step"], each["phases"]["forward"]) for each in ranks] == [
        (0, 7, 12, 0.5),
        (1, 7, 12, 0.5),
    ]


def torch_cpu() -> Any:
    import torch

    return torch.device("cpu")


@pytest.mark.parametrize(
    ("status", "left"),
    [("finished", []), ("preempted", []), ("interrupted", []), ("failed", ["driver"]), ("stopped", ["driver"])],
)
def test_what_a_run_leaves_behind(start: Callable[..., Monitor], tmp_path: Path, status: str, left: list[str]) -> None:
    monitor = start()
    monitor.joined({rank["rank"]: rank for rank in RANKS})  # type: ignore[misc]
    monitor.end(status, "why")
    assert [entry["labels"]["role"] for entry in targets(tmp_path)] == left, "RanksMissing tells of a run that failed"
    assert json.loads((tmp_path / "goodput.json").read_text())["ended"]
    assert json.loads((tmp_path / "run.json").read_text())["page"] is None
    assert monitor.url is None
    last = read_history(tmp_path / "history.jsonl")
    assert [record["kind"] for record in last] == ["end", "goodput"] and last[0]["status"] == status


def test_a_failure_is_counted_and_told(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start()
    monitor.take({"kind": "start", "step": 1})
    monitor.take({"kind": "checkpoint", "step": 10, "stall_seconds": 0.0, "seconds": 0.0})
    monitor.failed(Failure("hang", "rank 1 hung", step=14, rank=1))
    monitor.restarting()
    assert scraped(monitor)[("symile_run_restarts_total", "hang")] == 1
    restarts = [record for record in read_history(tmp_path / "history.jsonl") if record["kind"] == "restart"]
    assert [(record["cause"], record["step"]) for record in restarts] == [("hang", 14), ("rescaled", 10)]
    monitor.end("finished", "")
    again = start()
    assert scraped(again)[("symile_run_restarts_total", "hang")] == 1, "the next driver counts on"


def test_a_rank_that_is_gone_stays_until_the_next_group(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start()
    monitor.joined({rank["rank"]: rank for rank in RANKS})  # type: ignore[misc]
    monitor.failed(Failure("rank_lost", "rank 1 was lost"))
    monitor.look()
    assert len(targets(tmp_path)) == 3, "up == 0 is what Prometheus should see"
    monitor.joined({0: {**RANKS[0], "metrics_url": "http://127.0.0.1:9500/metrics"}})
    assert [entry["targets"] for entry in targets(tmp_path)[1:]] == [["127.0.0.1:9500"]]


def test_a_disk_that_takes_nothing_does_not_end_the_run(
    start: Callable[..., Monitor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_ranks", "write_goodput", "write_targets"):
        monkeypatch.setattr(monitor_module, name, full)
    monitor.joined({0: RANKS[0]})
    monitor.look()
    monitor.end("finished", "")
    assert "out of date" in caplog.text


def test_without_metrics_nothing_is_served(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start("metrics.enabled=false")
    monitor.joined({rank["rank"]: {**rank, "metrics_url": None} for rank in RANKS})  # type: ignore[misc]
    assert monitor.url is None and targets(tmp_path) == []
    monitor.end("finished", "")


@pytest.mark.parametrize("content", ["", "two words", "semi;colon", "line\nbreak"])
def test_a_token_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(ValueError, match=r"metrics.token_file: .*one word"):
        token_of(config(tmp_path, f"metrics.token_file={tmp_path / 'token'}"))


def test_a_token_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.token_file"):
        token_of(config(tmp_path, f"metrics.token_file={tmp_path / 'none'}"))
    assert token_of(config(tmp_path)) is None


@pytest.mark.parametrize(
    "content",
    [
        '{"seconds": {"init": null}}',
        '{"seconds": {"init": "long", "lost": -3, "productive": 1e999}}',
        '{"seconds": {"init": 1}, "restarts": []}',
        '{"seconds": {"init": 1}, "restarts": {"cosmic_ray": 3, "hang": "x", "other": -1}, "updated": "x"}',
        '{"seconds": {"init": 1' + "0" * 400 + "}}",
    ],
)
def test_an_account_that_is_damaged_does_not_keep_a_run_from_starting(
    start: Callable[..., Monitor], tmp_path: Path, content: str
) -> None:
    (tmp_path / "goodput.json").write_text(content)
    assert start().told()["restarts"] == 0


def test_what_a_killed_driver_left_of_a_run_that_was_done(tmp_path: Path) -> None:
    (tmp_path / "goodput.json").write_text('{"seconds": {"productive": 5, "pending": 3}, "ended": false, "updated": 1}')
    (tmp_path / "targets.json").write_text(json.dumps([{"targets": ["127.0.0.1:1"], "labels": {"run": "x"}}]))
    settle(tmp_path)
    assert targets(tmp_path) == []
    account = json.loads((tmp_path / "goodput.json").read_text())
    assert account["ended"] and account["seconds"]["productive"] == 8 and account["seconds"]["pending"] == 0


def test_endpoints_that_are_none_of_ours(tmp_path: Path) -> None:
    ours = {"targets": ["127.0.0.1:9400"], "labels": {"run": "x", "rank": "0"}}
    others: list[Any] = [
        {
            "targets": ["127.0.0.1:9400", 7, "evil/path", "host:notaport"],
            "labels": {**ours["labels"], "__scheme__": "x"},
        },  # type: ignore[dict-item]
        {"targets": [7], "labels": {}},
        {"targets": "127.0.0.1:1", "labels": {}},
        {"targets": ["[::1]:9400"], "labels": {"rank": 3, "run": None, "__metrics_path__": "/steal", "k k": "v"}},
        5,
    ]
    (tmp_path / "targets.json").write_text(json.dumps([ours, *others]))
    assert read_targets(tmp_path) == [ours, ours, {"targets": ["[::1]:9400"], "labels": {"rank": "3"}}]


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.address: '999.1.1.1' is no address"):
        check_address(config(tmp_path, "metrics.address=999.1.1.1"))
    check_address(config(tmp_path, "metrics.address=::1"))
