"""What there is to see of a run: one list of panels, from which Grafana's dashboards, the run's page, the terminal view
and docs/metrics.md are made.

A panel says where its values come from twice: in PromQL, for Prometheus, and as keys of history.jsonl, for whoever has
nothing but the run's directory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from symile_dist.metrics.names import OWN_PHASES, STRAGGLER_RATIO

Dashboard = Literal["training", "performance", "data", "reliability", "contrastive"]
Shape = Literal["curve", "stat", "stacked"]
"""A curve per series; one number; series whose sum says something."""
Unit = Literal[
    "", "seconds", "bytes", "bytes/second", "samples/second", "steps", "samples", "ratio", "nats", "flops/second"
]


@dataclass(frozen=True, kw_only=True)
class Query:
    """One PromQL expression. `$run` stands for the chosen runs (a regular expression on the label `run`), `$rank` for
    the chosen ranks, `$window` for the window of a rate."""

    expression: str
    legend: str = ""
    """With labels in double braces, as Grafana has it: `{{rank}}`."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value of history.jsonl over the steps."""

    kind: str
    """Of the records: "train", "validation", "checkpoint", ..."""
    key: str
    """Of the value; dots lead into objects (`phases.forward`); ending in `*` it stands for all keys that begin so."""
    label: str = ""
    """By default the key, or what the `*` stood for."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From this value on a panel is coloured."""

    value: float
    level: Literal["good", "warning", "bad"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel."""

    key: str
    """Names it, for links and tests: letters, digits and `_`."""
    title: str
    description: str
    """What it shows, and what to do where it looks wrong."""
    dashboard: Dashboard
    row: str
    """Title of the row it stands in."""
    unit: Unit = ""
    shape: Shape = "curve"
    queries: tuple[Query, ...]
    curves: tuple[Curve, ...] = ()
    thresholds: tuple[Threshold, ...] = ()
    logarithmic: bool = False
    needs_gpu: bool = False
    """There is nothing to see on a CPU."""
    on_page: bool = True
    """Shown on the run's page, if it has curves; the terminal shows those of `TERMINAL`."""


EVENTS_WINDOW = "1h"
"""Of what happens seldom: within the window of a rate there would be nothing to see."""
RECENT_WINDOW = "15m"
"""Of a mean over what happens every few seconds or minutes."""


def _of(metric: str, *matchers: str, rank: bool = False) -> str:
    """The metric of the chosen runs, and of the chosen ranks where these matter."""
    chosen = ['run=~"$run"', *(['rank=~"$rank"'] if rank else []), *matchers]
    return f"{metric}{{{', '.join(chosen)}}}"


def _by(aggregation: str, inner: str, *labels: str) -> str:
    """One series per run, and per value of the labels: `aggregation` may have a parameter, as in `quantile(0.5`."""
    name, _, parameter = aggregation.partition("(")
    arguments = f"{parameter}, {inner}" if parameter else inner
    return f"{name} by ({', '.join(('run', 'run_id', *labels))}) ({arguments})"


def _rate(selector: str) -> str:
    return f"rate({selector}[$window])"


def _increase(selector: str, window: str = EVENTS_WINDOW) -> str:
    return f"increase({selector}[{window}])"


def _mean(histogram: str, window: str, *labels: str, rank: bool = False, matchers: tuple[str, ...] = ()) -> str:
    """Of a histogram's observations, right however few they are: there is none where there were none."""
    total, count = (
        _by("sum", _increase(_of(f"{histogram}_{part}", *matchers, rank=rank), window), *labels)
        for part in ("sum", "count")
    )
    return f"{total} / ({count} > 0)"


def _per_step(counter: str, *labels: str) -> str:
    """What a counter grows by in a step, as a mean over the ranks; there is none while there are no steps."""
    steps = _by("sum", _rate(_of("symile_train_steps_total", rank=True)))
    grown = _by("sum", _rate(_of(counter, rank=True)), *labels)
    return f"{grown} / on (run, run_id) group_left () ({steps} > 0)" if labels else f"{grown} / ({steps} > 0)"


def _events(counter: str, *labels: str) -> str:
    """Of what all ranks count alike; a rank that was started anew has a second series."""
    return _by("max", _by("sum", _increase(_of(counter)), "rank", *labels), *labels)


def _over_ranks(inner: str, *aggregations: tuple[str, str]) -> tuple[Query, ...]:
    """One curve per aggregation over the ranks, however many there are."""
    return tuple(
        Query(expression=_by(aggregation, inner), legend=f"{{{{run}}}} {label}") for aggregation, label in aggregations
    )


_SLOWEST = (("max", "slowest rank"), ("quantile(0.5", "median rank"), ("min", "fastest rank"))
_IN_OWN_PHASES = f'phase=~"{"|".join(OWN_PHASES)}"'
_OWN_WORK = (
    _by("sum", _rate(_of("symile_train_phase_seconds_total", _IN_OWN_PHASES, rank=True)), "rank")
    + " / ("
    + _by("sum", _rate(_of("symile_train_steps_total", rank=True)), "rank")
    + " > 0)"
)
_REMAINING = (
    f"clamp_min({_by('max', _of('symile_run_target_steps'))} - {_by('max', _of('symile_train_step'))}, 0)"
    f" * ({_mean('symile_train_step_duration_seconds', RECENT_WINDOW)})"
)
_PRODUCTIVE = 'state="productive"'
_GOODPUT = (
    f"{_by('sum', _of('symile_run_time_seconds_total', _PRODUCTIVE))}"
    f" / ({_by('sum', _of('symile_run_time_seconds_total'))} > 0)"
)
_UP = 'up{run=~"$run", role="rank"}'


def _gauge(metric: str, legend: str = "{{run}}", *labels: str) -> tuple[Query, ...]:
    """A value that is the same on all ranks which tell it."""
    return (Query(expression=_by("max", _of(metric), *labels), legend=legend),)


_PANELS: tuple[Panel, ...] = (
    # Training
    Panel(
        key="step",
        title="Step",
        description="Global step. Flat: see the alert TrainingStalled; going back: a restart or a rollback.",
        dashboard="training",
        row="Now",
        unit="steps",
        shape="stat",
        queries=_gauge("symile_train_step"),
        curves=(Curve(kind="train", key="step", label="step"),),
        on_page=False,
    ),
    Panel(
        key="remaining",
        title="Time to the last step",
        description="At the step time of the last quarter of an hour; saves and validation come on top.",
        dashboard="training",
        row="Now",
        unit="seconds",
        shape="stat",
        queries=(Query(expression=_REMAINING, legend="{{run}}"),),
    ),
    Panel(
        key="ranks_up",
        title="Ranks that answer",
        description="Of those that the run should have. Below 1 for minutes: see the alert RanksMissing.",
        dashboard="training",
        row="Now",
        unit="ratio",
        shape="stat",
        queries=(
            Query(
                expression=f"{_by('sum', _UP)} / {_by('max', _of('symile_run_expected_ranks'))}",
                legend="{{run}}",
            ),
        ),
        thresholds=(Threshold(value=0, level="bad"), Threshold(value=1, level="good")),
    ),
    Panel(
        key="global_batch_size",
        title="Global batch",
        description="Samples of a step over all ranks: the pool of negatives. It stays the same on fewer ranks.",
        dashboard="training",
        row="Now",
        unit="samples",
        shape="stat",
        queries=_gauge("symile_global_batch_size_samples"),
    ),
    Panel(
        key="run_info",
        title="What runs",
        description="Version, objective, precision and ZeRO stage; compare with the other run where curves differ.",
        dashboard="training",
        row="Now",
        shape="stat",
        queries=_gauge(
            "symile_run_info",
            "{{run}}: {{objective}}, {{precision}}, ZeRO {{zero_stage}}, {{version}}",
            "version",
            "objective",
            "precision",
            "zero_stage",
        ),
    ),
    Panel(
        key="loss",
        title="Loss",
        description="Global loss. Rising for hours: lower the learning rate; NaN: see the events and the guard.",
        dashboard="training",
        row="Progress",
        queries=(*_gauge("symile_train_loss"), *_gauge("symile_validation_loss", "{{run}} validation")),
        curves=(
            Curve(kind="train", key="loss", label="training"),
            Curve(kind="validation", key="loss", label="validation"),
        ),
    ),
    Panel(
        key="steps",
        title="Steps over time",
        description="A straight line is a healthy run. Steps down are restarts and rollbacks: work that was lost.",
        dashboard="training",
        row="Progress",
        unit="steps",
        queries=_gauge("symile_train_step"),
    ),
    Panel(
        key="learning_rate",
        title="Learning rate",
        description="Of the first group of parameters. Not as planned after a resume: compare the two configs.",
        dashboard="training",
        row="Optimizer",
        queries=_gauge("symile_train_learning_rate"),
        curves=(Curve(kind="train", key="learning_rate", label="learning rate"),),
    ),
    Panel(
        key="grad_norm",
        title="Gradient norm",
        description=(
            "Before clipping. Growing tenfold: an unstable run (lower optimizer.lr, raise optimizer.warmup_steps); "
            "near 0: a saturated loss, or frozen parameters."
        ),
        dashboard="training",
        row="Optimizer",
        queries=_gauge("symile_train_grad_norm"),
        curves=(Curve(kind="train", key="grad_norm", label="gradient norm"),),
        logarithmic=True,
    ),
    Panel(
        key="logit_scale",
        title="Logit scale",
        description="What logits are multiplied with. Growing without end: the loss is lowered by scale alone.",
        dashboard="training",
        row="Optimizer",
        queries=_gauge("symile_train_logit_scale"),
        curves=(Curve(kind="train", key="logit_scale", label="logit scale"),),
        logarithmic=True,
    ),
    Panel(
        key="loss_scale",
        title="Loss scale",
        description="Of fp16; 1 elsewhere. Falling below 1: gradients overflow for good; train in bf16.",
        dashboard="training",
        row="Optimizer",
        queries=_gauge("symile_train_loss_scale"),
        curves=(Curve(kind="train", key="loss_scale", label="loss scale"),),
        logarithmic=True,
    ),
    # Performance
    Panel(
        key="throughput",
        title="Throughput",
        description="Samples of all ranks. Falling: see where the time goes, and the slowest rank.",
        dashboard="performance",
        row="Speed",
        unit="samples/second",
        queries=(Query(expression=_by("sum", _rate(_of("symile_train_samples_total"))), legend="{{run}}"),),
        curves=(Curve(kind="train", key="samples_per_second", label="throughput"),),
    ),
    Panel(
        key="step_time",
        title="Step time",
        description=(
            "All ranks' times match, for they wait for each other: the mean tells the speed, the 95th percentile "
            "single slow steps (data, saves, a busy node)."
        ),
        dashboard="performance",
        row="Speed",
        unit="seconds",
        queries=(
            Query(expression=_mean("symile_train_step_duration_seconds", "$window", rank=True), legend="{{run}} mean"),
            *(
                Query(
                    expression=(
                        f"histogram_quantile({quantile}, "
                        f"{_by('sum', _rate(_of('symile_train_step_duration_seconds_bucket', rank=True)), 'le')})"
                    ),
                    legend=f"{{{{run}}}} {quantile * 100:g}%",
                )
                for quantile in (0.5, 0.95)
            ),
        ),
        curves=(Curve(kind="train", key="step_seconds", label="step time"),),
    ),
    Panel(
        key="flops",
        title="Model FLOP/s",
        description="What the model needs, recomputation not counted, over all ranks.",
        dashboard="performance",
        row="Speed",
        unit="flops/second",
        queries=(Query(expression=_by("sum", _rate(_of("symile_train_model_flops_total"))), legend="{{run}}"),),
        curves=(Curve(kind="train", key="flops_per_second", label="model FLOP/s"),),
    ),
    Panel(
        key="mfu",
        title="Model FLOPs utilization",
        description=(
            "Of what the devices can do at this precision. Low: look for the phase that grows (data_wait, gather), "
            "raise train.micro_batch_size, turn recomputation off."
        ),
        dashboard="performance",
        row="Speed",
        unit="ratio",
        queries=(
            Query(
                expression=(
                    f"{_by('sum', _rate(_of('symile_train_model_flops_total')))}"
                    f" / {_by('sum', _of('symile_device_peak_flops_per_second'))}"
                ),
                legend="{{run}}",
            ),
        ),
        curves=(Curve(kind="train", key="mfu", label="MFU"),),
        thresholds=(
            Threshold(value=0, level="bad"),
            Threshold(value=0.2, level="warning"),
            Threshold(value=0.35, level="good"),
        ),
        needs_gpu=True,
    ),
    Panel(
        key="phases",
        title="Phases of a step",
        description=(
            "Mean over the ranks; their sum is the time from step to step. data_wait grows: see the dashboard data; "
            "gather or backward: the network, or one slow rank; checkpoint: save less often, or on a faster disk."
        ),
        dashboard="performance",
        row="Where the time goes",
        unit="seconds",
        shape="stacked",
        queries=(Query(expression=_per_step("symile_train_phase_seconds_total", "phase"), legend="{{run}} {{phase}}"),),
        curves=(Curve(kind="train", key="phases.*"),),
    ),
    Panel(
        key="collectives",
        title="Collectives of a step",
        description=(
            "Those of objective and loop, waiting for slower ranks included, as a mean over the ranks. If it grows "
            "with the number of nodes the network is the limit: symile-dist plan says what to expect."
        ),
        dashboard="performance",
        row="Where the time goes",
        unit="seconds",
        shape="stacked",
        queries=(Query(expression=_per_step("symile_collective_seconds_total", "op"), legend="{{run}} {{op}}"),),
    ),
    Panel(
        key="own_work",
        title="A rank's own work per step",
        description=(
            "The phases in which a rank waits for no other. The slowest apart from the median: a straggler, which all "
            "wait for (throttled device, busy host, slow disk); the panel beside it names the rank."
        ),
        dashboard="performance",
        row="Ranks",
        unit="seconds",
        queries=_over_ranks(_OWN_WORK, *_SLOWEST),
        curves=(Curve(kind="train", key="slowest.seconds", label="slowest rank behind the median"),),
    ),
    Panel(
        key="slowest_ranks",
        title="Slowest ranks",
        description="Own work per step of the five slowest. The same one for long: leave its node out, or look at it.",
        dashboard="performance",
        row="Ranks",
        unit="seconds",
        shape="stat",
        queries=(Query(expression=f"topk by (run, run_id) (5, {_OWN_WORK})", legend="{{run}} rank {{rank}}"),),
        on_page=False,
    ),
    Panel(
        key="straggler",
        title="Slowest rank against the median",
        description="1: all are alike. 1.3 means that every step takes as long as a rank needs that is 30% slower.",
        dashboard="performance",
        row="Ranks",
        queries=(
            Query(
                expression=f"{_by('max', _OWN_WORK)} / ({_by('quantile(0.5', _OWN_WORK)} > 0)",
                legend="{{run}}",
            ),
        ),
        curves=(Curve(kind="train", key="slowest.ratio", label="slowest / median"),),
        thresholds=(Threshold(value=STRAGGLER_RATIO, level="warning"), Threshold(value=2, level="bad")),
    ),
    Panel(
        key="collective_wait",
        title="Time in collectives",
        description="Share of a rank's time. One far below the others is the one that they wait for.",
        dashboard="performance",
        row="Ranks",
        unit="ratio",
        queries=_over_ranks(
            _by("sum", _rate(_of("symile_collective_seconds_total", rank=True)), "rank"),
            ("max", "longest wait"),
            ("quantile(0.5", "median rank"),
            ("min", "shortest wait"),
        ),
    ),
    Panel(
        key="memory",
        title="Device memory",
        description=(
            "Of the fullest rank. Reserved far above allocated: fragmentation (PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True); near the device's size: lower train.micro_batch_size."
        ),
        dashboard="performance",
        row="Memory",
        unit="bytes",
        queries=tuple(
            Query(
                expression=_by("max", _of(f"symile_device_memory_{what}_bytes", rank=True)),
                legend=f"{{{{run}}}} {what}",
            )
            for what in ("allocated", "reserved", "peak")
        ),
        curves=(Curve(kind="train", key="memory_bytes", label="fullest rank"),),
        needs_gpu=True,
    ),
    Panel(
        key="host_memory",
        title="Memory of a rank's process",
        description=(
            "On the host, of the fullest rank, loader processes not counted. Growing without end: a leak; lower "
            "data.prefetch before the system kills the rank."
        ),
        dashboard="performance",
        row="Memory",
        unit="bytes",
        queries=(
            Query(
                expression=_by("max", _of("process_resident_memory_bytes", 'role="rank"', rank=True)), legend="{{run}}"
            ),
        ),
    ),
    Panel(
        key="out_of_memory",
        title="Allocations that failed",
        description="For want of device memory, per hour. Any at all: lower train.micro_batch_size.",
        dashboard="performance",
        row="Memory",
        queries=(Query(expression=_by("sum", _increase(_of("symile_device_ooms_total"))), legend="{{run}}"),),
        thresholds=(Threshold(value=1, level="bad"),),
    ),
    # Data
    Panel(
        key="data_wait",
        title="Waiting for data",
        description=(
            "Share of the time. Above 20%: raise data.loader_processes or data.prefetch, bring the data nearer, make "
            "the transforms cheaper; the queue beside it tells whether it is for good."
        ),
        dashboard="data",
        row="Waiting",
        unit="ratio",
        queries=_over_ranks(
            _by("sum", _rate(_of("symile_train_phase_seconds_total", 'phase="data_wait"', rank=True)), "rank"),
            ("max", "longest"),
            ("avg", "mean"),
        ),
        curves=(Curve(kind="train", key="data_wait_fraction", label="waiting for data"),),
        thresholds=(Threshold(value=0.1, level="warning"), Threshold(value=0.2, level="bad")),
    ),
    Panel(
        key="queue_depth",
        title="Batches that are ready",
        description="0 on any rank: all ranks wait for its data.",
        dashboard="data",
        row="Waiting",
        queries=_over_ranks(
            _of("symile_data_queue_depth", rank=True), ("min", "emptiest rank"), ("quantile(0.5", "median rank")
        ),
    ),
    Panel(
        key="data_bytes",
        title="Bytes of samples",
        description="Read by all ranks. Falling with the throughput, with data_wait up: the store or the network.",
        dashboard="data",
        row="Flow",
        unit="bytes/second",
        queries=(Query(expression=_by("sum", _rate(_of("symile_data_bytes_total", rank=True))), legend="{{run}}"),),
        curves=(Curve(kind="train", key="data_bytes_per_second", label="read"),),
    ),
    Panel(
        key="shards_opened",
        title="Shards opened per minute",
        description="By all ranks. 0 for long: the loaders stand still.",
        dashboard="data",
        row="Flow",
        queries=(
            Query(expression=f"60 * {_by('sum', _rate(_of('symile_data_shards_opened_total')))}", legend="{{run}}"),
        ),
    ),
    Panel(
        key="mixture",
        title="Mixture of the data sets",
        description="Share of the batches by data set. Not as the weights in data.train say: one data set has run dry.",
        dashboard="data",
        row="Flow",
        unit="ratio",
        shape="stacked",
        queries=(
            Query(
                expression=(
                    f"{_by('sum', _rate(_of('symile_data_samples_total')), 'dataset')}"
                    " / on (run, run_id) group_left () "
                    f"({_by('sum', _rate(_of('symile_data_samples_total')))} > 0)"
                ),
                legend="{{run}} {{dataset}}",
            ),
        ),
    ),
    Panel(
        key="missing",
        title="Missing modalities",
        description="Share of the samples without one; `symile-dist shards stats` says what it should be.",
        dashboard="data",
        row="Flow",
        unit="ratio",
        queries=(
            Query(
                expression=(
                    f"{_by('sum', _rate(_of('symile_data_modality_missing_total')), 'modality')}"
                    " / on (run, run_id) group_left () "
                    f"({_by('sum', _rate(_of('symile_data_samples_total')))} > 0)"
                ),
                legend="{{run}} {{modality}}",
            ),
        ),
        curves=(Curve(kind="train", key="missing/*"),),
    ),
    Panel(
        key="fetched",
        title="Fetched from object stores",
        description="By all nodes; 0 where the data is local. Above what is read: the cache is too small.",
        dashboard="data",
        row="Object stores",
        unit="bytes/second",
        queries=(Query(expression=_by("sum", _rate(_of("symile_data_fetched_bytes_total"))), legend="{{run}}"),),
    ),
    Panel(
        key="requests",
        title="Requests per second",
        description="To object stores, and those that had to be made again. Many again: the store throttles or fails.",
        dashboard="data",
        row="Object stores",
        queries=(
            Query(expression=_by("sum", _rate(_of("symile_data_requests_total"))), legend="{{run}} requests"),
            Query(expression=_by("sum", _rate(_of("symile_data_retries_total"))), legend="{{run}} again"),
        ),
    ),
    Panel(
        key="cache",
        title="Cache of shards",
        description="Of the fullest node. Full, and more is fetched than read: raise data.storage.cache_bytes.",
        dashboard="data",
        row="Object stores",
        unit="bytes",
        queries=_gauge("symile_data_cache_bytes"),
    ),
    Panel(
        key="read_errors",
        title="Reads that failed",
        description="After their retries, per hour, by kind. checksum and truncated: symile-dist shards verify.",
        dashboard="data",
        row="Faults",
        shape="stacked",
        queries=(
            Query(
                expression=_by("sum", _increase(_of("symile_data_read_errors_total")), "kind"),
                legend="{{run}} {{kind}}",
            ),
        ),
        thresholds=(Threshold(value=1, level="warning"),),
    ),
    Panel(
        key="dropped_samples",
        title="Samples that were dropped",
        description="Empty slots of batches, per hour, by reason; beyond data.max_bad_fraction the run stops.",
        dashboard="data",
        row="Faults",
        unit="samples",
        shape="stacked",
        queries=(
            Query(
                expression=_by("sum", _increase(_of("symile_data_dropped_samples_total")), "reason"),
                legend="{{run}} {{reason}}",
            ),
        ),
        thresholds=(Threshold(value=1, level="warning"),),
    ),
    # Reliability
    Panel(
        key="goodput",
        title="Goodput",
        description=(
            "Share of the wall time that went into steps that count: a checkpoint holds them. Low: see the states "
            "beside it."
        ),
        dashboard="reliability",
        row="Goodput",
        unit="ratio",
        shape="stat",
        queries=(Query(expression=_GOODPUT, legend="{{run}}"),),
        thresholds=(
            Threshold(value=0, level="bad"),
            Threshold(value=0.8, level="warning"),
            Threshold(value=0.95, level="good"),
        ),
    ),
    Panel(
        key="time_by_state",
        title="Wall time by state",
        description=(
            "lost: steps that a restart did again, so save more often (checkpoint.every: auto); restart and init: see "
            "the phases of a start; eval: validate less often."
        ),
        dashboard="reliability",
        row="Goodput",
        unit="seconds",
        shape="stacked",
        queries=_gauge("symile_run_time_seconds_total", "{{run}} {{state}}", "state"),
        curves=(Curve(kind="goodput", key="seconds.*"),),
    ),
    Panel(
        key="ranks",
        title="Ranks",
        description="Expected and answering. Fewer for minutes: see the alert RanksMissing, `symile-dist status RUN`.",
        dashboard="reliability",
        row="Restarts",
        queries=(
            *_gauge("symile_run_expected_ranks", "{{run}} expected"),
            Query(expression=_by("sum", _UP), legend="{{run}} answer"),
        ),
    ),
    Panel(
        key="restarts",
        title="Restarts",
        description="Per hour, by cause; `symile-dist status RUN` has each with its rank and step.",
        dashboard="reliability",
        row="Restarts",
        shape="stacked",
        queries=(
            Query(
                expression=_by("sum", _increase(_of("symile_run_restarts_total")), "cause"), legend="{{run}} {{cause}}"
            ),
        ),
        thresholds=(Threshold(value=1, level="warning"), Threshold(value=3, level="bad")),
    ),
    Panel(
        key="start",
        title="The last start",
        description=(
            "Seconds by phase, of the slowest rank; after a failure their sum is what it took to go on. wait: no node "
            "was free; checkpoint: verifying it."
        ),
        dashboard="reliability",
        row="Restarts",
        unit="seconds",
        shape="stacked",
        queries=_gauge("symile_run_start_seconds", "{{run}} {{phase}}", "phase"),
        curves=(Curve(kind="start", key="phases.*"),),
    ),
    Panel(
        key="skipped_steps",
        title="Skipped steps",
        description="Per hour, by reason. Single ones are the guard's work; rows of them: the alert GradSkipStorm.",
        dashboard="reliability",
        row="Guard",
        unit="steps",
        shape="stacked",
        queries=(
            Query(
                expression=_events("symile_train_skipped_steps_total", "reason"),
                legend="{{run}} {{reason}}",
            ),
        ),
        curves=(Curve(kind="train", key="skipped_steps", label="skipped since the start"),),
        thresholds=(Threshold(value=1, level="warning"),),
    ),
    Panel(
        key="rollbacks",
        title="Rollbacks",
        description="Per hour: rows of skipped steps made the run go back. More than one: see guard in the config.",
        dashboard="reliability",
        row="Guard",
        queries=(Query(expression=_events("symile_train_rollbacks_total"), legend="{{run}}"),),
        thresholds=(Threshold(value=1, level="warning"), Threshold(value=2, level="bad")),
    ),
    Panel(
        key="checkpoint_age",
        title="Since the last checkpoint",
        description="What a failure now would cost, beside the start. Growing without end: the alert CheckpointStale.",
        dashboard="reliability",
        row="Checkpoints",
        unit="seconds",
        queries=(
            Query(
                expression=f"time() - {_by('max', _of('symile_checkpoint_last_success_timestamp_seconds'))}",
                legend="{{run}}",
            ),
        ),
    ),
    Panel(
        key="checkpoint_seconds",
        title="Time of checkpoint work",
        description=(
            "save: from its beginning to its commit; stall: how long training stood still, which should be "
            "milliseconds; load: at the last start."
        ),
        dashboard="reliability",
        row="Checkpoints",
        unit="seconds",
        queries=(
            Query(expression=_mean("symile_checkpoint_duration_seconds", EVENTS_WINDOW, "op"), legend="{{run}} {{op}}"),
        ),
        curves=(
            Curve(kind="checkpoint", key="seconds", label="save"),
            Curve(kind="checkpoint", key="stall_seconds", label="stall"),
            Curve(kind="mirror", key="seconds", label="mirror"),
        ),
        logarithmic=True,
    ),
    Panel(
        key="checkpoint_bytes",
        title="Size of a checkpoint",
        description="All ranks' files. Times checkpoint.keep_last it has to fit on the disk.",
        dashboard="reliability",
        row="Checkpoints",
        unit="bytes",
        queries=_gauge("symile_checkpoint_size_bytes"),
        curves=(Curve(kind="checkpoint", key="bytes", label="size"),),
    ),
    Panel(
        key="write_failures",
        title="Writes that failed",
        description=(
            "Per hour: saves, copies to the mirror, damaged files that were found, records of the history. Look at the "
            "disk first: df, then symile-dist checkpoints verify RUN."
        ),
        dashboard="reliability",
        row="Checkpoints",
        queries=tuple(
            Query(expression=_events(metric), legend=f"{{{{run}}}} {label}")
            for metric, label in (
                ("symile_checkpoint_failures_total", "saves"),
                ("symile_mirror_failures_total", "mirror"),
                ("symile_checkpoint_damaged_files_total", "damaged files"),
                ("symile_history_write_errors_total", "history"),
            )
        ),
        thresholds=(Threshold(value=1, level="bad"),),
    ),
    # Contrastive
    Panel(
        key="total_correlation",
        title="Total correlation that is proven",
        description=(
            "Lower bound, log N - loss, and its ceiling log N. At the ceiling the batch says no more: raise "
            "train.global_batch_size; falling in validation alone: overfitting."
        ),
        dashboard="contrastive",
        row="Information",
        unit="nats",
        queries=(
            *_gauge("symile_contrastive_total_correlation_bound_nats", "{{run}} bound"),
            Query(
                expression=f"ln({_by('max', _of('symile_global_batch_size_samples'))})",
                legend="{{run}} ceiling",
            ),
        ),
        curves=(
            Curve(kind="train", key="total_correlation_bound", label="training"),
            Curve(kind="validation", key="total_correlation_bound", label="validation"),
            Curve(kind="validation", key="total_correlation_ceiling", label="ceiling in validation"),
        ),
    ),
    Panel(
        key="scores",
        title="Scores",
        description="Mean of positives and of negatives, before the logit scale. Growing together: nothing is learned.",
        dashboard="contrastive",
        row="Information",
        queries=(
            *_gauge("symile_contrastive_positive_score", "{{run}} positives"),
            *_gauge("symile_contrastive_negative_score", "{{run}} negatives"),
        ),
        curves=(
            Curve(kind="train", key="positive_score", label="positives"),
            Curve(kind="train", key="negative_score", label="negatives"),
        ),
    ),
    Panel(
        key="validation_accuracy",
        title="Retrieval in validation",
        description="Share of queries whose target is among the first k. Flat while the loss falls: overfitting.",
        dashboard="contrastive",
        row="Retrieval",
        unit="ratio",
        queries=_gauge("symile_contrastive_retrieval_accuracy_ratio", "{{run}} {{query}} @{{k}}", "query", "k"),
        curves=(Curve(kind="validation", key="accuracy/*"),),
    ),
    Panel(
        key="batch_accuracy",
        title="Retrieval in the batch",
        description=(
            "Among rank 0's rows of a training batch, 256 at most. One direction behind the others: that modality's "
            "encoder learns too slowly, or its data is poor."
        ),
        dashboard="contrastive",
        row="Retrieval",
        unit="ratio",
        queries=(
            Query(
                expression=_by("avg", _of("symile_contrastive_batch_accuracy_ratio"), "query"),
                legend="{{run}} {{query}}",
            ),
        ),
        curves=(Curve(kind="train", key="batch_accuracy/*"),),
    ),
    Panel(
        key="alignment",
        title="Alignment",
        description="Mean squared distance of a sample's representations. 0, with a uniformity of 0: all collapsed.",
        dashboard="contrastive",
        row="Geometry",
        queries=(Query(expression=_by("avg", _of("symile_contrastive_alignment")), legend="{{run}}"),),
        curves=(Curve(kind="train", key="alignment", label="alignment"),),
    ),
    Panel(
        key="uniformity",
        title="Uniformity",
        description="Lower is more uniform. Rising to 0 in one modality: its encoder gives one answer to all.",
        dashboard="contrastive",
        row="Geometry",
        queries=(
            Query(
                expression=_by("avg", _of("symile_contrastive_uniformity"), "modality"), legend="{{run}} {{modality}}"
            ),
        ),
        curves=(Curve(kind="train", key="uniformity/*"),),
    ),
    Panel(
        key="effective_rank",
        title="Effective rank",
        description="Dimensions that a modality uses, among rank 0's rows. Below 2: it collapses to a line.",
        dashboard="contrastive",
        row="Geometry",
        queries=(
            Query(
                expression=_by("min", _of("symile_contrastive_effective_rank"), "modality"),
                legend="{{run}} {{modality}}",
            ),
        ),
        curves=(Curve(kind="train", key="effective_rank/*"),),
        thresholds=(Threshold(value=0, level="bad"), Threshold(value=2, level="good")),
    ),
)

PANELS: dict[str, Panel] = {panel.key: panel for panel in _PANELS}

TERMINAL = ("loss", "throughput", "step_time", "grad_norm", "learning_rate", "phases", "validation_accuracy")
"""What the terminal shows, the most important first: it has little room."""
