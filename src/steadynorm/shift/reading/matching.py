"""Which columns of two sources can be compared, and how each is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, get_args

from steadynorm.errors import ArgumentError, DataError
from steadynorm.shift.reading.frames import Base, Declared, Frame, Reading
from steadynorm.shift.reading.sides import Kind, Schema

__all__ = ["Plan", "match"]

_SAME: Final[dict[Base, Reading]] = {
    "numeric": "numeric",
    "boolean": "boolean",
    "time": "time",
    "string": "string",
    "empty": "numeric",
}
# Two sorts that can both be read as numbers, text if it says nothing but such; any other pair is left out.
_BOTH: Final[dict[frozenset[Base], Reading]] = {
    frozenset[Base](("numeric", "boolean")): "numeric",
    frozenset[Base](("numeric", "string")): "numeric",
    frozenset[Base](("boolean", "string")): "boolean",
}
_FROM: Final[dict[Kind, frozenset[Base]]] = {
    "numeric": frozenset(("numeric", "boolean", "time", "string", "empty")),
    "boolean": frozenset(("boolean", "numeric", "string", "empty")),
    "time": frozenset(("time", "numeric", "string", "empty")),
    "categorical": frozenset(("numeric", "boolean", "time", "string", "empty")),
    "text": frozenset(("string", "empty")),
}


@dataclass(frozen=True)
class Plan:
    """How the columns are read.

    Attributes:
        readings: By column, in the reference's order.
        strict: Columns that are text in one source only: left out where some of it cannot be read as the other.
        schema: What differs, as far as the types tell.
    """

    readings: Mapping[str, Reading]
    strict: frozenset[str]
    schema: Schema


def match(
    reference: Frame, current: Frame, types: Mapping[str, Kind] | None = None, columns: Sequence[str] | None = None
) -> Plan:
    """Decides for every column whether it is compared and how.

    Args:
        reference: One source.
        current: The other.
        types: How to read columns, where their type should not decide.
        columns: The only columns to compare; by default all.

    Returns:
        The plan.

    Raises:
        ArgumentError: A name that neither source has, an unknown type, or one that the column cannot be read as.
        DataError: No column is left to compare.
    """
    if isinstance(columns, str):
        raise ArgumentError(f"columns= must be a list of names, got the text {columns!r}. Give [{columns!r}].")
    asked: Mapping[str, Kind] = types or {}
    only = None if columns is None else list(dict.fromkeys(columns))
    known = list(dict.fromkeys([*reference.types, *current.types]))
    _check_names("types=", list(asked), known)
    _check_names("columns=", only or [], known)
    for name, kind in asked.items():
        if kind not in get_args(Kind):
            raise ArgumentError(
                f"types= must be one of {', '.join(get_args(Kind))} for each column, got {kind!r} for {name!r}."
            )
    wanted = [name for name in known if only is None or name in only]
    readings: dict[str, Reading] = {}
    strict: set[str] = set()
    retyped: list[tuple[str, str, str]] = []
    left_out: list[tuple[str, str]] = []
    for name in (name for name in wanted if name in reference.types and name in current.types):
        pair = reference.types[name], current.types[name]
        first, second = pair[0].base, pair[1].base
        different = first != second and "empty" not in (first, second) and None not in (first, second)
        if different:
            retyped.append((name, pair[0].spelled, pair[1].spelled))
        reading = _asked(name, asked[name], pair) if name in asked else _by_type(first, second)
        if reading is not None:
            readings[name] = reading
            if different and "string" in (first, second) and name not in asked:
                strict.add(name)
        elif None in (first, second):
            nested = (pair[0] if first is None else pair[1]).spelled
            left_out.append((name, f"values of type {nested} are not compared: turn them into columns of plain ones"))
        else:
            left_out.append((name, f"{pair[0].spelled} in the reference, {pair[1].spelled} in the current side"))
    schema = Schema(
        tuple(name for name in wanted if name not in current.types),
        tuple(name for name in wanted if name not in reference.types),
        tuple(retyped),
        tuple(left_out),
    )
    if not readings:
        raise DataError(_nothing(reference, current, schema))
    return Plan(readings, frozenset(strict), schema)


def _by_type(first: Base | None, second: Base | None) -> Reading | None:
    if first is None or second is None:
        return None
    if first == second or second == "empty":
        return _SAME[first]
    return _SAME[second] if first == "empty" else _BOTH.get(frozenset((first, second)))


def _asked(name: str, kind: Kind, pair: tuple[Declared, Declared]) -> Kind:
    for declared in pair:
        if declared.base not in _FROM[kind]:
            raise ArgumentError(
                f"types=: column {name!r} of type {declared.spelled} cannot be read as {kind}. "
                "Give another type, or leave the column out by columns=."
            )
    return kind


def _check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(f"{argument} names {_some(unknown)}, which neither side has. The columns: {_some(known)}.")


def _nothing(reference: Frame, current: Frame, schema: Schema) -> str:
    if schema.left_out:
        name, why = schema.left_out[0]
        return f"no column is left to compare: {len(schema.left_out)} left out, e.g. {name!r}: {why}."
    return (
        f"the two sides have no column in common: {reference.name} has {_some(list(reference.types))}; "
        f"{current.name} has {_some(list(current.types))}. Rename the columns of one of them."
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)[:80]) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
