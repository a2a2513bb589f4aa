"""`symile-dist monitoring up` with a real Prometheus: runs made of this test's own endpoints, and 1,024 ranks."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from symile_dist.metrics.discovery import as_json, run_id, targets, write_targets
from symile_dist.metrics.exporter import Exporter
from symile_dist.metrics.names import METRICS
from symile_dist.tools.monitoring.alerts import alerts, rules_text
from symile_dist.tools.monitoring.grafana import dashboards, expressions
from symile_dist.tools.monitoring.prometheus import Client, free_port, prometheus_over

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="apt-get install prometheus")
needs_alertmanager = pytest.mark.skipif(
    not (shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")),
    reason="apt-get install prometheus-alertmanager",
)

RANKS = 1024


def until(what: str, check: Callable[[], Any], seconds: float = 30) -> float:
    """Seconds until something was so."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        with contextlib.suppress(OSError):
            if check():
                return time.monotonic() - begin
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what}")


class FakeRun:
    """A run's directory, with the endpoints of a driver and two ranks in this process."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        (directory / "run.json").write_text(json.dumps({"name": directory.name, "status": "running"}))
        self.directory = directory
        self.driver = Exporter(owner="driver")
        self.driver.set("symile_run_expected_ranks", 2)
        self.ranks: list[Exporter] = []
        self.start_ranks()

    def start_ranks(self) -> None:
        """Others than before, at other ports."""
        before = self.ranks
        self.ranks = [Exporter(), Exporter()]
        for exporter in before:
            exporter.close()
        for number, exporter in enumerate(self.ranks):
            exporter.set("symile_train_loss", 2.0 + number)
        self.tell()

    def tell(self) -> None:
        ranks = [
            {"rank": rank, "host": "here", "metrics_url": exporter.url} for rank, exporter in enumerate(self.ranks)
        ]
        write_targets(self.directory, targets(self.directory.name, self.directory, self.driver.url, ranks))

    def end(self) -> None:
        write_targets(self.directory, [])

    def close(self) -> None:
        for exporter in (self.driver, *self.ranks):
            exporter.close()


class Up:
    """`symile-dist monitoring up` in a process of its own; `server` asks its Prometheus."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "symile_dist", "monitoring", "up", "--json", f"--port={self.port}", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            # In the background of a shell SIGINT is ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"it has ended: exit code {self.process.wait()}"
        self.told = json.loads(line)
        self.server = Client(self.told["prometheus"])

    def up(self) -> dict[str, float]:
        """Endpoint -> whether it answers."""
        return {labels["instance"]: value for labels, value in self.server.query("up")}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FakeRun]:
    made = FakeRun(tmp_path / "runs" / "demo")
    yield made
    made.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def begin(*arguments: str) -> Up:
        started.append(Up(tmp_path, *arguments))
        return started[-1]

    yield begin
    for each in started:
        each.close()
        until("the Prometheus of a killed command ends", lambda each=each: not alive(each.told["pid"]), 15)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def places(exporters: list[Exporter]) -> set[str]:
    return {f"127.0.0.1:{exporter.port}" for exporter in exporters}


def test_runs_are_found_and_followed(run: FakeRun, start: Callable[..., Up], tmp_path: Path) -> None:
    up = start()
    everything = {*places([run.driver]), *places(run.ranks)}
    until("all three answer", lambda: up.up() == dict.fromkeys(everything, 1.0), 15)
    found = {labels["rank"]: labels for labels, _ in up.server.query('up{role="rank"}')}
    assert {(labels["run"], labels["run_id"], labels["host"], labels["job"]) for labels in found.values()} == {
        ("demo", run_id(run.directory), "here", "symile-dist")
    }
    assert {labels["rank"]: value for labels, value in up.server.query("symile_train_loss")} == {"0": 2.0, "1": 3.0}

    run.start_ranks()
    other = FakeRun(tmp_path / "runs" / "second")
    try:
        there = {*places([run.driver, *run.ranks]), *places([other.driver, *other.ranks])}
        seconds = until("new ports and a new run are found, old ports forgotten", lambda: up.up().keys() == there)
        assert seconds < 10, seconds
        until("they answer", lambda: set(up.up().values()) == {1.0}, 10)
    finally:
        other.end()
        other.close()
    run.end()
    until("runs that have ended are forgotten", lambda: not up.up())
    assert not up.server.alerts("firing")
    rules = up.server.get("rules")["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} >= {alert.name for alert in alerts()}
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_and_data_is_kept(run: FakeRun, start: Callable[..., Up], number: signal.Signals) -> None:
    first = start("--out=kept")
    until("a value is there", lambda: first.server.query("symile_train_loss"), 15)
    before = time.time()
    children = psutil.Process(first.process.pid).children(recursive=True)
    assert first.told["pid"] in {child.pid for child in children}
    first.process.send_signal(number)
    assert first.process.wait(15) == 0
    assert not [child for child in children if alive(child.pid)]
    run.end()
    second = start("--out=kept")
    assert second.server.query("symile_train_loss", before), "what was scraped before is lost"


def test_what_is_in_the_way_is_told(run: FakeRun, start: Callable[..., Up], tmp_path: Path) -> None:
    first = start("--out=taken")

    def refused(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "symile_dist", "monitoring", "up", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert f"127.0.0.1:{first.port}" in refused(f"--port={first.port}", "--out=new")
    assert "is at work there" in refused(f"--port={free_port()}", "--out=taken")
    assert "no run of that name" in refused(f"--port={free_port()}", "--out=new", "no-such-run")
    assert "--token-file" in refused(f"--port={free_port()}", "--out=new", "--token-file=nowhere")
    assert not (tmp_path / "new").exists()


def test_a_named_run_alone_behind_a_token(run: FakeRun, start: Callable[..., Up], tmp_path: Path) -> None:
    other = FakeRun(tmp_path / "runs" / "second")
    (tmp_path / "token").write_text("secret-word")
    guarded = Exporter(token="secret-word")
    run.ranks.append(guarded)
    run.tell()
    try:
        up = start("--token-file=token", "demo")
        expected = {*places([run.driver]), *places(run.ranks)}
        until("all answer", lambda: up.up() == dict.fromkeys(expected, 1.0), 15)
    finally:
        other.close()


@needs_alertmanager
def test_an_alert_reaches_alertmanager(run: FakeRun, start: Callable[..., Up]) -> None:
    up = start("--alertmanager", "--time-scale=0.02", "--scrape-seconds=0.5")

    def told() -> list[str]:
        with urllib.request.urlopen(f"{up.told['alertmanager']}/api/v2/alerts", timeout=5) as reply:
            return [alert["labels"]["alertname"] for alert in json.load(reply)]

    until("all answer", lambda: len(up.up()) == 3, 15)
    assert "LossNotFinite" not in told()
    run.ranks[1].set("symile_train_loss", float("nan"))
    until("Alertmanager has it", lambda: "LossNotFinite" in told(), 30)
    (alert,) = [labels for labels in up.server.alerts() if labels["alertname"] == "LossNotFinite"]
    assert (alert["run"], alert["run_id"], alert["severity"]) == ("demo", run_id(run.directory), "critical")
    up.process.terminate()
    assert up.process.wait(15) == 0
    assert not alive(up.told["alertmanager_pid"]) and not alive(up.told["pid"])


def every_series(rank: int) -> bytes:
    """What a rank serves whose labels have all been used; without its own process's figures."""
    exporter = Exporter(None, label_values={"modality": ["image", "text", "audio"], "dataset": ["one", "two"]})
    for spec in METRICS.values():
        if spec.owner == "rank" and spec.kind == "gauge" and not spec.labels:
            exporter.set(spec.name, 1.0)
    for modality in ("image", "text", "audio"):
        exporter.set("symile_contrastive_uniformity", -2.0, modality=modality)
        exporter.set("symile_contrastive_effective_rank", 40.0, modality=modality)
        exporter.set("symile_contrastive_batch_accuracy_ratio", 0.5, query=f"{modality}_from_others")
        exporter.set("symile_contrastive_retrieval_accuracy_ratio", 0.5, query=f"{modality}_from_others", k="1")
    exporter.set("symile_checkpoint_last_success_timestamp_seconds", time.time())
    answer = exporter.application({"REQUEST_METHOD": "GET", "PATH_INFO": "/metrics"}, lambda status, headers: None)
    return b"".join(answer)


class Ranks(ThreadingHTTPServer):
    """A thousand ranks at paths of one port: /RANK. They take a step in a second; rank 700 forwards for longer."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Ranks)
        self.begun = time.monotonic()
        self.page = every_series(0).decode()
        self.sick = False

    def answer(self, rank: int) -> bytes:
        now = time.monotonic() - self.begun
        shares = {"forward": 0.7 if rank == 700 else 0.3, "backward": 0.2 if rank == 700 else 0.6, "data_wait": 0.01}
        text = re.sub(r"^(symile_train_steps_total) .*", rf"\1 {int(now)}", self.page, flags=re.MULTILINE)
        text = re.sub(r"^(symile_train_samples_total) .*", rf"\1 {64 * int(now)}", text, flags=re.MULTILINE)
        for phase, share in shares.items():
            series = f'symile_train_phase_seconds_total{{phase="{phase}"}}'
            text = re.sub(rf"^({re.escape(series)}) .*", rf"\1 {share * now}", text, flags=re.MULTILINE)
        if self.sick and rank == 1023:
            text = re.sub(r"^(symile_train_loss) .*", r"\1 NaN", text, flags=re.MULTILINE)
        return text.encode()


class _Ranks(BaseHTTPRequestHandler):
    server: Ranks
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = gzip.compress(self.server.answer(int(self.path.strip("/"))), 1)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_ranks(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """What 1,024 ranks ask of Prometheus: the list, the series, the rules, every panel."""
    ranks, driver = Ranks(), Exporter(owner="driver")
    driver.set("symile_run_expected_ranks", RANKS)
    driver.set("symile_global_batch_size_samples", 64 * RANKS)
    driver.set("symile_run_target_steps", 10_000)
    thread = threading.Thread(target=ranks.serve_forever, daemon=True)
    thread.start()
    told = [
        {"rank": rank, "host": f"node-{rank // 8:03d}", "metrics_url": f"http://127.0.0.1:{9400 + rank % 8}/metrics"}
        for rank in range(RANKS)
    ]
    listed = targets("large", tmp_path, driver.url, told)
    assert len(as_json(listed)) < 256 * 1024, "the list of endpoints is large"
    for entry in listed:
        if entry["labels"]["role"] == "rank":
            entry["targets"] = [f"127.0.0.1:{ranks.server_port}"]
            entry["labels"]["__metrics_path__"] = f"/{entry['labels']['rank']}"
            # Else all were one endpoint for Prometheus.
            entry["labels"]["instance"] = f"{entry['labels']['host']}:{9400 + int(entry['labels']['rank']) % 8}"
    write_targets(tmp_path, listed)
    scale = 0.4
    try:
        with prometheus_over(
            tmp_path / "prometheus", tmp_path / "targets.json", rules_text=rules_text(scale), scrape_seconds=20
        ) as server:
            up = 'sum(up{role="rank"})'
            until("all ranks answer", lambda: number(server, up) == RANKS, 120)
            samples = "run:symile_train_samples:rate5m"
            until("rates are there", lambda: number(server, samples) > 32 * RANKS, 180)
            series = number(server, 'count({run="large", role="rank"})') / RANKS
            assert series < 320, f"{series} series per rank, those of Prometheus included"
            stepped = time.time()
            costs = {}
            for content in dashboards().values():
                for each in expressions(content, window="80s"):
                    begin = time.monotonic()
                    found = server.query_range(each.expression, stepped - 60, stepped, 15)
                    costs[each.panel] = max(costs.get(each.panel, 0.0), time.monotonic() - begin)
                    assert len(found) <= 30, f"{each.panel}: {len(found)} lines for {RANKS} ranks"
            dearest = max(costs, key=costs.__getitem__)
            assert costs[dearest] < 5, f"{dearest} takes {costs[dearest]:.1f} s"
            slow = server.query("topk by (run) (1, run_rank:symile_own_work:rate5m)")
            assert slow[0][0]["rank"] == "700"
            ranks.sick = True
            until("one NaN of a thousand is found", lambda: "LossNotFinite" in firing(server), 60)
            longest = max(durations(server))
            print(
                f"rules {longest:.3f} s, {series:.0f} series per rank, dearest panel {dearest} {costs[dearest]:.2f} s"
            )
            record_property("rules_seconds", longest)
            assert longest < 1, f"an evaluation of the rules took {longest:.2f} s"
    finally:
        ranks.shutdown()
        ranks.server_close()
        driver.close()


def number(server: Client, expression: str) -> float:
    """The value of a single series; 0 while there is none."""
    found = server.query(expression)
    return found[0][1] if found else 0.0


def firing(server: Client) -> set[str]:
    return {labels["alertname"] for labels in server.alerts()}


def durations(server: Client) -> list[float]:
    """Seconds of the last evaluation of each group, by Prometheus's own metrics."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return [
        float(value) for value in re.findall(r"^prometheus_rule_group_last_duration_seconds\{.*?\} (\S+)", text, re.M)
    ]
