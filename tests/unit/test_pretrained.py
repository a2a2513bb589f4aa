"""Hugging Face models as encoders, with the transforms that feed them: tiny random models, saved to a folder."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from symile_dist.data.decode import Waveform
from symile_dist.data.tokens import TokensTransform
from symile_dist.data.transforms import ImageTransform, TensorTransform
from symile_dist.data.whisper import WhisperTransform, resampled
from symile_dist.encoders.pretrained import PretrainedEncoder
from symile_dist.registry import ENCODERS, TRANSFORMS, build
from symile_dist.types import Padded
from tests.pretrained import save_clip, save_text, save_whisper

DIM = 12


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text"))


def padded(sequences: list[Tensor], further: int = 0) -> Padded:
    values = pad_sequence(sequences, batch_first=True)
    if further:
        values = torch.cat([values, values.new_zeros((len(values), further, *values.shape[2:]))], 1)
    return Padded(values, torch.tensor([len(sequence) for sequence in sequences]))


def clips(*seconds: float) -> list[Waveform]:
    generator = np.random.default_rng(0)
    return [Waveform((0.1 * generator.standard_normal(int(s * 16000))).astype(np.float32), 16000) for s in seconds]


def test_the_parts_of_a_model_give_what_transformers_gives(clip: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model.vision_model(pixel_values=images)
        for pooling, expected in (
            ("pooler", output.pooler_output),
            ("cls", output.last_hidden_state[:, 0]),
            ("mean", output.last_hidden_state.mean(1)),
            ("none", output.last_hidden_state),
        ):
            encoder = PretrainedEncoder(DIM, str(clip), part="vision", pooling=pooling, projection=False).eval()  # type: ignore[arg-type]
            assert torch.allclose(encoder(images), expected, atol=1e-6), pooling
    ids = [torch.tensor([0, 5, 6, 2]), torch.tensor([0, 7, 2])]
    encoder = PretrainedEncoder(DIM, str(clip), part="text", pooling="pooler", projection=False).eval()
    alone = model.text_model(input_ids=ids[1][None]).pooler_output
    assert torch.allclose(encoder(padded(ids))[1], alone[0], atol=1e-5)


def test_the_registry_s_encoder_projects_to_the_embedding(clip: Path) -> None:
    options = {"model": str(clip), "part": "vision", "pooling": "pooler"}
    encoder = build("pretrained", options, ENCODERS, "encoder", embedding_dim=DIM)
    encoder(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert encoder(torch.randn(2, 3, 16, 16)).shape == (2, DIM)
    assert encoder.model.embeddings.class_embedding.grad.abs().sum() > 0
    frozen = build("pretrained", {**options, "frozen": True}, ENCODERS, "encoder", embedding_dim=DIM).train()
    assert not frozen.model.training and frozen.projection.training
    frozen(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert {name for name, p in frozen.named_parameters() if p.grad is not None} == {
        "projection.weight",
        "projection.bias",
    }
    assert encoder.to(torch.bfloat16)(torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "none"])
def test_padding_changes_no_text(text: Path, pooling: str) -> None:
    tokens = TokensTransform(str(text), max_length=12)
    sentences = [tokens(words, None) for words in ("a", "one two", "one two three a b c d e f g h i j k l", "")]
    assert [len(ids) for ids in sentences] == [3, 4, 12, 2]
    encoder = PretrainedEncoder(DIM, str(text), pooling=pooling, projection=False).eval()  # type: ignore[arg-type]
    together = encoder(padded(sentences))
    further = encoder(padded(sentences, further=60))  # beyond the positions that the model has
    for row, sentence in enumerate(sentences):
        alone = encoder(padded([sentence]))
        if pooling == "none":
            assert together.lengths[row] == len(sentence)
            found = [each.values[at, : len(sentence)] for each, at in ((together, row), (further, row), (alone, 0))]
        else:
            found = [together[row], further[row], alone[0]]
        assert torch.allclose(found[0], found[2], atol=1e-5) and torch.allclose(found[1], found[2], atol=1e-5)
    assert pooling == "none" or (together[0] - together[1]).abs().max() > 1e-3


def test_the_mean_is_over_the_words_and_not_over_the_padding(text: Path) -> None:
    from transformers import AutoModel

    ids = torch.tensor([0, 5, 6, 2])
    encoder = PretrainedEncoder(DIM, str(text), projection=False).eval()
    expected = AutoModel.from_pretrained(text).eval()(input_ids=ids[None]).last_hidden_state.mean(1)
    assert torch.allclose(encoder(padded([ids, torch.arange(9)]))[:1], expected, atol=1e-5)


def test_whisper_sees_the_whole_window_whatever_comes_of_the_transform(whisper: Path) -> None:
    """Frames of the clip alone, silence added by the encoder: what Whisper's own preparation gives."""
    from transformers import WhisperFeatureExtractor, WhisperModel

    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    model = WhisperModel.from_pretrained(whisper).eval()
    short, whole = WhisperTransform(str(whisper)), WhisperTransform(str(whisper), whole_window=True)
    some = [*clips(0.3, 0.52, 0.8, 1.0, 1.7, 0.004), Waveform(np.zeros(4000, np.float32), 16000)]
    features = extractor([clip.samples for clip in some], sampling_rate=16000, return_tensors="pt")["input_features"]
    assert torch.allclose(torch.stack([whole(clip, None) for clip in some]), features.transpose(1, 2), atol=1e-5)
    frames = [short(clip, None) for clip in some]
    assert [len(each) for each in frames] == [32, 54, 82, 100, 100, 2, 27]
    expected = model.encoder(features).last_hidden_state
    encoder = PretrainedEncoder(DIM, str(whisper), part="encoder", projection=False).eval()
    for row, each in enumerate(frames):
        of_clip = expected[row, : (len(each) + 1) // 2].mean(0)
        assert torch.allclose(encoder(padded(frames))[row], of_clip, atol=1e-4), row
        assert torch.allclose(encoder(padded([each]))[0], of_clip, atol=1e-4), row
    of_window = encoder(torch.stack([whole(clip, None) for clip in some]))
    assert torch.allclose(of_window, expected.mean(1), atol=1e-4)
    assert (of_window[0] - encoder(padded(frames))[0]).abs().max() > 1e-2, "silence counts in one of them"


def test_clips_of_other_rates(whisper: Path) -> None:
    time = np.arange(48000) / 48000
    for hertz, kept in ((440.0, True), (3000.0, True), (7000.0, True), (9000.0, False), (15000.0, False)):
        tone = np.sin(2 * np.pi * hertz * time).astype(np.float32)
        found = resampled(tone, 48000, 16000)
        assert len(found) == 16000
        expected = np.sin(2 * np.pi * hertz * np.arange(16000) / 16000) if kept else np.zeros(16000)
        assert np.abs(found - expected)[100:-100].max() < 0.01, hertz
    up = resampled(np.sin(2 * np.pi * 440 * np.arange(22050) / 22050).astype(np.float32), 22050, 16000)
    assert np.abs(up - np.sin(2 * np.pi * 440 * np.arange(16000) / 16000))[100:-100].max() < 0.01
    clip = Waveform(np.ones(4800, np.float32), 48000)
    assert WhisperTransform(str(whisper))(clip, None).shape == (12, 8)
    with pytest.raises(ValueError, match="48000 samples per second, the model takes 16000"):
        WhisperTransform(str(whisper), resample=False)(clip, None)
    for bad in (np.zeros(0, np.float32), np.array([1, np.nan], np.float32)):
        with pytest.raises(ValueError):
            WhisperTransform(str(whisper))(Waveform(bad, 16000), None)


def test_a_tokenizer_without_vocabulary_is_none(clip: Path, text: Path, tmp_path: Path) -> None:
    """transformers makes one of a model's config alone, and to it all texts of a length are the same."""
    shutil.copy(text / "config.json", tmp_path)
    for folder in (clip, tmp_path):
        with pytest.raises(ValueError, match="holds no tokenizer, whose files"):
            TokensTransform(str(folder))
    with pytest.raises(ValueError, match=r"nowhere: no tokenizer can be loaded: no such folder"):
        TokensTransform(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"max_length = 2: .* adds 2 special tokens"):
        TokensTransform(str(text), max_length=2)


def test_the_transforms_travel_to_loader_processes(whisper: Path, text: Path) -> None:
    for name, options, decoded in (
        ("tokens", {"model": str(text)}, "one two"),
        ("whisper_features", {"model": str(whisper)}, clips(0.2)[0]),
    ):
        transform = build(name, options, TRANSFORMS, "transform")
        state = pickle.dumps(transform)
        assert len(state) < 500, "what is loaded from the folder does not travel"
        there = pickle.loads(state)
        assert torch.equal(there(decoded, None), transform(decoded, None))
        assert there.variable_length


def test_clip_s_own_preparation_of_images() -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil()
    transform = ImageTransform([224, 224], True, "bicubic", processor.image_mean, processor.image_std)
    for height, width in ((300, 400), (411, 257), (224, 224), (100, 90), (225, 1000)):
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = processor(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.allclose(transform(picture, None), expected, atol=1e-5), (height, width)


def test_sequences_of_features_may_have_any_length() -> None:
    transform = TensorTransform([None, 3], variable_length=True)
    assert transform.variable_length and transform(np.ones((5, 3), np.float16), None).shape == (5, 3)
    with pytest.raises(ValueError, match="shape"):
        transform(np.ones((5, 4)), None)
    with pytest.raises(ValueError, match="begins with null"):
        TensorTransform([4, 3], variable_length=True)
    assert not TensorTransform([3]).variable_length


def test_mistakes_are_told(clip: Path, whisper: Path, text: Path, tmp_path: Path) -> None:
    def refused(words: str, model: Path, **options: object) -> None:
        with pytest.raises(ValueError, match=words):
            build("pretrained", {"model": str(model), **options}, ENCODERS, "encoder", embedding_dim=DIM)

    refused("no such folder", tmp_path / "nowhere")
    refused("pooling must be", text, pooling="max")
    refused("set projection=false", text, pooling="none")
    refused("part must be", clip, part="audio")
    refused("set part to vision or text", clip)
    refused("set part to encoder", whisper)
    refused("has no part 'vision'", whisper, part="vision")
    refused("has no part 'encoder'", text, part="encoder")
    for transform, folder in (("tokens", tmp_path), ("whisper_features", tmp_path)):
        with pytest.raises(ValueError, match=str(tmp_path)):
            build(transform, {"model": str(folder)}, TRANSFORMS, "transform")
    encoder = PretrainedEncoder(DIM, str(whisper), part="encoder", pooling="pooler")
    with pytest.raises(ValueError, match="has no pooler"):
        encoder(torch.zeros(1, 100, 8))
    with pytest.raises(TypeError, match="images"):
        PretrainedEncoder(DIM, str(clip), part="vision")(padded([torch.ones(3)]))
    with pytest.raises(TypeError, match="token ids"):
        PretrainedEncoder(DIM, str(text))(torch.ones(1, 3))


def test_inputs_that_the_model_cannot_take_are_told(clip: Path, whisper: Path, text: Path) -> None:
    """Not by torch, whose words would pass for a failure of the machine; and on a GPU end the process."""
    long = Padded(torch.full((1, 60), 5), torch.tensor([60]))
    for model, part, inputs, words in (
        (clip, "vision", torch.zeros(2, 1, 16, 16), r"\(2, 1, 16, 16\), the encoder takes \(n, 3, H, W\)"),
        (clip, "text", long, "the model knows 16 positions: set the transform's max_length to 16"),
        (text, None, long, "the model knows 38 positions"),
        (whisper, "encoder", Padded(torch.zeros(2, 9, 7), torch.tensor([9, 9])), r"takes \(n, T, 8\) frames"),
    ):
        encoder = PretrainedEncoder(DIM, str(model), part=part)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            encoder(inputs)
    PretrainedEncoder(DIM, str(text))(Padded(torch.full((1, 38), 5), torch.tensor([38])))


def test_transformers_is_told_what_not_to_do(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    told: dict[str, object] = {}

    def from_pretrained(name: str, **options: object) -> None:
        told.update(options)
        raise OSError("offline")

    monkeypatch.setattr(AutoModel, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="some/model: cannot be loaded: OSError: offline"):
        PretrainedEncoder(DIM, "some/model", revision="abc")
    assert told["use_safetensors"] is True and told["trust_remote_code"] is False and told["revision"] == "abc"


def test_no_pickle_is_read_and_no_weight_is_made_up(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(text / "model.safetensors")
    for name in ("config.json",):
        (tmp_path / name).write_bytes((text / name).read_bytes())
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors weights"):
        PretrainedEncoder(DIM, str(tmp_path))
    without = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    PretrainedEncoder(DIM, str(tmp_path), pooling="mean")
    with pytest.raises(ValueError, match=r"lacks weights .*pooler"):
        PretrainedEncoder(DIM, str(tmp_path), pooling="pooler")
    del without[next(key for key in without if "layer.0" in key)]
    save_file(without, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights .*layer\.0"):
        PretrainedEncoder(DIM, str(tmp_path), pooling="mean")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content in (b"damaged", b"", whole[:-1], whole[:20]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read as safetensors"):
            PretrainedEncoder.check(str(tmp_path))


def test_code_that_a_model_brings_along_is_not_run(text: Path, tmp_path: Path) -> None:
    import json

    for path in text.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((text / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        PretrainedEncoder(DIM, str(tmp_path))
    assert not (tmp_path / "ran").exists()
