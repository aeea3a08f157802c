"""Tables in a database engine, asked through Ibis: a few bounded passes, whatever the number of rows."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from steadynorm.errors import DataError
from steadynorm.shift.reading.arrays import drawn
from steadynorm.shift.reading.expressions import (
    OWN,
    column_of,
    declared,
    is_finite,
    is_infinite,
    is_number,
    number,
    prefix,
    sampled,
    sampled_rows,
)
from steadynorm.shift.reading.frames import (
    Base,
    Coded,
    Declared,
    Facts,
    Reading,
    Sample,
    is_categorical,
    key_of,
    text_of,
)
from steadynorm.shift.reading.sides import Kind
from steadynorm.shift.reading.values import Held, from_arrow

__all__ = ["TableFrame"]

_TOGETHER: Final = 20
"""Columns per aggregate query: on DuckDB, queries over more take longer per column."""


@dataclass(frozen=True, eq=False)
class TableFrame:
    """A table expression of Ibis.

    Attributes:
        name: What reports call it.
        table: `ibis.Table`; every question becomes one expression over it, run by the engine that it belongs to.
        rows: All rows.
        types: The columns, in order.
        ordered: Whether the engine gives the rows in the order of the source, as DuckDB does those of files.
    """

    name: str
    table: Any
    rows: int
    types: Mapping[str, Declared]
    ordered: bool = False

    @classmethod
    def of(cls, name: str, table: Any, ordered: bool = False) -> "TableFrame":
        """Asks the engine for the columns and counts the rows.

        Raises:
            DataError: The engine cannot read the table.
        """
        try:
            types = {column: declared(dtype) for column, dtype in table.schema().items()}
        except Exception as error:
            raise _unreadable(name, error) from error
        rows = _run(name, table.aggregate(rows=table.count()))["rows"][0].as_py() if types else 0
        return cls(name, table, int(rows), types, ordered)

    def sample(self, readings: Mapping[str, Reading], size: int, seed: int) -> Sample:
        """At most `size` rows: a Bernoulli sample with a few rows to spare, then trimmed at random.

        On DuckDB the same seed gives the same rows in the same order; on other engines, see their TABLESAMPLE.
        """
        table = self.table
        if self.rows > size:
            fraction = min(1.0, (size + 6 * math.sqrt(size) + 10) / self.rows)
            table = sampled_rows(table, fraction, seed)
        wanted: dict[str, Any] = {}
        for i, (name, reading) in enumerate(readings.items()):
            for part, expression in sampled(column_of(table, name), self.types[name].base, reading).items():
                wanted[f"{part}{i}"] = expression
        found = _run(self.name, table.select(**wanted))
        if found.num_rows > size:
            found = found.take(np.sort(np.random.default_rng(seed).choice(found.num_rows, size, replace=False)))
        columns: dict[str, Any] = {}
        for i, (name, reading) in enumerate(readings.items()):
            texts = found[f"text{i}"] if f"text{i}" in wanted else None
            columns[name] = _column(
                self.types[name].base, reading, texts, found[f"number{i}"] if f"number{i}" in wanted else None
            )
        whole = self.ordered and found.num_rows == self.rows
        return Sample(found.num_rows, columns, np.arange(self.rows) if whole else None)

    def facts(self, readings: Mapping[str, Kind], ranges: Mapping[str, tuple[float, float] | None]) -> dict[str, Facts]:
        """Aggregates of all rows: one pass over each column, many columns to a query."""
        names = [name for name in readings if self.types[name].base != "empty"]
        found = {name: Facts(self.rows) for name in readings if name not in names}
        for start in range(0, len(names), _TOGETHER):
            part = names[start : start + _TOGETHER]
            wanted = {
                f"{key}{i}": expression
                for i, name in enumerate(part)
                for key, expression in self._aggregates(name, readings[name], ranges.get(name)).items()
            }
            row = _run(self.name, self.table.aggregate(**wanted)).to_pylist()[0]
            for i, name in enumerate(part):
                answers = {key: row[f"{key}{i}"] for key in _ANSWERS if f"{key}{i}" in row}
                found[name] = self._finished(name, readings[name], answers)
        return found

    def largest(self, name: str, top: int) -> tuple[dict[str, int], int]:
        """The `top` most frequent categories with their rows, and the number of categories."""
        import ibis

        if self.types[name].base == "empty":
            return {}, 0
        groups = self._categories(name).group_by("key").aggregate(rows=ibis._.count())
        groups = groups.mutate(distinct=ibis._.count().over(ibis.window()))
        found = _run(self.name, groups.order_by(ibis.desc("rows"), "key").limit(top)).to_pylist()
        return self._texts(name, found), int(found[0]["distinct"]) if found else 0

    def counts_of(self, name: str, texts: Iterable[str]) -> dict[str, int]:
        """The rows in each of these categories."""
        import ibis

        base = self.types[name].base or "string"
        keys = [key for key in (key_of(text, base) for text in texts) if key is not None]
        if not keys:
            return {}
        table = self._categories(name)
        groups = table.filter(table.key.isin(keys)).group_by("key").aggregate(rows=ibis._.count())
        return self._texts(name, _run(self.name, groups).to_pylist())

    def _texts(self, name: str, found: list[dict[str, Any]]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for group in found:
            text = text_of(group["key"], self.types[name].base or "string")
            counts[text] = counts.get(text, 0) + int(group["rows"])
        return counts

    def _categories(self, name: str) -> Any:
        """A table of one column `key` without missing values."""
        base = self.types[name].base
        column = column_of(self.table, name)
        key = prefix(column) if base == "string" else number(column, base, OWN[base])
        table = self.table.select(key=key)
        return table.filter(is_number(table.key) if base == "numeric" else table.key.notnull())

    def _aggregates(self, name: str, kind: Kind, within: tuple[float, float] | None) -> dict[str, Any]:
        import ibis

        base, column = self.types[name].base, column_of(self.table, name)
        if kind == "categorical" and base == "string":
            return {"filled": column.count()}
        value = number(column, base, OWN[base] if kind == "categorical" else kind)
        answers: dict[str, Any] = {}
        if base == "string" and kind != "text":
            answers["raw"] = column.count()
        if column.type().is_floating() or base == "string":
            answers["infinite"] = is_infinite(value).sum()
            wanted = is_number(value) if kind == "categorical" else is_finite(value)
            value = wanted.ifelse(value, ibis.null("float64"))
        answers["filled"] = value.count()
        if kind == "boolean":
            answers["true"] = value.sum()
        if kind in ("numeric", "time", "text"):
            answers |= {"mean": value.mean(), "std": value.std(how="sample"), "low": value.min(), "high": value.max()}
        if within is not None:
            low, high = (ibis.literal(bound, "float64") for bound in within)
            answers |= {"below": (value < low).sum(), "above": (value > high).sum()}
        return answers

    def _finished(self, name: str, kind: Kind, answers: dict[str, Any]) -> Facts:
        filled = int(answers["filled"])
        infinite = 0 if kind == "categorical" else int(answers.get("infinite") or 0)
        missing = self.rows - filled - infinite
        unread = int(answers["raw"]) - filled - infinite if "raw" in answers else 0
        if not filled or "mean" not in answers:
            return Facts(missing, unread, infinite, true=int(answers.get("true") or 0))
        mean, std, low, high = (_real(answers[key]) for key in ("mean", "std", "low", "high"))
        if not (math.isfinite(mean) and (filled < 2 or math.isfinite(std))):
            mean, std = self._rescaled(name, kind, max(abs(low), abs(high)))
        outside = (int(answers.get(key) or 0) for key in ("below", "above"))
        return Facts(missing, unread, infinite, mean, std if filled > 1 else None, low, high, *outside)

    def _rescaled(self, name: str, kind: Kind, unit: float) -> tuple[float, float]:
        """Mean and standard deviation of values whose squares are no float64 any more, in units of the largest."""
        import ibis

        value = number(column_of(self.table, name), self.types[name].base, kind)
        value = is_finite(value).ifelse(value, ibis.null("float64")) / ibis.literal(unit, "float64")
        found = _run(self.name, self.table.aggregate(mean=value.mean(), std=value.std(how="sample")))
        return _real(found["mean"][0].as_py()) * unit, _real(found["std"][0].as_py()) * unit


_ANSWERS: Final = ("raw", "infinite", "filled", "true", "mean", "std", "low", "high", "below", "above")


def _column(base: Base | None, reading: Reading, texts: Any, numbers: Any) -> Any:
    """One sampled column out of what the engine sent, one column at a time so that no two are held twice."""
    if texts is not None:
        if numbers is not None:
            distinct = texts.combine_chunks().unique() if texts.num_chunks else texts.unique()
            if not is_categorical(len(distinct) - distinct.null_count, len(texts)):
                return _floats(numbers)
        held = from_arrow(texts)
        return held.data if isinstance(held.data, Coded) else Coded(np.full(len(texts), -1, np.int64), [])
    values = _floats(numbers)
    if reading in ("string", "categorical"):
        return drawn(Held(Declared(base, ""), values), "categorical", np.arange(len(values)))
    return values


def _floats(column: Any) -> Any:
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _real(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _run(name: str, expression: Any) -> Any:
    """The answer as a pyarrow table."""
    try:
        return expression.to_pyarrow()
    except Exception as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
    return DataError(f"{name}: cannot be read: {reason}. Mend the table, or export it again.")
