"""Decoders refuse bad bytes with ValueError; transforms scale, crop, map and augment as documented."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from symile_dist.data.decode import Waveform, decode_audio, decode_image, decode_npy, decode_text
from symile_dist.data.demo import DIGIT_WORDS
from symile_dist.data.transforms import (
    CHARACTER_VOCABULARY,
    CharacterTransform,
    ImageTransform,
    TensorTransform,
    WaveformTransform,
)

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def png(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def audio(samples: np.ndarray[Any, Any], rate: int = 16000, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype="PCM_16")
    return file.getvalue()


def npy(array: np.ndarray[Any, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares so many pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_image_round_trip() -> None:
    assert np.array_equal(decode_image(png(PICTURE)), PICTURE)
    grey = decode_image(png(PICTURE[:, :, 0]), mode="L")
    assert grey.dtype == np.uint8 and np.array_equal(grey, PICTURE[:, :, 0])
    assert decode_image(png(PICTURE[:, :, 0])).shape == (6, 9, 3)


def test_image_bombs_are_refused_before_decoding() -> None:
    with pytest.raises(ValueError, match="9000 x 9000 pixels"):
        decode_image(bomb(9000, 9000))
    with pytest.raises(ValueError, match="image"):  # above Pillow's own limit too
        decode_image(bomb(100_000, 100_000))
    with pytest.raises(ValueError, match="more than 53"):
        decode_image(png(PICTURE), max_pixels=53)
    assert decode_image(png(PICTURE), max_pixels=54).shape == (6, 9, 3)


@pytest.mark.parametrize("bad", [b"", b"not an image", png(PICTURE)[:60], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_bad_images(bad: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(bad)


@pytest.mark.parametrize("kind", ["FLAC", "WAV"])
def test_audio_round_trip(kind: str) -> None:
    pcm = RNG.integers(-30000, 30000, 4001).astype(np.int16)
    decoded = decode_audio(audio(pcm, 8000, kind))
    assert decoded.sample_rate == 8000 and decoded.samples.dtype == np.float32
    assert np.array_equal(decoded.samples, pcm.astype(np.float32) / 32768)


def test_stereo_becomes_mono() -> None:
    pcm = RNG.integers(-30000, 30000, (500, 2)).astype(np.int16)
    decoded = decode_audio(audio(pcm))
    assert np.allclose(decoded.samples, pcm.mean(1) / 32768, atol=1e-6)


def test_bad_audio() -> None:
    for bad in (b"", b"RIFF", b"not audio at all", audio(np.zeros(100, np.int16))[:20]):
        with pytest.raises(ValueError, match="not a readable audio file"):
            decode_audio(bad)
    with pytest.raises(ValueError, match="more than 1"):
        decode_audio(audio(np.zeros(16001, np.int16)), max_seconds=1.0)


def test_text() -> None:
    assert decode_text("επτά_七".encode()) == "επτά_七"
    with pytest.raises(ValueError):
        decode_text(b"\xff\xfe")


def test_npy() -> None:
    array = RNG.standard_normal((3, 4))
    assert np.array_equal(decode_npy(npy(array)), array)
    archive = io.BytesIO()
    np.savez(archive, a=array)
    for bad in (b"", b"junk", npy(array)[:-9], pickle.dumps(array), archive.getvalue()):
        with pytest.raises(ValueError, match="npy"):
            decode_npy(bad)


class _Exploit:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<f2", "|u1", "<i8", "|b1"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 0, 2), (2, 3, 4)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_reads_what_numpy_reads(dtype: str, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
    array = np.asarray(np.arange(math.prod(shape)).reshape(shape).astype(dtype), order=order)
    for version in ((1, 0), (2, 0)):
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=version)
        for data in (file.getvalue(), file.getvalue() + b"more"):
            found, expected = decode_npy(data), np.load(io.BytesIO(data))
            assert found.dtype == expected.dtype and np.array_equal(found, expected), (version, data)
            assert found.flags.writeable and found.flags.f_contiguous == expected.flags.f_contiguous
        if array.nbytes:
            with pytest.raises(ValueError, match="the file ends before them"):
                decode_npy(file.getvalue()[:-1])


@pytest.mark.parametrize("descr", ["'|V0'", "'V'", "[]", "'|S0'", "'<U0'", "'|O'"])
@pytest.mark.parametrize("shape", ["(10000000000000,)", "(1000,)"])
def test_npy_of_values_without_size_is_refused_at_once(descr: str, shape: str) -> None:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    with pytest.raises(ValueError, match=r"not a readable \.npy array"):
        decode_npy(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)


def test_npy_never_unpickles() -> None:
    with pytest.raises(ValueError):
        decode_npy(npy(np.array([_Exploit()], dtype=object), allow_pickle=True))
    with pytest.raises(ValueError):
        decode_npy(pickle.dumps(_Exploit()))


def test_image_transform_scales_and_orders() -> None:
    out = ImageTransform(mean=[0.1, 0.2, 0.3], std=[0.5, 1.0, 2.0])(PICTURE, None)
    expected = (PICTURE / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    assert out.dtype == torch.float32 and out.shape == (3, 6, 9)
    assert np.allclose(out.numpy(), expected.transpose(2, 0, 1), atol=1e-6)
    assert ImageTransform()(PICTURE[:, :, 0], None).shape == (1, 6, 9)
    assert ImageTransform(size=[4, 5])(PICTURE, None).shape == (3, 4, 5)
    assert ImageTransform(size=[4, 5])(PICTURE[:, :, 0], None).shape == (1, 4, 5)


def test_image_augmentation_needs_an_rng_and_repeats_with_it() -> None:
    transform = ImageTransform(shift=2, flip=True, noise=0.1)
    plain = transform(PICTURE, None)
    assert torch.equal(plain, ImageTransform()(PICTURE, None))
    first = transform(PICTURE, np.random.default_rng(5))
    assert torch.equal(first, transform(PICTURE, np.random.default_rng(5)))
    assert not torch.equal(first, transform(PICTURE, np.random.default_rng(6)))


def test_image_shift_moves_and_blackens() -> None:
    seen = set()
    rng = np.random.default_rng(0)
    for _ in range(60):
        out = ImageTransform(shift=1)(np.pad(np.full((1, 1), 255, np.uint8), 1), rng)
        assert out.sum() == 1.0
        seen.add(int(out.argmax()))
    assert seen == set(range(9))
    assert ImageTransform(shift=50)(PICTURE, np.random.default_rng(0)).sum() == 0


def test_random_part_of_an_image() -> None:
    rows, columns = np.mgrid[:200, :250].astype(np.uint8)  # a pixel tells where it was
    picture = np.stack([rows, columns, rows], axis=2)
    transform = ImageTransform(size=[40, 50], random_area=[0.5, 0.9])
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(200):
        part = transform(picture, rng) * 255
        assert part.shape == (3, 40, 50)
        height = float(part[0, -1].mean() - part[0, 0].mean()) * 40 / 39
        width = float(part[1, :, -1].mean() - part[1, :, 0].mean()) * 50 / 49
        seen.append((height * width / (200 * 250), width / height, float(part[0].mean())))
    share, proportions, middle = np.array(seen).T
    assert 0.47 < share.min() < 0.55 and 0.85 < share.max() < 0.93
    assert 0.9 < proportions.min() < 1.0 < 1.5 < proportions.max() < 1.7  # 1.25 times 3/4 to 4/3
    assert middle.std() > 5, "always the same place"
    whole = ImageTransform(size=[40, 50])(picture, None)
    assert torch.equal(transform(picture, None), whole), "nothing is augmented without an rng"
    narrow = np.ascontiguousarray(picture[:, :3])  # no part of these proportions lies within it
    assert transform(narrow, rng).shape == (3, 40, 50)


def test_image_transform_refuses_nonsense() -> None:
    for options in (
        {"random_area": [0.5, 1.0]},
        {"size": [4, 4], "random_area": [0.5]},
        {"size": [4, 4], "random_area": [0, 1]},
    ):
        with pytest.raises(ValueError, match="random_area"):
            ImageTransform(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std"):
        ImageTransform(std=0.0)
    with pytest.raises(ValueError, match="size"):
        ImageTransform(size=[8])
    with pytest.raises(ValueError, match="channels"):
        ImageTransform(mean=[0.5, 0.5])(PICTURE, None)
    with pytest.raises(ValueError, match="uint8"):
        ImageTransform()(PICTURE.astype(np.float32), None)  # type: ignore[arg-type]


def test_waveform_transform() -> None:
    clip = Waveform(np.linspace(-1, 1, 1000, dtype=np.float32), 16000)
    assert torch.equal(WaveformTransform()(clip, None), torch.from_numpy(clip.samples))
    short = WaveformTransform(max_seconds=0.01)
    assert torch.equal(short(clip, None), torch.from_numpy(clip.samples[420:580]))
    crops = {float(short(clip, np.random.default_rng(i))[0]) for i in range(20)}
    assert len(crops) > 10 and all(len(short(clip, np.random.default_rng(i))) == 160 for i in range(3))
    louder = WaveformTransform(gain_db=6.0)(clip, np.random.default_rng(1))
    ratio = float(louder[-1])
    assert 0.5 < ratio < 2.0 and ratio != 1.0 and torch.allclose(louder, ratio * torch.from_numpy(clip.samples))


def test_waveform_transform_refuses() -> None:
    with pytest.raises(ValueError, match="8000 samples per second"):
        WaveformTransform()(Waveform(np.zeros(10, np.float32), 8000), None)
    with pytest.raises(ValueError, match="empty"):
        WaveformTransform()(Waveform(np.zeros(0, np.float32), 16000), None)
    with pytest.raises(ValueError, match="NaN"):
        WaveformTransform()(Waveform(np.array([0.0, np.nan], np.float32), 16000), None)
    with pytest.raises(ValueError):
        WaveformTransform(max_seconds=0.0)


def test_characters_have_ids_of_their_own_in_all_ten_scripts() -> None:
    characters = sorted({c for words in DIGIT_WORDS.values() for word in words for c in word} | set("_ "))
    ids = CharacterTransform(max_length=1000)("".join(characters), None)
    assert len(set(ids.tolist())) == len(characters)
    assert ids.dtype == torch.int64 and int(ids.min()) >= 1 and int(ids.max()) < CHARACTER_VOCABULARY


def test_character_ids_are_fixed() -> None:
    # A checkpoint's embedding rows rely on these.
    assert CharacterTransform()("a_ж七\U0001f600", None).tolist() == [98, 96, 1079, 3915, 3913]


def test_character_transform_edges() -> None:
    every = "".join(chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000)
    ids = CharacterTransform(max_length=len(every))(every, None)
    assert int(ids.min()) >= 1 and int(ids.max()) < CHARACTER_VOCABULARY
    assert CharacterTransform()("", None).shape == (0,)
    assert CharacterTransform(max_length=3)("abcdef", None).tolist() == [98, 99, 100]
    assert torch.equal(CharacterTransform(lowercase=True)("ÀB", None), CharacterTransform()("àb", None))
    with pytest.raises(ValueError):
        CharacterTransform(max_length=0)


def test_tensor_transform() -> None:
    array = RNG.standard_normal((2, 3))
    out = TensorTransform(shape=[2, 3])(array, None)
    assert out.dtype == torch.float32 and np.allclose(out.numpy(), array, atol=1e-6)
    assert TensorTransform(dtype="int64")(np.array([1, 2], np.uint16), None).dtype == torch.int64
    assert torch.equal(TensorTransform()(array.astype(">f4"), None), out)
    frozen = np.ones(3, np.float32)
    frozen.flags.writeable = False
    TensorTransform()(frozen, None).add_(1)
    assert frozen.sum() == 3
    for bad in (np.zeros((3, 2)), np.full((2, 3), np.nan), np.full((2, 3), "x")):
        with pytest.raises(ValueError):
            TensorTransform(shape=[2, 3])(bad, None)
    with pytest.raises(ValueError, match="not a type"):
        TensorTransform(dtype="float31")


def test_values_that_a_type_does_not_hold_are_refused() -> None:
    """A label of 1.5 is none of class 1, and 1e300 would be infinite."""
    integers = TensorTransform(dtype="int64")
    assert integers(np.array([1.0, -2.0]), None).tolist() == [1, -2]
    for fraction in (np.array([1.5]), np.array([1e30], np.float32)):
        with pytest.raises(ValueError, match=r"not integers of torch\.int64"):
            integers(fraction, None)
    for dtype, large in (("float32", 1e300), ("float16", 1e6)):
        with pytest.raises(ValueError, match=f"too large for torch.{dtype}"):
            TensorTransform(dtype=dtype)(np.array([large]), None)
    assert TensorTransform()(np.array([0.5], np.longdouble), None).tolist() == [0.5]


@pytest.mark.parametrize(
    ("transform", "variable"),
    [(ImageTransform, False), (TensorTransform, False), (WaveformTransform, True), (CharacterTransform, True)],
)
def test_variable_length_is_declared(transform: Any, variable: bool) -> None:
    assert transform.variable_length is variable
