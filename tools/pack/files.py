"""Samples from a table that names files: any number of modalities."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from symile_dist.storage import sha256_of_file
from symile_dist.tools.pack.source import (
    LARGEST_MEMBER,
    Progress,
    ReadSample,
    Survey,
    json_bytes,
    key_of,
    tar_bytes,
)
from symile_dist.tools.pack.table import Table

ON_MISSING = ("error", "skip", "absent")
SHOWN = 5
"""Mistakes that a message lists; the rest is counted."""
THREADS = 8
"""Files looked at together: on a network disk a look takes a millisecond."""

_MEMBER = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*")
_KEY = re.compile(r"[^./\\\x00-\x1f]+")
_SAME_EXTENSION = {"jpeg": "jpg"}


@dataclass(frozen=True)
class FileColumn:
    """A column of paths, and the member that its files become."""

    column: str
    root: Path
    """Paths are relative to it."""
    name: str
    """`image.jpg`: the member. `image`: the member is `image.` and the file's extension. "": the extension alone."""

    def member(self, path: str) -> str:
        """Raises ValueError where the name needs an extension and the file has none."""
        if "." in self.name:
            return self.name
        extension = PurePosixPath(path).suffix[1:].lower()
        extension = _SAME_EXTENSION.get(extension, extension)
        if not re.fullmatch(r"[a-z0-9_-]+", extension):
            remedy = f"; name the member in full, e.g. --file {self.name}.jpg={self.column}" if self.name else ""
            raise ValueError(f"column '{self.column}': '{path}' has no extension to name its member by{remedy}")
        return f"{self.name}.{extension}" if self.name else extension

    def path(self, value: str) -> Path:
        """Raises ValueError for a path that leaves the root, and for what cannot be one."""
        parts = PurePosixPath(value)
        if parts.is_absolute() or ".." in parts.parts or "\0" in value:
            raise ValueError(
                f"column '{self.column}': '{value}' leaves the folder of its files; paths must be relative to it, "
                "without '..'"
            )
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
            raise ValueError(f"column '{self.column}': {value!a} cannot name a file") from None
        return self.root / parts


@dataclass(frozen=True)
class TableSource:
    """A table, of which each row is a sample."""

    layout: str
    table: Table
    files: tuple[FileColumn, ...]
    texts: tuple[tuple[str, str], ...] = ()
    """(member, column)"""
    metadata: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(key in the member `json`, columns: the first that is not empty)"""
    key: str | None = None
    """Column of the samples' keys; None: the number of the row, from 0."""
    on_missing: str = "error"

    def __post_init__(self) -> None:
        if self.on_missing not in ON_MISSING:
            raise ValueError(f"on_missing must be one of {', '.join(ON_MISSING)}, not '{self.on_missing}'")
        if not self.files and not self.texts:
            raise ValueError("nothing to pack: name a column, e.g. --file image=image_path or --text txt=caption")
        names = [*(file.name for file in self.files if file.name), *(member for member, _ in self.texts)]
        for name in names:
            if not _MEMBER.fullmatch(name):
                raise ValueError(f"'{name}' cannot name a member: use a-z, 0-9, '_', '-' and dots between")
            if names.count(name) > 1 or name == "json":
                raise ValueError(f"member '{name}' is named twice" if name != "json" else "member 'json' is taken")
        used = [*(file.column for file in self.files), *(column for _, column in self.texts)]
        used += [column for _, columns in self.metadata for column in columns] + ([self.key] if self.key else [])
        self.table.require(*dict.fromkeys(used))
        for file in self.files:
            if not file.root.is_dir():
                raise ValueError(f"{file.root}: no such folder (of the files in column '{file.column}')")

    def parameters(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "table_sha256": sha256_of_file(self.table.path),
            "quotes": self.table.quotes,
            "files": [[file.name, file.column] for file in self.files],
            "texts": [list(pair) for pair in self.texts],
            "metadata": [[name, list(columns)] for name, columns in self.metadata],
            "key": self.key,
            "on_missing": self.on_missing,
        }

    def survey(self, progress: Progress) -> Survey:
        """Reads the table and looks at every file, without opening one."""
        walk = _Walk(self)
        total = self.table.path.stat().st_size
        rows = self.table.rows()
        with ThreadPoolExecutor(THREADS) as pool:
            while batch := list(islice(rows, 256 * THREADS)):
                shares = [batch[first : first + 256] for first in range(0, len(batch), 256)]
                number = len(walk.sizes)
                for share, found in zip(shares, pool.map(self._file_sizes, shares), strict=True):
                    for (start, _, row), sizes in zip(share, found, strict=True):
                        walk.add(number, start, row, sizes)
                        number += 1
                progress("table, bytes", batch[-1][1], total)
        return walk.result(total)

    @contextlib.contextmanager
    def open(self) -> Iterator[ReadSample]:
        names = self.table.columns()
        with open(self.table.path, "rb") as file:

            def read(number: int, start: int, end: int) -> tuple[str, dict[str, bytes]]:
                row = self.table.parse(os.pread(file.fileno(), end - start, start), names)
                return self.key_of(number, row), self._members(row)

            yield read

    def _file_sizes(self, rows: Sequence[tuple[int, int, Mapping[str, Any]]]) -> list[list[int | str | None]]:
        """Per row and column of paths: the file's size, what is wrong with it, or None for an empty field."""
        return [[self._file_size(file, row) for file in self.files] for _, _, row in rows]

    @staticmethod
    def _file_size(file: FileColumn, row: Mapping[str, Any]) -> int | str | None:
        value = as_text(row.get(file.column))
        if not value:
            return None
        try:
            path = file.path(value)
        except ValueError:
            return None  # `members` raises the same, in the order of the rows
        try:
            found = os.stat(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        if not stat.S_ISREG(found.st_mode):
            return f"{path}: not a file"
        if found.st_size == 0:
            return f"{path}: is empty"
        if not os.access(path, os.R_OK):
            return f"{path}: may not be read"
        return found.st_size

    def key_of(self, number: int, row: Mapping[str, Any]) -> str:
        """Raises ValueError for a key that a shard cannot have."""
        if self.key is None:
            return key_of(number)
        key = as_text(row.get(self.key))
        if not _KEY.fullmatch(key):
            raise ValueError(
                f"column '{self.key}': '{key}' cannot be a key: it must not be empty nor hold dots or slashes (what "
                "follows the first dot names the member); without --key the row's number is the key"
            )
        return key

    def texts_of(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        """The members that the row itself holds: texts that are not empty, and `json`."""
        texts = {member: as_text(row.get(column)).encode() for member, column in self.texts}
        facts: dict[str, Any] = {}
        for name, columns in self.metadata:
            values = [row.get(column) for column in columns]
            value = next((value for value in values if value not in (None, "")), None)
            if value is not None:
                # A query is answered rightly when classes are equal, and 7 is not "7".
                facts[name] = as_text(value) if name == "class" else value
        return {**{member: text for member, text in texts.items() if text}, "json": json_bytes(facts)}

    def _members(self, row: Mapping[str, Any]) -> dict[str, bytes]:
        members = self.texts_of(row)
        for file in self.files:
            value = as_text(row.get(file.column))
            if value and isinstance(self._file_size(file, row), int):
                members[file.member(value)] = file.path(value).read_bytes()
        return members


class _Walk:
    """What is gathered of a table, row by row."""

    def __init__(self, source: TableSource) -> None:
        self.source = source
        self.starts, self.sizes, self.keys = array("q"), array("q"), array("Q")
        self.members: Counter[str] = Counter()
        self.absent: Counter[str] = Counter()
        self.of_column: dict[str, Counter[str]] = {file.column: Counter() for file in source.files}
        self.skipped = 0
        self.bad: list[str] = []
        self.bad_files = self.bad_rows = 0

    def add(self, number: int, start: int, row: Mapping[str, Any], sizes: Sequence[int | str | None]) -> None:
        source = self.source
        try:
            key = source.key_of(number, row)
            members = {member: len(content) for member, content in source.texts_of(row).items()}
            absent = [column for member, column in source.texts if member not in members]
            bad = [size for size in sizes if isinstance(size, str)]
            for file, size in zip(source.files, sizes, strict=True):
                value = as_text(row.get(file.column))
                if value:
                    file.path(value)
                    member = file.member(value)
                    if member in members:
                        raise ValueError(
                            f"two members of one name, '{member}'; name them apart with --file NAME=COLUMN"
                        )
                if not isinstance(size, int):
                    absent.append(file.column)
                    continue
                members[member] = size
                if size > LARGEST_MEMBER:
                    raise ValueError(f"'{value}' has {size} bytes; a member has at most {LARGEST_MEMBER}")
                self.of_column[file.column][member] += 1
            longest = max(len(f"{key}.{member}".encode()) for member in members)
            if longest > 100:
                raise ValueError(
                    f"the key '{key}' is too long: with its member it has {longest} bytes, a tar takes 100"
                )
        except ValueError as error:
            raise ValueError(f"{source.table.path}: row {number + 1}: {error}") from None
        self.starts.append(start)
        if source.key is not None:
            self.keys.append(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
        self.bad += bad[: SHOWN - len(self.bad)]
        self.bad_files += len(bad)
        self.bad_rows += bool(bad)
        if (bad and source.on_missing == "skip") or set(members) == {"json"}:
            self.skipped += 1
            self.sizes.append(0)
            return
        self.sizes.append(tar_bytes(members.values()))
        self.members.update(members.keys())
        self.absent.update(absent)

    def result(self, table_bytes: int) -> Survey:
        """Raises ValueError for missing files, where they are not allowed, and for keys that occur twice."""
        if self.bad_files and self.source.on_missing == "error":
            rest = self.bad_files - len(self.bad)
            more = f"\n  and {rest} more" if rest else ""
            raise ValueError(
                f"{self.bad_files} files of {self.bad_rows} samples are missing or unreadable:\n  "
                + "\n  ".join(self.bad)
                + f"{more}\nmend the paths, or leave such samples out (--on-missing skip) or pack them without the "
                "member (--on-missing absent)"
            )
        self.starts.append(table_bytes)
        starts = np.frombuffer(self.starts, dtype=np.int64)
        self._refuse_equal_keys(starts)
        remarks = []
        if self.bad_files:
            done = "left out" if self.source.on_missing == "skip" else "packed without them"
            remarks.append(
                f"{self.bad_files} files are missing or unreadable; their {self.bad_rows} samples are {done}"
            )
        for file in self.source.files:
            found = self.of_column[file.column]
            if len(found) > 1:
                counts = ", ".join(f"{member} ({count})" for member, count in found.most_common())
                remarks.append(
                    f"column '{file.column}' has files of several kinds: {counts}. A config's modality reads one "
                    "member: pack them under one name (shards pack files --file image.jpg=COLUMN; decoders look at the "
                    "bytes), or convert the files"
                )
        return Survey(
            starts=starts,
            tar_bytes=np.frombuffer(self.sizes, dtype=np.int64) if self.sizes else np.zeros(0, np.int64),
            members=dict(sorted(self.members.items())),
            absent=dict(sorted(self.absent.items())),
            skipped=self.skipped,
            remarks=remarks,
        )

    def _refuse_equal_keys(self, starts: np.ndarray) -> None:
        if len(self.keys) < 2:
            return
        hashes = np.frombuffer(self.keys, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        table, names = self.source.table, self.source.table.columns()
        with open(table.path, "rb") as file:
            for place in np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]]):
                pair = sorted((int(order[place]), int(order[place + 1])))
                keys = []
                for row in pair:
                    data = os.pread(file.fileno(), int(starts[row + 1] - starts[row]), int(starts[row]))
                    keys.append(self.source.key_of(row, table.parse(data, names)))
                if keys[0] == keys[1]:  # else two keys of one hash, which is not a mistake
                    raise ValueError(
                        f"{table.path}: key '{keys[0]}' stands in rows {pair[0] + 1} and {pair[1] + 1}; a key names "
                        "one sample: choose another column, or leave --key out"
                    )


def as_text(value: Any) -> str:
    """A field as text: "" for null, JSON for what is not a string."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def files_source(
    table: str | Path,
    root: str | Path,
    files: Sequence[str],
    texts: Sequence[str] = (),
    label: str | None = None,
    metadata: Sequence[str] = (),
    key: str | None = None,
    on_missing: str = "error",
    quotes: bool = True,
) -> TableSource:
    """A folder with a table (CSV, TSV or JSONL).

    Args:
        root: folder that the paths in the table are relative to.
        files: "NAME=COLUMN" of each column of paths; NAME as in `FileColumn.name`, not empty.
        texts: "MEMBER=COLUMN" of each column of texts.
        label: column of the class, for evaluation.
        metadata: columns that are kept in the member `json` under their own name.
        key: column of the samples' keys.

    Raises ValueError for a table, folder or column that is not there, and for names that cannot be.
    """
    pairs = {}
    for option, given in (("--file", files), ("--text", texts)):
        pairs[option] = [tuple(one.partition("=")[::2]) for one in given]
        for one, (name, column) in zip(given, pairs[option], strict=True):
            if not name or not column:
                raise ValueError(f"{option} {one}: write {option} NAME=COLUMN, e.g. --file image=image_path")
    columns = [column for column in metadata if column != "class" or label is None]
    return TableSource(
        layout="files",
        table=Table(Path(table), quotes),
        files=tuple(FileColumn(column, Path(root), name.lower()) for name, column in pairs["--file"]),
        texts=tuple((member.lower(), column) for member, column in pairs["--text"]),
        metadata=((("class", (label,)),) if label else ()) + tuple((column, (column,)) for column in columns),
        key=key,
        on_missing=on_missing,
    )
