"""Encoders: shapes, precisions, and that no neighbour in the batch changes a sample's output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from symile_dist.encoders import ENCODERS
from symile_dist.encoders.audio import AudioConvNet, LogMel, mel_filterbank
from symile_dist.encoders.image import ImageConvNet
from symile_dist.encoders.mlp import MLP
from symile_dist.encoders.points import ImagePoints
from symile_dist.encoders.text import TextConvNet
from symile_dist.registry import build
from symile_dist.types import Inputs, Padded

DIM = 12
OURS = ["audio_convnet", "image_convnet", "mlp", "text_convnet"]
"""The others are tested in test_pretrained.py, test_encoders_papers.py and test_points.py."""


def padded(sequences: list[Tensor]) -> Padded:
    return Padded(pad_sequence(sequences, batch_first=True), torch.tensor([len(s) for s in sequences]))


def clips(generator: torch.Generator) -> list[Tensor]:
    # Shorter than one frame, exactly one frame, an odd and an even number of frames, much longer.
    return [0.1 * torch.randn(n, generator=generator) for n in (100, 512, 5000, 7040, 16000)]


def texts(generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(1, 4096, (n,), generator=generator) for n in (1, 2, 17, 40, 90)]


SEQUENCES: list[tuple[Callable[[], nn.Module], Callable[[torch.Generator], list[Tensor]]]] = [
    (lambda: AudioConvNet(DIM, width=16), clips),
    (lambda: TextConvNet(DIM, width=16, pooled=24), texts),
]


@pytest.fixture
def generator() -> torch.Generator:
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("make", "sequences"), SEQUENCES)
def test_padding_changes_nothing(
    make: Callable[[], nn.Module], sequences: Callable[[torch.Generator], list[Tensor]], generator: torch.Generator
) -> None:
    encoder, batch = make(), sequences(generator)
    together = encoder(padded(batch))
    alone = torch.cat([encoder(padded([sequence])) for sequence in batch])
    assert together.shape == (len(batch), DIM)
    assert (together - alone).abs().max() < 1e-5
    values, lengths = padded(batch)
    further = encoder(Padded(nn.functional.pad(values, (0, 3001)), lengths))
    assert (together - further).abs().max() < 1e-5
    assert together.std(0).min() > 1e-3, "all clips give the same output"


@pytest.mark.parametrize(("make", "sequences"), SEQUENCES)
def test_padding_changes_no_gradient(
    make: Callable[[], nn.Module], sequences: Callable[[torch.Generator], list[Tensor]], generator: torch.Generator
) -> None:
    encoder, batch = make(), sequences(generator)
    encoder(padded(batch)).square().sum().backward()
    together = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    encoder.zero_grad(set_to_none=True)
    for sequence in batch:
        encoder(padded([sequence])).square().sum().backward()
    alone = [p.grad for p in encoder.parameters() if p.grad is not None]
    assert len(together) == len(alone) == len(list(encoder.parameters()))
    for a, b in zip(together, alone, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def inputs_of(name: str, generator: torch.Generator) -> Inputs:
    if name == "audio_convnet":
        return padded(clips(generator))
    if name == "text_convnet":
        return padded(texts(generator))
    return torch.randn(5, 10, generator=generator) if name == "mlp" else torch.randn(5, 1, 8, 16, generator=generator)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    if isinstance(inputs, Padded):
        values = inputs.values.to(dtype) if inputs.values.is_floating_point() else inputs.values
        return Padded(values, inputs.lengths)
    return inputs.to(dtype)


@pytest.mark.parametrize("name", OURS)
def test_all_precisions(name: str, generator: torch.Generator) -> None:
    encoder = build(name, {"input_dim": 10} if name == "mlp" else {}, ENCODERS, "encoder", embedding_dim=DIM)
    inputs = inputs_of(name, generator)
    reference = encoder(inputs).detach()
    assert reference.shape == (5, DIM) and reference.dtype == torch.float32
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.1)):
        output = encoder.to(dtype)(cast(inputs, dtype))
        assert output.dtype == dtype
        assert (output.float() - reference).abs().max() < tolerance * max(1.0, float(reference.abs().max()))
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
        encoder.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", OURS)
def test_no_batch_statistics_and_no_saved_buffers(name: str) -> None:
    encoder = build(name, {"input_dim": 10} if name == "mlp" else {}, ENCODERS, "encoder", embedding_dim=DIM)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    assert set(encoder.state_dict()) == {key for key, _ in encoder.named_parameters()}


def test_the_filterbank_survives_every_cast() -> None:
    features = AudioConvNet(DIM).features
    window, filters = features.window.clone(), features.filters.clone()
    for converted in (features.bfloat16(), features.double(), features.to("meta").to_empty(device="cpu")):
        assert converted.window.dtype == torch.float32 and torch.equal(converted.window, window)
        assert torch.equal(converted.filters, filters)


def test_log_mel_finds_the_frequency() -> None:
    time = torch.arange(8000) / 16000
    features = LogMel(16000, 512, 320, 40)
    tones = padded([torch.sin(2 * torch.pi * hertz * time) for hertz in (300.0, 1000.0, 4000.0)])
    frames, counts = features(*tones)
    assert frames.shape == (3, 40, 24) and counts.tolist() == [24, 24, 24]
    peaks = mel_filterbank(16000, 512, 40).argmax(0) * 16000 / 512
    for i, hertz in enumerate((300.0, 1000.0, 4000.0)):
        assert abs(float(peaks[frames[i].mean(1).argmax()]) - hertz) < 0.1 * hertz + 32
    assert abs(float(frames[0].mean())) < 1e-4 and abs(float(frames[0].std()) - 1) < 0.05


def test_loudness_does_not_matter_to_the_ear() -> None:
    clip = 0.3 * torch.randn(8000)
    features = LogMel(16000, 512, 320, 40)
    loud, quiet = features(*padded([clip]))[0], features(*padded([0.5 * clip]))[0]
    assert (loud - quiet).abs().max() < 0.05


def test_word_order_and_place_in_the_image_matter(generator: torch.Generator) -> None:
    text = TextConvNet(DIM)
    a, b = torch.tensor([5, 6, 7]), torch.tensor([9, 10, 11])
    forward, backward = text(padded([torch.cat([a, b])])), text(padded([torch.cat([b, a])]))
    assert (forward - backward).abs().max() > 1e-3
    images = torch.zeros(2, 1, 8, 16)
    images[0, 0, 2:6, 2:6] = images[1, 0, 2:6, 10:14] = 1
    left, right = ImageConvNet(DIM)(images)
    assert (left - right).abs().max() > 1e-3


def test_an_empty_text_is_finite() -> None:
    output = TextConvNet(DIM)(padded([torch.zeros(0, dtype=torch.int64), torch.tensor([3, 4])]))
    assert output.isfinite().all()


def test_the_wrong_kind_of_input_is_named() -> None:
    sequences = padded([torch.ones(4)])
    for encoder, inputs in (
        (ImageConvNet(DIM), sequences),
        (MLP(DIM, 4), sequences),
        (AudioConvNet(DIM), torch.ones(1, 4)),
        (TextConvNet(DIM), torch.ones(1, 4)),
    ):
        with pytest.raises(TypeError, match=type(encoder).__name__):
            encoder(inputs)


def test_values_of_another_number_and_ids_beyond_the_vocabulary_are_told() -> None:
    with pytest.raises(ValueError, match="a sample has 5 values, input_dim is 4"):
        MLP(DIM, 4)(torch.ones(2, 5))
    for images in (ImageConvNet(DIM), ImagePoints(DIM)):
        with pytest.raises(ValueError, match=r"the inputs are \(2, 3, 8, 8\), the encoder takes \(n, 1, H, W\)"):
            images(torch.ones(2, 3, 8, 8))
    encoder = TextConvNet(DIM, vocabulary_size=10)
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=f"an id is {wrong}, the encoder knows 0 to 9"):
            encoder(padded([torch.tensor([1, wrong])]))


def test_options_that_make_no_sense() -> None:
    for option in ("sample_rate", "n_fft", "hop", "n_mels", "layers"):
        with pytest.raises(ValueError, match=rf"{option} = 0.* should be 1 or more"):
            AudioConvNet(DIM, **{option: 0})
    with pytest.raises(ValueError, match="odd"):
        TextConvNet(DIM, kernel=4)
    with pytest.raises(ValueError, match="grid"):
        ImageConvNet(DIM, grid=(2,))
