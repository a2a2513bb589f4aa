"""The typed config: what can be set, what it means, and how mistakes are told.

A config is a YAML file plus `key=value` overrides from the command line. Every mistake is found before any work
starts, all of them at once, each with its place and, where a name is close to a known one, a suggestion:

    demo.yaml:12: optimizer.lrr: unknown key; did you mean 'lr'?

This module imports neither torch, ray nor deepspeed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails

from symile_dist.registry import DECODERS, ENCODERS, LOGGERS, OBJECTIVES, TRANSFORMS, suggestion, unknown_name

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ConfigError(ValueError):
    """A user's mistake in a config; the message has one line per mistake."""


class Section(BaseModel):
    """Base of every section: unknown keys are mistakes, values cannot change once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, ser_json_inf_nan="constants"
    )


class Component(BaseModel):
    """A part chosen by name, with its own options beside the name.

    `name` is a registry name or `package.module:Name`. A bare string stands for a component without options.
    """

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants")

    name: str
    """Registry name, or package.module:Name for one of your own."""

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def with_absolute_paths(self) -> Component:
        """Options that name a file or folder that is there (a model, a mean), for another working directory."""

        def absolute(value: Any) -> Any:
            if isinstance(value, dict):  # a component within this one
                return {key: absolute(part) for key, part in value.items()}
            named = isinstance(value, str) and "/" in value and Path(value).expanduser().exists()
            return str(Path(value).expanduser().resolve()) if named else value

        return Component(name=self.name, **{key: absolute(value) for key, value in self.options.items()})


class RunConfig(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; letters, digits, '.', '_' and '-'."""
    directory: str | None = None
    """Where everything of the run is kept; `runs/NAME` when left out."""
    init_from: str | None = None
    """Warm start: the directory of another run whose newest weights this one begins with."""


def local_path(url: str) -> Path | None:
    """The path that a folder's name means; None for a URL of an object store.

    Raises ValueError for what is neither: `pipe:` would run a shell, and `a::b` chains file systems.
    """
    if "://" in url:
        scheme, _, rest = url.partition("://")
        if "::" in url or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or scheme in ("pipe", "reference", "dask"):
            raise ValueError(f"'{url}' is not a folder's path or URL, such as data/train or s3://bucket/train")
        if re.search(r"^[^/]*@", rest):
            raise ValueError(f"a URL of {scheme}:// must not hold a password: credentials come from the environment")
        if scheme in ("file", "local"):
            return Path(rest)
        return None
    if url.startswith(("pipe:", "s3:", "file:", "gs:", "http:", "https:")):
        raise ValueError(f"'{url}' is not a folder's path or URL, such as data/train or s3://bucket/train")
    return Path(url)


class StorageConfig(Section):
    endpoint_url: str | None = None
    """Of an S3 service other than AWS's, e.g. http://minio:9000; AWS_ENDPOINT_URL when left out."""
    profile: str | None = None
    """Profile in ~/.aws whose credentials are used. Keys themselves stand in no config: AWS_ACCESS_KEY_ID and the like
    are read from the environment."""
    anonymous: bool = False
    """Read public buckets without credentials."""
    timeout_seconds: PositiveFloat = 30
    """A request of which nothing comes for so long is tried again."""
    give_up_seconds: PositiveFloat = 300
    """Once requests for a shard have failed for so long, it counts as unreadable."""
    connections: Positive = 16
    """Requests that a node makes at once."""
    request_bytes: Annotated[int, Field(ge=64 * 1024)] = 8 * 1024**2
    """Size of one ranged request."""
    cache_directory: str | None = None
    """Where a node keeps fetched shards; `symile-dist` in XDG_CACHE_HOME or ~/.cache when left out. A local disk."""
    cache_bytes: Annotated[int, Field(ge=1024**2)] = 100 * 1024**3
    """Bytes that the cache may hold on a node."""

    @field_validator("endpoint_url")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^@\s]+", value):
            raise ValueError("should be http://HOST:PORT or https://HOST, without a password")
        return value


class DatasetConfig(Section):
    path: str
    """Folder of shards with their index: a path, s3://bucket/prefix or another URL that fsspec knows."""
    weight: PositiveFloat = 1.0
    """Its share of the samples, relative to the other datasets' weights."""


def _named_datasets(value: Any) -> Any:
    """A bare path stands for one dataset, called `train`."""
    return {"train": {"path": value}} if isinstance(value, str) else value


class DataConfig(Section):
    train: Annotated[
        dict[str, DatasetConfig],
        Field(min_length=1),
        BeforeValidator(_named_datasets, json_schema_input_type=str | dict[str, DatasetConfig]),
    ]
    """Training shards with their index (see `symile-dist shards index`): a folder, or a mixture of several as
    `{name: {path: ..., weight: ...}}`."""
    validation: str | None = None
    """Folder of validation shards; without it there is no validation in the loop."""
    test: str | None = None
    """Folder of test shards for `symile-dist evaluate`; the validation shards when left out."""
    source: str | None = None
    """Where the data comes from and how its shards are made: told where they are not there, or of another layout."""
    storage: StorageConfig = StorageConfig()
    """How shards at s3://... and other URLs are reached and cached."""
    require: Literal["all"] | Positive | list[str] = "all"
    """Which samples are used: those with `all` modalities, those with at least so many, or those with the named ones.
    A modality that a sample lacks comes as zeros, marked in `Batch.present`."""
    missing_probability: Fraction | dict[str, Fraction] = 0.0
    """For experiments: withholds each modality (or the named ones) of a training or validation sample with this
    probability; always the same ones of the same sample."""
    lanes: Positive | None = None
    """Number of lanes that the shards of an epoch are dealt to; must divide global_batch_size. Chosen from
    global_batch_size and the number of shards when left out."""
    window: Positive = 4
    """How many shards' samples a lane shuffles together."""
    loader_processes: NonNegative = 1
    """Processes per rank that read and decode; 0 reads in the training process. The order does not depend on it."""
    prefetch: Positive = 4
    """Batches that each loader process prepares ahead."""
    metadata_member: str = "json"
    """Member that holds a sample's metadata (JSON)."""
    label: str | None = "class"
    """Key in the metadata that holds the class which retrieval is judged by; null: each sample is its own class."""
    on_error: Literal["quarantine", "stop"] = "quarantine"
    """What an unreadable sample does: `quarantine` masks it, writes it down and leaves it out from the next epoch on;
    `stop` ends the run."""
    max_bad_fraction: Fraction = 0.01
    """The run stops when more than this fraction of the samples read so far (of at least 1,000) was unreadable."""


class ModalityConfig(Section):
    member: str
    """Suffix of the member in the shards, e.g. `png`, `flac`, `seg.npy`."""
    decoder: Component
    """From bytes to an array or a string."""
    transform: Component
    """From what the decoder gives to a tensor; augmentation happens here."""
    encoder: Component
    """From a batch of tensors to representations."""
    encoder_of: str | None = None
    """In place of `encoder`: the modality whose encoder, normalisation and missing_embedding this one shares, weights
    and all. So an augmented view is a modality of the same member."""
    lr: PositiveFloat | None = None
    """Learning rate of this encoder; optimizer.lr when left out."""
    freeze: bool = False
    """Keep the encoder's weights as they are."""
    missing_embedding: bool = False
    """Learn a vector that stands for this modality where a sample lacks it, in the place of what the encoder makes of
    the placeholder."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler.resolve_ref_schema(handler(schema))
        made["required"].remove("encoder")  # `_shared_encoders` fills it in
        made["anyOf"] = [{"required": ["encoder"]}, {"required": ["encoder_of"]}]
        return made


class ModelConfig(Section):
    embedding_dim: Positive = 256
    """D: length of every modality's representation."""
    normalization: Literal["layer_norm", "l2", "none"] = "layer_norm"
    """What ends every encoder. Symile-M3 and Symile-MIMIC use layer_norm, the XOR experiments l2."""
    logit_scale_init: Annotated[float, Field(allow_inf_nan=False)] = -4.0
    """Initial value of the learned log of the logits' multiplier; Symile-M3 uses -6 at D = 8192."""
    logit_scale_form: Literal["log", "raw"] = "log"
    """What is learned: the `log` of the multiplier (CLIP, Symile) or the multiplier itself, `raw` (WPSE).
    logit_scale_init is of the same form."""
    logit_scale_range: tuple[PositiveFloat, PositiveFloat] | None = None
    """Lowest and highest multiplier of the logits; CLIP and WPSE keep it in [1, 100]."""

    @model_validator(mode="after")
    def _begins_in_range(self) -> ModelConfig:
        init = self.logit_scale_init
        low, high = self.logit_scale_range or (0.0, float("inf"))
        if low > high:
            raise ValueError(f"logit_scale_range: {low:g} is more than {high:g}")
        if self.logit_scale_form == "raw" and init <= 0:
            raise ValueError(
                f"logit_scale_init: the multiplier itself (logit_scale_form: raw) is positive, not {init:g}"
            )
        if not low <= (init if self.logit_scale_form == "raw" else math.exp(min(init, 700.0))) <= high:
            raise ValueError(
                f"logit_scale_init: the multiplier begins outside of logit_scale_range, [{low:g}, {high:g}]"
            )
        return self


class InnerOptimizerConfig(Section):
    """Adam, for modules that an objective trains against itself (FactorCL's CLUB critics)."""

    lr: PositiveFloat = 1e-4
    """Learning rate, constant."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """AdamW (decoupled weight decay)."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.01
    """Applied to parameters of two or more dimensions only."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up."""
    min_lr_fraction: Fraction = 0.0
    """Where the cosine ends, as a fraction of lr."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""
    inner: InnerOptimizerConfig = InnerOptimizerConfig()
    """The second optimizer, of an objective's inner modules; of no effect where it has none."""


class TrainConfig(Section):
    steps: Positive
    """Optimizer steps of the whole run."""
    global_batch_size: Annotated[int, Field(ge=2)]
    """Samples per step over all ranks: the pool of negatives."""
    micro_batch_size: Positive | None = None
    """Samples of a rank that the encoders hold at once: bounds memory at the price of a second forward pass, and leaves
    the step as it is (GradCache). All of them when left out."""
    freeze_batch_norm: bool = False
    """Keep the running statistics of batch normalisations as they are; micro_batch_size asks for it."""
    sync_batch_norm: bool = False
    """Batch normalisations use mean and variance of the global batch in place of a rank's own rows."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the encoders; the objective is computed in fp32 in any. fp16 scales the loss (its options:
    deepspeed.fp16) and skips steps whose gradients exceed its range; it needs zero_stage 1 or more."""
    float32_matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """How float32 matrices are multiplied, in encoders and objective: `high` lets CUDA devices take TF32, `medium` also
    lets CPUs that can take bf16, with sums in float32 (torch.set_float32_matmul_precision)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 1 shards the optimizer state, 2 also gradients, 3 also parameters."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in the host's memory: the optimizer's state and step (from zero_stage 1 on), or the parameters too
    (at zero_stage 3)."""
    partitioned_init: bool = False
    """At zero_stage 3: partition every encoder as soon as it is built, so that no device ever holds a whole one. The
    weights are those of any other stage."""
    activation_checkpointing: bool = False
    """Compute what encoders need for the backward pass a second time, in place of keeping it: less memory, a third more
    work. By layers where an encoder names them (`checkpointed`), else all of it at once."""
    compile: bool = False
    """Compile the encoders by torch.compile; the first steps take minutes."""
    log_every: Positive = 10
    """Steps between records in the history."""
    profile_steps: tuple[Positive, Positive] | None = None
    """[first, last]: steps of which torch's profiler writes a trace into RUN/profile, and what bounds their phases."""
    profile_ranks: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0])
    """The ranks that are profiled."""


class GuardConfig(Section):
    action: Literal["off", "warn", "skip"] = "warn"
    """What a spike does, a loss or a gradient norm far above those of the steps before: `warn` tells of it, `skip` lets
    no rank take the step. A step whose loss or gradients are not finite is always skipped."""
    window: Annotated[int, Field(ge=4)] = 128
    """Steps that a spike is judged by: the last ones that were taken. Judging begins when half of them are there."""
    threshold: PositiveFloat = 6.0
    """A spike lies more than so many standard deviations (robust ones: 1.4826 median absolute deviations) above the
    window's median; gradient norms are compared by their logs."""
    patience: Positive = 10
    """So many skipped steps in a row, and the run goes back to a checkpoint from before them."""
    margin: NonNegative = 20
    """How many of the last steps before such a row are distrusted, too: what spoils the weights comes before it shows.
    The checkpoint is from before them, and their batches are left out with those of the row."""
    max_rollbacks: NonNegative = 2
    """How often the run goes back; then it stops, and names the samples of the last batch. 0: it stops at once."""
    exclude: list[Positive] = []
    """Steps, by their number in the history, that are left out: their batches are consumed, and no more."""


class ValidationConfig(Section):
    every: Positive | None = None
    """Steps between validations; without it, none but the one at the end."""
    max_samples: Positive = 10_000
    """At most this many samples of the validation shards, from the first on."""
    best_metric: str = "loss"
    """Which validation value names the best step: `loss`, or an accuracy such as `accuracy/image_from_audio_text`."""


class CandidatesConfig(Section):
    query: str
    """Key in the metadata, or column of `file`: equal for all candidates of one query (Symile-MIMIC: label_hadm_id)."""
    positive: str
    """Key or column that is 1 where a candidate is the query's own, and 0 for a negative (Symile-MIMIC: label)."""
    file: str | None = None
    """CSV that lists the candidates; without it every sample of the split is one and says of which query."""
    sample: str | None = None
    """With `file`: the column, and key in the metadata, that names a candidate's sample (Symile-MIMIC: hadm_id)."""

    @model_validator(mode="after")
    def _both_or_none(self) -> CandidatesConfig:
        if (self.file is None) != (self.sample is None):
            raise ValueError("`file` and `sample` go together")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluationConfig(Section):
    directions: Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])] = ["auto"]
    """Which retrieval is measured: names such as `image_from_audio_text`, `others` (each modality from all the others),
    `singles` (from each other one), `all` subsets of the others; `auto` is `all` for up to four modalities, `others`
    and `singles` beyond."""
    recall_at: list[Positive] = [1, 5, 10]
    """The k of recall at k."""
    resamples: Annotated[int, Field(ge=2, le=100_000)] = 10
    """Of the bootstrap."""
    candidates: CandidatesConfig | None = None
    """Judge retrieval among a few candidates that the split names for each query, and not among all samples."""
    zero_shot: str | None = None
    """YAML file of classes and prompt templates for zero-shot classification: docs/evaluation.md."""


class CheckpointConfig(Section):
    every: Positive | Literal["auto"] | None = None
    """Steps between checkpoints; `auto`: as often as costs least, by what a save holds up and how often the run fails.
    Without it, and without every_minutes, only the last step is saved."""
    every_minutes: PositiveFloat | None = None
    """Minutes between checkpoints, beside or in place of steps."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """How many of the newest are kept; the best by validation is kept beside them."""
    keep_every: Positive | None = None
    """Checkpoints of steps that this divides are kept for good."""
    max_failures: Positive = 3
    """The run stops when this many saves in a row have failed, of a full disk for instance."""
    mirror: str | None = None
    """Folder or URL (s3://bucket/prefix) that has the checkpoints too, one run's alone: a run whose directory is lost
    goes on from there. Training does not wait for it. Reached as data.storage says."""

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_auto(cls, value: Any) -> Any:
        if value is None or value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError("should be a number of steps, 1 or more, or auto")

    @field_validator("mirror")
    @classmethod
    def _a_folder(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value or re.match(r"\w+:/(?!/)|\w+//", value) or re.fullmatch(r"\w+://+", value):
            raise ValueError("should be a folder or a URL such as s3://bucket/prefix")
        path = local_path(value)
        return value if path is None else str(path.expanduser())


class RayConfig(Section):
    num_workers: Positive = 1
    """Number of ranks (world_size)."""
    min_workers: Positive | None = None
    """Elastic: on a cluster with too little for num_workers the run takes as many ranks as it holds and as divide the
    global batch, but no fewer than these; it saves and takes more once nodes have come. The data stream and the loss
    are the same. Without it such a run is refused, or waits after a failure."""
    cpus_per_worker: PositiveFloat = 1
    """CPUs that Ray reserves for a rank."""
    gpus_per_worker: Literal[0, 1] = 0
    """GPUs of a rank: 1 trains on GPUs over NCCL, 0 on CPUs over gloo."""
    threads_per_worker: Positive | None = None
    """torch threads of a rank; cpus_per_worker when left out."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """So many failures in a row, without a new checkpoint between them, are survived by a restart; -1: any number."""
    max_repeats: Annotated[int, Field(ge=0)] = 3
    """A step in which the ranks fail so many times in a row ends the run: its batch is to blame; 0: never."""
    max_node_failures: Annotated[int, Field(ge=0)] = 3
    """A node whose ranks have failed so often is left out where the rest of the cluster holds the run; 0: never."""
    wait_for_nodes_seconds: Annotated[float, Field(ge=0)] = 1800
    """How long a run waits, after a failure, for a cluster that holds too few ranks for it."""
    grace_seconds: PositiveFloat = 60
    """How long SIGTERM waits for the ranks to save and stop."""
    hang_seconds: PositiveFloat | None = 600
    """Ranks that finish no step for so long are stuck: their stacks go to RUN/logs, and the group is restarted. Loading
    counts as a step, and so does validation. None: never."""
    collective_timeout_seconds: PositiveFloat = 600
    """A collective that takes longer is a failure."""


class WandbConfig(Section):
    """Options of the logger `wandb`. The key is WANDB_API_KEY's, or that of `wandb login`."""

    project: str = "symile-dist"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    mode: Literal["online", "offline"] | None = None
    """Online when left out, unless WANDB_MODE says otherwise; `offline` keeps all in RUN/wandb."""
    base_url: str | None = None
    """Of a server of one's own; WANDB_BASE_URL when left out."""

    @field_validator("base_url")
    @classmethod
    def _a_server(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^@\s]+", value):
            raise ValueError("should be http://HOST:PORT or https://HOST, without a key")
        return value


class MlflowConfig(Section):
    """Options of the logger `mlflow`. Credentials are those of MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD or
    MLFLOW_TRACKING_TOKEN."""

    tracking_uri: str | None = None
    """http(s)://HOST, a folder, or a database; MLFLOW_TRACKING_URI when left out."""
    experiment: str = "symile-dist"
    tags: dict[str, str] = {}

    @field_validator("tracking_uri")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        if value is not None and re.search(r"://[^/]*@", value):
            raise ValueError("must not hold a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        if value is not None and re.match(r"(sqlite:///|file:)(?!/)", value):
            raise ValueError("should name an absolute path, such as sqlite:////data/mlflow.db")
        return value


LOGGER_OPTIONS: dict[str, type[Section]] = {"wandb": WandbConfig, "mlflow": MlflowConfig}


class MetricsConfig(Section):
    address: str = "127.0.0.1"
    """Address that each rank's Prometheus endpoint, and the driver's page, listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the endpoint of a node's first rank, its next ones' follow; 0 lets the system choose."""
    driver_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the driver's page, its own metrics (/metrics) and its list of endpoints (/targets); 0 lets the system
    choose."""
    token_file: str | None = None
    """File whose content every request to these ports must carry, as a bearer token; all nodes read it."""
    enabled: bool = True
    """Serve Prometheus metrics."""
    loggers: dict[str, dict[str, Any]] = {}
    """Ordered map: name -> options. Where records go beside history.jsonl and TensorBoard: wandb, mlflow, or
    package.module:Name for one of your own. Keys and passwords stand in no config."""

    @field_validator("loggers", mode="before")
    @classmethod
    def _no_options(cls, value: Any) -> Any:
        return {name: options or {} for name, options in value.items()} if isinstance(value, dict) else value


class Config(Section):
    run: RunConfig
    """What the run is called and where it is kept."""
    seed: Annotated[int, Field(ge=0, le=2**40)] = 0
    """Seed of everything: weights, order of the data, augmentation, negatives."""
    data: DataConfig
    """Where the samples come from, and in which order."""
    modalities: Annotated[dict[str, ModalityConfig], Field(min_length=2)]
    """Ordered map: name of a modality -> how it is read and encoded. Any names, two or more."""
    model: ModelConfig = ModelConfig()
    """What the encoders share."""
    objective: Component = Component(name="symile")
    """What is learned: a name from OBJECTIVES or package.module:Name."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    train: TrainConfig
    """The loop."""
    guard: GuardConfig = GuardConfig()
    """Steps that are better not taken."""
    validation: ValidationConfig = ValidationConfig()
    """Validation in the loop."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What `symile-dist evaluate` measures; training does not depend on it."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    ray: RayConfig = RayConfig()
    """Workers."""
    metrics: MetricsConfig = MetricsConfig()
    """Prometheus."""
    deepspeed: dict[str, Any] = {}
    """Expert keys merged over the DeepSpeed config that is derived from this one."""

    @model_validator(mode="before")
    @classmethod
    def _shared_encoders(cls, value: Any) -> Any:
        """`encoder_of` gives a modality the other's `encoder`, so that whoever asks for it need not know."""
        modalities = value.get("modalities") if isinstance(value, dict) else None
        if not isinstance(modalities, dict):
            return value
        filled = dict(modalities)
        for name, modality in modalities.items():
            if isinstance(modality, dict) and modality.get("encoder_of") and "encoder" not in modality:
                other = modalities.get(modality["encoder_of"])
                # Where there is none, `_cross_checks` says so.
                encoder = other.get("encoder", "identity") if isinstance(other, dict) else "identity"
                filled[name] = {**modality, "encoder": encoder}
        return {**value, "modalities": filled}

    @model_validator(mode="after")
    def _mirror_elsewhere(self) -> Self:
        path = local_path(self.checkpoint.mirror) if self.checkpoint.mirror else None
        if path is not None:
            mirror, run = path.absolute(), self.run_directory.absolute()
            if mirror == run or mirror in run.parents or run in mirror.parents:
                raise ValueError(
                    f"checkpoint.mirror: {path} and the run's directory {self.run_directory} lie in another"
                )
        return self

    @property
    def run_directory(self) -> Path:
        return Path(self.run.directory or f"runs/{self.run.name}")

    @property
    def world_size(self) -> int:
        return self.ray.num_workers

    @property
    def encoded_at_once(self) -> int:
        """Samples of a rank that the encoders hold at once."""
        local = self.train.global_batch_size // self.world_size
        return min(self.train.micro_batch_size or local, local)

    def with_absolute_paths(self) -> Config:
        """The same config for processes with another working directory, and for a `resume` from another one."""

        def absolute(path: str | None) -> str | None:
            return path if path is None or "://" in path else str(Path(path).resolve())

        run = {"directory": absolute(str(self.run_directory)), "init_from": absolute(self.run.init_from)}
        data: dict[str, Any] = {key: absolute(getattr(self.data, key)) for key in ("validation", "test")}
        data["train"] = {
            name: dataset.model_copy(update={"path": absolute(dataset.path)})
            for name, dataset in self.data.train.items()
        }
        storage = {"cache_directory": absolute(self.data.storage.cache_directory)}
        data["storage"] = self.data.storage.model_copy(update=storage)
        evaluation: dict[str, Any] = {"zero_shot": absolute(self.evaluation.zero_shot)}
        if self.evaluation.candidates:
            file = absolute(self.evaluation.candidates.file)
            evaluation["candidates"] = self.evaluation.candidates.model_copy(update={"file": file})
        loggers = {name: dict(options) for name, options in self.metrics.loggers.items()}
        for options in loggers.values():
            uri = options.get("tracking_uri")  # MLflow's, which may be a folder
            if isinstance(uri, str) and ":" not in uri and not uri.startswith("databricks"):
                options["tracking_uri"] = str(Path(uri).expanduser().resolve())
        parts = ("decoder", "transform", "encoder")
        modalities = {
            name: modality.model_copy(update={part: getattr(modality, part).with_absolute_paths() for part in parts})
            for name, modality in self.modalities.items()
        }
        return self.model_copy(
            update={
                "run": self.run.model_copy(update=run),
                "checkpoint": self.checkpoint.model_copy(update={"mirror": absolute(self.checkpoint.mirror)}),
                "data": self.data.model_copy(update=data),
                "modalities": modalities,
                "evaluation": self.evaluation.model_copy(update=evaluation),
                "metrics": self.metrics.model_copy(
                    update={"loggers": loggers, "token_file": absolute(self.metrics.token_file)}
                ),
            }
        )

    def digest(self) -> str:
        """sha256 of all that training depends on: equal digests continue each other's checkpoints."""
        told: Any = {
            "run": {"name", "directory"},
            "data": {"source"},
            "train": {"profile_steps", "profile_ranks"},
            "evaluation": True,
            "metrics": True,
        }
        content = self.model_dump(mode="json", exclude=told)
        content["modalities"] = list(content["modalities"].items())  # their order decides the negatives
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        content = self.model_dump(mode="json")
        for modality in content["modalities"].values():
            if modality["encoder_of"]:  # an override of the other's encoder is to hold here too
                del modality["encoder"]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


# Keys of the DeepSpeed config that follow from ours: to set them in `deepspeed:` would make two truths.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "nothing: accumulation would shrink the pool of negatives",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "bf16": "train.precision",
    "fp16.enabled": "train.precision",
}


def _cross_checks(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    """Mistakes that no single field shows: (path, message)."""
    batch, world = config.train.global_batch_size, config.world_size
    if batch % world:
        below, above = batch // world * world, -(-batch // world) * world
        yield (
            ("train", "global_batch_size"),
            f"{batch} is not divisible by ray.num_workers = {world}; use {f'{below} or ' if below else ''}{above}",
        )
    if config.ray.min_workers and config.ray.min_workers > world:
        yield ("ray", "min_workers"), f"{config.ray.min_workers} is more than ray.num_workers = {world}"
    if config.data.lanes and batch % config.data.lanes:
        yield (
            ("data", "lanes"),
            f"{config.data.lanes} does not divide train.global_batch_size = {batch}; leave it out to have it chosen",
        )
    yield from _data_checks(config)
    if config.validation.every and not config.data.validation:
        yield ("validation", "every"), "needs data.validation, a folder of validation shards"
    for key, folder in (("directory", config.run.directory), ("init_from", config.run.init_from)):
        if folder and "://" in folder:
            yield ("run", key), "only local (or mounted) folders are supported"
    if config.checkpoint.every == "auto" and config.checkpoint.every_minutes:
        yield (
            ("checkpoint", "every_minutes"),
            "leave it out where checkpoint.every is auto",
        )
    if config.metrics.port and config.metrics.port + world - 1 > 65535:
        yield ("metrics", "port"), f"port + ray.num_workers - 1 = {config.metrics.port + world - 1} exceeds 65535"
    if config.metrics.port and config.metrics.port <= config.metrics.driver_port < config.metrics.port + world:
        yield ("metrics", "driver_port"), f"is among the ranks' ports, from metrics.port = {config.metrics.port} on"
    for key, instead in DERIVED_DEEPSPEED_KEYS.items():
        section, _, name = key.partition(".")
        given = config.deepspeed.get(section, {})
        if (section in config.deepspeed and not name) or (isinstance(given, dict) and name in given):
            yield ("deepspeed", *key.split(".")), f"follows from the config; set {instead} in its place"
    yield from _training_checks(config)
    zero = config.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        yield ("deepspeed", "zero_optimization"), "should be a map of DeepSpeed's keys"
    if isinstance(zero, dict) and "stage" in zero:
        path = ("deepspeed", "zero_optimization", "stage")
        yield path, "follows from the config; set train.zero_stage in its place"
    if isinstance(zero, dict) and zero.get("compute_grad_norm") is False:
        yield ("deepspeed", "zero_optimization", "compute_grad_norm"), "the gradient norm is needed: leave it out"
    for name in config.modalities:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            yield ("modalities", name), "a modality's name is made of letters, digits and '_', and begins with a letter"
        yield from _sharing_checks(config, name)
    if all(modality.freeze or modality.encoder_of for modality in config.modalities.values()):
        yield ("modalities",), "every encoder is frozen: there is nothing to train"


def _training_checks(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    train = config.train
    needed = {"none": 0, "optimizer": 1, "parameters": 3}[train.offload]
    if train.zero_stage < needed:
        yield ("train", "offload"), f"'{train.offload}' needs train.zero_stage = {needed}, it is {train.zero_stage}"
    if train.partitioned_init and train.zero_stage != 3:
        yield ("train", "partitioned_init"), f"needs train.zero_stage = 3, it is {train.zero_stage}"
    if train.precision == "fp16" and train.zero_stage == 0:
        yield ("train", "precision"), "fp16 needs train.zero_stage = 1 or more: DeepSpeed scales no loss without ZeRO"
    if train.compile and train.zero_stage == 3:
        yield ("train", "compile"), "gains nothing at train.zero_stage = 3, which gathers weights between the layers"
    if train.profile_steps:
        first, last = train.profile_steps
        if not first <= last <= train.steps:
            yield ("train", "profile_steps"), f"should be [first, last] of the steps 1 to train.steps = {train.steps}"
    for rank in train.profile_ranks if train.profile_steps else ():
        if rank >= config.world_size:
            yield ("train", "profile_ranks"), f"there is no rank {rank}: ray.num_workers = {config.world_size}"
    if train.sync_batch_norm and train.freeze_batch_norm:
        yield ("train", "sync_batch_norm"), "there is nothing to synchronise with train.freeze_batch_norm"


PICKLES = ("pickle", "pkl", "pyd", "pt", "pth", "joblib")
"""Suffixes of files that run code when they are read."""


def _data_checks(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    data, modalities = config.data, config.modalities
    folders: list[tuple[tuple[str, ...], str]] = [
        (("data", "train", name), dataset.path) for name, dataset in data.train.items()
    ]
    folders += [(("data", "validation"), data.validation or "."), (("data", "test"), data.test or ".")]
    for path, folder in folders:
        try:
            local_path(folder)
        except ValueError as error:
            yield path, str(error)
    for name in data.train:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            yield ("data", "train", name), "a dataset's name is made of up to 64 letters, digits, '_' and '-'"
    if isinstance(data.require, int) and data.require > len(modalities):
        yield ("data", "require"), f"{data.require} of {len(modalities)} modalities"
    named = data.require if isinstance(data.require, list) else []
    if isinstance(data.require, list) and not named:
        yield ("data", "require"), "names no modality; write `all`, a number or a list of modalities"
    missing = data.missing_probability if isinstance(data.missing_probability, dict) else {}
    for key, names in (("require", named), ("missing_probability", missing)):
        for name in names:
            if name not in modalities:
                yield ("data", key), f"unknown modality '{name}'{suggestion(name, list(modalities))}"
    for name, modality in modalities.items():
        suffix = modality.member.lower().rpartition(".")[2]
        if suffix in PICKLES and ":" not in modality.decoder.name:
            yield ("modalities", name, "member"), f"a '.{suffix}' file is a pickle, which runs code when it is read"


def _sharing_checks(config: Config, name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    modality, path = config.modalities[name], ("modalities", name)
    other = modality.encoder_of
    if other is None:
        return
    if other not in config.modalities or other == name:
        others = [known for known in config.modalities if known != name]
        yield (*path, "encoder_of"), f"'{other}' is no other modality{suggestion(other, others)}"
    elif config.modalities[other].encoder_of:
        yield (*path, "encoder_of"), f"'{other}' has no encoder of its own: name {config.modalities[other].encoder_of}"
    elif modality.encoder != config.modalities[other].encoder:
        yield (*path, "encoder"), f"is the encoder of {other} (encoder_of): leave it out"
    for key, value in (("lr", None), ("freeze", False), ("missing_embedding", False)):
        if getattr(modality, key) != value:
            yield (*path, key), f"the encoder is that of {other}: set modalities.{other}.{key}"


def _component_checks(config: Config) -> Iterator[tuple[tuple[str, ...], str]]:
    components: list[tuple[tuple[str, ...], Component, dict[str, str], str]] = [
        (("objective",), config.objective, OBJECTIVES, "objective")
    ]
    for name, modality in config.modalities.items():
        components += [
            (("modalities", name, "decoder"), modality.decoder, DECODERS, "decoder"),
            (("modalities", name, "transform"), modality.transform, TRANSFORMS, "transform"),
            (("modalities", name, "encoder"), modality.encoder, ENCODERS, "encoder"),
        ]
    for path, component, registry, kind in components:
        problem = unknown_name(component.name, registry, kind)
        if problem:
            yield (*path, "name"), problem
    for name, options in config.metrics.loggers.items():
        for place, problem in _logger_problems(name, options):
            yield ("metrics", "loggers", name, *place), problem


def _logger_problems(name: str, options: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """No message shows a value: it may be a secret."""
    problem = unknown_name(name, LOGGERS, "logger")
    if problem:
        yield (), problem
    words = "secrets stand in no config: they are read from the environment"
    for place in _secret_keys(options, ()):
        yield place, words
        return
    if name in LOGGER_OPTIONS:
        try:
            LOGGER_OPTIONS[name].model_validate(options)
        except ValidationError as error:
            for detail in error.errors():
                place = tuple(str(part) for part in detail["loc"])
                known = suggestion(place[-1], list(LOGGER_OPTIONS[name].model_fields))
                told = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
                yield place, f"unknown option{known}" if detail["type"] == "extra_forbidden" else told
            return
    if re.search(r"://([^/\s]*@|[^\s]*[?&][^=\s]*(key|token|secret|password)=)", str(options)):
        yield (), f"a URL with a user or a key: {words}"


def _secret_keys(value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Where options, at any depth, have a key that is called like a secret."""
    if isinstance(value, dict):
        for key, part in value.items():
            name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(key)).lower()
            if part and re.search(r"(^|[_-])(api_?key|key|token|password|passwd|secret|credential|auth)s?$", name):
                yield (*place, str(key))
            yield from _secret_keys(part, (*place, str(key)))
    elif isinstance(value, list):
        for part in value:
            yield from _secret_keys(part, place)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number (YAML 1.2; PyYAML reads a string) and refuses duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)

KeyPath = tuple[str, ...]
MAX_VALUES = 100_000
"""In a config, aliases expanded."""


def _compose(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Parses YAML into plain data and the line on which each key stands."""
    lines: dict[KeyPath, int] = {}

    visited = itertools.count(1)

    def walk(node: yaml.Node, path: KeyPath) -> None:
        if next(visited) > MAX_VALUES:  # aliases of aliases: a few lines of YAML may stand for billions of values
            raise ConfigError(f"{source}: holds more than {MAX_VALUES} values; does an alias (*name) repeat too much?")
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                key = (*path, str(key_node.value))
                line = key_node.start_mark.line + 1
                if key in lines:
                    name = ".".join(key)
                    raise ConfigError(f"{source}:{line}: {name}: the key stands twice (also in line {lines[key]})")
                lines[key] = line
                walk(value_node, key)
        elif isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                lines[(*path, str(index))] = item.start_mark.line + 1
                walk(item, (*path, str(index)))

    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {}, {}
            walk(node, ())
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _apply_override(data: dict[str, Any], override: str) -> tuple[KeyPath, KeyPath | None]:
    """Sets a key; returns its path and that of a component whose short form became a map on the way."""
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"override '{override}': write key=value, e.g. train.steps=100")
    value, _ = _compose(text, f"override '{override}'") if text.strip() else (None, {})
    if path[0] == "objective" and len(path) > 1 and data.get("objective") is None:
        data["objective"] = Config.model_fields["objective"].default.name  # an option of the default objective
    at: Any = data
    expanded: KeyPath | None = None
    for depth, part in enumerate(path[:-1]):
        child = at.setdefault(part, {})
        if child is None:
            child = at[part] = {}
        if isinstance(child, str):  # a component's short form: `encoder: mlp`
            child = at[part] = {"name": child}
            expanded = path[: depth + 1]
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': {'.'.join(path[: depth + 1])} is a value, not a section")
        at = child
    at[path[-1]] = value
    return path, expanded


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    """The section whose keys are looked up at `path`, for suggestions."""
    model: type[BaseModel] | None = Config
    for part in path:
        if model is None:
            return None
        if model is Config and part == "modalities":
            return ModalityConfig if len(path) == 2 else (Component if len(path) == 3 else None)
        if model is DataConfig and part == "train":
            return DatasetConfig
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return model


def _message(error: ErrorDetails, path: KeyPath) -> str:
    if error["type"] == "extra_forbidden":
        model = _model_at(path[:-1])
        hint = suggestion(path[-1], list(model.model_fields)) if model else ""
        return f"unknown key{hint}"
    if error["type"] == "missing":
        return "is missing"
    value = error.get("input")
    shown = f" (got {value!r})" if not isinstance(value, dict | list) or len(repr(value)) < 40 else ""
    return error["msg"].removeprefix("Value error, ").replace("Input should", "should") + shown


class LoadedConfig:
    """A config with, for every key that was set, where it was set."""

    def __init__(self, config: Config, origins: dict[KeyPath, str]) -> None:
        self.config = config
        self.origins = origins


def parse_config(text: str, source: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads a config from YAML text. Raises ConfigError with one line per mistake."""
    data, lines = _compose(text, source)
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: should be a map of sections, such as `train:` and `data:`")
    origins: dict[KeyPath, str] = {path: f"{source}:{line}" for path, line in lines.items()}
    problems: list[str] = []
    for override in overrides:
        try:
            path, expanded = _apply_override(data, override)
            if expanded and expanded in origins:
                origins[(*expanded, "name")] = origins[expanded]
            # What stood below the key is gone, and so is where it stood.
            origins = {other: place for other, place in origins.items() if other[: len(path)] != path}
            origins[path] = f"override '{override}'"
        except ConfigError as error:
            problems.append(str(error))

    def place(path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if path[:length] in origins:
                return origins[path[:length]]
        return source

    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        for detail in error.errors():
            # pydantic names the key of a mapping as '[key]' beside the path; only plain parts are keys of ours.
            path = tuple(str(part) for part in detail["loc"] if part != "[key]")
            problems.append(f"{place(path)}: {'.'.join(path)}: {_message(detail, path)}")
    else:
        for path, message in (*_cross_checks(config), *_component_checks(config)):
            problems.append(f"{place(path)}: {'.'.join(path)}: {message}")
    if problems:
        raise ConfigError("\n".join(problems))
    return LoadedConfig(config, origins)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Reads a config file. Raises ConfigError with one line per mistake."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return parse_config(text, str(path), overrides)


def explain(loaded: LoadedConfig) -> str:
    """Every key with its value, where the value comes from, and what the key means."""
    rows: list[str] = []

    def origin(path: KeyPath) -> str:
        if path in loaded.origins:
            return loaded.origins[path]
        below = [place for other, place in loaded.origins.items() if other[: len(path)] == path]
        if below:  # a map that overrides put together
            return ", ".join(dict.fromkeys(below))
        for length in range(len(path) - 1, 0, -1):
            prefix = path[:length]
            # A section that was written stands for the keys inside it only where it was given as one value.
            if prefix in loaded.origins and not any(other[:length] == prefix != other for other in loaded.origins):
                return loaded.origins[prefix]
        return "default"

    def walk(value: Any, path: KeyPath, description: str | None) -> None:
        if isinstance(value, BaseModel):
            for name, field in type(value).model_fields.items():
                walk(getattr(value, name), (*path, name), field.description)
            for name, extra in (value.model_extra or {}).items():
                walk(extra, (*path, name), f"Option of '{getattr(value, 'name', '')}'.")
        elif path == ("modalities",):
            for name, modality in value.items():
                walk(modality, (*path, name), None)
        else:
            shown = json.dumps(value, ensure_ascii=False, default=list)
            rows.append(f"{'.'.join(path)} = {shown}   [{origin(path)}]")
            if description:
                rows.append("    " + " ".join(description.split()))

    walk(loaded.config, (), None)
    return "\n".join(rows)
