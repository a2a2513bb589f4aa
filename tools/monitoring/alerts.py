"""The alert rules: when a person should be told, and not before.

An expression sees a run by the labels `run` and `run_id`, which its alert keeps. A run that has ended takes its
endpoints off the list, and their series end with them: where a rule looks back over a window it asks, too, that some
endpoint still answers. What is true of any start or restart for a while is waited out by `hold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import yaml

from symile_dist.metrics.names import OWN_PHASES, STRAGGLER_RATIO

GROUP = "symile-dist"
RUNBOOK = "docs/runbook.md"
EVALUATION_SECONDS = 15
"""From one evaluation of the rules to the next."""
LAST_CHECKPOINT_SECONDS = 2 * 3600
LONGEST_SCALE = 1000.0

Severity = Literal["critical", "warning"]
"""critical: wake someone, the run stands or loses its work; warning: it goes on, at a price."""

_BY = "by (run, run_id)"
_JOIN = "on (run, run_id)"
_ALIVE = f'max {_BY} (up{{role=~"driver|rank"}}) == 1'


@dataclass(frozen=True, kw_only=True)
class Record:
    """A series that several rules read."""

    name: str
    expression: str


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One rule. Durations in `expression` stand for themselves: they are scaled already."""

    name: str
    expression: str
    hold: str
    """How long the expression holds before the alert fires."""
    severity: Severity
    summary: str
    description: str
    """What is the matter, and what to do first; the rest stands in the runbook."""


def duration(seconds: float) -> str:
    """As Prometheus writes it: 90 -> 90s, 300 -> 5m, 0.3 -> 300ms."""
    milliseconds = max(1, round(seconds * 1000))
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000)):
        if milliseconds % size == 0:
            return f"{milliseconds // size}{unit}"
    return f"{milliseconds}ms"


def records(time_scale: float = 1.0) -> list[Record]:
    """Of all ranks, so that no alert has to look at a thousand of them twice."""
    window, ten_minutes = duration(300 * time_scale), duration(600 * time_scale)
    own = "|".join(OWN_PHASES)
    return [
        Record(
            name="run:symile_train_samples:rate5m",
            expression=f"sum {_BY} (rate(symile_train_samples_total[{window}]))",
        ),
        Record(
            name="run_rank:symile_own_work:rate5m",
            expression=(
                f'sum by (run, run_id, rank) (rate(symile_train_phase_seconds_total{{phase=~"{own}"}}[{window}]))'
            ),
        ),
        Record(
            name="run_rank:symile_collective:rate5m",
            expression=f"sum by (run, run_id, rank) (rate(symile_collective_seconds_total[{window}]))",
        ),
        # All ranks count the same steps.
        Record(
            name="run_reason:symile_skipped_steps:increase10m",
            expression=(f"max by (run, run_id, reason) (increase(symile_train_skipped_steps_total[{ten_minutes}]))"),
        ),
        Record(
            name="run:symile_train_steps:increase10m",
            expression=f"max {_BY} (increase(symile_train_steps_total[{ten_minutes}]))",
        ),
    ]


def alerts(time_scale: float = 1.0) -> list[Alert]:
    """The rules; with a `time_scale` of 0.1 every duration is a tenth, for tests.

    Raises ValueError where that leaves nothing.
    """
    if not 0 < time_scale <= LONGEST_SCALE:
        raise ValueError(f"--time-scale {time_scale}: should be more than 0, {LONGEST_SCALE:g} at most; 1 is real time")

    def minutes(number: float) -> str:
        return duration(60 * number * time_scale)

    def skipped(reasons: str, least: int, share: float) -> str:
        count = f'sum {_BY} (run_reason:symile_skipped_steps:increase10m{{reason=~"{reasons}"}})'
        return f"({count} > {least} and {count} > {share} * run:symile_train_steps:increase10m)"

    own, wait = "run_rank:symile_own_work:rate5m", "run_rank:symile_collective:rate5m"
    samples = "run:symile_train_samples:rate5m"
    up = f'sum {_BY} (up{{role="rank"}})'
    expected = f"max {_BY} (symile_run_expected_ranks)"
    saved = f"max {_BY} (symile_checkpoint_last_success_timestamp_seconds)"
    begun = f'max {_BY} (process_start_time_seconds{{role="driver"}})'
    return [
        Alert(
            name="RanksMissing",
            expression=f'({expected} - ({up} or 0 * {expected}) > 0) or (count {_BY} (up{{role="driver"}} == 0))',
            hold=minutes(5),
            severity="critical",
            summary="{{ $labels.run }}: {{ $value }} ranks, or the driver, have not answered for five minutes",
            description=(
                "A restart takes less. The group waits for nodes, or the run has failed, or its driver was killed, or "
                "Prometheus does not reach the machines. First: symile-dist status {{ $labels.run }}"
            ),
        ),
        Alert(
            name="TrainingStalled",
            expression=f"{_ALIVE} unless {_JOIN} (sum {_BY} (increase(symile_train_steps_total[{minutes(5)}])) > 0)",
            hold=minutes(10),
            severity="critical",
            summary="{{ $labels.run }}: no step for more than ten minutes",
            description=(
                "Its processes answer, but no rank has ended a step. The watchdog restarts ranks that hang for "
                "ray.hang_seconds; what it saw is in RUN/logs. First: symile-dist logs {{ $labels.run }}"
            ),
        ),
        Alert(
            name="LossNotFinite",
            expression=(
                f"count {_BY} ((symile_train_loss != symile_train_loss) or (abs(symile_train_loss) == Inf)) > 0"
            ),
            hold="0s",
            severity="critical",
            summary="{{ $labels.run }}: the loss is NaN or infinite",
            description=(
                "No rank takes such a step, and after guard.patience of them the run goes back to a checkpoint; after "
                "guard.max_rollbacks it stops. First: symile-dist view {{ $labels.run }}, the events"
            ),
        ),
        Alert(
            name="GradSkipStorm",
            # fp16 looks for its loss scale by overflows when it begins: fewer than 20.
            expression=(
                f"{skipped('nonfinite_loss|nonfinite_grad|loss_spike|grad_spike|other', 4, 0.1)}"
                f" or {skipped('overflow', 20, 0.5)}"
            ),
            hold="0s",
            severity="warning",
            summary="{{ $labels.run }}: {{ $value | humanize }} steps of the last ten minutes were skipped",
            description=(
                "More than one in ten for spikes or non-finite gradients, or half of them for fp16's range: the run "
                "hardly learns. First: symile-dist view {{ $labels.run }}, gradient norm and learning rate"
            ),
        ),
        Alert(
            name="DataStarved",
            expression=(
                f'max {_BY} (sum by (run, run_id, rank) (rate(symile_train_phase_seconds_total{{phase="data_wait"}}'
                f"[{minutes(5)}]))) > 0.2 and {_JOIN} {_ALIVE}"
            ),
            hold=minutes(10),
            severity="warning",
            summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the time goes into waiting for data",
            description=(
                "Of the rank that waits longest, and all wait for it. Raise data.loader_processes, or bring the data "
                "nearer. First: the dashboard data, whether reads fail or are made again"
            ),
        ),
        Alert(
            name="ThroughputDrop",
            expression=(
                f"{samples} < 0.7 * quantile_over_time(0.5, {samples}[{minutes(60)}]) "
                f"and {_JOIN} {samples} offset {minutes(55)} > 0 and {_JOIN} {_ALIVE}"
            ),
            hold=minutes(10),
            severity="warning",
            summary="{{ $labels.run }}: {{ $value | humanize }} samples/s, less than 70% of the last hour's median",
            description=(
                "For ten minutes. Fewer ranks, a slower store, a neighbour on the network or a throttled device. "
                "First: the dashboard performance, which phase has grown"
            ),
        ),
        Alert(
            name="Straggler",
            # Own work that makes others wait for a tenth of the time, or one rank that hardly waits while others do.
            expression=(
                f"((max {_BY} ({own}) - quantile {_BY} (0.5, {own}) > 0.1)"
                f" and (max {_BY} ({own}) > {STRAGGLER_RATIO} * quantile {_BY} (0.5, {own}))"
                f" or (quantile {_BY} (0.5, {wait}) - min {_BY} ({wait}) > 0.1)"
                f" and (min {_BY} ({wait}) < 0.5 * quantile {_BY} (0.5, {wait}))) and {_JOIN} {_ALIVE}"
            ),
            hold=minutes(15),
            severity="warning",
            summary="{{ $labels.run }}: all ranks wait for one, {{ $value | humanizePercentage }} of the time",
            description=(
                "The most own work: "
                '{{ range printf "topk(1, run_rank:symile_own_work:rate5m{run_id=%q})" $labels.run_id | query }}'
                "rank {{ .Labels.rank }}{{ end }}; the shortest wait: "
                '{{ range printf "bottomk(1, run_rank:symile_collective:rate5m{run_id=%q})" $labels.run_id | query }}'
                "rank {{ .Labels.rank }}{{ end }}. First: its host, in symile-dist status {{ $labels.run }}"
            ),
        ),
        Alert(
            name="CheckpointStale",
            # The checkpoint that a run goes on from may be old; it counts from the driver's start.
            expression=(
                f"(time() - (({saved} >= {_JOIN} {begun}) or {begun} or {saved})"
                f" > {round(LAST_CHECKPOINT_SECONDS * time_scale, 3):g}"
                f" or max {_BY} (increase(symile_checkpoint_failures_total[{minutes(30)}])) > 1.5)"
                f" and {_JOIN} {_ALIVE}"
            ),
            hold=minutes(1),
            severity="warning",
            summary="{{ $labels.run }}: no checkpoint for two hours, or saves fail",
            description=(
                "A failure now would cost what came since. Is there room on the disk, and does checkpoint.every ask "
                "for any? First: symile-dist status {{ $labels.run }}"
            ),
        ),
        Alert(
            name="RestartLoop",
            expression=(
                f'sum {_BY} (increase(symile_run_restarts_total{{cause!="preemption"}}[{minutes(60)}])) > 2.5'
                f" and {_JOIN} {_ALIVE}"
            ),
            hold="0s",
            severity="critical",
            summary="{{ $labels.run }}: {{ $value | humanize }} restarts within an hour",
            description=(
                "The run ends by itself once ray.max_failures come without a new checkpoint between. First: the causes "
                "in symile-dist status {{ $labels.run }}, then the log of the rank that it names"
            ),
        ),
        Alert(
            name="ContrastiveCollapse",
            expression=(
                f"(min {_BY} (symile_contrastive_effective_rank) < 1.5)"
                f" or (max {_BY} (symile_contrastive_uniformity) > -0.05)"
            ),
            hold=minutes(30),
            severity="warning",
            summary="{{ $labels.run }}: the representations of a modality have collapsed",
            description=(
                "They use hardly more than one direction: that encoder answers the same to everything. Lower its "
                "learning rate, look at its inputs. First: the dashboard contrastive, effective rank by modality"
            ),
        ),
    ]


def rules(time_scale: float = 1.0, runbook: str = RUNBOOK) -> dict[str, Any]:
    """What Prometheus (2.42 or newer) reads as a rule file.

    Args:
        time_scale: every duration is multiplied by it.
        runbook: where docs/runbook.md stands for whoever reads an alert: a file or a URL.
    """
    made = alerts(time_scale)
    group: list[dict[str, Any]] = [{"record": record.name, "expr": record.expression} for record in records(time_scale)]
    group += [
        {
            "alert": alert.name,
            "expr": alert.expression,
            "for": alert.hold,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.description,
                "runbook_url": f"{runbook}#{alert.name.lower()}",
            },
        }
        for alert in made
    ]
    return {"groups": [{"name": GROUP, "interval": duration(EVALUATION_SECONDS * time_scale), "rules": group}]}


def rules_text(time_scale: float = 1.0, runbook: str = RUNBOOK) -> str:
    return yaml.safe_dump(rules(time_scale, runbook), sort_keys=False, width=120, allow_unicode=True)
