"""Convolution and pooling over sequences of unequal length that no padding can change."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(n,) lengths -> (n, 1, size) bool: True where a position of (n, C, size) holds data."""
    return (torch.arange(size, device=lengths.device)[None, :] < lengths[:, None])[:, None, :]


class MaskedConv(nn.Module):
    """Convolution over time -> GELU, plus the input where the shape allows it.

    The convolution pads with zeros and every position beyond a sequence's end is set to zero, so the end of a batch's
    tensor and the end of a shorter sequence look the same from within.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {kernel}")
        self.stride = stride
        self.residual = stride == 1 and channels_in == channels_out
        padding = dilation * (kernel // 2)
        self.convolution = nn.Conv1d(channels_in, channels_out, kernel, stride, padding, dilation)

    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(n, C, T), zero beyond (n,) lengths -> (n, C', ceil(T / stride)) and the new lengths."""
        outputs = functional.gelu(self.convolution(values))
        if self.residual:
            outputs = outputs + values
        if self.stride > 1:
            lengths = torch.div(lengths + self.stride - 1, self.stride, rounding_mode="floor")
        return outputs * length_mask(lengths, outputs.shape[2]).to(outputs.dtype), lengths


class MaskedPool(nn.Module):
    """Mean and maximum over time, side by side, then LayerNorm: (n, C, T) -> (n, 2 C).

    The maximum says whether a pattern occurs, the mean how much of it. An empty sequence gives zeros.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * channels)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        """`values` are zero beyond (n,) `lengths`."""
        mean = values.sum(2) / lengths.clamp(min=1)[:, None].to(values.dtype)
        lowest = torch.finfo(values.dtype).min
        maximum = values.masked_fill(~length_mask(lengths, values.shape[2]), lowest).amax(2)
        maximum = maximum.masked_fill((lengths == 0)[:, None], 0.0)
        return self.norm(torch.cat([mean, maximum], dim=1))
