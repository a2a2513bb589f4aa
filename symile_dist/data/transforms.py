"""Decoded samples -> tensors: `transform(decoded, rng) -> Tensor`.

`rng` is None where nothing is to be augmented (evaluation); one that never uses it says `uses_rng = False`, and where
none does it is None. A transform that says `variable_length` returns
tensors whose first dimension differs from sample to sample; the collate pads them into `types.Padded`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.data.decode import Waveform
from symile_dist.types import CHARACTER_VOCABULARY

_DIRECT = 0x0E80
"""Code points below this (Latin to Thai: every alphabet and Indic script of common use) have an id of their own."""
_HASHED = 373
"""Ids that all other code points share, by their remainder. So large that any run of as many code points (kana, for
one) is free of collisions, and that the digits of Chinese, Japanese and Korean are."""
assert 1 + _DIRECT + _HASHED <= CHARACTER_VOCABULARY


class ImageTransform:
    """uint8 image -> float32 (C, H, W), scaled to [0, 1], then (x - mean) / std.

    Parameters:
        size: (H, W) to resize to, or None to keep the size, which must then be the same for all images.
        crop: keep the proportions: resize so that the image covers `size`, and take the middle.
        resample: `bilinear` or `bicubic`. CLIP's own preparation is size [224, 224], crop, bicubic.
        mean, std: one number, or one per channel.
        random_area: augmentation, (least, most): a random part of the image, of this share of its area and of the
            proportions of `size` times 3/4 to 4/3, is resized to `size` (random resized crop).
        shift: augmentation, moves the image by up to this many pixels in both directions; what enters is black.
        flip: augmentation, mirrors half of the images left to right.
        noise: augmentation, standard deviation of Gaussian noise, before normalisation (1 is white).

    Raises ValueError for a size, mean or std that make no sense, and for arrays that are no images.
    """

    variable_length: ClassVar[bool] = False

    def __init__(
        self,
        size: Sequence[int] | None = None,
        crop: bool = False,
        resample: str = "bilinear",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        random_area: Sequence[float] | None = None,
        shift: int = 0,
        flip: bool = False,
        noise: float = 0.0,
    ) -> None:
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise ValueError(f"size must be (height, width), not {tuple(size)}")
        if resample not in ("bilinear", "bicubic"):
            raise ValueError(f"resample must be bilinear or bicubic, not '{resample}'")
        if shift < 0 or noise < 0:
            raise ValueError("shift and noise must not be negative")
        if random_area is not None and (len(random_area) != 2 or not 0 < random_area[0] <= random_area[1] <= 1):
            raise ValueError(f"random_area must be (least, most), shares of the area up to 1, not {random_area}")
        if random_area is not None and size is None:
            raise ValueError("random_area needs a size")
        self.random_area = None if random_area is None else (float(random_area[0]), float(random_area[1]))
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.crop, self.resample = crop, resample
        self.mean = np.atleast_1d(np.asarray(mean, dtype=np.float32)).reshape(-1, 1, 1)
        self.std = np.atleast_1d(np.asarray(std, dtype=np.float32)).reshape(-1, 1, 1)
        if (self.std <= 0).any():
            raise ValueError(f"std must be positive, not {std}")
        # One multiplication and one addition per pixel.
        self._scale = (1.0 / (255.0 * self.std)).astype(np.float32)
        self._offset = (-self.mean / self.std).astype(np.float32)
        self.shift, self.flip, self.noise = shift, flip, noise

    def __call__(self, decoded: NDArray[np.uint8], rng: np.random.Generator | None) -> Tensor:
        image = np.asarray(decoded)
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise ValueError(f"an image is (H, W) or (H, W, C) uint8, not {image.shape} {image.dtype}")
        if self.size is not None:
            if rng is not None and self.random_area is not None:
                image = self._random_part(image, self.size, self.random_area, rng)
            if image.shape[:2] != self.size:
                image = self._resized(image, self.size)
        planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.shape[0] not in (1, planes.shape[0]):
                raise ValueError(f"{name} has {values.shape[0]} values, the image {planes.shape[0]} channels")
        if rng is not None:
            if self.shift:
                planes = _shifted(planes, *(int(s) for s in rng.integers(-self.shift, self.shift + 1, size=2)))
            if self.flip and rng.random() < 0.5:
                planes = planes[:, :, ::-1]
        values = planes * self._scale + self._offset
        if rng is not None and self.noise:
            values += (self.noise / self.std) * rng.standard_normal(values.shape, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def _random_part(
        self, image: NDArray[np.uint8], size: tuple[int, int], shares: tuple[float, float], rng: np.random.Generator
    ) -> NDArray[np.uint8]:
        """A part of the image; where none of ten draws lies within it, the whole image."""
        from PIL import Image

        height, width = image.shape[:2]
        for _ in range(10):
            area = height * width * rng.uniform(*shares)
            proportions = size[1] / size[0] * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            rows, columns = round(math.sqrt(area / proportions)), round(math.sqrt(area * proportions))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
                box = (left, top, left + columns, top + rows)
                method = getattr(Image.Resampling, self.resample.upper())
                return np.asarray(Image.fromarray(image).resize(size[::-1], method, box=box))
        return image

    def _resized(self, image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
        from PIL import Image

        target = size
        if self.crop:
            scale = max(size[0] / image.shape[0], size[1] / image.shape[1])
            target = (max(size[0], int(image.shape[0] * scale)), max(size[1], int(image.shape[1] * scale)))
        whole = np.asarray(
            Image.fromarray(image).resize(target[::-1], getattr(Image.Resampling, self.resample.upper()))
        )
        top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
        return whole[top : top + size[0], left : left + size[1]]


def _shifted(planes: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """(C, H, W) moved by some pixels, zero where nothing moved to."""
    height, width = planes.shape[1:]
    moved = np.zeros_like(planes)
    if abs(down) < height and abs(right) < width:
        moved[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = planes[
            :, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
    return moved


class WaveformTransform:
    """A decoded clip -> float32 (T,) in [-1, 1], T its number of samples.

    Parameters:
        sample_rate: Hz; a clip of another rate is refused, not resampled: resampling costs more than all the rest and
            belongs into the making of the dataset.
        max_seconds: longer clips are cut, at a random place where an rng is given, else in the middle; None keeps all.
        gain_db: augmentation, makes the clip louder or softer by up to so much.

    Raises ValueError for a clip of another rate and for one that is empty or holds NaN.
    """

    variable_length: ClassVar[bool] = True

    def __init__(self, sample_rate: int = 16000, max_seconds: float | None = None, gain_db: float = 0.0) -> None:
        if sample_rate < 1 or (max_seconds is not None and max_seconds <= 0) or gain_db < 0:
            raise ValueError("sample_rate and max_seconds must be positive, gain_db not negative")
        self.sample_rate = sample_rate
        self.max_samples = None if max_seconds is None else max(1, round(max_seconds * sample_rate))
        self.gain_db = gain_db

    def __call__(self, decoded: Waveform, rng: np.random.Generator | None) -> Tensor:
        samples, rate = decoded
        if rate != self.sample_rate:
            raise ValueError(f"the clip has {rate} samples per second, the config says {self.sample_rate}")
        if len(samples) == 0:
            raise ValueError("the clip is empty")
        if self.max_samples is not None and len(samples) > self.max_samples:
            spare = len(samples) - self.max_samples
            start = spare // 2 if rng is None else int(rng.integers(spare + 1))
            samples = samples[start : start + self.max_samples]
        if not np.isfinite(np.dot(samples, samples)):
            raise ValueError("the clip holds NaN or infinity")
        if rng is not None and self.gain_db:
            samples = samples * np.float32(10.0 ** (rng.uniform(-self.gain_db, self.gain_db) / 20.0))
        return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


class CharacterTransform:
    """Text -> int64 (T,): one id per Unicode code point, at most `max_length`.

    Ids are 1 to CHARACTER_VOCABULARY - 1 and need no vocabulary file: code points below U+0E80 have an id of their own,
    all others (kana, Han, Hangul, emoji) share 373 ids by their remainder. Remainders collide, which costs a model
    of short words little; for free text in those scripts use a tokenizer.

    Text is lower-cased where `lowercase` says so. An empty text gives a tensor of length 0.
    """

    uses_rng: ClassVar[bool] = False
    variable_length: ClassVar[bool] = True

    def __init__(self, max_length: int = 256, lowercase: bool = False) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {max_length}")
        self.max_length, self.lowercase = max_length, lowercase

    def __call__(self, decoded: str, rng: np.random.Generator | None) -> Tensor:
        text = decoded.lower() if self.lowercase else decoded
        # surrogatepass: a lone surrogate is odd but harmless here.
        points = np.frombuffer(text[: self.max_length].encode("utf-32-le", "surrogatepass"), dtype="<u4")
        points = points.astype(np.int64)
        return torch.from_numpy(np.where(points < _DIRECT, 1 + points, 1 + _DIRECT + points % _HASHED))


class TensorTransform:
    """A numeric array -> a tensor of a floating-point or integer type.

    Parameters:
        shape: what every array must have, or None for whatever comes; None in it allows any size there.
        variable_length: the first dimension differs from sample to sample; the shape begins with None then.
        dtype: "float32", "float64", "int64" or another type of torch.

    Raises ValueError for another shape, for values that are no numbers, for NaN or infinity, and for values that the
    type does not hold: fractions in integers, and what would be infinite.
    """

    uses_rng: ClassVar[bool] = False
    variable_length: bool = False

    def __init__(
        self, shape: Sequence[int | None] | None = None, dtype: str = "float32", variable_length: bool = False
    ) -> None:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"'{dtype}' is not a type of torch")
        self.shape = None if shape is None else tuple(None if size is None else int(size) for size in shape)
        if variable_length and self.shape is not None and (not self.shape or self.shape[0] is not None):
            raise ValueError(f"a shape of variable length begins with null, not {self.shape}")
        self.variable_length = variable_length
        self.dtype = kind

    def __call__(self, decoded: NDArray[Any], rng: np.random.Generator | None) -> Tensor:
        array = np.asarray(decoded)
        if self.shape is not None and not _fits(array.shape, self.shape):
            raise ValueError(f"the array has shape {array.shape}, the config says {self.shape}")
        if array.dtype.kind not in "biuf":
            raise ValueError(f"an array of {array.dtype} is not numeric")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("the array holds NaN or infinity")
        # torch knows neither foreign byte orders nor all of numpy's types; a copy, for decoded arrays may be read-only.
        native = array.astype(array.dtype.newbyteorder("="), copy=True)
        if native.dtype.kind == "u" and native.dtype.itemsize > 1:
            native = native.astype(np.int64)
        if native.dtype.kind == "f" and native.dtype.itemsize > 8:
            native = native.astype(np.float64)
        values = torch.from_numpy(native)
        made = values.to(self.dtype)
        if values.is_floating_point() and made.dtype != values.dtype:
            if not made.is_floating_point() and not made.is_complex() and (made != values).any():
                raise ValueError(f"the array holds values that are not integers of {self.dtype}")
            if made.is_floating_point() and made.itemsize < values.itemsize and not made.isfinite().all():
                raise ValueError(f"the array holds values that are too large for {self.dtype}")
        return made


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))
