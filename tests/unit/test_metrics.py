"""The metric table, and the exporter scraped through its real endpoint."""

from __future__ import annotations

import math
import multiprocessing
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from symile_dist.metrics.exporter import Exporter
from symile_dist.metrics.names import METRICS, PREFIX, known_or_other
from symile_dist.metrics.recorder import Recorder

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(exporter: Exporter) -> Samples:
    assert exporter.url is not None
    with urllib.request.urlopen(exporter.url, timeout=5) as reply:
        text = reply.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter(label_values={"modality": ["image", "text"]})
    yield exporter
    exporter.close()


def test_table_follows_the_conventions() -> None:
    for name, spec in METRICS.items():
        assert name == spec.name and name.startswith(PREFIX) and re.fullmatch(r"[a-z0-9_]+", name)
        assert (spec.kind == "counter") == name.endswith("_total"), name
        assert set(spec.label_values) <= set(spec.labels), name
        assert not {"run", "run_id", "rank", "job", "instance", "step", "shard"} & set(spec.labels), name
        assert (spec.kind == "histogram") == bool(spec.buckets), name
        assert len(spec.buckets) <= 12 and list(spec.buckets) == sorted(set(spec.buckets)), name
        assert spec.help.endswith(".") or ";" in spec.help, name
        for unit in ("seconds", "bytes", "ratio", "nats"):
            if name.removesuffix("_total").endswith(f"_{unit}"):
                assert spec.unit == unit, name


def test_values_arrive_with_labels_and_without_created_series(exporter: Exporter) -> None:
    exporter.set("symile_train_loss", 3.25)
    exporter.increment("symile_train_steps_total")
    exporter.increment("symile_train_samples_total", 64)
    exporter.increment("symile_train_phase_seconds_total", 0.5, phase="data_wait")
    exporter.observe("symile_train_step_duration_seconds", 0.3)
    exporter.observe("symile_checkpoint_duration_seconds", 2.0, op="save")
    samples = scrape(exporter)
    assert samples[("symile_train_loss", ())] == 3.25
    assert samples[("symile_train_steps_total", ())] == 1
    assert samples[("symile_train_samples_total", ())] == 64
    assert samples[("symile_train_phase_seconds_total", (("phase", "data_wait"),))] == 0.5
    assert samples[("symile_train_step_duration_seconds_sum", ())] == 0.3
    assert samples[("symile_train_step_duration_seconds_bucket", (("le", "0.25"),))] == 0
    assert samples[("symile_train_step_duration_seconds_bucket", (("le", "0.5"),))] == 1
    assert samples[("symile_checkpoint_duration_seconds_count", (("op", "save"),))] == 1
    assert not [name for name, _ in samples if name.endswith("_created")]


def test_rare_counters_stand_at_zero_and_unset_gauges_are_absent(exporter: Exporter) -> None:
    samples = scrape(exporter)
    assert samples[("symile_train_skipped_steps_total", (("reason", "nonfinite_grad"),))] == 0
    assert samples[("symile_data_modality_missing_total", (("modality", "text"),))] == 0
    assert samples[("symile_checkpoint_failures_total", ())] == 0
    names = {name for name, _ in samples}
    assert "symile_train_loss" not in names
    # At 0 this would read as a checkpoint of 1970.
    assert "symile_checkpoint_last_success_timestamp_seconds" not in names
    assert "symile_run_restarts_total" not in names, "the driver's"


def test_driver_serves_its_own() -> None:
    exporter = Exporter(owner="driver")
    try:
        exporter.set("symile_run_expected_ranks", 4)
        exporter.set("symile_run_info", 1, version="1", objective="symile", precision="bf16", zero_stage="1")
        samples = scrape(exporter)
        assert samples[("symile_run_expected_ranks", ())] == 4
        assert samples[("symile_run_restarts_total", (("cause", "hang"),))] == 0
        assert not [name for name, _ in samples if name.startswith("symile_train_")]
    finally:
        exporter.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_gauges_are_kept(exporter: Exporter, value: float) -> None:
    exporter.set("symile_train_loss", value)
    scraped = scrape(exporter)[("symile_train_loss", ())]
    assert scraped == value or (math.isnan(scraped) and math.isnan(value))


def test_our_own_bugs_fail(exporter: Exporter) -> None:
    with pytest.raises(AssertionError, match="not a metric"):
        exporter.set("symile_train_los", 1.0)
    with pytest.raises(AssertionError, match="not a metric of this process"):
        exporter.set("symile_run_expected_ranks", 1.0)
    with pytest.raises(AssertionError, match="is a gauge"):
        exporter.increment("symile_train_loss")
    with pytest.raises(AssertionError, match="not one of"):
        exporter.increment("symile_train_phase_seconds_total", 1.0, phase="lunch")
    with pytest.raises(AssertionError, match="not one of"):
        exporter.set("symile_contrastive_uniformity", 1.0, modality="smell")
    with pytest.raises(AssertionError, match="labels"):
        exporter.increment("symile_train_phase_seconds_total", 1.0)
    for amount in (-1.0, math.nan, math.inf):
        with pytest.raises(AssertionError, match="cannot add"):
            exporter.increment("symile_train_samples_total", amount)
    with pytest.raises(AssertionError, match="cannot observe"):
        exporter.observe("symile_train_step_duration_seconds", math.nan)
    assert "smell" not in str(scrape(exporter))


def test_values_from_outside_are_bounded() -> None:
    assert known_or_other("symile_data_read_errors_total", "kind", "checksum") == "checksum"
    assert known_or_other("symile_data_read_errors_total", "kind", "ClientPayloadError('...')") == "other"
    with pytest.raises(AssertionError):
        known_or_other("symile_run_time_seconds_total", "state", "asleep")


def test_taken_port_falls_back(caplog: pytest.LogCaptureFixture, exporter: Exporter) -> None:
    assert exporter.port is not None
    second = Exporter(port=exporter.port)
    assert second.port not in (None, exporter.port)
    assert f"127.0.0.1:{exporter.port}" in caplog.text
    second.set("symile_train_loss", 2.0)
    assert scrape(second)[("symile_train_loss", ())] == 2.0
    second.close()


def test_close_frees_the_port() -> None:
    first = Exporter()
    port = first.port or 0
    first.close()
    assert first.port is None and first.url is None
    first.close()
    first.set("symile_train_loss", 1.0)
    second = Exporter(port=port)
    assert second.port == port
    second.close()


@pytest.mark.parametrize(("port", "address"), [(0, "203.0.113.7"), (99999, "203.0.113.7")])
def test_no_server_is_survived(port: int, address: str, caplog: pytest.LogCaptureFixture) -> None:
    exporter = Exporter(port, address)  # An address that no machine of ours has.
    assert exporter.port is None and exporter.url is None
    assert "training goes on" in caplog.text
    exporter.set("symile_train_loss", 1.0)
    exporter.increment("symile_train_steps_total")
    exporter.close()


def test_impossible_port_falls_back() -> None:
    exporter = Exporter(port=99999)
    assert exporter.port is not None
    exporter.close()


def test_listens_on_loopback_only_unless_told(exporter: Exporter) -> None:
    assert exporter.url is not None and exporter.url.startswith("http://127.0.0.1:")
    assert (
        exporter._server is not None
        and exporter._server._server is not None
        and exporter._server._server.socket.getsockname()[0] == "127.0.0.1"
    )


def test_silent_client_does_not_hurt(exporter: Exporter) -> None:
    with socket.create_connection(("127.0.0.1", exporter.port or 0)):
        exporter.set("symile_train_loss", 2.0)
        assert scrape(exporter)[("symile_train_loss", ())] == 2.0
        started = time.monotonic()
        exporter.close()
        assert time.monotonic() - started < 3


def test_forked_child_does_not_hold_the_port() -> None:
    exporter = Exporter()
    port = exporter.port or 0
    context = multiprocessing.get_context("fork")
    release = context.Event()
    started = context.Event()

    def child() -> None:
        started.set()
        release.wait(20)

    process = context.Process(target=child)
    process.start()
    try:
        assert started.wait(20)
        exporter.close()
        again = Exporter(port=port)
        assert again.port == port
        again.close()
    finally:
        release.set()
        process.join(20)


def test_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, symile_dist.metrics.names, symile_dist.metrics.exporter, symile_dist.metrics.history, "
        "symile_dist.view.terminal\n"
        "assert not {'torch', 'ray', 'deepspeed'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_a_recorder_tells_of_starts_and_of_saves_that_failed(exporter: Exporter) -> None:
    recorder = Recorder(exporter)
    recorder.start_record(11, {"workers": 8.5, "load": 0.25})
    recorder.count_failed_save()
    recorder.count_failed_save(mirror=True)
    recorder.count_damaged(2)
    recorder.checkpoint_record(10, 160, size=1000, seconds=0.5, stall=0.002)
    values = scrape(exporter)
    assert values[("symile_run_start_seconds", (("phase", "workers"),))] == 8.5
    assert values[("symile_run_start_seconds", (("phase", "load"),))] == 0.25
    assert values[("symile_checkpoint_failures_total", ())] == values[("symile_mirror_failures_total", ())] == 1
    assert values[("symile_checkpoint_damaged_files_total", ())] == 2
    assert values[("symile_checkpoint_duration_seconds_sum", (("op", "stall"),))] == 0.002
    assert values[("symile_checkpoint_duration_seconds_count", (("op", "save"),))] == 1
