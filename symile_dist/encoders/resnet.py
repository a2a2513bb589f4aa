"""Residual networks (He et al. 2015, arXiv 1512.03385), as Symile-MIMIC uses them: CXR by ResNet-50, ECG by ResNet-18.

Parameters have the names that torchvision and timm give them, so that weights of theirs can be loaded. The stride of a
bottleneck is in its 3 x 3 convolution ("v1.5"), as there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from symile_dist.hub import fetch_file, reads_weights, weights_in
from symile_dist.types import Inputs, Padded

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
"""Depth -> residual blocks per stage; bottlenecks from 50 on."""


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """Two 3 x 3 convolutions, or as a bottleneck 1 x 1, 3 x 3, 1 x 1, beside a shortcut."""

    def __init__(self, channels_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        channels_out = 4 * width if bottleneck else width
        sizes = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        widths = [channels_in, *[width] * (len(sizes) - 1), channels_out]
        self.depth = len(sizes)
        for number, (kernel, step) in enumerate(sizes, start=1):
            self.add_module(f"conv{number}", _convolution(widths[number - 1], widths[number], kernel, step))
            self.add_module(f"bn{number}", nn.BatchNorm2d(widths[number]))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels_in != channels_out:
            shortcut = _convolution(channels_in, channels_out, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, values: Tensor) -> Tensor:
        shortcut = values if self.downsample is None else self.downsample(values)
        for number in range(1, self.depth + 1):
            values = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(values))
            if number < self.depth:
                values = values.relu_()
        return (values + shortcut).relu_()


class ResNet(nn.Module):
    """Images (n, C, H, W), or anything laid out like one, -> (n, embedding_dim).

    Parameters:
        depth: 18, 34, 50, 101 or 152.
        channels: of the input; an electrocardiogram (1, 5000, 12) has one.
        weights: trained weights to begin with: a .safetensors file, a folder that holds `model.safetensors`, or a name
            on the hub, such as timm/resnet50.tv2_in1k (torchvision's IMAGENET1K_V2). Their classifier is left out, and
            so is the first convolution where it is of another number of channels.
        revision: branch, tag or commit on the hub.
        width: channels of the first stage; 64 as published.

    What happens to the running statistics of its batch normalisations is in docs/presets.md. Raises ValueError for a
    depth that does not exist and for weights that cannot be had or do not fit.
    """

    loads_weights: ClassVar[str] = "weights"
    """The option that does."""

    def __init__(
        self,
        embedding_dim: int,
        depth: int = 50,
        channels: int = 3,
        weights: str | None = None,
        revision: str = "main",
        width: int = 64,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, not {depth}")
        self.channels = channels
        self.conv1 = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        previous, bottleneck = width, depth >= 50
        for stage, blocks in enumerate(BLOCKS[depth]):
            layers: list[nn.Module] = []
            for number in range(blocks):
                stride = 2 if stage > 0 and number == 0 else 1
                layers.append(Block(previous, width * 2**stage, stride, bottleneck))
                previous = width * 2**stage * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(previous, embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if weights is not None and reads_weights():
            self._load(weights, revision)

    def _load(self, weights: str, revision: str) -> None:
        from safetensors.torch import load_file

        path = weights_file(weights, revision)
        fitting = self._fitting(path)
        self.load_state_dict(
            {name: tensor for name, tensor in load_file(path).items() if name in fitting}, strict=False
        )

    def _fitting(self, path: Path) -> set[str]:
        """Names of the weights in a file that are this network's. Raises ValueError for a file of another's."""
        found = {name: shape for name, shape in weights_in(path).items() if not name.startswith("fc.")}
        if "conv1.weight" in found and found["conv1.weight"][1:2] != (self.channels,):
            del found["conv1.weight"]
        own = self.state_dict()
        begins_anew = ("fc.", "conv1.")
        wrong = [name for name in found if name not in own or tuple(own[name].shape) != found[name]]
        wrong += [n for n in own if n not in found and not n.startswith(begins_anew) and "num_batches" not in n]
        if wrong:
            raise ValueError(
                f"{path}: is not of this network: '{wrong[0]}'{f' and {len(wrong) - 1} more' if wrong[1:] else ''} "
                "do not fit; names as torchvision's and timm's are expected, of the same depth"
            )
        return set(found)

    @staticmethod
    def check(weights: str | None = None, revision: str = "main", **options: Any) -> None:
        """Raises ValueError unless the weights can be had and are of this network."""
        if weights is not None:
            path = weights_file(weights, revision)
            with torch.device("meta"):
                ResNet(1, **options)._fitting(path)

    def checkpointed(self) -> list[nn.Module]:
        """The parts that train.activation_checkpointing computes twice: a residual block each."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, inputs: Inputs) -> Tensor:
        """Raises TypeError for `Padded`, ValueError for another number of channels."""
        if isinstance(inputs, Padded):
            raise TypeError("ResNet takes images of one size (a tensor), not sequences of unequal length")
        if inputs.dim() != 4 or inputs.shape[1] != self.channels:
            raise ValueError(f"ResNet: the inputs are {tuple(inputs.shape)}, not (n, {self.channels}, H, W)")
        values = self.maxpool(self.bn1(self.conv1(inputs)).relu_())
        for stage in range(1, 5):
            values = self.get_submodule(f"layer{stage}")(values)
        projected: Tensor = self.fc(values.mean((2, 3)))
        return projected


def weights_file(weights: str, revision: str) -> Path:
    """The local file of trained weights. Raises ValueError when it cannot be had."""
    if weights.endswith((".pth", ".pt", ".bin")):
        raise ValueError(
            f"{weights}: such a file is a pickle, which runs code when it is read; save it as .safetensors"
        )
    path = Path(weights).expanduser()
    if weights.endswith(".safetensors") or path.is_dir() or weights.startswith((".", "/", "~")):
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected are trained weights as .safetensors")
        return path
    return fetch_file(weights, "model.safetensors", revision)


__all__ = ["ResNet", "weights_file"]
