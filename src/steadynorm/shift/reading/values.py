"""A column in memory, from whatever holds it: numpy arrays, lists, pandas Series, Arrow arrays."""

import datetime
import decimal
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.reading.frames import LONGEST_CATEGORY, Base, Coded, Declared

__all__ = ["Held", "from_array", "from_arrow", "from_objects", "from_series", "seconds_of"]

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_NULLS: Final = frozenset(("NoneType", "NAType", "NaTType"))


@dataclass(frozen=True, eq=False)
class Held:
    """A column in memory.

    Attributes:
        declared: What it holds.
        data: (n,) real numbers or truth values, NaN where missing; seconds, for times; codes, for text; None where it
            cannot be compared.
        lengths: Of each text of `data`, in characters (before they are cut to the longest category).
    """

    declared: Declared
    data: NDArray[Any] | Coded | None
    lengths: NDArray[np.float64] | None = None


def from_array(values: NDArray[Any]) -> Held:
    """From a 1-d numpy array of any dtype, masked or not."""
    spelled = str(values.dtype)
    mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
    plain: NDArray[Any] = np.ma.getdata(values)
    if plain.dtype.kind == "O":
        return from_objects([None if mask is not None and mask[i] else v for i, v in enumerate(plain.tolist())])
    if plain.dtype.kind == "U":
        texts, codes = np.unique(plain, return_inverse=True)
        return _coded(codes.astype(np.int64).reshape(-1), texts.tolist(), mask, spelled)
    if plain.dtype.kind == "M":
        return Held(Declared("time", spelled), _masked(seconds_of(plain), mask))
    if plain.dtype.kind not in "biuf":
        return Held(Declared(None, spelled), None)
    return Held(Declared("boolean" if plain.dtype.kind == "b" else "numeric", spelled), _masked(plain, mask))


def from_objects(values: Sequence[Any]) -> Held:
    """From Python objects: one sort of them throughout, besides None and NaN."""
    present = {kind for kind in set(map(type, values)) if kind.__name__ not in _NULLS}
    spelled = " and ".join(sorted(kind.__name__ for kind in present)) or "null"
    if any(issubclass(kind, str) for kind in present):
        present.discard(float)  # NaN among text is how pandas says missing
        if not all(issubclass(kind, str) for kind in present) or any(isinstance(v, float) and v == v for v in values):
            return Held(Declared(None, f"a mix of {spelled}"), None)
        order: dict[str, int] = {}
        codes = np.fromiter(
            (order.setdefault(v, len(order)) if isinstance(v, str) else -1 for v in values), np.int64, len(values)
        )
        return _coded(codes, list(order), None, "string")
    base = _base_of(present)
    if base is None:
        return Held(Declared(None, f"a mix of {spelled}" if len(present) > 1 else spelled), None)
    convert = _seconds if base == "time" else float
    try:
        data = np.fromiter(
            (np.nan if type(v).__name__ in _NULLS else convert(v) for v in values), np.float64, len(values)
        )
    except (OverflowError, ValueError, TypeError):
        return Held(Declared(None, f"{spelled} beyond what a float64 holds"), None)
    return Held(Declared(base, spelled), data)


def from_series(series: Any) -> Held:
    """From a pandas Series: times with a zone become UTC, its categories and strings become codes."""
    dtype = series.dtype
    spelled = str(dtype)
    if spelled.startswith("datetime64[") and hasattr(dtype, "tz"):
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    if isinstance(series.dtype, np.dtype):
        held = from_array(series.to_numpy())
    elif spelled == "category":
        kinds = from_objects(series.cat.categories.tolist())
        codes = series.cat.codes.to_numpy().astype(np.int64)
        held = _spread(kinds, codes)
    else:
        held = from_objects(series.astype(object).where(series.notna(), None).tolist())
    return Held(Declared(held.declared.base, spelled), held.data, held.lengths)


def from_arrow(column: Any) -> Held:
    """From a pyarrow Array or ChunkedArray."""
    import pyarrow as pa

    kind, spelled = column.type, str(column.type)
    if pa.types.is_null(kind):
        return Held(Declared("empty", "null"), np.full(len(column), np.nan))
    if pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type):  # which pyarrow cannot decode
        parts = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        decoded = [part.dictionary.cast(pa.large_string()).take(part.indices) for part in parts]
        column, kind = pa.chunked_array(decoded, type=pa.large_string()), pa.large_string()
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_boolean(kind):
        return Held(Declared("boolean", spelled), _doubles(column.cast(pa.uint8()).cast(pa.float64())))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Held(Declared("numeric", spelled), _doubles(column.cast(pa.float64(), safe=False)))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        micro = column.cast(pa.timestamp("us", tz=getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return Held(Declared("time", spelled), _doubles(micro.cast(pa.float64(), safe=False)) / 1e6)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        codes, texts = _encoded(column)
        return _coded(codes, texts, None, spelled)
    return Held(Declared(None, spelled), None)


def seconds_of(times: NDArray[Any]) -> NDArray[np.float64]:
    """datetime64 of any unit as seconds since 1970-01-01, NaT as NaN.

    Example:
        >>> seconds_of(np.array(["1970-01-02", "NaT"], dtype="datetime64[D]"))
        array([86400.,    nan])
    """
    whole = times.astype("datetime64[s]")
    rest = (times - whole) / np.timedelta64(1, "s") if np.datetime_data(times.dtype)[0] not in "YM" else 0.0
    return np.where(np.isnat(times), np.nan, whole.astype(np.int64).astype(np.float64) + rest)


def _coded(codes: NDArray[np.int64], texts: list[str], mask: NDArray[np.bool_] | None, spelled: str) -> Held:
    lengths = np.array([len(text) for text in texts], dtype=np.float64)
    codes = codes if mask is None else np.where(mask, -1, codes)
    if any(len(text) > LONGEST_CATEGORY for text in texts):
        order: dict[str, int] = {}
        renamed = np.array([order.setdefault(text[:LONGEST_CATEGORY], len(order)) for text in texts], dtype=np.int64)
        full = lengths[codes] if len(lengths) else np.zeros(len(codes))
        full = np.where(codes < 0, np.nan, full)
        return Held(Declared("string", spelled), Coded(np.where(codes < 0, -1, renamed[codes]), list(order)), full)
    full = np.where(codes < 0, np.nan, lengths[codes]) if len(lengths) else np.full(len(codes), np.nan)
    return Held(Declared("string", spelled), Coded(codes, texts), full)


def _spread(kinds: Held, codes: NDArray[np.int64]) -> Held:
    """A column of codes (-1 where missing) into the values `kinds`."""
    if kinds.data is None:
        return kinds
    if isinstance(kinds.data, Coded):
        positions = np.append(kinds.data.codes, -1)[codes]
        lengths = None if kinds.lengths is None else np.append(kinds.lengths, np.nan)[codes]
        return Held(kinds.declared, Coded(positions, kinds.data.texts), lengths)
    return Held(kinds.declared, np.append(kinds.data.astype(np.float64), np.nan)[codes])


def _base_of(present: set[type]) -> Base | None:
    if not present:
        return "empty"
    if all(issubclass(kind, bool | np.bool_) for kind in present):
        return "boolean"
    if all(issubclass(kind, numbers.Real | decimal.Decimal | np.bool_) for kind in present):
        return "numeric"
    if all(issubclass(kind, datetime.date | np.datetime64) for kind in present):
        return "time"
    return None


def _seconds(value: Any) -> float:
    if isinstance(value, np.datetime64):
        return float(seconds_of(np.array(value)))
    moment = value if isinstance(value, datetime.datetime) else datetime.datetime(value.year, value.month, value.day)
    return (moment.replace(tzinfo=moment.tzinfo or datetime.UTC) - _EPOCH).total_seconds()


def _masked(data: NDArray[Any], mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    return data if mask is None or not mask.any() else np.where(mask, np.nan, data.astype(np.float64))


def _doubles(column: Any) -> NDArray[np.float64]:
    """Nulls as NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


def _encoded(column: Any) -> tuple[NDArray[np.int64], list[str]]:
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(whole, pa.ChunkedArray):  # too long for one array, or without any chunk
        whole = pa.chunked_array(whole.chunks, type=whole.type).cast(pa.large_string()).combine_chunks()
    whole = whole.dictionary_encode()
    return whole.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), whole.dictionary.to_pylist()
