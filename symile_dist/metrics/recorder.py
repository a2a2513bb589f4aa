"""What the loop tells the world: this rank's Prometheus metrics, the run's history (rank 0) and the driver."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from symile_dist.metrics.exporter import Exporter
from symile_dist.metrics.history import History
from symile_dist.metrics.names import Topic, known_or_other
from symile_dist.spans import Spans
from symile_dist.types import Batch

FETCH_COUNTERS = {
    "bytes_fetched": "symile_data_fetched_bytes_total",
    "requests": "symile_data_requests_total",
    "retries": "symile_data_retries_total",
}
"""What the fetcher counts -> its metric."""
GAUGES = {
    "learning_rate": "symile_train_learning_rate",
    "logit_scale": "symile_train_logit_scale",
    "loss_scale": "symile_train_loss_scale",
    "positive_score": "symile_contrastive_positive_score",
    "negative_score": "symile_contrastive_negative_score",
    "total_correlation_bound": "symile_contrastive_total_correlation_bound_nats",
    "alignment": "symile_contrastive_alignment",
}
"""A training record's value -> its metric."""
LABELLED_GAUGES = {
    "uniformity": ("symile_contrastive_uniformity", "modality"),
    "effective_rank": ("symile_contrastive_effective_rank", "modality"),
    "batch_accuracy": ("symile_contrastive_batch_accuracy_ratio", "query"),
}
"""The same of values that are called `<key>/<label>`."""
DEVICE_GAUGES = {
    "memory_allocated": "symile_device_memory_allocated_bytes",
    "memory_reserved": "symile_device_memory_reserved_bytes",
    "memory_peak": "symile_device_memory_peak_bytes",
    "peak_flops": "symile_device_peak_flops_per_second",
}

Publish = Callable[[dict[str, Any]], None]


def _ignore(record: dict[str, Any]) -> None:
    """Publishes to nobody."""


class Recorder:
    """One rank's recorder. `history` and `publish` are rank 0's alone; every rank has an exporter.

    Args:
        exporter: where Prometheus metrics go; None for none.
        history: the run's history; None on other ranks.
        publish: called with every record, for the driver's live view.
        tells_node: this rank tells what is true of its node.
        on_gpu: times are the device's.
    """

    def __init__(
        self,
        exporter: Exporter | None = None,
        history: History | None = None,
        publish: Publish = _ignore,
        tells_node: bool = True,
        on_gpu: bool = False,
    ) -> None:
        self.exporter, self.history, self.publish, self.tells_node = exporter, history, publish, tells_node
        self.spans = Spans(on_gpu)
        self.flops_per_sample: float | None = None
        """Of the model, forward and backward; None before they are counted."""
        self._phases: defaultdict[str, float] = defaultdict(float)
        self._missing: defaultdict[str, int] = defaultdict(int)
        self._fetched: dict[str, int] = {}
        self._out_of_memory = self._write_errors = 0
        self._since = time.perf_counter()
        self._steps = self._samples = self._local_samples = self._bytes = 0

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times a phase of the step (see PHASES in metrics/names.py)."""
        return self.spans.phase(name)

    def restart_clock(self) -> None:
        """Begins a new interval of speed measurement: set-up, validation and saving are not steps."""
        self._count_phases()
        self._phases.clear()
        self._missing.clear()
        self._since = time.perf_counter()
        self._steps = self._samples = self._local_samples = self._bytes = 0

    def _count_phases(self) -> None:
        seconds, collectives = self.spans.take()
        for phase, each in seconds.items():
            self._phases[phase] += each
        if self.exporter:
            for phase, each in seconds.items():
                self.exporter.increment("symile_train_phase_seconds_total", max(0.0, each), phase=phase)
            for operation, each in collectives.items():
                self.exporter.increment("symile_collective_seconds_total", max(0.0, each), op=operation)

    def count_step(
        self, step: int, seconds: float, local_samples: int, global_samples: int, skipped_for: str | None
    ) -> None:
        """`skipped_for`: one of SKIP_REASONS; None where the step was taken."""
        self._steps += 1
        self._samples += global_samples
        self._local_samples += local_samples
        self._count_phases()
        if self.exporter:
            self.exporter.increment("symile_train_steps_total")
            self.exporter.set("symile_train_step", step)
            self.exporter.increment("symile_train_samples_total", local_samples)
            self.exporter.increment("symile_train_model_flops_total", local_samples * (self.flops_per_sample or 0.0))
            self.exporter.observe("symile_train_step_duration_seconds", seconds)
            if skipped_for:
                self.exporter.increment("symile_train_skipped_steps_total", reason=skipped_for)

    def tell_step(self, loss: float, grad_norm: float) -> None:
        """Of the last step, taken or not."""
        if self.exporter:
            self.exporter.set("symile_train_loss", loss)
            self.exporter.set("symile_train_grad_norm", grad_norm)

    def count_rollback(self) -> None:
        if self.exporter:
            self.exporter.increment("symile_train_rollbacks_total")

    def count_data(self, batch: Batch, local_samples: int, queue_depth: int) -> None:
        """What reading a batch took, and what of it could not be read; `local_samples` of its slots are valid."""
        read = batch.read
        self._bytes += read.bytes
        for modality, count in read.missing.items():
            self._missing[modality] += count
        if not self.exporter:
            return
        self.exporter.increment("symile_data_bytes_total", read.bytes)
        self.exporter.increment("symile_data_shards_opened_total", read.shards_opened)
        self.exporter.set("symile_data_queue_depth", queue_depth)
        for dataset, count in read.samples.items():
            self.exporter.increment("symile_data_samples_total", count, dataset=dataset)
        for modality, count in read.missing.items():
            self.exporter.increment("symile_data_modality_missing_total", count, modality=modality)
        name = "symile_data_read_errors_total"
        for fault in batch.faults:
            self.exporter.increment(name, kind=known_or_other(name, "kind", fault.kind))
        unreadable = len(batch) - local_samples
        if unreadable:
            self.exporter.increment("symile_data_dropped_samples_total", unreadable, reason="unreadable")

    def count_fetched(self, counters: dict[str, int]) -> None:
        """What the node's fetcher has done since the last call; one rank of a node tells it."""
        if not self.exporter:
            return
        for key, name in FETCH_COUNTERS.items():
            if key in counters:
                self.exporter.increment(name, max(0, counters[key] - self._fetched.get(key, 0)))
        self._fetched = counters
        self.exporter.set("symile_data_cache_bytes", counters.get("bytes_cached", 0))

    def tell_device(self, facts: Mapping[str, float]) -> None:
        """What of DEVICE_GAUGES is known of this rank's device, and how often it had no memory (`out_of_memory`)."""
        if not self.exporter:
            return
        for key, name in DEVICE_GAUGES.items():
            if key in facts:
                self.exporter.set(name, facts[key])
        failed = int(facts.get("out_of_memory", 0))
        self.exporter.increment("symile_device_ooms_total", max(0, failed - self._out_of_memory))
        self._out_of_memory = failed

    def own_speed(self) -> dict[str, float]:
        """This rank's steps since the clock was started: seconds and bytes per step, by what they were spent on, and
        the share of samples that lack a modality."""
        steps = max(1, self._steps)
        speed = {f"phases.{phase}": seconds / steps for phase, seconds in self._phases.items()}
        speed["step_seconds"] = (time.perf_counter() - self._since) / steps
        speed["data_bytes"] = self._bytes / steps
        lacking = {f"missing/{name}": count / max(1, self._local_samples) for name, count in self._missing.items()}
        return speed | lacking

    def publish_ranks(self, step: int, table: list[dict[str, float]]) -> None:
        """Every rank's figures, for the driver: too many for the history."""
        if self.history:
            self.publish({"kind": "ranks", "step": step, "table": table})

    def efficiency(self, world_size: int, peak_flops: float | None) -> dict[str, float]:
        """`flops_per_second` of all ranks, and `mfu` where the device's peak is known; nothing if not counted."""
        if not self.flops_per_sample:
            return {}
        rate = self._samples * self.flops_per_sample / max(1e-9, time.perf_counter() - self._since)
        return {"flops_per_second": rate} | ({"mfu": rate / (world_size * peak_flops)} if peak_flops else {})

    def train_record(self, step: int, samples_seen: int, **values: Any) -> None:
        """A record of the last steps since the one before, with their speed."""
        seconds = max(1e-9, time.perf_counter() - self._since)
        speed = {
            "samples_per_second": self._samples / seconds,
            "step_seconds": seconds / max(1, self._steps),
            "data_wait_fraction": self._phases["data_wait"] / seconds,
        }
        if self.exporter:
            for key, name in GAUGES.items():
                if key in values:
                    self.exporter.set(name, values[key])
            for key, value in values.items():
                name, label = LABELLED_GAUGES.get(key.partition("/")[0], ("", ""))
                if label and "/" in key:
                    self.exporter.set(name, value, **{label: key.partition("/")[2]})
        self.record("train", step, samples_seen=samples_seen, **values, **speed)
        self.restart_clock()

    def validation_record(self, step: int, samples_seen: int, values: dict[str, float], seconds: float) -> None:
        if self.exporter and self.history:  # one rank is enough: the values are global
            self.exporter.set("symile_validation_loss", values["loss"])
            for key, value in values.items():
                if key.startswith("accuracy/"):
                    query = key.removeprefix("accuracy/")
                    self.exporter.set("symile_contrastive_retrieval_accuracy_ratio", value, query=query, k="1")
        self.record("validation", step, samples_seen=samples_seen, **values, seconds=seconds)

    def checkpoint_record(self, step: int, samples_seen: int, size: int, seconds: float, stall: float) -> None:
        """Of a checkpoint that is whole: `seconds` from its beginning to its end, `stall` of them on the step loop."""
        if self.exporter:
            self.exporter.observe("symile_checkpoint_duration_seconds", seconds, op="save")
            self.exporter.observe("symile_checkpoint_duration_seconds", stall, op="stall")
            self.exporter.set("symile_checkpoint_last_success_timestamp_seconds", time.time())
            if self.history:
                self.exporter.set("symile_checkpoint_size_bytes", size)
        self.record("checkpoint", step, samples_seen=samples_seen, bytes=size, seconds=seconds, stall_seconds=stall)

    def count_failed_save(self, mirror: bool = False) -> None:
        if self.exporter:
            what = "mirror" if mirror else "checkpoint"
            self.exporter.increment(f"symile_{what}_failures_total")

    def count_damaged(self, files: int) -> None:
        if self.exporter and files:
            self.exporter.increment("symile_checkpoint_damaged_files_total", files)

    def count_resumed(self, saved_at: float, phases: Mapping[str, float]) -> None:
        """A checkpoint of that time was found, verified and loaded."""
        if self.exporter:
            self.exporter.set("symile_checkpoint_last_success_timestamp_seconds", saved_at)
            for operation, phase in (("verify", "checkpoint"), ("load", "load")):
                self.exporter.observe("symile_checkpoint_duration_seconds", phases.get(phase, 0.0), op=operation)

    def start_record(self, step: int, phases: dict[str, float]) -> None:
        """How long the way into the first step took, phase by phase (see START_PHASES)."""
        if self.exporter:
            for phase, seconds in phases.items():
                self.exporter.set("symile_run_start_seconds", seconds, phase=phase)
        rounded = {phase: round(seconds, 3) for phase, seconds in phases.items()}
        self.record("start", step, phases=rounded, seconds=round(sum(phases.values()), 3))

    def event(self, step: int, about: Topic, message: str, level: str = "info", **values: Any) -> None:
        self.record("event", step, about=about, message=message, level=level, **values)

    def record(self, kind: str, step: int, **values: Any) -> None:
        if self.history:
            self.publish(self.history.write(kind, step, **values))
            if self.exporter:
                errors = self.history.write_errors
                self.exporter.increment("symile_history_write_errors_total", max(0, errors - self._write_errors))
                self._write_errors = errors

    def tell_end(self, status: str) -> None:
        """As of `History.tell_end`."""
        if self.history:
            self.history.tell_end(status)

    def flush(self) -> None:
        if self.history:
            self.history.flush()

    def close(self) -> None:
        if self.history:
            self.history.close()
        if self.exporter:
            self.exporter.close()
