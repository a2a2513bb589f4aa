"""Rows of a CSV, TSV or JSONL file, one at a time, and where each stands in the file.

A table may have millions of rows: what is kept of it is a byte offset per row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Table:
    """A table in UTF-8. Raises ValueError when the file is not there or its name says no known format."""

    path: Path
    quotes: bool = True
    """False: `"` is a character like any other (.tsv as Common Voice writes it)."""

    def __post_init__(self) -> None:
        if self._suffix not in (*DELIMITERS, *JSON_LINES):
            raise ValueError(f"{self.path}: a table is a .csv, .tsv or .jsonl file, not compressed")
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such table")

    @property
    def _suffix(self) -> str:
        return self.path.suffix.lower()

    def columns(self) -> list[str]:
        """The header; of JSONL, the keys of the first row. Raises ValueError for an empty or unreadable table."""
        with open(self.path, "rb") as file:
            lines = _Lines(file)
            try:
                if self._suffix in JSON_LINES:
                    first = next((line for line in lines if line.strip()), None)
                    names = None if first is None else list(self._json_row(first))
                else:
                    names = next(self._csv_reader(lines), None)
            except (ValueError, csv.Error) as error:
                raise ValueError(f"{self.path}: line {lines.number}: {error}") from None
        if not names:
            raise ValueError(f"{self.path}: the table is empty")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"{self.path}: column '{repeated[0]}' stands there twice")
        return names

    def require(self, *wanted: str) -> None:
        """Raises ValueError unless the table has all these columns."""
        names = self.columns()
        missing = [name for name in wanted if name not in names]
        if missing:
            plural = "s" if len(missing) > 1 else ""
            raise ValueError(f"{self.path}: no column{plural} {', '.join(missing)}; it has {', '.join(names)}")

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """(first byte, last byte + 1, row) of every row; blank lines are passed over.

        Raises ValueError, with the line, for a row that does not fit the header or is not UTF-8.
        """
        names = self.columns()
        with open(self.path, "rb") as file:
            lines = _Lines(file)
            json_lines = self._suffix in JSON_LINES
            records: Iterator[Any] = iter(lines) if json_lines else self._csv_reader(lines)
            try:
                if not json_lines:
                    next(records)
                start = lines.position
                for record in records:
                    if json_lines and record.strip():
                        yield start, lines.position, self._json_row(record)
                    elif not json_lines and record:
                        yield start, lines.position, self._csv_row(record, names)
                    start = lines.position
            except (ValueError, csv.Error) as error:
                hint = "; is a quote not closed? --no-quotes takes quotes as they are" if self._quoted(error) else ""
                raise ValueError(f"{self.path}: line {lines.number}: {error}{hint}") from None

    def parse(self, data: bytes, names: Sequence[str]) -> dict[str, Any]:
        """The bytes of one row, as `rows` gave their place, -> the row."""
        text = data.decode("utf-8")
        if self._suffix in JSON_LINES:
            return self._json_row(text)
        return self._csv_row(next(self._csv_reader(io.StringIO(text, newline=""))), names)

    def _csv_reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        delimiter = DELIMITERS[self._suffix]
        if self.quotes:
            return csv.reader(lines, delimiter=delimiter, strict=True)
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)

    def _quoted(self, error: Exception) -> bool:
        return self.quotes and self._suffix in DELIMITERS and isinstance(error, csv.Error)

    @staticmethod
    def _csv_row(fields: list[str], names: Sequence[str]) -> dict[str, Any]:
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} fields, the header has {len(names)} columns")
        return dict(zip(names, fields, strict=True))

    @staticmethod
    def _json_row(line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None
        if not isinstance(row, dict):
            raise ValueError("not a JSON object")
        return row


class _Lines:
    """The lines of a file as text, with `position`: the bytes taken so far. csv.reader takes no line too many."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        # Spreadsheets put a byte-order mark in front.
        self.position = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(self.position)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        self.number += 1
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 ({error.reason}); save the table as UTF-8") from None
