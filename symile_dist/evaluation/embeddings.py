"""Embeddings in a Parquet file, for use elsewhere: written in row groups, whole or not at all, and read back.

Columns: `sample_id`, `shard` and `row` (where the sample lies), `label`, `metadata.KEY` for the keys that were asked
for, and one list of D float32 per embedding, null where a sample lacks the modality. What they come from stands in the
schema's metadata under `symile_dist`, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from symile_dist.storage import write_atomic

SCHEMA_KEY = b"symile_dist"
FACTS = ("sample_id", "shard", "row", "label")
ROW_GROUP_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class EmbeddingRows:
    """n samples."""

    vectors: Mapping[str, Tensor]
    """Embedding -> (n, D) float32"""
    present: Mapping[str, Tensor]
    """Embedding -> (n,) bool"""
    sample_ids: Tensor
    """(n,) int64"""
    shards: Sequence[str]
    rows: Sequence[int]
    """In the shards' indices."""
    labels: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def bytes(self) -> int:
        return sum(vectors.nbytes for vectors in self.vectors.values())


def write_embeddings(
    path: str | Path, parts: Iterable[EmbeddingRows], about: Mapping[str, Any], metadata: Sequence[str] = ()
) -> int:
    """Writes a Parquet file as the parts come, a row group at a time; returns the number of samples.

    Whatever happens on the way, a file of that name is whole or as it was before.

    Args:
        about: what the embeddings come from (run, step, ...); kept in the schema, with the embeddings' names.
        metadata: keys that become columns, as strings; what is no string stands there as JSON.

    An embedding that is called like a column besides (`label`) becomes `label.embedding`.

    Raises ValueError without a sample, and where two columns would have one name nonetheless.
    """
    count = 0

    def write(file: BinaryIO) -> None:
        nonlocal count
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer: Any = None
        waiting: list[EmbeddingRows] = []
        try:
            for part in parts:
                if writer is None:
                    schema = _schema(part, about, metadata)
                    texts = [name for name in schema.names if schema.field(name).type == pa.string()]
                    writer = pq.ParquetWriter(file, schema, use_dictionary=texts, write_statistics=list(FACTS))
                count += len(part)
                waiting.append(part)
                if sum(rows.bytes for rows in waiting) >= ROW_GROUP_BYTES:
                    writer.write_table(_table(waiting, writer.schema, metadata))
                    waiting = []
            if sum(map(len, waiting)):
                writer.write_table(_table(waiting, writer.schema, metadata))
        finally:
            if writer is not None:
                writer.close()
        if not count:
            raise ValueError(f"{path}: there is no sample to export")

    write_atomic(Path(path), write)
    return count


def _schema(part: EmbeddingRows, about: Mapping[str, Any], metadata: Sequence[str]) -> Any:
    import pyarrow as pa

    facts = [("sample_id", pa.int64()), ("shard", pa.string()), ("row", pa.int64()), ("label", pa.string())]
    facts += [(f"metadata.{key}", pa.string()) for key in metadata]
    taken = {name for name, _ in facts}
    columns = {name: f"{name}.embedding" if name in taken else name for name in part.vectors}
    given = [*taken, *columns.values()]
    twice = sorted({column for column in given if given.count(column) > 1})
    if twice:
        raise ValueError(f"two columns would be called '{twice[0]}'; give one of them another name")
    lists = [(columns[name], pa.list_(pa.float32(), vectors.shape[1])) for name, vectors in part.vectors.items()]
    told = {**about, "embeddings": columns, "metadata": list(metadata)}
    return pa.schema([*facts, *lists], metadata={SCHEMA_KEY: json.dumps(told).encode()})


def _table(parts: Sequence[EmbeddingRows], schema: Any, metadata: Sequence[str]) -> Any:
    import pyarrow as pa

    columns: list[Any] = [
        pa.array(np.concatenate([part.sample_ids.numpy() for part in parts])),
        pa.array([name for part in parts for name in part.shards], pa.string()),
        pa.array([row for part in parts for row in part.rows], pa.int64()),
        pa.array([label for part in parts for label in part.labels], pa.string()),
    ]
    facts = [facts for part in parts for facts in part.metadata]
    columns += [pa.array([_text(found.get(key)) for found in facts], pa.string()) for key in metadata]
    for name in parts[0].vectors:
        vectors = np.concatenate([part.vectors[name].numpy() for part in parts]).astype(np.float32, copy=False)
        lacking = ~np.concatenate([part.present[name].numpy() for part in parts])
        flat, mask = pa.array(vectors.reshape(-1)), pa.array(lacking)
        columns.append(pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=mask))
    return pa.Table.from_arrays(columns, schema=schema)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Embeddings:
    """What a file of embeddings holds, n samples."""

    vectors: dict[str, NDArray[np.float32]]
    """Embedding -> (n, D), NaN where a sample lacks the modality"""
    sample_ids: NDArray[np.int64]
    """(n,)"""
    shards: list[str]
    rows: NDArray[np.int64]
    labels: list[str]
    about: dict[str, Any]
    """Run, step, split, config_digest, similarity and more."""
    metadata: dict[str, list[str | None]] = field(default_factory=dict)


def load_embeddings(path: str | Path, names: Sequence[str] | None = None) -> Embeddings:
    """Reads what `symile-dist evaluate RUN --export` wrote.

    Args:
        names: embeddings to read; all when left out.

    Raises ValueError for another file, or a name that it does not hold.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from None
    with file:
        schema = file.schema_arrow
        if SCHEMA_KEY not in (schema.metadata or {}):
            raise ValueError(f"{path}: was not written by symile-dist evaluate --export")
        about = json.loads(schema.metadata[SCHEMA_KEY])
        columns, keys = about.pop("embeddings"), about.pop("metadata")
        unknown = [name for name in names or [] if name not in columns]
        if unknown:
            raise ValueError(f"{path}: holds no embedding '{unknown[0]}'; it holds {', '.join(columns)}")
        columns = {name: column for name, column in columns.items() if names is None or name in names}
        count = file.metadata.num_rows
        vectors = {
            name: np.empty((count, schema.field(column).type.list_size), dtype=np.float32)
            for name, column in columns.items()
        }
        first = 0
        for batch in file.iter_batches(columns=list(columns.values())) if columns else ():
            for name, column in columns.items():
                lists = batch.column(column)
                size = lists.type.list_size
                values = np.asarray(lists.values)[lists.offset * size : (lists.offset + len(lists)) * size]
                rows = vectors[name][first : first + len(lists)]
                rows[:] = values.reshape(-1, size)
                rows[np.asarray(lists.is_null())] = np.nan
            first += len(batch)
        facts = file.read(columns=[*FACTS, *(f"metadata.{key}" for key in keys)])
    return Embeddings(
        vectors,
        sample_ids=facts["sample_id"].to_numpy(),
        shards=facts["shard"].to_pylist(),
        rows=facts["row"].to_numpy(),
        labels=facts["label"].to_pylist(),
        about=about,
        metadata={key: facts[f"metadata.{key}"].to_pylist() for key in keys},
    )
