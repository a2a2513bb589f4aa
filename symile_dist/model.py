"""The model: one encoder per modality, and the learned scale of the logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.config import Config
from symile_dist.encoders.recompute import recompute, recompute_parts
from symile_dist.registry import ENCODERS, OBJECTIVES, build, resolve
from symile_dist.spans import phase
from symile_dist.types import Batch, Inputs, Outputs, Padded, PointSet, Representation, StepReport


class L2Normalize(nn.Module):
    """(n, D) -> rows of unit length."""

    def forward(self, representations: Tensor) -> Tensor:
        return F.normalize(representations, dim=-1)


class MissingEmbedding(nn.Module):
    """A learned vector for what the encoder makes of a placeholder, where a sample lacks the modality."""

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(embedding_dim) / embedding_dim**0.5)

    def forward(self, emitted: Representation, present: Tensor) -> Representation:
        """(n, D) and (n,) flags -> (n, D); in point sets it stands alone, with the weight 1."""
        if isinstance(emitted, Tensor):
            return torch.where(present[:, None], emitted, self.vector.to(emitted.dtype))
        vectors, weights, sizes = emitted
        alone = torch.zeros_like(weights)
        alone[:, 0] = 1
        return PointSet(
            torch.where(present[:, None, None], vectors, self.vector.to(vectors.dtype)),
            torch.where(present[:, None], weights, alone),
            torch.where(present, sizes, 1),
        )


class _Clamped(torch.autograd.Function):
    """A number kept within a range. Where it has left it, only gradients pass that lead back: it cannot get stuck."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.low, ctx.high = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (value,), (gradient,) = ctx.saved_tensors, gradients
        leads_out = ((value <= ctx.low) & (gradient > 0)) | ((value >= ctx.high) & (gradient < 0))
        return gradient.masked_fill(leads_out, 0.0), None, None


def _normalization(kind: str, embedding_dim: int) -> nn.Module:
    if kind == "layer_norm":
        return nn.LayerNorm(embedding_dim)
    return L2Normalize() if kind == "l2" else nn.Identity()


def in_precision_of(encoder: nn.Module, inputs: Inputs) -> Inputs:
    """Floating-point inputs in the precision of the encoder's weights, unless it asks for them as they are.

    An encoder does so by `takes_float32 = True`: a waveform in bf16, say, has lost its quiet parts before any feature
    of it is computed.
    """
    weight = next(encoder.parameters(), None)
    values = inputs.values if isinstance(inputs, Padded) else inputs
    if weight is None or not values.is_floating_point() or getattr(encoder, "takes_float32", False):
        return inputs
    cast = values.to(weight.dtype)
    return Padded(cast, inputs.lengths) if isinstance(inputs, Padded) else cast


class MultimodalModel(nn.Module):
    """Encoders, each ended by the normalisation, and the learned scale of the logits.

    Raises ValueError for an encoder or option that does not exist.
    """

    def __init__(self, config: Config, built: Callable[[nn.Module], None] = lambda encoder: None) -> None:
        """`built` is called with every encoder before the next one is built."""
        super().__init__()
        dim = config.model.embedding_dim
        self.encoders = nn.ModuleDict()
        self.normalizations = nn.ModuleDict()
        self.missing_embeddings = nn.ModuleDict()
        self._recomputed: set[str] = set()
        self.encoder_of = {name: modality.encoder_of or name for name, modality in config.modalities.items()}
        """Modality -> the one whose encoder it passes through, its own or another's."""
        for name, modality in config.modalities.items():
            if modality.encoder_of:
                continue
            encoder = modality.encoder
            self.encoders[name] = build(encoder.name, encoder.options, ENCODERS, "encoder", embedding_dim=dim)
            built(self.encoders[name])
            if config.train.activation_checkpointing and not recompute_parts(self.encoders[name]):
                self._recomputed.add(name)
            self.normalizations[name] = _normalization(config.model.normalization, dim)
            if modality.freeze:
                self.encoders[name].requires_grad_(False)
            if modality.missing_embedding:
                self.missing_embeddings[name] = MissingEmbedding(dim)
        # One element, not zero dimensions: DeepSpeed cannot broadcast a scalar parameter.
        self.logit_scale = nn.Parameter(torch.full((1,), config.model.logit_scale_init))
        self.logit_scale_form, self.logit_scale_range = config.model.logit_scale_form, config.model.logit_scale_range

    def forward(self, batch: Batch, representations: dict[str, Representation] | None = None) -> Outputs:
        """Encodes the batch, unless its representations are known already."""
        scale = self.multiplier()
        if representations is not None:
            return Outputs(representations, scale)
        representations = {}
        for number, name in enumerate(self.encoder_of):
            representations[name] = self.encode(name, batch.inputs[name], batch.present[:, number])
        return Outputs(representations, scale)

    def multiplier(self) -> Tensor:
        """Scalar: what logits are multiplied with."""
        scale = self.logit_scale.float().squeeze(0)
        if self.logit_scale_form == "log":
            scale = scale.exp()
        return _Clamped.apply(scale, *self.logit_scale_range) if self.logit_scale_range else scale

    def encode(self, name: str, inputs: Inputs, present: Tensor) -> Representation:
        """One modality: n inputs, and (n,) flags that say which of them are placeholders -> n representations."""
        name = self.encoder_of[name]
        emitted = self._encode(name, inputs, present)
        # A point set (WPSE) has a normalisation of its own, token by token.
        return self.normalizations[name](emitted) if isinstance(emitted, Tensor) else emitted

    def _encode(self, name: str, inputs: Inputs, present: Tensor) -> Representation:
        """What the encoder emits, and the learned vector where a sample lacks the modality, if there is one.

        An encoder that treats lacking modalities itself says so by `takes_present = True`, and gets (n,) flags.
        """
        encoder = self.encoders[name]
        inputs = in_precision_of(encoder, inputs)
        flags = (present,) if getattr(encoder, "takes_present", False) else ()
        emitted: Representation
        try:
            if name in self._recomputed:
                emitted = recompute(encoder, encoder, inputs, *flags)
            else:
                emitted = encoder(inputs, *flags)
        except (TypeError, ValueError) as error:  # inputs of another kind or shape: no restart would help
            raise ValueError(f"modality '{name}': {error}") from error
        return self.missing_embeddings[name](emitted, present) if name in self.missing_embeddings else emitted


def make_objective(config: Config) -> nn.Module:
    """The config's objective. Its constructor may take `seed`, `embedding_dim`, `modalities` (names, in order) and
    `global_batch_size` beside its own options; it gets those that it names.

    Raises ValueError for an objective or option that does not exist.
    """
    name, options = config.objective.name, config.objective.options
    offered = {
        "seed": config.seed,
        "embedding_dim": config.model.embedding_dim,
        "modalities": list(config.modalities),
        "global_batch_size": config.train.global_batch_size,
    }
    taken = inspect.signature(resolve(name, OBJECTIVES, "objective")).parameters
    given = {key: value for key, value in offered.items() if key in taken and key not in options}
    objective: nn.Module = build(name, options, OBJECTIVES, "objective", **given)
    return objective


def _detached(representation: Representation) -> Representation:
    if isinstance(representation, PointSet):
        return PointSet(*(tensor.detach() for tensor in representation))
    return representation.detach()


class TrainingModule(nn.Module):
    """Model and objective as one module, so that both their parameters pass through engine and checkpoint."""

    def __init__(self, config: Config, built: Callable[[nn.Module], None] = lambda encoder: None) -> None:
        super().__init__()
        self.model = MultimodalModel(config, built)
        self.objective = make_objective(config)
        self.seen: dict[str, Representation] = {}
        """Representations of the last training step, for whoever looks at the model's health; without gradients."""
        for name, parameter in self.named_parameters():
            if len(getattr(parameter, "ds_shape", parameter.shape)) == 0:
                raise ValueError(
                    f"parameter '{name}' has no dimension, which DeepSpeed cannot shard; give it shape (1,)"
                )

    def forward(
        self, batch: Batch, step: int | None, representations: dict[str, Representation] | None = None
    ) -> StepReport | Outputs:
        """The objective on the encoded batch.

        In two parts for the two-pass step, both through here, where DeepSpeed's hooks are: without `step` only the
        encoding, with `representations` only the objective.
        """
        outputs = self.model(batch, representations)
        if step is None:
            return outputs
        if self.training:
            self.seen = {name: _detached(value) for name, value in outputs.representations.items()}
        with phase("loss"):
            report: StepReport = self.objective(outputs, batch, step)
        return report

    # -- inner modules: those of the objective that a second optimizer trains, and that are no submodules of this one

    def inner_modules(self) -> dict[str, nn.Module]:
        """By name; the ones that the objective's `inner_modules()` gives, where it has any."""
        found: dict[str, nn.Module] = getattr(self.objective, "inner_modules", dict)()
        return {f"objective.inner.{name}": module for name, module in found.items()}

    def inner_state(self) -> dict[str, Tensor]:
        """Their weights, by names that no parameter of this module has."""
        return {
            f"{name}.{key}": tensor
            for name, module in self.inner_modules().items()
            for key, tensor in module.state_dict().items()
        }

    def load_weights(self, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
        """Copies the weights of all parameters, the inner modules' too. Returns the names that are lacking and those
        that are not known; where there are such, nothing is copied. Buffers may lack: filter banks are made anew.

        Raises RuntimeError for weights of another shape.
        """
        own, inner = self.state_dict(), self.inner_state()
        missing = [name for name in [*dict(self.named_parameters()), *inner] if name not in weights]
        unknown = [name for name in weights if name not in own and name not in inner]
        if not missing and not unknown:
            self.load_state_dict({name: weights[name] for name in weights if name not in inner}, strict=False)
            self.load_inner(weights)
        return missing, unknown

    def load_inner(self, weights: Mapping[str, Tensor]) -> None:
        """Copies what `inner_state` gave. Raises KeyError or RuntimeError where it was another objective's."""
        for name, module in self.inner_modules().items():
            module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()})

    def train(self, mode: bool = True) -> TrainingModule:
        for module in self.inner_modules().values():
            module.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainingModule:
        """They follow to another device, and keep their precision."""
        for module in self.inner_modules().values():
            module._apply(lambda tensor: tensor.to(fn(tensor).device))
        return super()._apply(fn, recurse)
