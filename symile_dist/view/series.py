"""The numbers of a run's history: held compactly for months of training, and given in as many points as a screen
shows.

A table holds the records of one kind, a column the values of one key over them. What is given of a long range is one
point per bucket of steps, with mean, smallest and largest value, so that a spike of one step stays in sight; NaN and
infinity are told apart from both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 600
"""At most so many of a column are given at a time."""
MAX_COLUMNS = 2000
"""Of a table: beyond, a key is not kept (a run has a few dozen)."""
_MAX_DEPTH = 3
_DIGITS = 6
_LARGEST = float(np.finfo(np.float32).max)
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_IDENTITY = frozenset({"kind", "step", "time"})

Floats = NDArray[np.float64]


class _Growing:
    """An array that takes more at its end; what was given of it before stays as it was."""

    def __init__(self, dtype: Any) -> None:
        self._data = np.empty(64, dtype)
        self.size = 0

    @property
    def values(self) -> NDArray[Any]:
        return self._data[: self.size]

    def extend(self, values: NDArray[Any]) -> None:
        size = self.size + len(values)
        if size > len(self._data):
            larger = np.empty(max(size, 2 * len(self._data)), self._data.dtype)
            larger[: self.size] = self.values
            self._data = larger
        self._data[self.size : size] = values
        self.size = size

    def cut(self, size: int) -> None:
        if size < self.size:
            # Copied: whoever reads what was given before must not see it overwritten.
            self._data = self._data[:size].copy() if size else np.empty(64, self._data.dtype)
            self.size = size


class Column:
    """The values of one key: `rows` of the table in which they stand, and the `values` themselves, to 7 digits."""

    def __init__(self) -> None:
        self._rows, self._values = _Growing(np.uint32), _Growing(np.float32)

    @property
    def rows(self) -> NDArray[Any]:
        return self._rows.values

    @property
    def values(self) -> NDArray[Any]:
        return self._values.values

    def extend(self, rows: NDArray[Any], values: Floats) -> None:
        # Beyond what 32 bits hold is still not infinity.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            held = np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), values)
            self._rows.extend(rows)
            self._values.extend(held.astype(np.float32))

    def cut(self, table_rows: int) -> None:
        size = int(np.searchsorted(self.rows, table_rows))
        self._rows.cut(size)
        self._values.cut(size)


class Table:
    """The records of one kind.

    Where `replayed`, each step stands once: a record of an earlier step than the last one drops all from that step on,
    as the run does when it goes back. Otherwise records stand in the order in which they came.
    """

    def __init__(self, replayed: bool) -> None:
        self.replayed = replayed
        self.cuts = 0
        """How often something was dropped."""
        self.columns: dict[str, Column] = {}
        self._steps, self._times = _Growing(np.float64), _Growing(np.float64)

    @property
    def steps(self) -> Floats:
        return self._steps.values

    @property
    def times(self) -> Floats:
        """Unix seconds; NaN where a record has none."""
        return self._times.values

    def add(self, records: Sequence[Mapping[str, Any]], steps: Floats) -> None:
        """Appends records; `steps` has the step of each."""
        begin = 0
        back = np.flatnonzero(np.diff(steps) <= 0) + 1 if self.replayed else np.empty(0, int)
        for end in [*back.tolist(), len(records)]:
            self._add(records[begin:end], steps[begin:end])
            begin = end

    def _add(self, records: Sequence[Mapping[str, Any]], steps: Floats) -> None:
        if not len(records):
            return
        if self.replayed and self._steps.size and steps[0] <= self.steps[-1]:
            self._cut(int(np.searchsorted(self.steps, steps[0])))
        first = self._steps.size
        self._steps.extend(steps)
        self._times.extend(_numbers([record.get("time") for record in records])[1])
        for key, present, values in _columns(records):
            column = self.columns.get(key)
            if column is None:
                if len(self.columns) >= MAX_COLUMNS:
                    continue
                column = self.columns[key] = Column()
            column.extend((np.flatnonzero(present) + first).astype(np.uint32), values[present])

    def _cut(self, rows: int) -> None:
        self.cuts += 1
        self._steps.cut(rows)
        self._times.cut(rows)
        for column in self.columns.values():
            column.cut(rows)

    def last(self, key: str, count: int) -> Floats:
        """The last `count` values of a column, as they came; fewer where there are fewer."""
        column = self.columns.get(key)
        return np.empty(0) if column is None else column.values[-count:].astype(np.float64)


def _columns(
    records: Sequence[Mapping[str, Any]], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, NDArray[np.bool_], Floats]]:
    """(key, which records have a number there, the numbers) of all keys; dots lead into objects."""
    keys: dict[str, None] = {}
    signature: tuple[str, ...] = ()
    signatures = 0
    for record in records:
        names = tuple(record)
        if names != signature:  # nearly all records of a kind have the same keys
            signature = names
            signatures += 1
            keys.update(dict.fromkeys(names))
    for key in keys:
        if depth == 0 and key in _IDENTITY:
            continue
        values = list(map(itemgetter(key), records)) if signatures == 1 else [record.get(key) for record in records]
        present, numbers = _numbers(values)
        if present.any():
            yield f"{prefix}{key}", present, numbers
        if depth < _MAX_DEPTH and not present.all() and any(isinstance(value, dict) for value in values):
            parts = [value if isinstance(value, dict) else {} for value in values]
            yield from _columns(parts, f"{prefix}{key}.", depth + 1)


def _numbers(values: list[Any]) -> tuple[NDArray[np.bool_], Floats]:
    """(where there is a number, the numbers); the history's words for NaN and infinity are numbers."""
    try:
        numbers = np.array(values, dtype=np.float64)
        if numbers.ndim == 1 and not any(isinstance(value, str) for value in (values[0], values[-1])):
            present = np.ones(len(values), bool)
            for index in np.flatnonzero(np.isnan(numbers)):
                present[index] = values[index] is not None
            return present, numbers
    except (TypeError, ValueError, OverflowError):
        pass
    found = [_number(value) for value in values]
    present = np.array([value is not None for value in found], bool)
    return present, np.array([math.nan if value is None else value for value in found])


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return _NONFINITE.get(value)
    if isinstance(value, (int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


# -- What is given -----------------------------------------------------------------------------------------------------


def bucket_width(span: float, rows: int) -> int:
    """Steps per point where `rows` records lie within `span` steps: 0 gives each record, else 1, 2 or 5 times a power
    of ten, so that buckets stay where they are while a run grows."""
    if rows <= POINTS:
        return 0
    width = 1
    for factor in _one_two_five():
        width = factor
        if span / width <= POINTS - 1:  # a range may begin and end within buckets
            break
    return width


def _one_two_five() -> Iterator[int]:
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


class Part:
    """The rows of a table between two steps, gathered into points: the grid that its columns share."""

    def __init__(self, table: Table, first: float, last: float, since: float | None = None) -> None:
        """
        Args:
            first, last: steps, both included.
            since: leave out the points before the one that holds this step.
        """
        steps = table.steps
        self._order: NDArray[Any] | None = None
        if not table.replayed and len(steps) > 1 and bool((np.diff(steps) < 0).any()):
            self._order = np.argsort(steps, kind="stable")
            steps = steps[self._order]
        begin, end = int(np.searchsorted(steps, first)), int(np.searchsorted(steps, last, side="right"))
        self.rows = end - begin
        """Of the whole range."""
        self.last = float(steps[end - 1]) if self.rows else -1.0
        """Step of the last of them."""
        span = self.last - float(steps[begin]) + 1 if self.rows else 0.0
        self.width = bucket_width(span, end - begin)
        if since is not None and self._order is None:
            at = math.floor(since / self.width) * self.width if self.width else since
            begin = max(begin, int(np.searchsorted(steps, at)))
        self.begin, self.end = begin, end
        self._table = table
        times = table.times if self._order is None else table.times[self._order]
        part, times = steps[begin:end], times[begin:end]
        if self.width:
            self._starts, buckets = _runs(np.floor(part / self.width))
            self.steps: Floats = buckets * self.width
            """First step of each bucket, or the step of each record."""
            self.times: Floats = times[self._starts]
        else:
            self.steps, self.times = part, times

    def grid(self) -> dict[str, Any]:
        """For JSON: steps and times of the points, of which each stands for `width` steps from its own on; and the last
        step that there is."""
        steps, times = _plain(self.steps), _plain(self.times, digits=12)
        return {"width": self.width, "last": self.last, "steps": steps, "times": times}

    def column(self, key: str) -> dict[str, Any] | None:
        """For JSON: `mean` per point (None: no value there, or none that is finite), `min` and `max` where points stand
        for several records, and `odd`: [point, "NaN" | "Infinity" | "-Infinity"] of those that hold such a value.

        None where the column has nothing here.
        """
        column = self._table.columns.get(key)
        if column is None or self.begin == self.end:
            return None
        if self._order is None:
            first, last = (int(np.searchsorted(column.rows, edge)) for edge in (self.begin, self.end))
            places = column.rows[first:last].astype(np.int64) - self.begin
            values = column.values[first:last].astype(np.float64)
        else:
            where = np.full(len(self._table.steps), -1)
            where[self._order] = np.arange(len(where))
            places = where[column.rows.astype(np.int64)]
            inside = (places >= self.begin) & (places < self.end)
            sort = np.argsort(places[inside], kind="stable")
            places = places[inside][sort] - self.begin
            values = column.values[inside][sort].astype(np.float64)
        if not len(values):
            return None
        if not self.width:
            mean = np.full(len(self.steps), math.nan)
            mean[places] = values
            odd = places[~np.isfinite(values)]
            mean[odd] = math.nan
            kinds = [_word(value) for value in values[~np.isfinite(values)]]
            return {"mean": _plain(mean), **_odd(odd, kinds)}
        points = np.searchsorted(self._starts, places, side="right") - 1
        starts, present = _runs(points)
        present = present.astype(np.int64)
        finite = np.isfinite(values)
        counts = np.add.reduceat(finite, starts, dtype=np.float64)
        some = np.where(counts > 0, counts, np.nan)
        mean, low, high = (np.full(len(self.steps), math.nan) for _ in range(3))
        mean[present] = np.add.reduceat(np.where(finite, values, 0.0), starts) / some
        low[present] = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
        high[present] = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
        odd_points = points[~finite]
        odd_values: dict[int, str] = {}
        for point, value in zip(odd_points.tolist(), values[~finite].tolist(), strict=True):
            if odd_values.get(point) != "NaN":
                odd_values[point] = _word(value)
        return {
            "mean": _plain(mean),
            "min": _plain(low),
            "max": _plain(high),
            **_odd(list(odd_values), list(odd_values.values())),
        }


def _runs(sorted_values: Floats | NDArray[Any]) -> tuple[NDArray[Any], Floats]:
    """(index at which each run of equal values begins, the values)."""
    if not len(sorted_values):
        return np.empty(0, int), np.empty(0)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(sorted_values)) + 1))
    return starts, np.asarray(sorted_values[starts], np.float64)


def _odd(points: Iterable[int], kinds: Iterable[str]) -> dict[str, Any]:
    found = [[int(point), kind] for point, kind in zip(points, kinds, strict=True)]
    return {"odd": found} if found else {}


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(values: Floats, digits: int = _DIGITS) -> list[float | int | None]:
    """For JSON, in few characters: so many significant digits; what is not finite becomes None."""
    finite = np.isfinite(values)
    if bool(finite.all()) and bool((values == np.rint(values)).all()) and bool((np.abs(values) < 2**53).all()):
        whole: list[float | int | None] = values.astype(np.int64).tolist()
        return whole
    with np.errstate(all="ignore"):
        size = np.where(finite & (values != 0), np.abs(values), 1.0)
        scale = 10.0 ** (digits - 1 - np.floor(np.log10(size)))
        rounded = np.rint(values * scale) / scale
        # Scaling leaves the range of floats at its ends, where rounding saves no characters anyway.
        rounded = np.where(np.isfinite(rounded), rounded, values)
    plain: list[float | int | None] = rounded.tolist()
    for index in np.flatnonzero(~finite):
        plain[index] = None
    return plain
