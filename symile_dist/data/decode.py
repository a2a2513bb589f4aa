"""Bytes of one member -> what a transform takes. Whatever is wrong with the bytes is a ValueError.

Nothing here unpickles: a dataset may come from anywhere.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What Pillow may try: its EPS reader, for one, starts Ghostscript."""


MAX_NPY_HEADER = 10_000
"""Bytes, as numpy itself has it."""

MAX_AUDIO_VALUES = 2**28
"""Samples times channels of a clip: a GiB as float32. Some hundred bytes may declare any number."""


class Waveform(NamedTuple):
    """A decoded clip."""

    samples: NDArray[np.float32]
    """(T,) in [-1, 1], mono."""
    sample_rate: int
    """Hz"""


def decode_image(data: bytes, mode: str = "RGB", max_pixels: int = 50_000_000) -> NDArray[np.uint8]:
    """An encoded image -> (H, W, 3) uint8 for mode "RGB", (H, W) for mode "L".

    Raises ValueError for bytes that are no image, for a truncated one and, before anything is decoded, for one that
    declares more than `max_pixels`.
    """
    from PIL import Image

    if mode not in ("RGB", "L"):
        raise ValueError(f"image mode must be 'RGB' or 'L', not '{mode}'")
    try:
        with warnings.catch_warnings():
            # Pillow's own limits: the warning is ours to give, as an error, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"the image declares {image.width} x {image.height} pixels, more than {max_pixels}")
        return np.asarray(image if image.mode == mode else image.convert(mode))
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, EOFError, struct.error and more
        raise ValueError(f"not a readable image: {error}") from error


def decode_audio(data: bytes, max_seconds: float = 3600.0) -> Waveform:
    """An encoded clip (FLAC, WAV, Ogg, MP3) -> its samples, averaged over the channels, and the sample rate.

    Raises ValueError for bytes that are no audio and, before anything is decoded, for clips longer than `max_seconds`.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.frames * file.channels > MAX_AUDIO_VALUES:
                raise ValueError(f"the clip declares {file.frames} samples of {file.channels} channels: refused")
            if file.frames > max_seconds * file.samplerate:
                raise ValueError(
                    f"the clip declares {file.frames / file.samplerate:.0f} s, more than {max_seconds:.0f}"
                )
            samples = file.read(dtype="float32")
            rate = int(file.samplerate)
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise ValueError(f"not a readable audio file: {error}") from error
    return Waveform(samples if samples.ndim == 1 else samples.mean(axis=1, dtype=np.float32), rate)


def decode_text(data: bytes) -> str:
    """UTF-8 -> str. Raises ValueError (UnicodeDecodeError) for anything else."""
    return data.decode("utf-8")


def decode_npy(data: bytes) -> NDArray[Any]:
    """A .npy file -> its array. Raises ValueError for anything else, and for arrays of Python objects."""
    try:
        size = _npy_header_size(data)
        shape, fortran, dtype = _npy_header(data[:size])
        if dtype.hasobject or dtype.itemsize == 0:  # of values without size any number takes no bytes
            raise ValueError("an array of Python objects, or of values without size")
        count = math.prod(shape)
        if size + count * dtype.itemsize > len(data):
            raise ValueError(f"{count} values of {dtype} are declared, the file ends before them")
        return np.ndarray(shape, dtype, data, size, order="F" if fortran else "C").copy(order="K")
    except Exception as error:  # a damaged header may raise almost anything (SyntaxError, TypeError, EOFError)
        raise ValueError(f"not a readable .npy array: {error}") from error


def _npy_header_size(data: bytes) -> int:
    if data[:6] != b"\x93NUMPY":
        raise ValueError("it does not begin with numpy's magic number")
    (length,) = struct.unpack_from("<H" if data[6] == 1 else "<I", data, 8)
    size: int = length + (10 if data[6] == 1 else 12)
    if size > min(len(data), MAX_NPY_HEADER):
        raise ValueError(f"its header takes {size} bytes")
    return size


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, dtype). Arrays of one kind have the same header, and numpy takes 40
    microseconds to read one: ten times as long as all the rest."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format: write it with names of fields in ASCII")
    return read(stream)
