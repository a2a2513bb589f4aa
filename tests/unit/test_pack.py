"""Packing: what stands in the shards, the same bytes however they are written, and every mistake told in words."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import wave
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from symile_dist.cli import build_parser, main
from symile_dist.config import parse_config
from symile_dist.data.decode import decode_audio, decode_image, decode_npy
from symile_dist.data.index import BLOCK, read_index, split_name
from symile_dist.data.manifest import read_manifest
from symile_dist.registry import ENCODERS, TRANSFORMS, build
from symile_dist.tools.pack.arrays import ArrayMember, ArraySource, arrays_source, open_array
from symile_dist.tools.pack.files import TableSource, files_source
from symile_dist.tools.pack.symile_m3 import csv_source, tensors_source
from symile_dist.tools.pack.symile_mimic import mimic_source
from symile_dist.tools.pack.writer import pack, parse_bytes
from symile_dist.tools.shard_folder import parse_part

M3_COLUMNS = ("lang", "audio_path", "audio_filename", "cls", "image_path", "cls_id", "target_text", "text")
SAMPLES = 23


def image_bytes(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG")
    return file.getvalue()


def clip_bytes(number: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as clip:
        clip.setnchannels(1)
        clip.setsampwidth(2)
        clip.setframerate(16000)
        clip.writeframes(np.random.default_rng(number).integers(-999, 999, 40 + number, dtype=np.int16).tobytes())
    return file.getvalue()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def make_m3(folder: Path, samples: int = SAMPLES) -> Path:
    """The published CSV layout: folder/{train.csv,imagenet,cv}; texts with commas, quotes and a line break."""
    rows = []
    for number in range(samples):
        image, clip = f"ILSVRC/train/n{number % 4}/{number}.JPEG", f"cv/el/clips/{number}.wav"
        for root, name, content in (("imagenet", image, image_bytes(number)), ("cv", clip, clip_bytes(number))):
            (folder / root / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / root / name).write_bytes(content)
        text = f'γάτα {number}_tench, "fish"' + ("\nline" if number == 2 else "")
        rows.append(("el", clip, str(number), "tench, fish", image, number % 4, f"γάτα {number}", text))
    write_table(folder / "train.csv", M3_COLUMNS, rows)
    return folder


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_m3(tmp_path_factory.mktemp("m3"))


def m3_source(folder: Path, on_missing: str = "error") -> TableSource:
    return csv_source(folder / "train.csv", folder / "imagenet", folder / "cv", on_missing)


def from_tars(folder: Path) -> dict[str, dict[str, bytes]]:
    """key -> suffix -> bytes, as tarfile reads them, in the order of the shards."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and (member.mtime, member.uid, member.uname) == (0, 0, "")
                key, suffix = split_name(member.name)
                samples.setdefault(key, {})[suffix] = file.read()
    return samples


def through_index(folder: Path) -> list[dict[str, bytes]]:
    """suffix -> bytes of every sample, read at the places that the indices name."""
    samples = []
    manifest = read_manifest(folder)
    for entry in manifest.shards:
        content = (folder / entry.name).read_bytes()
        index = read_index(folder / entry.name, entry.index_sha256)
        for row in range(len(index)):
            sample = {}
            for column, member in enumerate(index.members):
                if index.present[row, column]:
                    start = int(index.block_offsets[row, column]) * BLOCK
                    sample[member] = content[start : start + int(index.sizes[row, column])]
                    assert zlib.crc32(sample[member]) == index.checksums[row, column]
            samples.append(sample)
    assert len(samples) == manifest.samples
    return samples


def packed(folder: Path) -> dict[str, dict[str, bytes]]:
    """All samples by key, after both ways of reading agreed."""
    samples = from_tars(folder)
    assert list(samples.values()) == through_index(folder)
    return samples


def fingerprints(folder: Path) -> dict[str, str]:
    """Of every file but the lock, hidden ones too."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != ".pack.lock"
    }


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_symile_m3_csv(m3: Path, tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    summary = pack(m3_source(m3), tmp_path / "out", max_samples=5, progress=lambda *stage: stages.append(stage))
    assert summary["complete"] and (summary["samples"], summary["shards"]) == (SAMPLES, 5)
    assert ("samples", SAMPLES, SAMPLES) in stages and "table, bytes" in {stage for stage, _, _ in stages}
    samples = packed(tmp_path / "out")
    assert len(samples) == SAMPLES and list(samples) != sorted(samples), "shuffled: published tables are sorted"
    with open(m3 / "train.csv", newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            sample = samples[f"{number:08d}"]
            assert set(sample) == {"jpg", "wav", "txt", "json"}
            assert sample["jpg"] == image_bytes(number) and sample["wav"] == clip_bytes(number)
            assert sample["txt"].decode() == row["text"]
            facts = json.loads(sample["json"])
            assert (facts["class"], facts["language"], facts["cls"]) == (str(number % 4), "el", "tench, fish")
            assert facts["target_text"] == row["target_text"] and facts["image_path"] == row["image_path"]
    assert decode_image(samples["00000003"]["jpg"]).shape == (8, 8, 3)
    assert decode_audio(samples["00000003"]["wav"]).sample_rate == 16000


def test_webdataset_reads_them(m3: Path, tmp_path: Path) -> None:
    import webdataset

    pack(m3_source(m3), tmp_path / "out", max_samples=10)
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    samples = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    ours = from_tars(tmp_path / "out")
    assert list(samples) == list(ours)
    assert all(samples[key]["txt"] == ours[key]["txt"] and samples[key]["jpg"] == ours[key]["jpg"] for key in ours)


def test_class_names_where_there_are_no_ids(m3: Path, tmp_path: Path) -> None:
    with open(m3 / "train.csv", newline="", encoding="utf-8") as file:
        rows = [[row[name] for name in M3_COLUMNS if name != "cls_id"] for row in csv.DictReader(file)]
    table = write_table(tmp_path / "named.csv", [name for name in M3_COLUMNS if name != "cls_id"], rows)
    pack(csv_source(table, m3 / "imagenet", m3 / "cv"), tmp_path / "out")
    assert json.loads(packed(tmp_path / "out")["00000000"]["json"])["class"] == "tench, fish"


def make_tensors(folder: Path, split: str, save: Callable[[Path, NDArray[Any]], None]) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        "image": rng.standard_normal((SAMPLES, 1024), dtype=np.float32),
        "audio": rng.standard_normal((SAMPLES, 1280), dtype=np.float32),
        # The published ids went through a float tensor.
        "text_input_ids": rng.integers(0, 250002, (SAMPLES, 9)).astype(np.float32),
        "text_attention_mask": rng.integers(0, 2, (SAMPLES, 9)).astype(np.float32),
        "cls_id": rng.integers(0, 1000, SAMPLES).astype(np.float32),
        "idx": np.arange(SAMPLES) + 100,
    }
    folder.mkdir(parents=True)
    for name, values in arrays.items():
        save(folder / f"{name}_{split}", values)
    (folder / f"lang_{split}.txt").write_text("\n".join("en" if i % 3 else "zh-CN" for i in range(SAMPLES)))
    return arrays


def save_npy(path: Path, values: NDArray[Any]) -> None:
    np.save(path.with_name(path.name + ".npy"), values)


def save_pt(path: Path, values: NDArray[Any]) -> None:
    torch.save(torch.from_numpy(values), path.with_name(path.name + ".pt"))


@pytest.mark.parametrize(("save", "subfolder"), [(save_npy, ""), (save_pt, "val")])
def test_symile_m3_tensors(tmp_path: Path, save: Any, subfolder: str) -> None:
    arrays = make_tensors(tmp_path / "tensors" / subfolder, "val", save)
    pack(tensors_source(tmp_path / "tensors", "val"), tmp_path / "out", shard_bytes="40KB")
    samples = packed(tmp_path / "out")
    assert len(samples) == SAMPLES and len(list((tmp_path / "out").glob("*.tar"))) > 3
    for number in range(SAMPLES):
        sample = samples[f"{number:08d}"]
        assert set(sample) == {"image.npy", "audio.npy", "input_ids.npy", "attention_mask.npy", "json"}
        for member in ("image", "audio"):
            values = decode_npy(sample[f"{member}.npy"])
            assert values.dtype == np.float16 and np.array_equal(values, arrays[member][number].astype(np.float16))
        ids, mask = decode_npy(sample["input_ids.npy"]), decode_npy(sample["attention_mask.npy"])
        assert (ids.dtype, mask.dtype) == (np.int32, np.uint8)
        assert np.array_equal(ids, arrays["text_input_ids"][number])
        assert np.array_equal(mask, arrays["text_attention_mask"][number])
        facts = json.loads(sample["json"])
        language = "en" if number % 3 else "zh-CN"
        assert facts == {"class": str(int(arrays["cls_id"][number])), "language": language, "idx": number + 100}


def test_features_of_other_precisions(tmp_path: Path) -> None:
    make_tensors(tmp_path / "tensors", "val", save_npy)
    (tmp_path / "tensors" / "image_val.npy").unlink()
    image = torch.randn(SAMPLES, 1024).bfloat16()
    image[1, 5], image[2, 5] = 1e6, float("nan")
    torch.save(image, tmp_path / "tensors" / "image_val.pt")
    with pytest.raises(
        ValueError, match=r"image_val.pt: row 1: .* does not fit into float16; .* float32, into another"
    ):
        pack(tensors_source(tmp_path / "tensors", "val"), tmp_path / "half", seed=None)
    assert not list((tmp_path / "half").glob("*.t*")), "no part of a shard is left"
    pack(tensors_source(tmp_path / "tensors", "val", "float32"), tmp_path / "single")
    samples = packed(tmp_path / "single")
    for number in range(SAMPLES):
        values = decode_npy(samples[f"{number:08d}"]["image.npy"])
        assert np.array_equal(values, image[number].float().numpy(), equal_nan=True)


def make_mimic(folder: Path, split: str, rows: int, retrieval: bool) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(1)
    arrays: dict[str, NDArray[Any]] = {
        "cxr": rng.standard_normal((rows, 3, 16, 16), dtype=np.float32),
        "ecg": rng.uniform(-1, 1, (rows, 1, 50, 12)),
        "labs_percentiles": rng.uniform(0, 1, (rows, 50)),
        "labs_missingness": rng.integers(0, 2, (rows, 50)),
        "hadm_id": 20_000_000 + np.arange(rows),
    }
    if retrieval:
        arrays["label_hadm_id"] = 20_000_000 + np.arange(rows) // 10 * 10
        arrays["label"] = (np.arange(rows) % 10 == 0).astype(np.int64)
    (folder / split).mkdir(parents=True)
    for name, values in arrays.items():
        np.save(folder / split / f"{name}_{split}.npy", values)
    return arrays


@pytest.mark.parametrize(("split", "retrieval"), [("train", False), ("val_retrieval", True)])
def test_symile_mimic(tmp_path: Path, split: str, retrieval: bool) -> None:
    arrays = make_mimic(tmp_path / "data_npy", split, 20, retrieval)
    pack(mimic_source(tmp_path / "data_npy", split), tmp_path / "out", max_samples=7)
    samples = packed(tmp_path / "out")
    assert len(samples) == 20
    for number in range(20):
        sample = samples[f"{number:08d}"]
        assert set(sample) == {"cxr.npy", "ecg.npy", "labs.npy", "json"}
        assert np.array_equal(decode_npy(sample["cxr.npy"]), arrays["cxr"][number])
        assert np.array_equal(decode_npy(sample["ecg.npy"]), arrays["ecg"][number].astype(np.float32))
        labs = decode_npy(sample["labs.npy"])
        assert labs.shape == (100,) and labs.dtype == np.float32
        assert np.array_equal(labs[:50], arrays["labs_percentiles"][number].astype(np.float32))
        assert np.array_equal(labs[50:], arrays["labs_missingness"][number]), "1 stays: observed"
        facts = {"class": str(20_000_000 + number), "hadm_id": 20_000_000 + number}
        if retrieval:
            facts |= {"label_hadm_id": 20_000_000 + number // 10 * 10, "label": int(number % 10 == 0)}
        assert json.loads(sample["json"]) == facts


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl"])
def test_files_of_any_table(tmp_path: Path, form: str) -> None:
    """Four modalities; an empty field is an absent member; the key and the metadata are the user's."""
    (tmp_path / "data").mkdir()
    rows = []
    for number in range(9):
        for side in ("left", "right"):
            (tmp_path / "data" / f"{side}{number}.png").write_bytes(b"png" + bytes([number]))
        (tmp_path / "data" / f"{number}").write_bytes(b"no extension")
        rows.append(
            {
                "id": f"bird-{number}",
                "left": f"left{number}.png",
                "right": f"right{number}.png" if number != 4 else "",
                "depth": str(number),
                "caption": f'a "bird" {number}' if number != 5 else "",
                "species": f"s{number % 2}",
                "weight": 3 * number if form == "jsonl" else str(3 * number),
            }
        )
    table = tmp_path / f"birds.{form}"
    with open(table, "w", newline="", encoding="utf-8-sig") as file:
        if form == "jsonl":
            file.write("\n\n".join(json.dumps(row) for row in rows))
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if form == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    source = files_source(
        table, tmp_path / "data", ["left=left", "right=right", "depth.bin=depth"], ["txt=caption"],
        label="species", metadata=["weight"], key="id",
    )  # fmt: skip
    summary = pack(source, tmp_path / "out", max_samples=4)
    assert summary["absent"] == {"caption": 1, "right": 1} and summary["members"]["left.png"] == 9
    assert "1 samples lack right" in summary["message"]
    samples = packed(tmp_path / "out")
    assert set(samples) == {f"bird-{number}" for number in range(9)}
    for number, row in enumerate(rows):
        expected = {
            "left.png": b"png" + bytes([number]),
            "right.png": b"png" + bytes([number]),
            "depth.bin": b"no extension",
            "txt": row["caption"].encode(),
            "json": json.dumps({"class": row["species"], "weight": row["weight"]}).encode(),
        }
        for absent in ("right.png",) * (number == 4) + ("txt",) * (number == 5):
            del expected[absent]
        assert samples[f"bird-{number}"] == expected


def test_tables_with_quotes_that_do_not_close(tmp_path: Path) -> None:
    (tmp_path / "validated.tsv").write_text('path\tsentence\na\t"Hello\nb\tthere\n')
    with pytest.raises(ValueError, match=r"line 3: unexpected end of data; .*--no-quotes"):
        pack(files_source(tmp_path / "validated.tsv", tmp_path, [], ["txt=sentence"]), tmp_path / "out")
    pack(files_source(tmp_path / "validated.tsv", tmp_path, [], ["txt=sentence"], quotes=False), tmp_path / "out")
    assert [sample["txt"] for _, sample in sorted(packed(tmp_path / "out").items())] == [b'"Hello', b"there"]


def test_order(m3: Path, tmp_path: Path) -> None:
    for name, seed in (("kept", None), ("one", 1), ("again", 1), ("two", 2)):
        pack(m3_source(m3), tmp_path / name, seed=seed, max_samples=10)
    kept, one, two = (list(packed(tmp_path / name)) for name in ("kept", "one", "two"))
    assert kept == sorted(kept) and one != kept and one != two and set(one) == set(kept)
    assert fingerprints(tmp_path / "one") == fingerprints(tmp_path / "again")


def test_shards_stay_below_their_size(m3: Path, tmp_path: Path) -> None:
    summary = pack(m3_source(m3), tmp_path / "out", shard_bytes=30_000)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.tar")]
    assert len(sizes) == summary["shards"] > 3 and sum(sizes) == summary["bytes"]
    assert max(sizes) <= 30_000 + 1024 + 10240
    alone = pack(m3_source(m3), tmp_path / "alone", shard_bytes=1)
    assert alone["shards"] == SAMPLES, "a sample larger than a shard has one of its own"


def test_options_in_words() -> None:
    assert [parse_bytes(size) for size in (7, "7", "256MB", "1.5 kB", "2GiB")] == [7, 7, 256 * 10**6, 1500, 2**31]
    assert parse_part("2/3") == (2, 3)
    for size in ("0", "-1", "many", "3 apples"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(size)
    for part in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="is no part"):
            parse_part(part)


# -- parts, processes, kills -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(m3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the M3 shards, written at once by one process."""
    out = tmp_path_factory.mktemp("reference")
    pack(m3_source(m3), out, max_samples=3)
    return fingerprints(out)


def test_parts_write_the_same_bytes(m3: Path, tmp_path: Path, reference: Mapping[str, str]) -> None:
    out = tmp_path / "out"
    second = pack(m3_source(m3), out, max_samples=3, part="2/3")
    assert not second["complete"] and second["missing_parts"] == {"1/3": 3, "3/3": 2}
    assert "5 shards are missing, of the parts 1/3 (3), 3/3 (2)" in second["message"]
    assert not (out / "manifest.json").exists()
    for number in (1, 4, 7):
        assert read_index(out / f"shard-{number:06d}.tar"), "each shard has its index at once"
    assert not pack(m3_source(m3), out, max_samples=3, part="3/3")["complete"]
    last = pack(m3_source(m3), out, max_samples=3, part="1/3")
    assert last["complete"] and last["digest"] == read_manifest(out).digest
    assert fingerprints(out) == reference


def test_processes_write_the_same_bytes(m3: Path, tmp_path: Path, reference: Mapping[str, str]) -> None:
    assert pack(m3_source(m3), tmp_path / "out", max_samples=3, processes=2)["complete"]
    assert fingerprints(tmp_path / "out") == reference


def test_again_does_nothing(m3: Path, tmp_path: Path) -> None:
    first = pack(m3_source(m3), tmp_path / "out", max_samples=3)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar*")}
    second = pack(m3_source(m3), tmp_path / "out", max_samples=3)
    assert (first["written"], second["written"], second["digest"]) == (8, 0, first["digest"])
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar*")}


def test_what_was_lost_is_made_again(m3: Path, tmp_path: Path, reference: Mapping[str, str]) -> None:
    out = tmp_path / "out"
    pack(m3_source(m3), out, max_samples=3)
    for name in ("shard-000002.tar", "shard-000004.tar.idx", "manifest.json", "pack.npy"):
        (out / name).unlink()
    (out / ".shard-000002.tar.4711.tmp").write_bytes(b"half a shard")
    (out / ".manifest.json.4711.tmp").write_bytes(b"{")
    summary = pack(m3_source(m3), out, max_samples=3)
    assert summary["complete"] and summary["written"] == 2
    assert fingerprints(out) == reference, "and the leftovers are gone"


def test_temporary_files_of_others_at_work_stay(m3: Path, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    pack(m3_source(m3), out, max_samples=3, part="1/2")
    other = out / ".shard-000002.tar.4711.tmp"
    other.write_bytes(b"half a shard")
    with open(out / ".pack.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert pack(m3_source(m3), out, max_samples=3)["complete"]
        assert other.exists()
    pack(m3_source(m3), out, max_samples=3)
    assert not other.exists()


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_run_again(tmp_path: Path, processes: int) -> None:
    """SIGKILL while shards are being written: no half shard is taken for a whole one, the bytes are the same."""
    with open(tmp_path / "texts.jsonl", "w") as file:
        for number in range(800):
            file.write(json.dumps({"caption": f"{number} " * 200}) + "\n")
    out = tmp_path / "out"
    words = [
        "shards", "pack", "files", str(tmp_path / "texts.jsonl"), "--root", str(tmp_path), "--text", "txt=caption",
        "--max-samples", "5", "--processes", str(processes), "--out",
    ]  # fmt: skip
    run = subprocess.Popen([sys.executable, "-m", "symile_dist.cli", *words, str(out)], stdout=subprocess.DEVNULL)
    children: list[int] = []
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("*.tar")) if out.exists() else []) < 7:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        children = children_of(run.pid)
        assert len(children) >= processes - 1
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "the killed command's processes live on"
        time.sleep(0.01)
    whole = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 7 <= len(whole) < 160 and not (out / "manifest.json").exists()
    source = files_source(tmp_path / "texts.jsonl", tmp_path, [], ["txt=caption"])
    assert pack(source, out, max_samples=5)["complete"]
    assert all((out / name).stat().st_mtime_ns == when for name, when in whole.items()), "whole shards are kept"
    pack(source, tmp_path / "undisturbed", max_samples=5)
    assert fingerprints(out) == fingerprints(tmp_path / "undisturbed")


# -- missing files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """M3 with a missing image, an empty clip and a folder in place of an image: three samples of 23."""
    folder = make_m3(tmp_path / "m3")
    (folder / "imagenet/ILSVRC/train/n1/5.JPEG").unlink()
    (folder / "cv/cv/el/clips/7.wav").write_bytes(b"")
    (folder / "imagenet/ILSVRC/train/n1/9.JPEG").unlink()
    (folder / "imagenet/ILSVRC/train/n1/9.JPEG").mkdir()
    return folder


def test_missing_files_stop_it_before_anything_is_written(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 files of 3 samples are missing or unreadable:\n") as error:
        pack(m3_source(broken), tmp_path / "out")
    for told in ("5.JPEG: No such file", "7.wav: is empty", "9.JPEG: not a file", "--on-missing skip"):
        assert told in str(error.value)
    assert not (tmp_path / "out").exists()
    for image in (broken / "imagenet/ILSVRC/train/n3").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=r"8 files of 7 samples .*\n(  .*\n){5}  and 3 more\n"):
        pack(m3_source(broken), tmp_path / "out")


def test_samples_with_missing_files_are_skipped(broken: Path, tmp_path: Path) -> None:
    summary = pack(m3_source(broken, "skip"), tmp_path / "out")
    assert (summary["rows"], summary["samples"], summary["skipped"]) == (SAMPLES, SAMPLES - 3, 3)
    assert "3 skipped" in summary["message"] and "their 3 samples are left out" in summary["message"]
    missing = {f"{number:08d}" for number in range(SAMPLES)} - set(packed(tmp_path / "out"))
    assert missing == {"00000005", "00000007", "00000009"}


def test_samples_with_missing_files_are_packed_without_the_member(broken: Path, tmp_path: Path) -> None:
    summary = pack(m3_source(broken, "absent"), tmp_path / "out", max_samples=4)
    assert summary["samples"] == SAMPLES and summary["absent"] == {"audio_path": 1, "image_path": 2}
    assert summary["members"] == {"jpg": SAMPLES - 2, "json": SAMPLES, "txt": SAMPLES, "wav": SAMPLES - 1}
    samples = packed(tmp_path / "out")
    assert set(samples["00000005"]) == {"wav", "txt", "json"} and set(samples["00000007"]) == {"jpg", "txt", "json"}


def test_files_that_change_meanwhile(tmp_path: Path) -> None:
    folder, out = make_m3(tmp_path / "m3"), tmp_path / "out"
    pack(m3_source(folder), out, max_samples=3, part="1/2")
    for image in folder.rglob("*.JPEG"):
        image.write_bytes(image.read_bytes() * 9)
    with pytest.raises(ValueError, match=r"sample '\d{8}' \(row \d+\) has changed since the plan was made"):
        pack(m3_source(folder), out, max_samples=3, part="2/2")
    (out / "pack.npy").unlink()
    with pytest.raises(ValueError, match="its plan was made when other source files were there"):
        pack(m3_source(folder), out, max_samples=3)


def test_files_of_several_kinds_are_remarked(tmp_path: Path) -> None:
    folder = make_m3(tmp_path / "m3")
    images = folder / "imagenet/ILSVRC/train/n0"
    (images / "0.JPEG").rename(images / "0.png")
    table = folder / "train.csv"
    table.write_text(table.read_text().replace("n0/0.JPEG", "n0/0.png"))
    summary = pack(m3_source(folder), tmp_path / "out")
    assert summary["members"] == {"jpg": SAMPLES - 1, "json": SAMPLES, "png": 1, "txt": SAMPLES, "wav": SAMPLES}
    assert "column 'image_path' has files of several kinds: jpg (22), png (1)" in summary["message"]


# -- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else(m3: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds something that is not of this command \(notes.txt\)"):
        pack(m3_source(m3), tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt: is not a folder"):
        pack(m3_source(m3), tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="then copy it to the object store"):
        pack(m3_source(m3), "s3://bucket/train")
    out = tmp_path / "out"
    pack(m3_source(m3), out, max_samples=9)
    (out / "shard-000000.tar").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"shard-000000.tar: has 5 bytes, the plan says \d+: damaged or replaced"):
        pack(m3_source(m3), out, max_samples=9)
    (out / "mine.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds mine.tar, which is not of this dataset"):
        pack(m3_source(m3), out, max_samples=9)
    (out / "pack.json").write_text("{}")
    with pytest.raises(ValueError, match=r"pack.json: damaged or not of this command"):
        pack(m3_source(m3), out, max_samples=9)


def test_a_disk_that_is_too_small(m3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"0.0 GB are to be written, 0.0 GB are free"):
        pack(m3_source(m3), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_other_parameters_into_the_same_folder(tmp_path: Path) -> None:
    folder = make_m3(tmp_path / "m3")
    pack(m3_source(folder), tmp_path / "out", max_samples=9, part="1/3")
    for options, told in (
        ({"max_samples": 8}, "max_samples: there 9, now 8"),
        ({"max_samples": 9, "seed": None}, "seed: there 0, now null"),
        ({"max_samples": 9, "shard_bytes": 10**6}, "shard_bytes: there 256000000, now 1000000"),
    ):
        with pytest.raises(ValueError, match=f"holds shards of other inputs or options .*{told}"):
            pack(m3_source(folder), tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_missing: there"):
        pack(m3_source(folder, "skip"), tmp_path / "out", max_samples=9)
    with open(folder / "train.csv", "a") as table:
        table.write("\n")
    with pytest.raises(ValueError, match="table_sha256: there"):
        pack(m3_source(folder), tmp_path / "out", max_samples=9)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "a/../../secret"])
def test_paths_that_leave_the_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "data").mkdir()
    table = write_table(tmp_path / "table.csv", ["path"], [[path]])
    for on_missing in ("error", "skip", "absent"):
        with pytest.raises(ValueError, match=r"table.csv: row 1: column 'path': '.*' leaves the folder of its files"):
            pack(
                files_source(table, tmp_path / "data", ["x.bin=path"], on_missing=on_missing), tmp_path / "out"
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_root_may_be_a_link(m3: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(m3 / "imagenet")
    assert pack(csv_source(m3 / "train.csv", tmp_path / "images", m3 / "cv"), tmp_path / "out")["complete"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "the table is empty"),
        ("path,txt\n", "no sample is left to pack of 0"),
        ("path,txt\na\n", "line 2: 1 fields, the header has 2 columns"),
        ("path,path\n", "column 'path' stands there twice"),
        ("path,text\n", "no column txt; it has path, text"),
        (b"path,txt\n\xff,a\n", "line 2: not UTF-8"),
        ("path,txt\n,\n,\n", "no sample is left to pack of 2"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str | bytes, told: str) -> None:
    (tmp_path / "table.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told):
        pack(files_source(tmp_path / "table.csv", tmp_path, ["x.bin=path"], ["txt=txt"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_lines_that_are_none(tmp_path: Path) -> None:
    deep = '{"txt": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    for content, told in (
        ("[1]\n", "line 1: not a JSON object"),
        ('{"txt": "a"}\n{"txt"\n', "line 2: Expecting"),
        (deep, r"table\.jsonl: line 1: the JSON is nested too deeply"),
        ('{"txt": "a"}\n' + deep, r"table\.jsonl: line 2: the JSON is nested too deeply"),
    ):
        (tmp_path / "table.jsonl").write_text(content)
        with pytest.raises(ValueError, match=told):
            pack(files_source(tmp_path / "table.jsonl", tmp_path, [], ["txt=txt"]), tmp_path / "out")


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text('{"photo": "a.jpg", "txt": "a"}\n{"photo": "\\ud800.jpg", "txt": "b"}\n')
    source = files_source(tmp_path / "table.jsonl", tmp_path, ["image=photo"], ["txt=txt"], on_missing="absent")
    with pytest.raises(ValueError, match=r"table\.jsonl: row 2: column 'photo': '\\ud800\.jpg' cannot name a file"):
        pack(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_that_cannot_be(tmp_path: Path) -> None:
    for keys, told in (
        (["a", "b", "a"], "key 'a' stands in rows 1 and 3"),
        (["a", "b.jpg"], r"row 2: column 'key': 'b.jpg' cannot be a key"),
        (["a", ""], r"row 2: column 'key': '' cannot be a key"),
        (["a/b"], "cannot be a key"),
        (["k" * 99], "is too long"),
    ):
        table = write_table(tmp_path / "table.csv", ["key", "txt"], [(key, "text") for key in keys])
        with pytest.raises(ValueError, match=told):
            pack(files_source(table, tmp_path, [], ["txt=txt"], key="key"), tmp_path / "out")


def test_names_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "noext").write_bytes(b"x")
    (tmp_path / "a.txt").write_bytes(b"x")
    table = write_table(tmp_path / "table.csv", ["path", "text"], [("noext", "hello")])
    for files, texts, told in (
        ([], [], "nothing to pack"),
        (["image"], [], "write --file NAME=COLUMN"),
        ([], ["=text"], "write --text NAME=COLUMN"),
        (["_a=path"], [], "'_a' cannot name a member"),
        ([], ["json=text"], "member 'json' is taken"),
        (["a=path", "A=text"], [], "member 'a' is named twice"),
        (["image=path"], [], r"row 1: column 'path': 'noext' has no extension .* --file image.jpg=path"),
        (["image=pth"], [], "no column pth; it has path, text"),
    ):
        with pytest.raises(ValueError, match=told):
            pack(files_source(table, tmp_path, files, texts), tmp_path / "out")
    table = write_table(tmp_path / "table.csv", ["path", "text"], [("a.txt", "hello")])
    with pytest.raises(ValueError, match=r"two members of one name, 'a.txt'"):
        pack(files_source(table, tmp_path, ["a=path"], ["a.txt=text"]), tmp_path / "out")
    with pytest.raises(ValueError, match=r"a table is a .csv, .tsv or .jsonl file"):
        files_source(tmp_path / "a.txt", tmp_path, [])


class Trap:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


def test_tensors_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tensors"
    arrays = make_tensors(folder, "train", save_pt)

    def refused(told: str) -> None:
        with pytest.raises(ValueError, match=told):
            pack(tensors_source(folder, "train"), tmp_path / "out")
        assert not (tmp_path / "out").exists() and not (tmp_path / "unpickled").exists()

    image = folder / "image_train.pt"
    for content, told in (
        (torch.zeros(SAMPLES - 1, 1024), "not equally long.*image_train.pt 22, audio_train.pt 23"),
        (torch.zeros(SAMPLES), r"image_train.pt: has shape \(23,\); the shape of image features is \(n, n\)"),
        ([torch.zeros(3)], r"image_train.pt: holds no plain tensor \(list\)"),
        (torch.zeros(SAMPLES, 2).to(torch.float8_e4m3fn), "a tensor of torch.float8_e4m3fn on cpu cannot be packed"),
        (torch.zeros(SAMPLES, 2, device="meta"), "a tensor of torch.float32 on meta cannot be packed"),
        (torch.zeros(SAMPLES, 2, dtype=torch.complex64).conj(), "a tensor of torch.complex64 on cpu cannot be packed"),
        (Trap(), "image_train.pt: cannot be read safely as a tensor"),
    ):
        torch.save(content, image)
        refused(told)
    torch.save(torch.from_numpy(arrays["image"]), image, _use_new_zipfile_serialization=False)
    refused(r"image_train.pt: cannot be read safely as a tensor .*save it again")
    image.write_bytes(pickle.dumps(Trap()))
    refused("cannot be read safely")
    image.unlink()
    np.save(folder / "image_train.npy", np.array([Trap()] * SAMPLES, dtype=object), allow_pickle=True)
    refused(r"image_train.npy: not a plain .npy array")
    (folder / "image_train.npy").unlink()
    save_npy(folder / "image_val", arrays["image"])
    refused(r"no image_train.pt or image_train.npy; there is image_val.npy")
    save_npy(folder / "image_train", arrays["image"])
    save_pt(folder / "image_train", arrays["image"])
    refused("image_train.pt and .*image_train.npy: two files for one array")
    image.unlink()
    save_pt(folder / "text_attention_mask_train", arrays["text_attention_mask"][:, 1:])
    refused(r"the shape of a mask of these token ids is \(n, 9\)")
    save_pt(folder / "text_attention_mask_train", arrays["text_attention_mask"])
    (folder / "lang_train.txt").write_text("en\nel")
    refused("not equally long.*lang_train.txt 2")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        tensors_source(tmp_path / "nowhere", "train")


def npy(descr: str, shape: str) -> bytes:
    return npy_of(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n")


def npy_of(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        npy_of("{'descr': '''<f4\n"),  # tokenize.TokenError
        npy_of("(" * 900 + ")" * 900 + "\n"),
        npy_of("-" * 9000 + "1\n"),  # MemoryError
        npy("'<f4'", "(-1, 4)"),
        npy("'<f4'", "(-2, -4)"),
        npy("'<f4'", f"({10**30},)"),  # OverflowError
        npy("'<f4'", f"({2**62}, 4)"),  # a product of zero, with a warning
        npy("'<f4'", "(True,)"),  # TypeError
        npy("'<f4'", "(17,)"),
        npy("[('a', '<f4', (-1,))]", "(2,)"),
    ],
    ids=lambda content: repr(content[10:70]),
)
def test_headers_of_arrays_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy: not a plain \.npy array: \S") as error:
        pack(arrays_source([f"a={tmp_path}/a.npy"]), tmp_path / "out")
    assert len(str(error.value)) < 500, "the header is told at length"
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.npy").write_bytes(npy("'<f4'", "(16,)"))
    assert pack(arrays_source([f"a={tmp_path}/a.npy"]), tmp_path / "out")["samples"] == 16, "a header made here is good"


def test_an_array_that_is_not_there_is_no_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_array(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [save_npy, save_pt])
@pytest.mark.parametrize(("name", "fact"), [("cls_id", "class"), ("idx", "idx")])
def test_facts_that_are_no_number(tmp_path: Path, save: Any, name: str, fact: str) -> None:
    """As a class, NaN would make one class of all samples without one."""
    folder = tmp_path / "tensors"
    values = make_tensors(folder, "val", save)[name].astype(np.float32)
    for odd in (np.nan, np.inf):
        save(folder / f"{name}_val", np.where(np.isin(np.arange(SAMPLES), (5, 9)), odd, values))
        with pytest.raises(ValueError, match=rf"{name}_val\.(npy|pt): row 5: '{fact}' is {odd}; give every sample"):
            pack(tensors_source(folder, "val"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_in_bfloat16(tmp_path: Path) -> None:
    """numpy knows no such numbers: their bytes are not the class."""
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    torch.save(torch.tensor([7.0, 8.0, 0.5]).bfloat16(), tmp_path / "label.pt")
    pack(arrays_source([f"a={tmp_path}/a.npy"], f"{tmp_path}/label.pt"), tmp_path / "out", seed=None)
    classes = [json.loads(sample["json"])["class"] for sample in packed(tmp_path / "out").values()]
    assert classes == ["7", "8", "0.5"]
    torch.save(torch.tensor([7.0, torch.nan, 0.5]).bfloat16(), tmp_path / "label.pt")
    with pytest.raises(ValueError, match=r"label\.pt: row 1: 'class' is nan"):
        arrays_source([f"a={tmp_path}/a.npy"], f"{tmp_path}/label.pt")


def test_a_byte_order_mark_is_no_part_of_the_first_class(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    (tmp_path / "class.txt").write_bytes("\ufeffen\r\nel\r\nen\r\n".encode())
    pack(arrays_source([f"a={tmp_path}/a.npy"], f"{tmp_path}/class.txt"), tmp_path / "out", seed=None)
    assert [json.loads(sample["json"])["class"] for sample in packed(tmp_path / "out").values()] == ["en", "el", "en"]


@pytest.mark.parametrize("changed", ["vision", "text"])
def test_a_change_is_seen_in_each_of_several_files_of_one_name(tmp_path: Path, changed: str) -> None:
    for name in ("vision", "text"):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "train.npy", np.zeros((3, 2)))
    arrays = [f"{name}={tmp_path / name / 'train.npy'}" for name in ("vision", "text")]
    pack(arrays_source(arrays), tmp_path / "out")
    pack(arrays_source(arrays), tmp_path / "out")
    np.save(tmp_path / changed / "train.npy", np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"holds shards of other inputs .*sha256: there"):
        pack(arrays_source(arrays), tmp_path / "out")


def test_what_fits_no_type_on_offer(tmp_path: Path) -> None:
    np.save(tmp_path / "cxr.npy", np.full((2, 3), 1e300))
    source = ArraySource("test", (ArrayMember("cxr.npy", (tmp_path / "cxr.npy",), "float32"),), ())
    with pytest.raises(ValueError, match=r"cxr\.npy: row 0: 1e\+300 does not fit into float32$"):
        pack(source, tmp_path / "out", seed=None)


def test_ids_that_are_not_whole(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.array([[1.0, 2.0], [1.5, 2.0]]))
    source = ArraySource("test", (ArrayMember("ids.npy", (tmp_path / "ids.npy",), "int32"),), ())
    with pytest.raises(ValueError, match=r"ids.npy: row 1: values that are not integers of int32"):
        pack(source, tmp_path / "out", seed=None)


def test_mimic_arrays_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "data_npy"
    arrays = make_mimic(folder, "val", 4, False)

    def refused(name: str, values: NDArray[Any], told: str) -> None:
        np.save(folder / "val" / f"{name}_val.npy", values)
        with pytest.raises(ValueError, match=told):
            mimic_source(folder, "val")
        np.save(folder / "val" / f"{name}_val.npy", arrays[name])

    refused("cxr", arrays["cxr"][:, :1], r"cxr_val.npy: has shape \(4, 1, 16, 16\); .* is \(n, 3, n, n\)")
    refused("ecg", arrays["ecg"][:3], "not equally long.*ecg_val.npy 3")
    refused("labs_missingness", arrays["labs_missingness"][:, :49], r"the shape of their flags is \(n, 50\)")
    refused("labs_missingness", arrays["labs_missingness"] + 1, "flags other than 0 and 1; 1 means .* observed")
    refused("hadm_id", arrays["hadm_id"][:, None], "hadm_id_val.npy: has shape .* needs one number per sample")
    with pytest.raises(ValueError, match=r"no cxr_train.npy"):
        mimic_source(folder, "train")
    with pytest.raises(ValueError, match="split must be one of train, val, val_retrieval, test"):
        mimic_source(folder, "valid")


@pytest.mark.parametrize("split", ["val_retrieval", "test"])
def test_candidates_that_are_not_named(tmp_path: Path, split: str) -> None:
    """The evaluation of these splits needs them: without them it would fail when the samples have been encoded."""
    folder = tmp_path / "data_npy"
    arrays = make_mimic(folder, split, 20, True)
    mimic_source(folder, split)

    def refused(name: str, values: NDArray[Any], told: str) -> None:
        np.save(folder / split / f"{name}_{split}.npy", values)
        with pytest.raises(ValueError, match=told):
            mimic_source(folder, split)
        np.save(folder / split / f"{name}_{split}.npy", arrays[name])

    rows = np.arange(20)
    refused(
        "label", np.where(rows == 7, 2, arrays["label"]), rf"label_{split}.npy: row 7 of {split}: label is 2; should"
    )
    refused("label", np.where(rows == 7, np.nan, arrays["label"]), rf"{split}/label_{split}.npy: row 7: 'label' is nan")
    refused("label", arrays["label"][:, None], r"has shape \(20, 1\); 'label' needs one number per sample")
    for name, fact in (("label_hadm_id", "label_hadm_id"), ("hadm_id", "class")):
        ids = np.where(rows == 3, np.nan, arrays[name])
        refused(name, ids, rf"{split}/{name}_{split}.npy: row 3: '{fact}' is nan")
    for name in ("label", "label_hadm_id"):
        path = folder / split / f"{name}_{split}.npy"
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=rf"{split}: no {name}_{split}.npy; each row of {split} is a candidate"):
            mimic_source(folder, split)
        path.write_bytes(content)


# -- the command line ------------------------------------------------------------------------------------------------


def test_command_line(m3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "pack", "symile-m3", "--csv", f"{m3}/train.csv", "--images", f"{m3}/imagenet", "--out"]
    out = str(tmp_path / "out")
    assert main([*words, out, "--audio", f"{m3}/cv", "--shard-bytes", "20KB", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["complete"] and summary["samples"] == SAMPLES and summary["shards"] > 3
    assert main([*words, out, "--audio", f"{m3}/cv", "--shard-bytes", "20KB"]) == 0
    assert f"{SAMPLES} samples in {summary['shards']} shards, members jpg, json, txt, wav" in capsys.readouterr().out
    make_mimic(tmp_path / "data_npy", "test", 3, True)
    mimic = ["shards", "pack", "symile-mimic", "--data-npy", f"{tmp_path}/data_npy", "--split", "test"]
    assert main([*mimic, "--out", f"{tmp_path}/mimic", "--no-shuffle"]) == 0
    capsys.readouterr()
    for given, told in (
        ([*words, out], "--csv needs --audio too"),
        ([*words, out, "--audio", f"{m3}/cv", "--dtype", "float32"], "--dtype does not go with --csv"),
        ([*words, out, "--tensors", "x"], "name one layout"),
        (["shards", "pack", "symile-m3", "--out", out], "name one layout"),
        ([*words, out, "--audio", f"{m3}/nowhere"], "nowhere: no such folder"),
        ([*words, out, "--audio", f"{m3}/cv", "--part", "3/2"], "'3/2' is no part"),
        ([*words, out, "--audio", f"{m3}/cv", "--processes", "0"], "processes must be at least 1"),
        (["shards", "pack", "files", "nowhere.csv", "--root", ".", "--out", out], "nowhere.csv: no such table"),
    ):
        assert main(given) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and told in captured.err, captured.err


# -- docs/packing.md -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "packing.md").read_text(encoding="utf-8")


def test_commands_of_the_page() -> None:
    commands = [line.split()[1:] for line in PAGE.splitlines() if line.startswith("symile-dist shards pack ")]
    assert [words[2] for words in commands] == ["symile-m3", "symile-m3", "symile-mimic", "arrays", "files"]
    for words in commands:
        build_parser().parse_args(words)


def test_configs_of_the_page() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        # Where it stands the reader's own encoder.
        text = block.replace("my_package.encoders:TokenEncoder", "{name: mlp, input_dim: 9}")
        whole = f"run: {{name: page}}\ndata: {{train: shards}}\ntrain: {{steps: 1, global_batch_size: 8}}\n{text}"
        config = parse_config(whole, "page.yaml").config
        for modality in config.modalities.values():
            build(modality.transform.name, modality.transform.options, TRANSFORMS, "transform")
            build(modality.encoder.name, modality.encoder.options, ENCODERS, "encoder", embedding_dim=8)
