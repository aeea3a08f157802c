"""Two sources in, two sides out: exact facts of all rows by bounded passes, and a bounded random sample of rows."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steadynorm.errors import ArgumentError, DataError
from steadynorm.progress import tracked
from steadynorm.shift.reading.frames import Coded, Facts, Frame, Reading, Sample
from steadynorm.shift.reading.matching import match
from steadynorm.shift.reading.sides import Column, Kind, Schema, Side
from steadynorm.shift.reading.sources import Source, opened

__all__ = ["MAX_CATEGORIES", "Column", "Kind", "Schema", "Side", "scan"]

MAX_CATEGORIES: Final = 1_000
"""Most categories of a column that are counted one by one; the others are counted together."""

_CANDIDATES: Final = 4

MAX_SAMPLED_VALUES: Final = 50_000_000
"""Most values (rows times columns) in a side's sample: 400 MB."""

_Floats: TypeAlias = NDArray[np.float64]


def scan(
    reference: Source,
    current: Source,
    *,
    types: Mapping[str, Kind] | None = None,
    columns: Sequence[str] | None = None,
    sample: int = 200_000,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Side, Side, Schema]:
    """Reads two sources: aggregates of all rows, and a random sample of rows for all else.

    Columns are read by their type: truth values as boolean, integers, floats and decimals as numeric, dates and
    timestamps as time (those with a zone in UTC; those without are taken as UTC), text as categorical if the sampled
    rows of the reference hold at most max(50, 1 % of them) distinct ones, else as free text. Text that spells numbers
    stays text. `types` overrides: what cannot be read as asked then counts as missing. Categories are told apart by
    their first 128 characters, numbers as categories as float64.

    Args:
        reference: What the model knows, see `sources`.
        current: What it gets now.
        types: How to read columns by name: "numeric", "categorical", "boolean", "time" or "text".
        columns: The only columns to compare; by default all that both sides have.
        sample: Most rows of a side in its sample, >= 1. With more than 250 columns fewer rows are drawn: 50 million
            values at most.
        seed: Of the sample. The same seed draws the same rows from memory, from files and from DuckDB; other engines
            may draw others.
        progress: Shows a bar on the standard error.

    Returns:
        The reference side, the current side, and what differs between their columns.

    Raises:
        DataError: A source is not there, is damaged, or has no rows; or no column can be compared.
        ArgumentError: Something that is no source, or an unknown name or type in `types` or `columns`.
        MissingDependencyError: A table that is not in memory, without the extra `tables`.

    Example:
        >>> old, new, _ = scan({"x": [1.0, 2.0, 3.0], "c": ["a", "b", "b"]}, {"x": [2.0, 9.0], "c": ["b", "z"]})
        >>> new.columns["x"].above, new.columns["x"].mean, new.columns["c"].counts
        (1, 5.5, {'b': 1, 'a': 0, 'z': 1})
    """
    if sample < 1:
        raise ArgumentError(f"sample must be at least 1 row, got {sample}.")
    with ExitStack() as stack:
        first = opened(reference, "reference", stack, seed=seed, progress=progress)
        second = opened(current, "current", stack, seed=seed, progress=progress)
        for frame in (first, second):
            if not frame.rows:
                raise DataError(f"{frame.name}: rows are required, got none. Check how the table was written.")
        plan = match(first, second, types, columns)
        size = max(1, min(sample, MAX_SAMPLED_VALUES // len(plan.readings)))
        drawn = _sampled(first, second, plan.readings, size, seed, progress)
        kinds = _kinds(plan.readings, drawn)
        facts = _facts(first, second, kinds, progress)
        left_out = _unread(plan.strict, kinds, facts)
        pairs: dict[str, tuple[Column, Column]] = {}
        for name in tracked([name for name in kinds if name not in left_out], "counting", show=progress):
            pairs[name] = _columns(name, kinds[name], (first, second), (facts[0][name], facts[1][name]), drawn)
    if not pairs:
        raise DataError(
            f"no column is left to compare: {'; '.join(f'{name!r}: {why}' for name, why in left_out.items())}."
        )
    schema = replace(plan.schema, left_out=plan.schema.left_out + tuple(left_out.items()))
    names = [first.name, second.name]
    if names[0] == names[1]:
        names = [f"{names[0]} (reference)", f"{names[1]} (current)"]
    sides = tuple(
        Side(names[i], frame.rows, part.size, {name: pair[i] for name, pair in pairs.items()}, part.row_numbers)
        for i, (frame, part) in enumerate(zip((first, second), drawn, strict=True))
    )
    return sides[0], sides[1], schema


def _sampled(
    first: Frame, second: Frame, readings: Mapping[str, Reading], size: int, seed: int, progress: bool
) -> tuple[Sample, Sample]:
    """The reference's sample says which text is categories; where that has no text, the current side's does."""
    turns = iter(tracked((first, second), "sampling", show=progress))
    reference = next(turns).sample(readings, size, seed)
    settled: dict[str, Reading] = {
        name: reading if reading != "string" or not _told(reference.columns[name]) else _kind(reference.columns[name])
        for name, reading in readings.items()
    }
    current = next(turns).sample(settled, size, seed + 1)
    next(turns, None)
    return reference, current


def _told(drawn: _Floats | Coded) -> bool:
    return not isinstance(drawn, Coded) or bool(drawn.texts)


def _kind(drawn: _Floats | Coded) -> Kind:
    return "categorical" if isinstance(drawn, Coded) else "text"


def _kinds(readings: Mapping[str, Reading], drawn: tuple[Sample, Sample]) -> dict[str, Kind]:
    kinds: dict[str, Kind] = {}
    for name, reading in readings.items():
        deciding = drawn[0] if _told(drawn[0].columns[name]) else drawn[1]
        kinds[name] = _kind(deciding.columns[name]) if reading == "string" else reading
    return kinds


def _facts(first: Frame, second: Frame, kinds: Mapping[str, Kind], progress: bool) -> tuple[dict[str, Facts], ...]:
    found: list[dict[str, Facts]] = []
    for frame in tracked((first, second), "aggregating", show=progress):
        known = found[0] if found else {}
        found.append(frame.facts(kinds, {name: _range(known.get(name)) for name in kinds}))
    return tuple(found)


def _range(facts: Facts | None) -> tuple[float, float] | None:
    return None if facts is None or facts.minimum is None or facts.maximum is None else (facts.minimum, facts.maximum)


def _unread(strict: frozenset[str], kinds: Mapping[str, Kind], facts: tuple[dict[str, Facts], ...]) -> dict[str, str]:
    """Columns that are text in one side and in part not what the other side has."""
    reasons: dict[str, str] = {}
    for name in strict:
        unread = sum(side[name].unread for side in facts)
        if unread:
            what = "truth values" if kinds[name] == "boolean" else "numbers"
            reasons[name] = f"text in one side only, and {unread:,} of its values are no {what}"
    return reasons


def _columns(
    name: str, kind: Kind, frames: tuple[Frame, Frame], facts: tuple[Facts, Facts], drawn: tuple[Sample, Sample]
) -> tuple[Column, Column]:
    counts: list[dict[str, int] | None] = [None, None]
    distinct: list[int | None] = [None, None]
    if kind == "boolean":
        pairs = [{"false": f.rows - g.missing - g.true, "true": g.true} for f, g in zip(frames, facts, strict=True)]
        counts, distinct = [*pairs], [sum(map(bool, pair.values())) for pair in pairs]
    elif kind == "categorical":
        counts, distinct = _counted(name, frames)
    columns: list[Column] = []
    for i, (frame, fact) in enumerate(zip(frames, facts, strict=True)):
        told = counts[i]
        columns.append(
            Column(
                name, kind, frame.rows, fact.missing, fact.infinite, fact.mean, fact.std, fact.minimum, fact.maximum,
                fact.below, fact.above, told, 0 if told is None else frame.rows - fact.missing - sum(told.values()),
                distinct[i], _values(drawn[i].columns[name], kind, told, drawn[i].size),
            )
        )  # fmt: skip
    return columns[0], columns[1]


def _counted(name: str, frames: tuple[Frame, Frame]) -> tuple[list[dict[str, int] | None], list[int | None]]:
    """Exact counts of the most frequent categories of both sides together, and how many there are.

    Chosen by their rows on both sides together, whichever they are on: a choice by the sides' shares would favour what
    one side has by chance. More candidates are looked at than kept, since each side names its own most frequent ones.
    """
    found = [frame.largest(name, _CANDIDATES * MAX_CATEGORIES) for frame in frames]
    for i, frame in enumerate(frames):
        mine, distinct = found[i]
        absent = [text for text in found[1 - i][0] if text not in mine]
        if distinct > len(mine) and absent:
            found[i] = mine | frame.counts_of(name, absent), distinct
    rows = {text: sum(counts.get(text, 0) for counts, _ in found) for text in {**found[0][0], **found[1][0]}}
    largest = sorted(rows, key=lambda text: (-rows[text], text))[:MAX_CATEGORIES]
    return [{text: counts.get(text, 0) for text in largest} for counts, _ in found], [n for _, n in found]


def _values(drawn: _Floats | Coded, kind: Kind, counts: dict[str, int] | None, size: int) -> _Floats:
    if not isinstance(drawn, Coded):
        return drawn
    if kind == "text" or counts is None:  # no text in this side's sample at all
        return np.full(size, np.nan)
    places = {text: float(i) for i, text in enumerate(counts)}
    found = [places.get(text, float(len(places))) for text in drawn.texts]
    return np.array([*found, np.nan], dtype=np.float64)[drawn.codes]
