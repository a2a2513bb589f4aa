"""Batch normalisation in every precision, and over all ranks.

In training it makes a sample's representation depend on its neighbours: on those of its rank or, `synchronized`, on
those of the global batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symile_dist.distributed import all_gather_with_gradient, world_size

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """torch's batch normalisation of (n, C) or (n, C, ...), with three differences.

    Its running statistics stay float32 beside weights of lower precision: they are sums of small changes. A batch whose
    mean or variance is not finite leaves them as they are: they would never be finite again. With `synchronized` mean
    and variance are those of all ranks' rows.
    """

    synchronized = False

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    @classmethod
    def of(cls, other: nn.modules.batchnorm._BatchNorm, synchronized: bool) -> BatchNorm:
        """The same normalisation, with the other's own parameters and buffers."""
        made = cls(other.num_features, other.eps, other.momentum, other.affine, other.track_running_stats)
        made._parameters, made._buffers, made.training = other._parameters, other._buffers, other.training
        made.synchronized = synchronized
        return made

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        momentum = self._count() if self.training else 0.0
        mean, variance = self.running_mean, self.running_var
        if self.training and self.synchronized and world_size() > 1:
            return self._over_all_ranks(input, weight, bias, momentum)
        if not self.training or mean is None or variance is None:
            return F.batch_norm(input, mean, variance, weight, bias, self.training or mean is None, momentum, self.eps)
        # Changed in copies: autograd keeps those for the backward pass, and none is changed after that.
        moved = mean.clone(), variance.clone()
        normalized = F.batch_norm(input, *moved, weight, bias, True, momentum, self.eps)
        self._move(*moved)
        return normalized

    @torch.no_grad()
    def _move(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics to these, channel by channel where both are finite."""
        if self.running_mean is not None and self.running_var is not None:
            finite = mean.isfinite() & variance.isfinite()
            self.running_mean.copy_(torch.where(finite, mean, self.running_mean))
            self.running_var.copy_(torch.where(finite, variance, self.running_var))

    def _count(self) -> float:
        """Counts the batch; returns by how much the running statistics move towards it."""
        if self.num_batches_tracked is None:
            return self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _over_all_ranks(self, input: Tensor, weight: Tensor | None, bias: Tensor | None, momentum: float) -> Tensor:
        """As one process would normalise the rows of all ranks; in float32.

        Each rank's mean and variance are gathered, with gradients, and put together (Chan, Golub, LeVeque 1979), which
        loses no digits where the mean is large. All ranks have equally many rows.
        """
        values = input.float()
        others = [dim for dim in range(values.dim()) if dim != 1]
        own_variance, own_mean = torch.var_mean(values, dim=others, correction=0)
        means, variances = all_gather_with_gradient(torch.stack([own_mean, own_variance])[None]).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        if self.running_mean is not None and self.running_var is not None:
            count = values.numel() // values.shape[1] * len(means)
            with torch.no_grad():
                unbiased = variance * (count / (count - 1))
                self._move(self.running_mean.lerp(mean, momentum), self.running_var.lerp(unbiased, momentum))
        scale = (variance + self.eps).rsqrt() * (1.0 if weight is None else weight)
        shift = (0.0 if bias is None else bias) - mean * scale
        shape = (-1, *[1] * (values.dim() - 2))
        return (values * scale.view(shape) + shift.view(shape)).to(input.dtype)


def convert_batch_norms(module: nn.Module, synchronized: bool = False) -> int:
    """Puts `BatchNorm` in the place of torch's own ones, under the same names; returns how many there are."""
    converted = 0
    for name, child in module.named_children():
        if type(child) in KINDS:
            assert isinstance(child, nn.modules.batchnorm._BatchNorm)
            setattr(module, name, BatchNorm.of(child, synchronized))
            converted += 1
        else:
            converted += convert_batch_norms(child, synchronized)
    return converted


__all__ = ["BatchNorm", "convert_batch_norms"]
