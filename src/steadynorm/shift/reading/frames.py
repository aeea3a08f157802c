"""What the scan asks of a source, wherever its rows are: in memory (`arrays`) or in a database engine (`engine`)."""

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from steadynorm.shift.reading.sides import Kind

__all__ = ["Base", "Coded", "Declared", "Facts", "Frame", "Reading", "Sample", "is_categorical", "key_of", "text_of"]

Base: TypeAlias = Literal["numeric", "boolean", "time", "string", "empty"]
"""What a column holds by its type in the source; "empty" is a column of nulls without a type."""

Reading: TypeAlias = Kind | Literal["string"]
"""How to sample a column; "string" leaves it to the sample whether it is categories or free text."""

LONGEST_CATEGORY: Final = 128
"""Characters by which categories are told apart: a bound on the memory that a sample takes."""

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True)
class Declared:
    """A column's type in its source: what it holds (None: nothing that can be compared), and the source's own word."""

    base: Base | None
    spelled: str


@dataclass(frozen=True, eq=False)
class Coded:
    """A column of categories: (n,) positions in `texts`, -1 where missing."""

    codes: NDArray[np.int64]
    texts: list[str]


@dataclass(frozen=True, eq=False)
class Sample:
    """Sampled rows: numbers (lengths, where a column turned out to be free text) or codes, by column."""

    size: int
    columns: dict[str, NDArray[np.float64] | Coded]
    row_numbers: NDArray[np.int64] | None


@dataclass(frozen=True)
class Facts:
    """Aggregates of all rows of one column, see `sides.Column`; `unread` of the missing could not be read as asked, and
    `true` counts truth values."""

    missing: int
    unread: int = 0
    infinite: int = 0
    mean: float | None = None
    std: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    below: int = 0
    above: int = 0
    true: int = 0


class Frame(Protocol):
    """Named columns of equally many rows."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def rows(self) -> int:
        """All rows."""
        ...

    @property
    def types(self) -> Mapping[str, Declared]:
        """The columns, in order."""
        ...

    def sample(self, readings: Mapping[str, Reading], size: int, seed: int) -> Sample:
        """At most `size` rows, each equally likely."""
        ...

    def facts(self, readings: Mapping[str, Kind], ranges: Mapping[str, tuple[float, float] | None]) -> dict[str, Facts]:
        """Aggregates of all rows; `below` and `above` where a range is given."""
        ...

    def largest(self, name: str, top: int) -> tuple[dict[str, int], int]:
        """The `top` most frequent categories with their rows, and the number of categories."""
        ...

    def counts_of(self, name: str, texts: Iterable[str]) -> dict[str, int]:
        """The rows in each of these categories; categories without rows may be absent."""
        ...


def is_categorical(distinct: int, rows: int) -> bool:
    """Whether text of so many distinct values in so many sampled rows is categories: at most max(50, 1 % of rows).

    Example:
        >>> is_categorical(50, 100), is_categorical(51, 100), is_categorical(900, 100_000)
        (True, False, True)
    """
    return distinct <= max(50, rows // 100)


def text_of(value: object, base: Base) -> str:
    """A category as text, the same from every engine: 3 and 3.0 are "3", instants are ISO 8601 in UTC.

    Example:
        >>> text_of(3.0, "numeric"), text_of(1, "boolean"), text_of(86_400, "time")
        ('3', 'true', '1970-01-02T00:00:00+00:00')
    """
    if isinstance(value, str):
        return value[:LONGEST_CATEGORY]
    number = float(value)  # pyright: ignore[reportArgumentType]
    if base == "boolean":
        return "true" if number else "false"
    if base == "time":
        try:
            return (_EPOCH + datetime.timedelta(seconds=number)).isoformat()
        except OverflowError:  # beyond the year 9999
            return f"{number:g} s"
    return str(int(number)) if math.isfinite(number) and number == int(number) else repr(number)


def key_of(text: str, base: Base) -> str | float | None:
    """The inverse of `text_of`: what to look for in a column that holds `base`; None for what it cannot hold.

    Example:
        >>> key_of("3", "numeric"), key_of("3", "string"), key_of("red", "numeric"), key_of("true", "boolean")
        (3.0, '3', None, 1.0)
    """
    if base == "boolean":
        return {"false": 0.0, "true": 1.0}.get(text)
    try:
        if base == "numeric":
            return float(text)
        if base == "time":
            return (datetime.datetime.fromisoformat(text) - _EPOCH).total_seconds()
    except (ValueError, TypeError):
        return None
    return text if base == "string" else None
