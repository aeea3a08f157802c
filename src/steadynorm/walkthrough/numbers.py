"""What a user passes as numbers, as exact rationals."""

from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final, TypeAlias

from steadynorm.errors import ArgumentError, ShapeError

__all__ = ["Number", "as_columns", "as_number", "per_feature"]

Number: TypeAlias = int | float | str | Decimal

_LARGEST_POWER: Final = 400  # beyond any double; keeps a slip of the pen from filling the memory


def as_number(value: Any, what: str) -> Fraction:
    """The exact value of a number as it is written: 0.1 is one tenth."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError, TypeError):
            raise ArgumentError(f"{what} must be one number, got {value!r:.60}.") from None
    text = repr(value) if isinstance(value, float) else str(value).strip()
    try:
        decimal = Decimal(text)
    except InvalidOperation:
        raise ArgumentError(f"{what} must be a number, got {text[:60]!r}.") from None
    if not decimal.is_finite():
        raise ArgumentError(
            f"{what} must be finite, got {text}. A batch with such a value has no mean and no variance."
        )
    if (decimal and abs(decimal.adjusted()) > _LARGEST_POWER) or len(text) > 2 * _LARGEST_POWER:
        raise ArgumentError(
            f"{what} must be 0 or between 1e-{_LARGEST_POWER} and 1e{_LARGEST_POWER} in size, got {text[:60]}."
        )
    return Fraction(decimal)


def as_columns(values: Any) -> list[list[Fraction]]:
    """The batch by features: one column for a list of numbers, else one per entry of a row."""
    rows = _listed(values, "values")
    if not any(_is_row(row) for row in rows):
        return [[as_number(x, f"value {i}") for i, x in enumerate(rows, start=1)]]
    listed = [_listed(row, f"row {i}") for i, row in enumerate(rows, start=1)]
    for i, row in enumerate(listed, start=1):
        if len(row) != len(listed[0]):
            raise ShapeError(
                f"every row must have one number per feature: row 1 has {len(listed[0])}, row {i} has {len(row)}."
            )
    if not listed[0]:
        raise ShapeError("the rows are empty: each must hold one number per feature.")
    numbers = [[as_number(x, f"row {i}, feature {j}") for j, x in enumerate(r, 1)] for i, r in enumerate(listed, 1)]
    return [list(column) for column in zip(*numbers, strict=True)]


def _is_row(value: Any) -> bool:
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0 and not isinstance(value, str | bytes)


def _listed(value: Any, what: str) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ArgumentError(f"{what} must be a list of numbers, or of rows of numbers, got {value!r:.60}.")
    return list(value)


def per_feature(value: Any, what: str, features: int) -> list[Fraction]:
    """One number for all features, or one for each."""
    if not _is_row(value):
        return [as_number(value, what)] * features
    numbers = [as_number(x, f"{what} {j}") for j, x in enumerate(_listed(value, what), start=1)]
    if len(numbers) != features:
        raise ShapeError(f"{what} must be one number, or one per feature: {features} features, {len(numbers)} given.")
    return numbers
