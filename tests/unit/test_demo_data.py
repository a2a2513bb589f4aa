"""The demo dataset: what its samples say, what its splits share, and that its bytes are reproducible."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("espeakng_loader")

import soundfile
from PIL import Image
from sklearn.datasets import load_digits

from symile_dist.data import demo
from symile_dist.data.demo import DIGIT_WORDS, LANGUAGES, clip_plan, make_demo, number_name, scan_split

SIZES: dict[str, int] = {"train": 23, "val": 7, "test": 8, "samples_per_shard": 10}


def members(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted((folder / split).glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(key, {})[extension] = file.read()
    return samples


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar"))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "m3"
    stages: list[tuple[str, int, int]] = []
    summary = make_demo(out, languages=2, **SIZES, processes=2, progress=lambda *report: stages.append(report))
    assert summary["created"] and summary["splits"]["train"]["samples"] == 23
    assert ("shards", 5, 5) in stages
    return out


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {split: [json.loads(s["json"]) for s in members(folder, split).values()] for split in demo.SPLITS}


def test_layout(folder: Path) -> None:
    train = members(folder, "train")
    assert list(train) == [f"{i:08d}" for i in range(23)]
    assert all(set(sample) == {"png", "flac", "txt", "json"} for sample in train.values())
    assert [path.name for path in sorted((folder / "train").glob("shard-*.tar"))] == [
        f"shard-{i:05d}.tar" for i in range(3)
    ]
    assert len(members(folder, "val")) == 7 and len(members(folder, "test")) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "test", "train", "val"]
    assert [path.name for path in folder.parent.iterdir()] == ["m3"], "the temporary folder was left behind"


def test_text_names_the_number_only_in_the_language_of_the_clip(folder: Path) -> None:
    for sample in members(folder, "train").values():
        facts = json.loads(sample["json"])
        names = sample["txt"].decode().split("_")
        expected = {number_name(int(number), language) for language, number in facts["numbers"].items()}
        assert len(names) == 2 and set(names) == expected
        assert facts["numbers"][facts["language"]] == facts["class"]
        assert len(set(facts["numbers"].values())) == 2, "a number named twice could not be the image's"


def test_image_is_the_two_scans_of_the_class(folder: Path) -> None:
    digits = load_digits()
    for sample in members(folder, "train").values():
        facts = json.loads(sample["json"])
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert image.shape == (8, 16) and image.dtype == np.uint8
        for half, scan, digit in zip((image[:, :8], image[:, 8:]), facts["scans"], facts["class"], strict=True):
            assert digits.target[scan] == int(digit)
            assert np.abs(half / 255 * 16 - digits.images[scan]).max() < 0.1


def test_clips_are_speech_at_16_khz(folder: Path) -> None:
    for sample in members(folder, "test").values():
        samples, rate = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
        info = soundfile.info(io.BytesIO(sample["flac"]))
        assert (rate, samples.ndim, info.format, info.subtype) == (16000, 1, "FLAC", "PCM_16")
        assert 0.2 < len(samples) / rate < 3.0 and np.abs(samples).max() > 0.05


def test_no_scan_and_no_voice_is_in_two_splits(facts: dict[str, list[dict[str, Any]]]) -> None:
    targets = load_digits().target
    split = scan_split(targets, seed=0)
    pools = {name: {int(s) for scans in split[name].values() for s in scans} for name in demo.SPLITS}
    assert sum(len(pool) for pool in pools.values()) == len(targets) == len(set.union(*pools.values()))
    for name in demo.SPLITS:
        assert all(set(fact["scans"]) <= pools[name] for fact in facts[name])
        assert all(targets[scan] == digit for digit, scans in split[name].items() for scan in scans)
    voices = {name: {clip.voice for clip in clip_plan(0, name, "el", 300)} for name in demo.SPLITS}
    assert not (voices["train"] & voices["test"] or voices["train"] & voices["val"] or voices["val"] & voices["test"])


def test_bytes_depend_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "one", languages=2, **SIZES, processes=1)
    assert fingerprints(tmp_path / "one") == fingerprints(folder)
    # Another seed: other clips, other scans in the test split.
    assert not set(clip_plan(0, "train", "el", 50)) & set(clip_plan(1, "train", "el", 50))
    targets = load_digits().target
    assert set(scan_split(targets, 0)["test"][4].tolist()) != set(scan_split(targets, 1)["test"][4].tolist())


def test_an_existing_dataset_is_kept_and_anything_else_refused(folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = make_demo(folder, languages=2, **SIZES)
    assert not again["created"] and "nothing done" in again["message"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=r"other parameters \(seed: 0\)"):
        make_demo(folder, languages=2, **SIZES, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not this dataset"):
        make_demo(tmp_path, languages=2, **SIZES)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_copy_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "train").mkdir(parents=True)
    (copy / "demo.json").write_bytes((folder / "demo.json").read_bytes())
    with pytest.raises(ValueError, match=r"damaged copy.*shard-00000\.tar"):
        make_demo(copy, languages=2, **SIZES)


@pytest.mark.parametrize("wrong", [{"languages": 0}, {"languages": 11}, {"val": 0}, {"samples_per_shard": 0}])
def test_parameters_out_of_range(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_demo(tmp_path / "out", **{**SIZES, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(demo, "_build", broken)
    with pytest.raises(RuntimeError, match="disk is full"):
        make_demo(tmp_path / "out", languages=2, **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_languages_are_those_of_symile_m3() -> None:
    assert set(LANGUAGES[:2]) == {"en", "el"}
    assert set(LANGUAGES[:5]) == {"el", "en", "hi", "ja", "uk"}
    assert set(LANGUAGES) == {"ar", "el", "en", "hi", "ja", "ko", "te", "th", "uk", "zh"} == set(DIGIT_WORDS)
    words = [word for words in DIGIT_WORDS.values() for word in words]
    assert len(words) == len(set(words)) == 100
    assert not any("_" in word or " " in word for word in words)
    assert number_name(47, "en") == "four seven" and number_name(5, "el") == "μηδέν πέντε"


def test_every_voice_speaks_every_language() -> None:
    speech = demo.Speech()
    assert speech.sample_rate == 22050
    for language in LANGUAGES:
        for split in demo.SPLITS:
            for voice in demo._VOICES[split]:
                samples = speech.speak(demo.Clip(voice, 250, 50, 47), language)
                assert len(samples) > 0.15 * speech.sample_rate and np.abs(samples).max() > 1000, (language, voice)
    with pytest.raises(RuntimeError, match="no voice"):
        speech.speak(demo.Clip("nobody", 200, 50, 0), "xx")
