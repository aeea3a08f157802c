"""Columns as expressions of Ibis: the same numbers and texts from every engine."""

import math
from typing import Any, Final

from steadynorm.shift.reading.frames import LONGEST_CATEGORY, Base, Declared, Reading
from steadynorm.shift.reading.sides import Kind

__all__ = [
    "OWN",
    "column_of",
    "declared",
    "is_finite",
    "is_infinite",
    "is_number",
    "number",
    "prefix",
    "sampled",
    "sampled_rows",
]

OWN: Final[dict[Base | None, Kind]] = {
    "numeric": "numeric",
    "boolean": "boolean",
    "time": "time",
    "string": "categorical",
    "empty": "numeric",
    None: "numeric",
}
"""How a column is read as numbers where nothing else is asked for; text never is."""


def column_of(table: Any, name: str) -> Any:
    """A column; UUIDs as text."""
    column = table[name]
    return column.cast("string") if column.type().is_uuid() else column


def sampled(column: Any, base: Base | None, reading: Reading) -> dict[str, Any]:
    """What to draw of a column: numbers, or texts, or both where only the sample will tell."""
    if reading in ("string", "categorical") and base == "string":
        lengths = {"number": column.length().cast("float64")} if reading == "string" else {}
        return {"text": prefix(column), **lengths}
    return {"number": number(column, base, OWN[base] if reading in ("string", "categorical") else reading)}


def number(column: Any, base: Base | None, kind: Reading) -> Any:
    """A column as float64: null where it is null or cannot be read so."""
    import ibis

    if base == "empty":
        return ibis.null("float64")
    if kind == "text":
        return column.length().cast("float64")
    if base == "string":
        if kind == "boolean":
            return column.try_cast("boolean").cast("int8").cast("float64")
        # With a zone, or else "+02:00" would be dropped; where there is none, it is the connection's, which is UTC.
        moments = column.try_cast("timestamp('UTC')").cast("timestamp")
        return _seconds(moments) if kind == "time" else column.try_cast("float64")
    if base == "time":
        return _seconds(column.cast("timestamp") if column.type().is_date() else column)
    if base == "boolean":
        return column.cast("int8").cast("float64")
    if kind == "boolean":
        truth = (column != 0).cast("int8").cast("float64")
        return is_number(column).ifelse(truth, ibis.null("float64")) if column.type().is_floating() else truth
    return column.cast("float64")


def is_finite(value: Any) -> Any:
    """False for NaN and ±∞, null for null."""
    # Not by isnan, which DuckDB takes to be false on Parquet files whose statistics name no NaN: by the format none do.
    return (value - value) == 0


def is_infinite(value: Any) -> Any:
    """True for ±∞, null for null."""
    import ibis

    # Not by isinf, which Ibis translates for Spark into a constant.
    return (value == ibis.literal(math.inf, "float64")) | (value == ibis.literal(-math.inf, "float64"))


def is_number(value: Any) -> Any:
    """False for NaN, null for null."""
    return is_finite(value) | is_infinite(value)


def _seconds(times: Any) -> Any:
    from ibis.common.exceptions import IbisError

    whole = times.epoch_seconds().cast("float64").floor()
    rest = times.microsecond().cast("float64") / 1e6
    try:
        rest.compile()
    except IbisError:  # some engines, such as Spark, have whole seconds only
        return whole
    return whole + rest


def prefix(column: Any) -> Any:
    """What categories are told apart by."""
    return column.substr(0, LONGEST_CATEGORY)


def declared(dtype: Any) -> Declared:
    """What a column of this type of Ibis holds."""
    spelled = str(dtype).removeprefix("!")
    if dtype.is_null() or (dtype.is_unknown() and "NULL" in spelled):
        return Declared("empty", "null")
    if dtype.is_boolean():
        return Declared("boolean", spelled)
    if dtype.is_numeric():
        return Declared("numeric", spelled)
    if dtype.is_date() or dtype.is_timestamp():
        return Declared("time", spelled)
    return Declared("string" if dtype.is_string() or dtype.is_uuid() else None, spelled)


def sampled_rows(table: Any, fraction: float, seed: int) -> Any:
    """A Bernoulli sample of the rows, with this seed where the engine takes one."""
    from ibis.common.exceptions import IbisError

    seeded = table.sample(fraction, method="row", seed=seed)
    try:
        seeded.compile()
    except IbisError:
        return table.sample(fraction, method="row")
    return seeded
