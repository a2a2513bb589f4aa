"""Embeddings in a Parquet file: what comes back is what was written, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import symile_dist
from symile_dist.evaluation import embeddings
from symile_dist.evaluation.embeddings import EmbeddingRows, load_embeddings, write_embeddings


def rows(first: int, count: int) -> EmbeddingRows:
    """Of modalities whose names could be mistaken for one another, and for a column of the file's own."""
    generator = torch.Generator().manual_seed(first)
    ids = torch.arange(first, first + count)
    return EmbeddingRows(
        vectors={
            name: torch.randn(count, size, generator=generator)
            for name, size in (("x1", 5), ("x1.shared", 3), ("label", 2))
        },
        present={"x1": ids % 4 != 0, "x1.shared": ids % 3 != 0, "label": torch.ones(count, dtype=torch.bool)},
        sample_ids=ids,
        shards=[f"shard-{number // 10}.tar" for number in ids.tolist()],
        rows=[number % 10 for number in ids.tolist()],
        labels=[f"class {number % 3}" for number in ids.tolist()],
        metadata=[{"admission": number, "ward": "ö"} if number % 5 else {} for number in ids.tolist()],
    )


PARTS = ((0, 20), (20, 7), (27, 0), (27, 14))


@pytest.mark.parametrize("group", [1, 700, 2**26], ids=lambda group: f"groups of {group} bytes")
def test_what_is_written_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr(embeddings, "ROW_GROUP_BYTES", group)
    path, parts = tmp_path / "new" / "embeddings.parquet", [rows(*part) for part in PARTS]
    about = {"run": "demo", "step": 300, "similarity": None}
    assert write_embeddings(path, iter(parts), about, ["admission", "ward", "nothing"]) == 41
    assert pq.ParquetFile(path).metadata.num_row_groups == {1: 3, 700: 2, 2**26: 1}[group]
    found = symile_dist.load_embeddings(path)
    assert list(found.vectors) == ["x1", "x1.shared", "label"] and found.about == about
    for name, vectors in found.vectors.items():
        there = torch.cat([part.present[name] for part in parts]).numpy()
        written = torch.cat([part.vectors[name] for part in parts]).numpy()
        assert vectors.dtype == np.float32 and np.array_equal(vectors[there], written[there]), name
        assert np.isnan(vectors[~there]).all(), f"{name}: what a sample lacks is not there"
    assert found.sample_ids.tolist() == list(range(41))
    assert [f"shard-{number // 10}.tar" for number in range(41)] == found.shards
    assert found.rows.tolist() == [number % 10 for number in range(41)]
    assert found.labels == [f"class {number % 3}" for number in range(41)]
    assert found.metadata["admission"][:3] == [None, "1", "2"] and found.metadata["ward"][1] == "ö"
    assert found.metadata["nothing"] == [None] * 41
    some = load_embeddings(path, ["x1.shared"])
    assert list(some.vectors) == ["x1.shared"] and len(some.labels) == 41
    assert np.array_equal(some.vectors["x1.shared"], found.vectors["x1.shared"], equal_nan=True)


def test_any_reader_of_parquet_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(path, [rows(0, 5)], {}, ["ward"])
    schema = pq.read_schema(path)
    assert schema.names == ["sample_id", "shard", "row", "label", "metadata.ward", "x1", "x1.shared", "label.embedding"]
    assert schema.field("x1").type == pa.list_(pa.float32(), 5)
    table = pq.read_table(path)
    assert table["x1"][0].as_py() is None and table["x1"][1].as_py() == rows(0, 5).vectors["x1"][1].tolist()


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    part = rows(0, 5)
    part = replace(
        part,
        vectors={**part.vectors, "label.embedding": part.vectors["x1"]},
        present={**part.present, "label.embedding": part.present["x1"]},
    )
    with pytest.raises(ValueError, match=r"two columns would be called 'label\.embedding'"):
        write_embeddings(tmp_path / "embeddings.parquet", [part], {})
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    write_embeddings(path, [rows(0, 5)], {})
    before = path.read_bytes()

    def breaks_off() -> Iterator[EmbeddingRows]:
        yield rows(5, 9)
        raise RuntimeError("a GPU fell off the bus")

    with pytest.raises(RuntimeError, match="fell off"):
        write_embeddings(path, breaks_off(), {})
    with pytest.raises(ValueError, match="no sample"):
        write_embeddings(path, [rows(0, 0)], {})
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match="was not written by symile-dist evaluate"):
        load_embeddings(path)
    path.write_text("not a table")
    with pytest.raises(ValueError, match="not a Parquet file"):
        load_embeddings(path)
    write_embeddings(path, [rows(0, 5)], {})
    with pytest.raises(ValueError, match=r"no embedding 'x2'; it holds x1, x1\.shared, label"):
        load_embeddings(path, ["x2"])
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "nowhere.parquet")
