"""Log-mel spectrogram and convolutions over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from symile_dist.encoders.masked import MaskedConv, MaskedPool, length_mask
from symile_dist.types import Inputs, Padded


def mel_filterbank(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """(n_fft // 2 + 1, n_mels) float32: triangles that are equally wide on the mel scale (HTK's formula)."""

    def mel(hertz: float) -> float:
        return float(2595.0 * np.log10(1.0 + hertz / 700.0))

    edges = 700.0 * (10.0 ** (np.linspace(mel(20.0), mel(sample_rate / 2), n_mels + 2) / 2595.0) - 1.0)
    bins = np.linspace(0.0, sample_rate / 2, n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.from_numpy(np.maximum(0.0, np.minimum(rising, falling)).astype(np.float32))


class LogMel(nn.Module):
    """Waveforms -> log-mel frames, each clip shifted and scaled to mean 0 and variance 1 over its own frames.

    Computed in float32 whatever the precision of the model: in bfloat16 the log of quiet bands would be noise.
    """

    window: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, n_fft: int, hop: int, n_mels: int) -> None:
        super().__init__()
        if not min(sample_rate, n_fft, hop, n_mels) >= 1:
            raise ValueError(
                f"sample_rate = {sample_rate}, n_fft = {n_fft}, hop = {hop} and n_mels = {n_mels} should be 1 or more"
            )
        self.sample_rate, self.n_fft, self.hop, self.n_mels = sample_rate, n_fft, hop, n_mels
        self.register_buffer("window", torch.empty(0), persistent=False)
        self.register_buffer("filters", torch.empty(0), persistent=False)
        self._fill(torch.empty(0).device)

    def _fill(self, device: torch.device) -> None:
        self.window = torch.hann_window(self.n_fft, dtype=torch.float32, device=device)
        self.filters = mel_filterbank(self.sample_rate, self.n_fft, self.n_mels).repeat_interleave(2, 0).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Module.bfloat16() would round the buffers, and to_empty() would lose them: they are made anew.
        super()._apply(fn, recurse)
        self._fill(self.window.device)
        return self

    @torch.no_grad()
    def forward(self, values: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(n, T) waveforms, zero beyond (n,) lengths -> (n, n_mels, F) float32, zero beyond the (n,) frame counts.

        A frame lies wholly within its clip; a clip that is shorter than one frame has one, padded with zeros.
        """
        with torch.autocast(values.device.type, enabled=False):
            values = values.float()
            if values.shape[1] < self.n_fft:
                values = nn.functional.pad(values, (0, self.n_fft - values.shape[1]))
            # The frames are cut out before the transform: twice as fast on a CPU as torch.stft, which transposes.
            spectrum = torch.fft.rfft(values.unfold(1, self.n_fft, self.hop) * self.window)
            # Real and imaginary parts alternate, and each filter stands in two rows: one product sums the power.
            parts = torch.view_as_real(spectrum).flatten(2)
            logs = (parts.square() @ self.filters + 1e-5).log().transpose(1, 2)
            frames = torch.div(lengths - self.n_fft, self.hop, rounding_mode="floor").clamp(min=0) + 1
            mask = length_mask(frames, logs.shape[2]).float()
            count = frames[:, None, None] * self.n_mels
            mean = (logs * mask).sum((1, 2), keepdim=True) / count
            centred = (logs - mean) * mask
            variance = centred.square().sum((1, 2), keepdim=True) / count
            return centred * (variance + 1e-3).rsqrt(), frames


class AudioConvNet(nn.Module):
    """Log-mel spectrogram -> strided convolutions over time -> masked pooling -> linear."""

    takes_float32 = True
    """Waveforms come in float32 in every precision of the weights: in bf16 they would lose their quiet parts."""

    def __init__(
        self,
        embedding_dim: int,
        sample_rate: int = 16000,
        n_fft: int = 512,
        hop: int = 320,
        n_mels: int = 40,
        width: int = 64,
        kernel: int = 5,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers = {layers} should be 1 or more")
        self.features = LogMel(sample_rate, n_fft, hop, n_mels)
        # The first layer halves the frame rate: neighbouring frames overlap and say nearly the same.
        self.layers = nn.ModuleList(
            [MaskedConv(n_mels if i == 0 else width, width, kernel, stride=2 if i == 0 else 1) for i in range(layers)]
        )
        self.pool = MaskedPool(width)
        self.projection = nn.Linear(2 * width, embedding_dim)

    def forward(self, inputs: Inputs) -> Tensor:
        """`Padded` of (n, T) waveforms in [-1, 1] -> (n, embedding_dim). Raises TypeError for a plain tensor."""
        if not isinstance(inputs, Padded):
            raise TypeError("AudioConvNet takes clips of unequal length (types.Padded), not a tensor")
        values, lengths = self.features(inputs.values, inputs.lengths)
        values = values.to(self.projection.weight.dtype)
        for layer in self.layers:
            values, lengths = layer(values, lengths)
        return self.projection(self.pool(values, lengths))


__all__ = ["AudioConvNet", "LogMel", "mel_filterbank"]
