"""Tables with a label column: which column is the label, and what features the others become."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from steadynorm.errors import DataError
from steadynorm.experiment.data.columns import read_columns
from steadynorm.experiment.data.labelled import LabelledData, check_size
from steadynorm.experiment.data.labels import encode

__all__ = ["MAX_CATEGORIES", "read"]

MAX_CATEGORIES: Final = 32
"""Most distinct texts in a column that is still turned into one 0/1 feature each; more looks like names or ids."""

_LABEL_NAMES: Final = ("label", "target", "class", "y")


def read(path: Path, label: str | None = None) -> LabelledData:
    """Reads a table.

    Numbers and truth values become one feature each, in the order of the columns. So does text of two distinct values:
    0 for the first in sorted order, 1 for the second. Text of 3 to 32 distinct values becomes one 0/1 feature per value
    ("one-hot", sorted). Anything else (more distinct texts, dates, lists) is refused by name, since a guess at what it
    means would decide the result. Nothing missing is filled in.

    Args:
        path: An existing local file: a header and rows of .csv or .tsv, .parquet, or JSON objects.
        label: The label column; by default the only one called label, target, class or y, in any case.

    Returns:
        The features (N, F) as they are (`split` standardises them), the classes in sorted order.

    Raises:
        DataError: The file is damaged, has no rows or no such label column, or a column is unusable.
        MissingDependencyError: The extra `tables` is not installed.
    """
    columns = read_columns(path)
    names = list(columns)
    if not names or not len(columns[names[0]]):
        raise DataError(f"{path}: a table with a header and rows is required, got no rows.")
    chosen = _label_column(path, names, label)
    for name, values in columns.items():
        _refuse_missing(path, name, values)
    features = [name for name in names if name != chosen]
    if not features:
        raise DataError(f"{path}: at least one column besides the label {chosen!r} is required, got none.")
    classes, y, _ = encode(f"{path}, column {chosen!r}", np.ma.getdata(columns[chosen]))
    x = np.concatenate([_encoded(path, name, columns[name]) for name in features], axis=1)
    check_size(x.size, str(path))
    return LabelledData(path.stem, torch.from_numpy(x), y, classes, "table")


def _label_column(path: Path, names: list[str], label: str | None) -> str:
    if label is not None:
        if label in names:
            return label
        raise DataError(f"{path}: no column {label!r} to use as the label; the columns are {_some(names)}.")
    found = [name for name in names if name.lower() in _LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{path}: one label column is required, called {', '.join(_LABEL_NAMES)} or named by label= (--label); "
        f"got {f'several: {_some(found)}' if found else f'the columns {_some(names)}'}. Name the one that is meant."
    )


def _refuse_missing(path: Path, name: str, values: NDArray[Any]) -> None:
    missing = np.ma.getmaskarray(values)
    if values.dtype.kind == "f":
        missing = missing | np.isnan(np.ma.getdata(values))
    count = int(missing.sum())
    if count:
        raise DataError(
            f"{path}: column {name!r} misses {count:,} of {len(values):,} values (the first in row "
            f"{int(missing.argmax()) + 1}). Drop those rows, drop the column, or fill the values in."
        )


def _encoded(path: Path, name: str, column: NDArray[Any]) -> NDArray[np.float32]:
    """(N, 1) of a numeric or two-valued column, (N, K) of text with K distinct values."""
    values: NDArray[Any] = np.ma.getdata(column)
    if values.dtype.kind in "biuf":
        with np.errstate(over="ignore"):
            numbers = values.astype(np.float32)
        bad = ~np.isfinite(numbers)
        if bool(bad.any()):
            raise DataError(
                f"{path}: column {name!r} has {int(bad.sum()):,} values that are not finite in float32 (the first, "
                f"{values[bad][0]}, in row {int(bad.argmax()) + 1}). Rescale the column, or drop or mend those rows."
            )
        return numbers[:, None]
    if not all(isinstance(value, str) for value in values.tolist()):
        kind = type(values.tolist()[0]).__name__.replace("ndarray", "list")
        raise DataError(
            f"{path}: column {name!r} holds values of type {kind}; numbers, truth values or text of few distinct "
            "values are required. Turn it into numbers, or drop it."
        )
    text = values.astype(np.str_)
    distinct = np.unique(text)
    if len(distinct) <= MAX_CATEGORIES:
        return (text[:, None] == (distinct[1:] if len(distinct) == 2 else distinct)).astype(np.float32)
    odd = next((i for i, value in enumerate(text.tolist()) if not _is_number(value)), None)
    seen = "" if odd is None else f" (row {odd + 1} holds {str(text[odd])[:40]!r})"
    raise DataError(
        f"{path}: column {name!r} is text with {len(distinct):,} distinct values{seen}; text is one-hot encoded up to "
        f"{MAX_CATEGORIES}. Drop it if it is a name or id, mend it if it should be numbers, or group its values."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
