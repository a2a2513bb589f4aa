"""The presets on tiny datasets in exactly the published layouts: packed, trained, evaluated, and what is told where
something is not there.

The networks are the presets' own, made small by overrides; XLM-R is a tiny one with random weights.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from symile_dist.cli import main
from symile_dist.config import Config, load_config, parse_config
from symile_dist.preflight import preflight
from symile_dist.tools.features.encode import encode
from symile_dist.tools.pack.symile_m3 import csv_source, tensors_source
from symile_dist.tools.pack.symile_mimic import mimic_source
from symile_dist.tools.pack.writer import pack
from tests.features import encode_without_ray
from tests.pretrained import save_clip, save_text, save_whisper
from tests.processes import run_distributed
from tests.unit.test_pack import make_m3 as make_m3_media

CONFIGS = Path(__file__).parents[2] / "configs"
M3 = ("m3-2", "m3-5", "m3-10", "m3-missing")
PRESETS = (*M3, "mimic")
SAMPLES, CLASSES, TOKENS, VOCABULARY = 12, 3, 7, 50
FROM_MEDIA = "m3-2, from media"


def make_m3(folder: Path, split: str) -> None:
    """What the authors' save_representations.py writes for a split: features by class, ids that XLM-R pads with 1."""
    rng = np.random.default_rng(len(split))
    classes = np.arange(SAMPLES) % CLASSES
    lengths = rng.integers(1, TOKENS - 1, SAMPLES)
    ids = np.ones((SAMPLES, TOKENS), dtype=np.int64)
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = [0, *rng.integers(4, VOCABULARY, length), 2]
    tensors = {
        "image": torch.from_numpy(rng.standard_normal((SAMPLES, 1024), dtype=np.float32)) + classes[:, None],
        "audio": torch.from_numpy(rng.standard_normal((SAMPLES, 1280), dtype=np.float32)),
        "text_input_ids": torch.from_numpy(ids),
        "text_attention_mask": torch.from_numpy((ids != 1).astype(np.float32)),
        "cls_id": torch.from_numpy(classes.astype(np.float32)),
        "idx": torch.arange(SAMPLES, dtype=torch.float32),
    }
    (folder / split).mkdir(parents=True)
    for name, values in tensors.items():
        torch.save(values.float() if name in ("image", "audio") else values, folder / split / f"{name}_{split}.pt")
    (folder / split / f"lang_{split}.txt").write_text("\n".join("en" if row % 2 else "el" for row in range(SAMPLES)))


def make_mimic(folder: Path, split: str, queries: int, candidates: int = 1) -> None:
    """data_npy/<split>/<name>_<split>.npy; with candidates a row per query and candidate, the first its own."""
    rng = np.random.default_rng(len(split))
    rows = np.array([[(query + other) % queries for other in range(candidates)] for query in range(queries)]).ravel()
    of = np.repeat(np.arange(queries), candidates)
    arrays: dict[str, Any] = {
        "cxr": rng.standard_normal((queries, 3, 320, 320), dtype=np.float32)[rows],
        "ecg": rng.uniform(-1, 1, (queries, 1, 5000, 12)).astype(np.float32)[rows],
        "labs_percentiles": rng.uniform(0, 1, (queries, 50))[rows],
        "labs_missingness": rng.integers(0, 2, (queries, 50))[rows],
        "hadm_id": 20_000_000 + rows,
    }
    if candidates > 1:
        arrays |= {"label_hadm_id": 20_000_000 + of, "label": (rows == of).astype(np.int64)}
    (folder / split).mkdir(parents=True)
    for name, values in arrays.items():
        np.save(folder / split / f"{name}_{split}.npy", values)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to train in: data/ as the presets name it, and a tiny XLM-R in xlm-r/."""
    folder = tmp_path_factory.mktemp("presets")
    save_text(folder / "xlm-r")
    for split in ("train", "val", "test"):
        make_m3(folder / "tensors", split)
        for words in (2, 5, 10):
            pack(tensors_source(folder / "tensors", split), folder / "data" / f"m3-{words}" / split, max_samples=5)
    make_features_from_media(folder)
    for split, queries, candidates in (("train", 4, 1), ("val", 4, 1), ("test", 3, 3)):
        make_mimic(folder / "data_npy", split, queries, candidates)
        pack(mimic_source(folder / "data_npy", split), folder / "data" / "mimic" / split, max_samples=4)
    for member in ("image", "audio"):
        train, out = folder / "data" / "m3-2" / "train", folder / "data" / "m3-2" / f"{member}-mean.npy"
        assert (
            main(["shards", "mean", str(train), "--member", f"{member}.npy", "--out", str(out), "--processes=1"]) == 0
        )
    return folder


def yaml_block(page: str, begins: str) -> str:
    """The YAML of a page of the documentation that begins so."""
    text = (CONFIGS.parent / "docs" / page).read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if block.startswith(begins)]
    return str(block)


def make_features_from_media(folder: Path) -> None:
    """The published CSV layout, packed, and encoded by the config of docs/features.md with tiny models."""
    save_clip(folder / "clip")
    save_whisper(folder / "whisper")
    media = make_m3_media(folder / "media", SAMPLES)
    pack(csv_source(media / "train.csv", media / "imagenet", media / "cv"), folder / "data" / "media", max_samples=7)
    overrides = [
        f"data.train={folder}/data/media",
        "modalities.image.transform.size=[16, 16]",
        f"modalities.image.encoder.model={folder}/clip",
        "modalities.audio.member=wav",
        *(f"modalities.audio.{part}.model={folder}/whisper" for part in ("transform", "encoder")),
        *(f"modalities.text.{part}.model={folder}/xlm-r" for part in ("transform", "encoder")),
    ]
    config = parse_config(yaml_block("features.md", "run: {name: m3}"), "features.md", overrides).config
    with pytest.MonkeyPatch.context() as patch:
        encode_without_ray(patch)
        summary = encode(config, folder / "data" / "m3-2-from-media", modalities=["image", "audio"])
    assert summary["complete"] and not summary["left_out"]


def from_media(work: Path) -> Config:
    """The preset as docs/presets.md changes it where the features are one's own; CLIP's and Whisper's tiny widths."""
    text = yaml.safe_load(yaml_block("presets.md", "  text:"))["text"]
    folder = work / "data" / "m3-2-from-media"
    tiny = [f"data.{split}={folder}" for split in ("train", "validation", "test")]
    for name, width in (("image", 24), ("audio", 16)):
        tiny += [f"modalities.{name}.transform.shape=[{width}]", f"modalities.{name}.encoder.input_dim={width}"]
    tiny += [f"modalities.text={json.dumps(text)}", "modalities.text.transform.model=./xlm-r"]
    # A tiny XLM-R knows 38 positions.
    tiny += [f"modalities.text.{part}.max_length=20" for part in ("transform", "encoder")]
    return in_folder(work, "m3-2", *tiny, "modalities.text.encoder.model=./xlm-r", "run.name=from-media")


def small(name: str) -> list[str]:
    """Overrides that make a preset small, and nothing else of it different."""
    overrides = [
        f"run.name={name}",
        "model.embedding_dim=16",
        "train.steps=2",
        "train.global_batch_size=4",
        "train.log_every=1",
        "validation.every=2",
        "checkpoint.every=2",
        "data.loader_processes=0",
        "ray.gpus_per_worker=0",
        "metrics.enabled=false",
    ]
    if name in M3:
        return [*overrides, "modalities.text.encoder.model=./xlm-r"]
    return [*overrides, "modalities.cxr.encoder.width=2", "modalities.ecg.encoder.width=2"]


def in_folder(work: Path, name: str, *overrides: str) -> Config:
    before = Path.cwd()
    os.chdir(work)
    try:
        return load_config(CONFIGS / f"{name}.yaml", [*small(name), *overrides]).config.with_absolute_paths()
    finally:
        os.chdir(before)


def train_and_evaluate(work: str) -> dict[str, Any]:
    """Every preset, one after the other in this process; the wider BatchNorm options of MIMIC's as well."""
    from symile_dist.tools.reproduce.trial import Trial, run_trials

    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    configs = [*(in_folder(Path(work), name) for name in PRESETS), from_media(Path(work))]
    for config in configs:
        preflight(config)
    results = run_trials([Trial(config) for config in configs], 0, lambda *progress: None)
    return dict(zip([*PRESETS, FROM_MEDIA], results, strict=True))


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, Any]:
    (found,) = run_distributed(train_and_evaluate, 1, str(work), timeout=280.0)
    return dict(found)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_is_evaluated_by_its_protocol(results: dict[str, Any], work: Path, name: str) -> None:
    result = results[name]
    assert result["steps"] == 2
    history = [json.loads(line) for line in (work / "runs" / name / "history.jsonl").read_text().splitlines()]
    trained = [record for record in history if record["kind"] == "train"]
    assert [record["step"] for record in trained] == [1, 2]
    assert all(np.isfinite(record["loss"]) and record["skipped_steps"] == 0 for record in trained)
    direction = "cxr_from_ecg_labs" if name == "mimic" else "image_from_audio_text"
    assert list(result["evaluation"]["retrieval"]) == [direction], "the published task, and no other"
    found = result["evaluation"]["retrieval"][direction]
    assert found["candidates"] == (3 if name == "mimic" else SAMPLES)
    assert 0 <= found["accuracy"] <= 1 and np.isfinite(found["bootstrap_standard_error"])


def test_a_preset_trains_on_features_of_one_s_own(results: dict[str, Any]) -> None:
    found = results[FROM_MEDIA]
    assert found["steps"] == 2 and list(found["evaluation"]["retrieval"]) == ["image_from_audio_text"]
    assert np.isfinite(found["evaluation"]["loss"])


def test_evaluation_uses_the_trained_running_statistics(results: dict[str, Any], work: Path) -> None:
    from symile_dist.checkpoint.reshape import consolidated_weights
    from symile_dist.tools.trained import load_trained

    folder = work / "runs" / "mimic" / "checkpoints" / "step-00000002"
    weights = consolidated_weights(folder)
    statistics = {name: tensor for name, tensor in weights.items() if "running_mean" in name}
    assert len(statistics) == 20 + 53, "ResNet-18's and ResNet-50's"
    assert all(tensor.abs().sum() > 0 for tensor in statistics.values()), "zero is where they begin"
    read = load_trained(in_folder(work, "mimic"), folder).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in statistics.items())


def test_the_presets_say_what_was_published() -> None:
    """Of every preset: what the paper and its authors' scripts have."""
    for name in M3:
        config = load_config(CONFIGS / f"{name}.yaml").config
        assert (config.train.global_batch_size, config.model.embedding_dim) == (256, 8192)
        assert config.train.steps == 24 * 10_000_000 / 256 and config.model.logit_scale_init == -6
        assert config.objective.options == {"negative_sampling": "n"} and config.model.normalization == "layer_norm"
        assert config.optimizer.lr in (1e-4, 5e-5, 1e-5) and config.optimizer.weight_decay in (0, 1e-4, 1e-3)
    missing = load_config(CONFIGS / "m3-missing.yaml").config
    assert missing.data.missing_probability == 0.5 and missing.modalities["text"].encoder.options["missing_token"]
    mimic = load_config(CONFIGS / "mimic.yaml").config
    assert (mimic.train.global_batch_size, mimic.train.steps) == (280, 80 * (10_000 // 280))
    assert (mimic.optimizer.lr, mimic.optimizer.weight_decay, mimic.model.logit_scale_init) == (5e-4, 0.2, -7)
    assert mimic.objective.options == {"negative_sampling": "n_squared"}
    for name in PRESETS:
        head = (CONFIGS / f"{name}.yaml").read_text().split("run:")[0]
        for word in ("data", "command", "hardware", "time", "published", "not run"):
            assert f"#   {word}  " in head, f"{name}: the header says nothing of '{word}'"


def test_the_published_numbers_of_parameters() -> None:
    """MIMIC's networks with D = 8192, counted by hand from the published code."""
    from symile_dist.model import MultimodalModel

    config = load_config(CONFIGS / "mimic.yaml").config
    with torch.device("meta"):
        encoders = MultimodalModel(config).encoders
    counted = {name: sum(p.numel() for p in encoder.parameters()) for name, encoder in encoders.items()}
    resnet50 = 25_557_032 - (2048 * 1000 + 1000) + 2048 * 8192 + 8192
    resnet18 = 11_689_512 - (512 * 1000 + 1000) - 2 * 64 * 49 + 512 * 8192 + 8192
    labs = 100 * 256 + 256 + 256 * 1024 + 1024 + 1024 * 8192 + 8192
    assert counted == {"cxr": resnet50, "ecg": resnet18, "labs": labs}


# -- what is not there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m3-5", ["m3-5/train: no such folder of shards", "pack symile-m3", r"image_train.pt (n, 1024)", "presets.md"]),
        ("mimic", ["mimic/train: no such folder of shards", "physionet.org", "cxr_train.npy (n, 3, 320, 320)"]),
    ],
)
def test_a_missing_dataset_is_told_with_its_source_and_layout(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    (tmp_path / "xlm-r").symlink_to(work / "xlm-r")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as told:
        preflight(load_config(CONFIGS / f"{name}.yaml", small(name)).config)
    for word in words:
        assert word in str(told.value)
    assert str(told.value).count("data.source") == 1


def test_a_dataset_of_another_layout_is_told(work: Path) -> None:
    for name, overrides, words in (
        ("m3-2", ["data.train=data/mimic/train"], "no sample has a member 'image.npy'"),
        ("m3-2", ["modalities.image.transform.shape=[768]"], r"shape \(1024,\), the config says \(768,\)"),
        ("mimic", ["data.train=data/m3-2/train"], "no sample has a member 'cxr.npy'"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}.*data.source: Symile-M") as told:
            preflight(in_folder(work, name, *overrides))
        assert "no such folder" not in str(told.value)


def test_what_else_is_missing_is_told_before_anything_starts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    with pytest.raises(
        ValueError, match=r"fill: data/image-mean\.npy: a \.npy file of \(1024,\).*symile-dist shards mean"
    ):
        preflight(in_folder(work, "m3-missing", "modalities.image.encoder.fill=data/image-mean.npy"))
    with pytest.raises(ValueError, match="no such folder; a model that save_pretrained wrote is needed there"):
        preflight(in_folder(work, "m3-2", "modalities.text.encoder.model=./nowhere"))
    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"hf download FacebookAI/xlm-roberta-large.*copy FOLDER"):
        preflight(in_folder(work, "m3-2", "modalities.text.encoder.model=FacebookAI/xlm-roberta-large"))


def test_options_that_name_files_hold_in_another_working_directory(work: Path) -> None:
    config = in_folder(work, "m3-missing")
    options = config.modalities["image"].encoder.options
    assert options["fill"] == str((work / "data/m3-2/image-mean.npy").resolve())
    assert config.modalities["text"].encoder.options["model"] == str((work / "xlm-r").resolve())
    assert yaml.safe_load(config.to_yaml())["modalities"]["image"]["encoder"]["fill"] == options["fill"]
    assert config.digest() == config.with_absolute_paths().digest()
