"""The DeepSpeed engine: ZeRO 0-3 in fp32, bf16 and fp16, and steps that all ranks take or skip together."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symile_dist.checkpoint.manifest import CheckpointError
from symile_dist.checkpoint.pieces import pieces_of, restore, saved_tensors, spread_weights
from symile_dist.checkpoint.shards import PIECES, Shards
from symile_dist.config import Config
from symile_dist.distributed import all_reduce_max, broadcast_object, host_group, world_size
from symile_dist.encoders.batch_norm import convert_batch_norms
from symile_dist.encoders.recompute import compile_encoder
from symile_dist.inner import InnerOptimizer
from symile_dist.model import TrainingModule
from symile_dist.optim import learning_rate_factor, make_optimizer
from symile_dist.spans import phase
from symile_dist.types import Batch, Outputs, Representation, StepReport


class StepResult(NamedTuple):
    applied: bool
    """False when a non-finite loss or gradient was seen: the same on all ranks, and no weight has changed."""
    grad_norm: float
    """Global norm before clipping; not finite where the gradients were not."""
    learning_rate: float
    rescaled: bool = False
    """Skipped because gradients exceeded fp16's range: the loss is scaled by half as much from here on."""
    inner_applied: bool = True
    """False when a gradient of the objective's inner modules was not finite: the same on all ranks."""
    refused: bool = False
    """Skipped because whoever was asked did not admit it: see `Engine.step`."""


Admits = Callable[[float], bool]
"""Global gradient norm before clipping -> whether the step may be taken. The same on all ranks, which ask in step."""


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
        )
    return merged


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed config that follows from ours, with the expert keys of `deepspeed:` laid on top."""
    derived: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.global_batch_size // config.world_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": {"stage": config.train.zero_stage, **_offloaded(config)},
        "zero_allow_untested_optimizer": True,
        # Offloaded too, the optimizer is torch's, fused: DeepSpeed's own is compiled when it is first used.
        "zero_force_ds_cpu_optimizer": False,
        # Without it a bf16 step with infinite gradients would be taken.
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.train.precision == "fp16"},
        "managed_gradient_accumulation": not _adds_up_by_itself(config),
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    return merge(derived, config.deepspeed)


def _offloaded(config: Config) -> dict[str, Any]:
    parts = {"none": [], "optimizer": ["optimizer"], "parameters": ["optimizer", "param"]}[config.train.offload]
    return {f"offload_{part}": {"device": "cpu", "pin_memory": config.ray.gpus_per_worker > 0} for part in parts}


def _in_parts(config: Config) -> bool:
    """Whether a step takes several backward passes."""
    return config.encoded_at_once * config.world_size < config.train.global_batch_size


def _adds_up_by_itself(config: Config) -> bool:
    """DeepSpeed adds gradients up until `step`. Told which backward pass is the last, it would hand an offloaded
    optimizer only what that pass has gradients of, and nothing of the objective's parameters."""
    return _in_parts(config) and config.train.offload != "none"


@contextlib.contextmanager
def _new_groups_with_timeout(timeout: timedelta) -> Iterator[None]:
    """DeepSpeed makes its groups without a timeout, hence with 30 minutes: a hung rank would go unseen that long."""
    original = dist.new_group
    dist.new_group = functools.partial(original, timeout=timeout)
    try:
        yield
    finally:
        dist.new_group = original


def _unused_modules() -> Iterator[types.ModuleType]:
    """What stands in for modules of DeepSpeed that are imported at every start, never used here, and import much: the
    autotuner all of MLflow where that is installed (1.6 s), the Muon optimizer torch's compiler (2 s)."""
    for name, attribute, value in (
        ("autotuning.autotuner", "Autotuner", None),
        ("runtime.zero.muon.muon_optimizer", "MuonWithAuxAdam", type("MuonWithAuxAdam", (), {})),  # no optimizer is one
        ("runtime.zero.muon.original_muon", "muon_update", None),
    ):
        module = types.ModuleType(f"deepspeed.{name}")
        vars(module)[attribute] = value
        yield module


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, told which accelerator it has: it reads that when it is first imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for module in _unused_modules():
        sys.modules.setdefault(module.__name__, module)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # An optional shared-memory all-reduce whose compilation takes half a minute at the first start; killed in the
        # midst of it, a worker leaves a lock on which every later one waits for ever. Not by `import ... as`, which
        # gives torch itself: the package has an attribute of the submodule's name.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        # DeepSpeed refuses fp16 where a processor has no instructions for it; torch computes it there too, slowly.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def refuse_batch_norm(module: nn.Module) -> None:
    """Raises ValueError where a sample's representation would depend on its micro-batch."""
    for name, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
            raise ValueError(
                f"train.micro_batch_size: '{name}' is a batch normalisation, whose statistics would be those of a "
                "micro-batch and the step no longer that of the whole batch; set train.freeze_batch_norm=true to keep "
                "its running statistics as they are, or use another normalisation"
            )


def _whole(*parameters: nn.Parameter) -> contextlib.AbstractContextManager[Any]:
    """Inside, ZeRO-3's partitioned parameters are whole; what is written into them on all ranks alike stays."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(parameters), modifier_rank=0, enabled=any(hasattr(p, "ds_id") for p in parameters))


def _ask_before_steps(optimizer: Any, admits: Callable[[Tensor], bool]) -> None:
    """Has DeepSpeed's ZeRO optimizer ask, once it knows the gradients' norm and before it changes anything.

    It computes the norm in the midst of its step, and drops the step where that is not finite. So where a step is not
    admitted it gets to see an infinite norm; fp16's scale is left as it is then. `admits` gets the norm of gradients
    that hold that scale.
    """
    from deepspeed.runtime.utils import combine_grad_norm_groups

    refused = False

    def asked(norm: Tensor) -> Tensor:
        nonlocal refused
        refused = bool(torch.isfinite(norm)) and not admits(norm)
        return torch.full_like(norm, torch.inf) if refused else norm

    if hasattr(optimizer, "_get_norm_groups"):  # stage 3
        norms_of_groups = optimizer._get_norm_groups
        optimizer._get_norm_groups = lambda: [asked(combine_grad_norm_groups(norms_of_groups()))]
    else:  # stages 1 and 2
        global_norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: asked(global_norm())
    update_scale = optimizer._update_scale

    def update_scale_unless_refused(has_overflow: bool) -> None:
        nonlocal refused
        if not refused:
            update_scale(has_overflow)
        refused = False

    optimizer._update_scale = update_scale_unless_refused


def copy_weights(module: TrainingModule, weights: dict[str, Tensor]) -> list[str]:
    """Copies weights by name where the shapes agree; returns the names. Raises ValueError when none fits."""
    copied = []
    for name, parameter in module.named_parameters():
        if name in weights and weights[name].shape == getattr(parameter, "ds_shape", parameter.shape):
            with torch.no_grad(), _whole(parameter):
                parameter.copy_(weights[name])
            copied.append(name)
    for name, tensor in module.inner_state().items():
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])
            copied.append(name)
    if not copied:
        raise ValueError(
            "none of the other run's weights fits this model: no parameter has both its name and its shape"
        )
    return copied


class Engine:
    """One rank's training engine.

    A step is `report = engine.forward(batch, step)`, `engine.backward(report.loss)`, `engine.step(step)`; in two passes
    (`gradcache`) `encode` and `objective` stand for `forward`, and `backward` is called for each part. The objective's
    inner modules, if it has any, are trained in `step`, by `inner`.
    """

    def __init__(self, config: Config, device: torch.device, weights: dict[str, Tensor] | None = None) -> None:
        """
        Args:
            device: this rank's.
            weights: of another run, by parameter name, to begin with (warm start).

        Raises ValueError for a component that does not exist, or weights none of which fits.
        """
        self.config, self.device = config, device
        self._broken_off = False
        self._parts = 0  # backward passes of the step so far, while more are to come
        self._finite = torch.tensor(True)  # the loss of the step
        self._managed = not _adds_up_by_itself(config)
        self.dtype = DTYPES[config.train.precision]
        torch.set_float32_matmul_precision(config.train.float32_matmul_precision)
        deepspeed = import_deepspeed(device)
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False)
        settings = deepspeed_config(config)
        with _new_groups_with_timeout(timedelta(seconds=config.ray.collective_timeout_seconds)):
            host_group()  # made here, where it gets the timeout
            # Encoders are built whole and in fp32 at every stage, so that stages begin with the same weights, trained
            # ones among them; ZeRO-3 partitions them in initialize, or each when it is built. (Built within zero.Init,
            # bf16 weights would come from another random stream, and what an encoder does to a layer's weights after
            # the layer was made would be lost.)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)  # the same initial weights on every rank
                module = TrainingModule(config, self._partition if config.train.partitioned_init else lambda part: None)
            convert_batch_norms(module, config.train.sync_batch_norm)
            if config.train.partitioned_init:
                self._partition(module)
            self.warm_started = copy_weights(module, weights) if weights is not None else []
            """Names of the parameters that began with the other run's weights."""
            optimizer = make_optimizer(module, config)
            self._peak_learning_rates = [group["peak_lr"] for group in optimizer.param_groups]
            self.deepspeed, *_ = deepspeed.initialize(model=module.to(device), optimizer=optimizer, config=settings)
        inner = module.inner_modules()
        self.inner = InnerOptimizer(inner, config.optimizer.inner) if inner else None
        self._inner_loss: Callable[[], Tensor] | None = None
        self.before_update: Callable[[], None] = lambda: None
        """Called in `step`, before weights or moments change."""
        self._lowest_loss_scale = self._configure_loss_scaler()
        self._admits: Admits | None = None  # of the step that is being taken
        self._refused_norm: float | None = None
        if config.train.zero_stage > 0:
            _ask_before_steps(self.deepspeed.optimizer, self._admitted)
        self.train()
        if config.train.compile:
            for encoder in module.model.encoders.values():
                compile_encoder(encoder)
        if _in_parts(config):
            refuse_batch_norm(module)

    def _partition(self, part: nn.Module) -> None:
        """ZeRO-3: leaves each rank its share of every parameter; one at a time is whole on the device."""
        import deepspeed

        for parameter in part.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = parameter.data.to(self.dtype)
        deepspeed.zero.Init(module=part, config_dict_or_path=deepspeed_config(self.config), dtype=self.dtype)

    @property
    def module(self) -> TrainingModule:
        return self.deepspeed.module

    def train(self, mode: bool = True) -> None:
        """All ranks call it, in step: evaluation begins with rank 0's running statistics, which checkpoints hold."""
        if not mode:
            self._share_statistics()
        self.deepspeed.train(mode)
        for name, modality in self.config.modalities.items():
            if modality.freeze:  # no dropout, no new statistics: it stays as it is
                self.module.model.encoders[name].eval()
        if self.config.train.freeze_batch_norm:
            for part in self.module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()

    def _share_statistics(self) -> None:
        """Gives every rank the running statistics of rank 0's batch normalisations, as DDP's broadcast_buffers does."""
        if world_size() == 1:
            return
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                for statistic in part.buffers(recurse=False):
                    dist.broadcast(statistic, 0)

    def _moved(self, batch: Batch) -> Batch:
        with phase("h2d"):
            return batch.to(self.device)

    def forward(self, batch: Batch, step: int) -> StepReport:
        return self._kept(self.deepspeed(self._moved(batch), step))

    def encode(self, batch: Batch) -> Outputs:
        """The encoders alone."""
        return self.deepspeed(self._moved(batch), None)

    def objective(self, batch: Batch, step: int, representations: dict[str, Representation]) -> StepReport:
        """The objective alone, on representations of the whole batch."""
        without_inputs = replace(batch, inputs={})  # they are as large as the batch, and only the encoders need them
        # A copy: ZeRO-3's hooks put tensors of their own into it.
        return self._kept(self.deepspeed(self._moved(without_inputs), step, dict(representations)))

    def _kept(self, report: StepReport) -> StepReport:
        """Keeps the inner modules' loss for `step`."""
        self._inner_loss = report.inner_loss
        return report

    def backward(self, loss: Tensor, last: bool = True, scaled: bool = False) -> None:
        """Back-propagates; an infinite loss makes its gradients NaN, so that the check before the step sees it.

        Args:
            last: False where more calls for the same step follow; their gradients are added up.
            scaled: the gradients that it hands on hold fp16's scale already.
        """
        self._check_whole()
        if scaled:
            loss = loss / self.loss_scale()
        else:
            self._finite = torch.isfinite(loss.detach())
        if not last and self._parts == 0:
            self._forget_gradients()
        self._parts = 0 if last else self._parts + 1
        if self._managed:
            self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * torch.where(torch.isfinite(loss), 1.0, torch.nan))
        if not last and self._managed:
            self.deepspeed.step()  # takes no step, but counts: what follows is added and does not overwrite

    def _forget_gradients(self) -> None:
        """DeepSpeed overwrites the last step's gradients in the first part of a step only, and there only those of
        parameters that take part in it: it would add the others' to what is left of the last step."""
        if self.config.train.zero_stage == 3:
            self.deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        elif not self._managed:
            for gradient in self.deepspeed.optimizer.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def break_off(self) -> None:
        """After an exception between the parts of a step: its gradients are there and cannot be told from others."""
        self._broken_off = True

    def _check_whole(self) -> None:
        if self._broken_off:
            raise RuntimeError(
                "a step was broken off by an exception, and part of its gradients is left; make a new engine and load "
                "a checkpoint"
            )

    def step(self, step: int, admits: Admits | None = None) -> StepResult:
        """Takes the optimizer step, or skips it on all ranks when any rank has a non-finite gradient.

        Then, if it was taken, the inner modules' step, on their loss of the same forward pass.

        Args:
            admits: asked before anything is changed, where the gradients are finite.
        """
        self._check_whole()
        self.before_update()
        self._admits, self._refused_norm = admits, None
        result = self._outer_step(step)
        loss, self._inner_loss = self._inner_loss, None
        if self.inner is None or not result.applied:
            return result
        assert loss is not None, "the objective has inner modules, but its report has no inner_loss"
        return result._replace(inner_applied=self.inner.step(loss()))

    def _outer_step(self, step: int) -> StepResult:
        factor = learning_rate_factor(self.config.optimizer, step, self.config.train.steps)
        for group, peak in zip(self.deepspeed.optimizer.param_groups, self._peak_learning_rates, strict=True):
            group["lr"] = peak * factor
        learning_rate = self.config.optimizer.lr * factor
        if self.config.train.zero_stage == 0:
            return self._plain_step(learning_rate)
        scale = self.loss_scale()
        self.deepspeed.step()
        if self._refused_norm is not None:
            return StepResult(False, self._refused_norm, learning_rate, refused=True)
        if not self.deepspeed.was_step_applied():
            finite = not all_reduce_max((~self._finite).to(self.device, torch.uint8))
            return StepResult(False, math.nan, learning_rate, rescaled=finite and scale > self._lowest_loss_scale)
        return StepResult(True, float(self.deepspeed.get_global_grad_norm()), learning_rate)

    def _admitted(self, norm: Tensor) -> bool:
        """Asks `admits`, if there is someone to ask."""
        value = float(norm) / self.loss_scale()
        if self._admits is None or self._admits(value):
            return True
        self._refused_norm = value
        return False

    def _configure_loss_scaler(self) -> float:
        """Returns the scale below which it does not go, where it then stays: the loop counts skips and ends the run."""
        scaler: Any = getattr(self.deepspeed.optimizer, "loss_scaler", None)
        if self.dtype != torch.float16 or not scaler.dynamic:
            return math.inf
        scaler.raise_error_at_min_scale = False
        return float(scaler.min_scale)

    def loss_scale(self) -> float:
        """What fp16 multiplies the loss with before the backward pass; 1 in other precisions. No device is asked."""
        return float(self.deepspeed.optimizer.loss_scale) if self.dtype == torch.float16 else 1.0

    def _plain_step(self, learning_rate: float) -> StepResult:
        # At stage 0 gradients are whole and already averaged, so every rank comes to the same decision. In fp32 it is
        # torch's own optimizer behind DeepSpeed's all-reduce, and nothing there looks for NaN.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        finite = bool(torch.isfinite(norm))
        if not finite or not self._admitted(norm):
            self.deepspeed.zero_grad()
            self.deepspeed.optimizer.zero_grad()
            return StepResult(False, float(norm) if finite else math.nan, learning_rate, refused=finite)
        self.deepspeed.step()
        assert self.deepspeed.was_step_applied()
        return StepResult(True, float(norm), learning_rate)

    def logit_scale(self) -> float:
        """What logits are multiplied with. Waits for the device; call it on all ranks (ZeRO-3 gathers)."""
        from deepspeed.runtime.zero import GatheredParameters

        parameter = self.module.model.logit_scale
        with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")), torch.no_grad():
            return float(self.module.model.multiplier())

    def saved_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this rank keeps of the training state, for a checkpoint: tensors by `KIND/NAME`, as views of those that
        are trained on, and what else there is, as JSON."""
        optimizer, rank = self.deepspeed.optimizer, dist.get_rank()
        pieces = list(pieces_of(self.module, optimizer, rank, world_size(), dealt=True))
        tensors = saved_tensors(pieces, optimizer)
        if rank == 0:  # the same on all
            tensors |= {f"buffers/{name}": buffer for name, buffer in self._persistent_buffers().items()}
            tensors |= {f"inner/{name}": tensor for name, tensor in self.module.inner_state().items()}
            adam = self.inner.tensors() if self.inner else {}
            tensors |= {f"inner_adam/{name}": tensor for name, tensor in adam.items()}
        scaler = getattr(optimizer, "loss_scaler", None)
        return tensors, {
            PIECES: {piece.name: [piece.start, piece.start + piece.length, piece.shape] for piece in pieces},
            "loss_scaler": {name: getattr(scaler, name) for name in LOSS_SCALER if hasattr(scaler, name)},
        }

    def restore(self, saved: Shards) -> None:
        """Puts a checkpoint's training state in the place of this rank's; all ranks call it.

        Raises CheckpointError where it is another model's.
        """
        optimizer = self.deepspeed.optimizer
        self._check_same_model(saved)
        restore(list(pieces_of(self.module, optimizer, dist.get_rank(), world_size(), dealt=False)), optimizer, saved)
        spread_weights(optimizer)
        statistics = saved.of_rank(0, "buffers")
        for name, buffer in self._persistent_buffers().items():
            if name in statistics:
                buffer.copy_(statistics[name])
        if self.inner:
            self.module.load_inner(saved.of_rank(0, "inner"))
            self.inner.load_tensors(saved.of_rank(0, "inner_adam"))
        if self.dtype == torch.float16:
            for name, value in saved.metadata(0)["loss_scaler"].items():
                setattr(optimizer.loss_scaler, name, value)

    def _check_same_model(self, saved: Shards) -> None:
        """By rank 0, as it takes the heads of all files."""
        other: list[str] = []
        if dist.get_rank() == 0:
            other = sorted(saved.shapes().keys() ^ dict(self.module.named_parameters()).keys())
        other = broadcast_object(other)
        if other:
            words = ", ".join(other[:3])
            raise CheckpointError(f"{saved.folder}: is of another model: only one of the two has {words}")

    def _persistent_buffers(self) -> dict[str, Tensor]:
        kept = self.module.state_dict(keep_vars=True)
        return {name: buffer for name, buffer in self.module.named_buffers() if name in kept}


LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What fp16's scaler remembers."""
