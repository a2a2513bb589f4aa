"""Every Prometheus metric of a run, in one table: exporter, panels, alerts and tests read it.

Each rank and the driver serve their own endpoint. The labels `run`, `run_id`, `role` ("rank" or "driver"), `rank`,
`host` and `job` come from service discovery (see metrics/discovery.py) and are not repeated here. A label takes its
values from a bounded set, because each value is one more time series: either the set stands in the table, or the run's
config bounds it (the names of its modalities, say). A step, a shard or the text of an exception is never a label.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PREFIX = "symile_"
OTHER = "other"

Kind = Literal["counter", "gauge", "histogram"]
Owner = Literal["rank", "driver"]

# At most 12 each: a histogram costs one series per bucket and rank.
STEP_SECONDS_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CHECKPOINT_SECONDS_BUCKETS = (0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

PHASES = ("data_wait", "h2d", "forward", "gather", "loss", "backward", "optimizer", "checkpoint", "eval", OTHER)
COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "broadcast", "barrier")
SKIP_REASONS = ("nonfinite_loss", "nonfinite_grad", "loss_spike", "grad_spike", "overflow", "excluded", OTHER)
READ_ERROR_KINDS = ("open", "index", "truncated", "checksum", "decode", OTHER)
DROP_REASONS = ("unreadable",)
CHECKPOINT_OPERATIONS = ("save", "stall", "load", "verify")
RESTART_CAUSES = ("rank_lost", "node_lost", "hang", "out_of_memory", "preemption", "nonfinite", OTHER)
START_PHASES = ("detect", "wait", "workers", "import", "checkpoint", "data", "model", "load", "first_step")
RUN_STATES = ("init", "productive", "checkpoint", "eval", "restart", "lost")
OWN_PHASES = ("data_wait", "h2d", "forward", "loss")
"""In which a rank waits for no other: gather, backward and optimizer hold collectives, whose time is the slowest
rank's on all of them."""
STRAGGLER_RATIO = 1.3
"""From so many times the median rank's own work on, a rank is a straggler."""
BAD_ENDS = ("failed", "stopped", "refused")
"""What a run's status is when it has ended as nobody wished."""
RETRIEVAL_DEPTHS = ("1",)
Topic = Literal["resume", "stop", "skip", "spike", "rollback", "data", "checkpoint", "profile"]
"""What an event of the history is about."""


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric."""

    name: str
    """The full name as Prometheus shows it, prefix and `_total` included."""
    kind: Kind
    help: str
    unit: str = ""
    """Of the value: "seconds", "bytes", "samples", ...; empty for a pure number."""
    owner: Owner = "rank"
    """Who exports it: every rank, or the driver alone."""
    labels: tuple[str, ...] = ()
    label_values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Per label, all values it may take. A label that is absent here is bounded by the run's config."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, in `unit`, without +Inf."""


_TABLE = (
    # Progress
    MetricSpec(
        name="symile_train_steps_total",
        kind="counter",
        help="Optimizer steps this rank has taken, skipped ones included (the same on all ranks).",
        unit="steps",
    ),
    MetricSpec(
        name="symile_train_step",
        kind="gauge",
        help="Global step this rank has come to: it goes back where the run does.",
        unit="steps",
    ),
    MetricSpec(
        name="symile_train_samples_total",
        kind="counter",
        help="Samples this rank has trained on: the sum over ranks is the run's.",
        unit="samples",
    ),
    MetricSpec(name="symile_train_loss", kind="gauge", help="Global loss of the last step; NaN and Inf are kept."),
    MetricSpec(name="symile_validation_loss", kind="gauge", help="Loss of the last validation; served by rank 0."),
    MetricSpec(
        name="symile_train_learning_rate", kind="gauge", help="Learning rate of the first group, at the last record."
    ),
    MetricSpec(name="symile_train_grad_norm", kind="gauge", help="Global gradient norm before clipping, last step."),
    MetricSpec(
        name="symile_train_loss_scale",
        kind="gauge",
        help="Loss scale of mixed precision, at the last record; 1 where unused.",
    ),
    MetricSpec(
        name="symile_train_logit_scale",
        kind="gauge",
        help="Factor on the logits, exp already applied, at the last record.",
    ),
    MetricSpec(
        name="symile_train_skipped_steps_total",
        kind="counter",
        help="Steps whose update all ranks dropped together.",
        unit="steps",
        labels=("reason",),
        label_values={"reason": SKIP_REASONS},
    ),
    MetricSpec(
        name="symile_train_rollbacks_total",
        kind="counter",
        help="Times the run went back to a checkpoint because of skipped steps (the same on all ranks).",
    ),
    # Speed
    MetricSpec(
        name="symile_train_step_duration_seconds",
        kind="histogram",
        help="Wall time of one step, from asking for data to the end of the update.",
        unit="seconds",
        buckets=STEP_SECONDS_BUCKETS,
    ),
    MetricSpec(
        name="symile_train_phase_seconds_total",
        kind="counter",
        help="Wall time of this rank by phase of the step; each second counts once.",
        unit="seconds",
        labels=("phase",),
        label_values={"phase": PHASES},
    ),
    MetricSpec(
        name="symile_train_model_flops_total",
        kind="counter",
        help="Floating-point operations the model needed on this rank, recomputation not counted.",
        unit="flops",
    ),
    MetricSpec(
        name="symile_device_peak_flops_per_second",
        kind="gauge",
        help="What this rank's device can do at the training precision: MFU is the rate of model flops over it.",
        unit="flops/second",
    ),
    MetricSpec(
        name="symile_collective_seconds_total",
        kind="counter",
        help="Time of this rank in the collectives of objective and loop, waiting for slower ranks included.",
        unit="seconds",
        labels=("op",),
        label_values={"op": COLLECTIVES},
    ),
    # Memory
    MetricSpec(
        name="symile_device_memory_allocated_bytes",
        kind="gauge",
        help="Device memory held by tensors.",
        unit="bytes",
    ),
    MetricSpec(
        name="symile_device_memory_reserved_bytes",
        kind="gauge",
        help="Device memory held by the allocator.",
        unit="bytes",
    ),
    MetricSpec(
        name="symile_device_memory_peak_bytes",
        kind="gauge",
        help="Largest allocation since the process started.",
        unit="bytes",
    ),
    MetricSpec(name="symile_device_ooms_total", kind="counter", help="Allocations that failed for want of memory."),
    # Data
    MetricSpec(
        name="symile_data_bytes_total", kind="counter", help="Bytes of samples read by this rank.", unit="bytes"
    ),
    MetricSpec(
        name="symile_data_shards_opened_total", kind="counter", help="Shards this rank has opened.", unit="shards"
    ),
    MetricSpec(
        name="symile_data_read_errors_total",
        kind="counter",
        help="Reads that failed after their retries.",
        labels=("kind",),
        label_values={"kind": READ_ERROR_KINDS},
    ),
    MetricSpec(
        name="symile_data_samples_total",
        kind="counter",
        help="Slots of this rank's batches, by the dataset that they came from.",
        unit="samples",
        labels=("dataset",),
    ),
    MetricSpec(
        name="symile_data_fetched_bytes_total",
        kind="counter",
        help="Bytes that this node fetched from object stores; served by one rank of a node.",
        unit="bytes",
    ),
    MetricSpec(
        name="symile_data_requests_total",
        kind="counter",
        help="Requests that this node made to object stores; served by one rank of a node.",
    ),
    MetricSpec(
        name="symile_data_retries_total",
        kind="counter",
        help="Requests that had to be made again; served by one rank of a node.",
    ),
    MetricSpec(
        name="symile_data_cache_bytes",
        kind="gauge",
        help="Bytes in this node's cache of shards; served by one rank of a node.",
        unit="bytes",
    ),
    MetricSpec(
        name="symile_data_dropped_samples_total",
        kind="counter",
        help="Slots of the batch that stayed empty.",
        unit="samples",
        labels=("reason",),
        label_values={"reason": DROP_REASONS},
    ),
    MetricSpec(
        name="symile_data_modality_missing_total",
        kind="counter",
        help="Samples that came without this modality.",
        unit="samples",
        labels=("modality",),
    ),
    MetricSpec(
        name="symile_data_queue_depth",
        kind="gauge",
        help="Batches ready and waiting: 0 means that training waits for data.",
        unit="batches",
    ),
    # Checkpoint
    MetricSpec(
        name="symile_checkpoint_duration_seconds",
        kind="histogram",
        help="Wall time of checkpoint work; op=stall is the part of a save during which training stood still.",
        unit="seconds",
        labels=("op",),
        label_values={"op": CHECKPOINT_OPERATIONS},
        buckets=CHECKPOINT_SECONDS_BUCKETS,
    ),
    MetricSpec(
        name="symile_checkpoint_size_bytes",
        kind="gauge",
        help="Bytes of the last checkpoint, all ranks' files together; served by rank 0.",
        unit="bytes",
    ),
    MetricSpec(name="symile_checkpoint_failures_total", kind="counter", help="Saves that did not commit."),
    MetricSpec(name="symile_mirror_failures_total", kind="counter", help="Checkpoints that did not reach the mirror."),
    MetricSpec(
        name="symile_checkpoint_damaged_files_total",
        kind="counter",
        help="Files of checkpoints that were not as they had been written, when the run looked for one to go on from.",
    ),
    MetricSpec(
        name="symile_checkpoint_last_success_timestamp_seconds",
        kind="gauge",
        help="Unix time of the last commit (or of the checkpoint resumed from); absent before the first.",
        unit="seconds",
    ),
    # Contrastive
    MetricSpec(
        name="symile_contrastive_retrieval_accuracy_ratio",
        kind="gauge",
        help="Validation retrieval accuracy at k, 0 to 1; query is '<target>_from_<queries>'; served by rank 0.",
        unit="ratio",
        labels=("query", "k"),
        label_values={"k": RETRIEVAL_DEPTHS},
    ),
    MetricSpec(
        name="symile_contrastive_batch_accuracy_ratio",
        kind="gauge",
        help="Retrieval accuracy among rank 0's rows of a training batch (at most 256), from 0 to 1.",
        unit="ratio",
        labels=("query",),
    ),
    MetricSpec(
        name="symile_contrastive_positive_score", kind="gauge", help="Mean score of positives, before logit_scale."
    ),
    MetricSpec(
        name="symile_contrastive_negative_score", kind="gauge", help="Mean score of negatives, before logit_scale."
    ),
    MetricSpec(
        name="symile_contrastive_total_correlation_bound_nats",
        kind="gauge",
        help="Lower bound on the total correlation, log N - loss; its ceiling is ln(symile_global_batch_size_samples).",
        unit="nats",
    ),
    MetricSpec(
        name="symile_contrastive_alignment",
        kind="gauge",
        help=(
            "Mean squared distance of a sample's representations (Wang and Isola 2020): lower is closer; of rank 0's "
            "rows."
        ),
    ),
    MetricSpec(
        name="symile_contrastive_uniformity",
        kind="gauge",
        help=(
            "Log mean Gaussian potential of pairs (Wang and Isola 2020): 0 is collapsed, lower is more uniform; of "
            "rank 0's rows."
        ),
        labels=("modality",),
    ),
    MetricSpec(
        name="symile_contrastive_effective_rank",
        kind="gauge",
        help="Exp of the entropy of the normalized singular values: 1 is collapsed, D is full; of rank 0's rows.",
        unit="dimensions",
        labels=("modality",),
    ),
    MetricSpec(
        name="symile_history_write_errors_total",
        kind="counter",
        help="Records that did not reach history.jsonl or a logger (a full disk, say); training goes on.",
    ),
    MetricSpec(
        name="symile_run_start_seconds",
        kind="gauge",
        help="What the start of this group of ranks took, by phase; after a failure their sum is the recovery time.",
        unit="seconds",
        labels=("phase",),
        label_values={"phase": START_PHASES},
    ),
    # Run: one writer, because these are true of the group and outlive any rank
    MetricSpec(
        name="symile_global_batch_size_samples",
        kind="gauge",
        help="Samples of the global batch: the pool of negatives.",
        unit="samples",
        owner="driver",
    ),
    MetricSpec(
        name="symile_run_target_steps",
        kind="gauge",
        help="The step at which the run ends.",
        unit="steps",
        owner="driver",
    ),
    MetricSpec(
        name="symile_run_info",
        kind="gauge",
        help="Always 1; the labels describe the run.",
        owner="driver",
        labels=("version", "objective", "precision", "zero_stage"),
    ),
    MetricSpec(
        name="symile_run_expected_ranks",
        kind="gauge",
        help="Ranks the run should have: a lost target vanishes from `up`, so that only this shows the gap.",
        unit="ranks",
        owner="driver",
    ),
    MetricSpec(
        name="symile_run_restarts_total",
        kind="counter",
        help="Times the worker group was started again.",
        owner="driver",
        labels=("cause",),
        label_values={"cause": RESTART_CAUSES},
    ),
    MetricSpec(
        name="symile_run_time_seconds_total",
        kind="counter",
        # A counter cannot go back, so a step's time waits until its fate is known.
        help="Wall time by state; steps count as productive once a checkpoint holds them, else as lost.",
        unit="seconds",
        owner="driver",
        labels=("state",),
        label_values={"state": RUN_STATES},
    ),
)

METRICS: dict[str, MetricSpec] = {spec.name: spec for spec in _TABLE}


def known_or_other(name: str, label: str, value: str) -> str:
    """`value` where metric `name` allows it for `label`, else "other".

    For values from outside our code (the kind of a fault, the cause of a restart), which must not make new series.
    """
    allowed = METRICS[name].label_values[label]
    assert OTHER in allowed, f"{name}{{{label}}} has no value '{OTHER}'"
    return value if value in allowed else OTHER
