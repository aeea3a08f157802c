"""What is known of the two sides of a comparison: exact facts of all rows, and a bounded random sample of them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Column", "Kind", "Schema", "Side"]

Kind: TypeAlias = Literal["numeric", "categorical", "boolean", "time", "text"]
"""How a column is read: numbers, categories, truth values, instants (seconds), or free text (by its length)."""


@dataclass(frozen=True, eq=False)
class Column:
    """One column of one side.

    Attributes:
        name: The column's name in the source.
        kind: How it is read. Of free text the values are its lengths in characters; those of a time are seconds since
            1970-01-01 UTC (a time without a zone is taken as UTC).
        rows: Rows of this side, all of them.
        missing: Rows that are null or NaN, of all rows.
        infinite: Rows that are +∞ or -∞, of all rows.
        mean: Of the finite values of all rows; None for categories and truth values, and where there are none.
        std: Unbiased standard deviation of the finite values of all rows; None where there are fewer than two.
        minimum: Least finite value of all rows, or None.
        maximum: Greatest finite value of all rows, or None.
        below: Finite values of this side under the reference's minimum, of all rows; 0 for the reference itself.
        above: The same above the reference's maximum.
        counts: Rows per category, exact, of all rows; None where the column has no categories. The same keys in both
            sides, at most `MAX_CATEGORIES`: those whose shares of the two sides add up to most, in that order. For
            truth values "false" and "true".
        other: Rows in categories beyond those, exact.
        distinct: Number of categories among all rows; None where the column has none.
        values: (n,) the sample. Finite values, ±∞ kept, NaN where missing; for categories and truth values the
            position in `counts`, or its length for any other category.
    """

    name: str
    kind: Kind
    rows: int
    missing: int
    infinite: int
    mean: float | None
    std: float | None
    minimum: float | None
    maximum: float | None
    below: int
    above: int
    counts: dict[str, int] | None
    other: int
    distinct: int | None
    values: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two sources.

    Attributes:
        name: What the source is called in reports, e.g. "train.parquet".
        rows: All rows.
        sampled: n, the rows of the sample; equal to `rows` where nothing had to be left out.
        columns: The columns that both sides have, in the reference's order.
        row_numbers: (n,) positions of the sampled rows in the source's order; None where that is not known.
    """

    name: str
    rows: int
    sampled: int
    columns: dict[str, Column]
    row_numbers: NDArray[np.int64] | None


@dataclass(frozen=True)
class Schema:
    """What differs between the columns of the two sides, said and not compared.

    Attributes:
        only_reference: Columns that the current side lacks.
        only_current: Columns that the reference lacks.
        retyped: (name, type in the reference, type in the current side) of columns that are not of one sort, such as
            numbers here and text there. They are compared where both can be read as numbers, else left out.
        left_out: (name, why) of columns in both sides that are not compared.
    """

    only_reference: tuple[str, ...]
    only_current: tuple[str, ...]
    retyped: tuple[tuple[str, str, str], ...]
    left_out: tuple[tuple[str, str], ...]
