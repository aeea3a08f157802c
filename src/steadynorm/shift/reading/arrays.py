"""The small engine for columns in memory: the same questions as `engine` asks a database, answered by numpy."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.reading.frames import (
    Coded,
    Declared,
    Facts,
    Reading,
    Sample,
    is_categorical,
    text_of,
)
from steadynorm.shift.reading.sides import Kind
from steadynorm.shift.reading.values import Held

__all__ = ["ArrayFrame", "aggregates", "drawn"]

# What DuckDB takes for one, so that a column means the same in memory and in a file.
_TRUTH: Final = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), 1.0),
    **dict.fromkeys(("false", "f", "no", "n", "0"), 0.0),
}
_TIME: Final = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?:[T ](\d{2}:\d{2}.*))?", re.ASCII)


@dataclass(frozen=True, eq=False)
class ArrayFrame:
    """Columns in memory, all of `rows` rows; `positions` says which rows of the source they are, if not all."""

    name: str
    rows: int
    columns: Mapping[str, Held]
    positions: NDArray[np.int64] | None = None

    @property
    def types(self) -> Mapping[str, Declared]:
        """The columns, in order."""
        return {name: held.declared for name, held in self.columns.items()}

    def sample(self, readings: Mapping[str, Reading], size: int, seed: int) -> Sample:
        """`size` rows without replacement, in their order; the same for the same seed."""
        rng = np.random.default_rng(seed)
        picked = np.arange(self.rows) if self.rows <= size else np.sort(rng.choice(self.rows, size, replace=False))
        columns = {name: drawn(self.columns[name], reading, picked) for name, reading in readings.items()}
        numbers = picked if self.positions is None else self.positions[picked]
        return Sample(len(picked), columns, numbers.astype(np.int64))

    def facts(self, readings: Mapping[str, Kind], ranges: Mapping[str, tuple[float, float] | None]) -> dict[str, Facts]:
        """Aggregates of all rows, one column at a time in float64."""
        found: dict[str, Facts] = {}
        for name, kind in readings.items():
            held = self.columns[name]
            if kind == "categorical":
                found[name] = Facts(int((_codes(held).codes < 0).sum()))
                continue
            values = _numbers(held, kind)
            unread = int(np.isnan(values).sum() - (_codes(held).codes < 0).sum()) if _is_text(held) else 0
            if kind == "boolean":
                found[name] = Facts(int(np.isnan(values).sum()), unread, true=int(np.nansum(values)))
                continue
            found[name] = aggregates(values, ranges.get(name), unread)
        return found

    def largest(self, name: str, top: int) -> tuple[dict[str, int], int]:
        """The `top` most frequent categories with their rows, and the number of categories."""
        coded = _codes(self.columns[name])
        counts = np.bincount(coded.codes[coded.codes >= 0], minlength=len(coded.texts))
        order = sorted(np.flatnonzero(counts).tolist(), key=lambda i: (-counts[i], coded.texts[i]))
        return {coded.texts[i]: int(counts[i]) for i in order[:top]}, len(order)

    def counts_of(self, name: str, texts: Iterable[str]) -> dict[str, int]:
        """The rows in each of these categories."""
        found, _ = self.largest(name, len(_codes(self.columns[name]).texts))
        return {text: found[text] for text in texts if text in found}


def aggregates(values: NDArray[np.float64], within: tuple[float, float] | None, unread: int = 0) -> Facts:
    """Missing, infinite, mean, unbiased standard deviation, range, and how many lie outside `within`.

    Example:
        >>> found = aggregates(np.array([1.0, 2.0, 3.0, np.nan, np.inf]), (1.5, 9.0))
        >>> found.missing, found.infinite, found.mean, found.std, found.below
        (1, 1, 2.0, 1.0, 1)
    """
    missing, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    finite = values if not missing + infinite else values[np.isfinite(values)]
    if not finite.size:
        return Facts(missing, unread, infinite)
    low, high = float(finite.min()), float(finite.max())
    scale = max(abs(low), abs(high))
    # Squares of values beyond 1e150 are no float64 any more: those are measured in units of the largest.
    unit = scale if scale > 1e150 else 1.0
    with np.errstate(over="ignore"):
        scaled = finite if unit == 1.0 else finite / unit
        mean = float(scaled.mean() * unit)
        std = float(scaled.std(ddof=1) * unit) if finite.size > 1 else None
    below = above = 0
    if within is not None:
        below, above = int((finite < within[0]).sum()), int((finite > within[1]).sum())
    return Facts(missing, unread, infinite, mean, std, low, high, below, above)


def _is_text(held: Held) -> bool:
    return isinstance(held.data, Coded)


def drawn(held: Held, reading: Reading, picked: NDArray[np.intp]) -> NDArray[np.float64] | Coded:
    """The picked rows of a column, read as asked; text without a reading by `is_categorical`."""
    if reading == "string":
        coded = _codes(held)
        codes = coded.codes[picked]
        used = np.unique(codes[codes >= 0])
        reading = "categorical" if is_categorical(len(used), len(picked)) else "text"
    if reading == "categorical":
        coded = _codes(held)
        codes = coded.codes[picked]
        used = np.unique(codes[codes >= 0])
        places = np.full(len(coded.texts) + 1, -1, dtype=np.int64)
        places[used] = np.arange(len(used))
        return Coded(places[codes], [coded.texts[i] for i in used.tolist()])
    return _numbers(held, reading, picked)


def _numbers(held: Held, reading: Reading, picked: NDArray[np.intp] | None = None) -> NDArray[np.float64]:
    """The column as numbers, NaN where missing or unreadable."""
    rows = slice(None) if picked is None else picked
    if reading == "text" and held.lengths is not None:
        return held.lengths[rows]
    if isinstance(held.data, Coded):
        parsed = np.array([_parsed(text, reading) for text in held.data.texts] + [np.nan], dtype=np.float64)
        return parsed[held.data.codes[rows]]
    values = np.asarray(cast("NDArray[Any]", held.data)[rows], dtype=np.float64)
    if reading == "boolean":
        return np.where(np.isnan(values), np.nan, values != 0)
    return values


def _parsed(text: str, reading: Reading) -> float:
    try:
        if reading == "boolean":
            return _TRUTH.get(text.lower(), np.nan)
        if reading == "time":
            return _seconds(text)
        return float(text) if text.isascii() else np.nan
    except ValueError:
        return np.nan


def _seconds(text: str) -> float:
    """Since 1970, in UTC: of a date, or a date and a time with a zone or without one (then UTC)."""
    found = _TIME.fullmatch(text)
    if found is None:
        return np.nan
    year, month, day, rest = found.groups()
    moment = datetime.fromisoformat(f"{year}-{int(month):02}-{int(day):02}" + (f"T{rest}" if rest else ""))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _codes(held: Held) -> Coded:
    """The column as categories; numbers, truth values and times by their text."""
    if isinstance(held.data, Coded):
        return held.data
    values = np.asarray(cast("NDArray[Any]", held.data), dtype=np.float64)
    present = ~np.isnan(values)
    distinct, inverse = np.unique(values[present], return_inverse=True)
    codes = np.full(len(values), -1, dtype=np.int64)
    codes[present] = inverse
    base = held.declared.base or "string"
    texts = [text_of(value, base) for value in distinct.tolist()]
    if len(set(texts)) < len(texts):  # such as +0.0 and -0.0
        order: dict[str, int] = {}
        renamed = np.array([order.setdefault(text, len(order)) for text in texts], dtype=np.int64)
        codes[present] = renamed[codes[present]]
        texts = list(order)
    return Coded(codes, texts)
