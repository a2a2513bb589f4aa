"""A small convolutional network over images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from symile_dist.types import Inputs, Padded


def check_channels(inputs: Tensor, channels: int) -> None:
    """Raises ValueError unless these are images (n, channels, H, W)."""
    if inputs.dim() != 4 or inputs.shape[1] != channels:
        raise ValueError(
            f"the inputs are {tuple(inputs.shape)}, the encoder takes (n, {channels}, H, W); the decoder `image` gives "
            "three channels, with mode L one"
        )


class ImageConvNet(nn.Module):
    """3 x 3 convolutions, halving the resolution from stage to stage, then a fixed grid -> linear.

    The grid keeps where in the image something is, which a mean over the whole image would lose.
    """

    def __init__(
        self,
        embedding_dim: int,
        channels: int = 1,
        widths: Sequence[int] = (32, 64),
        grid: Sequence[int] = (2, 4),
        hidden: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(grid) != 2:
            raise ValueError(f"grid must be (rows, columns), not {tuple(grid)}")
        self.channels = channels
        stages: list[nn.Module] = []
        previous = channels
        for index, width in enumerate(widths):
            if index > 0:
                stages.append(nn.AvgPool2d(2))
            stages += [
                nn.Conv2d(previous, width, 3, padding=1),
                nn.GroupNorm(8 if width % 8 == 0 else 1, width),
                nn.GELU(),
            ]
            previous = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d((int(grid[0]), int(grid[1])))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(previous * int(grid[0]) * int(grid[1]), hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, embedding_dim),
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """(n, channels, H, W) -> (n, embedding_dim). Raises TypeError for `Padded`, ValueError for other channels."""
        if isinstance(inputs, Padded):
            raise TypeError("ImageConvNet takes images of one size (a tensor), not sequences of unequal length")
        check_channels(inputs, self.channels)
        return self.head(self.pool(self.stages(inputs)))
