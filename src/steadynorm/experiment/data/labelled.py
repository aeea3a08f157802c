"""One data set in memory: examples, labels, class names, and what is required of them before anything is trained."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from steadynorm.errors import DataError

__all__ = ["MAX_VALUES", "MIN_PER_CLASS", "Kind", "LabelledData", "check_size"]

Kind = Literal["image", "table"]

MIN_PER_CLASS: Final = 5
"""Fewest examples of a class that can be shared out: 3 to train on, 1 to validate, 1 to test, at the usual fifths."""

MAX_VALUES: Final = 2**31
"""Most numbers that one array of examples may hold (8 GiB in float32): a data set is kept in memory as a whole."""


def check_size(values: int, where: str) -> None:
    """Refuses, before allocating it, an array of examples that would not fit in memory.

    Args:
        values: How many numbers the array would hold.
        where: The file or folder, for the message.

    Raises:
        DataError: More than `MAX_VALUES`.
    """
    if values > MAX_VALUES:
        raise DataError(
            f"{where}: the data set must fit in memory, in at most {MAX_VALUES * 4 / 2**30:.0f} GiB of float32; "
            f"this one takes {values * 4 / 2**30:,.1f} GiB. Use fewer examples or smaller ones."
        )


@dataclass(frozen=True, eq=False)
class LabelledData:
    """A classification data set in memory, checked when it is made.

    Attributes:
        name: What to call it in reports.
        x: The examples, float32, finite: (N, C, H, W) for images, (N, F) for tables.
        y: The labels, (N,) int64: indices into `classes`.
        classes: The names of the classes, at least two.
        kind: "image" (values of order one, used as they are) or "table" (standardised by `split`).
        test: A fixed test set (x, y) of the same form, or None: `split` then takes one out of `x`.

    Raises:
        DataError: Anything above does not hold, a class has fewer than 5 examples, or the test set lacks a class.

    Example:
        >>> x = torch.arange(20.0).reshape(10, 2)
        >>> data = LabelledData("stripes", x, torch.arange(10) % 2, ("even", "odd"), "table")
        >>> len(data.x), data.classes
        (10, ('even', 'odd'))
    """

    name: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]
    kind: Kind
    test: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            only = f"only {self.classes[0]!r}" if self.classes else "none"
            raise DataError(
                f"{self.name}: at least two classes are required, got {only}. "
                "Check that the labels are the column, the folders or the array that you meant."
            )
        _check_kind(self.name, self.kind, self.x)
        _check_examples(self.name, self.x, self.y, len(self.classes))
        _check_counts(self.name, self.y, self.classes, MIN_PER_CLASS, "every class")
        if self.test is not None:
            x, y = self.test
            where = f"{self.name}, test set"
            if x.shape[1:] != self.x.shape[1:]:
                raise DataError(
                    f"{where}: examples must have the training set's shape {tuple(self.x.shape[1:])}, "
                    f"got {tuple(x.shape[1:])}. Bring both to one shape."
                )
            _check_examples(where, x, y, len(self.classes))
            _check_counts(where, y, self.classes, 1, "every class of the training set")

    def fingerprint(self) -> str:
        """A hex digest of the contents (examples, labels, classes, kind, test set; not the name), for cache keys."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.x, self.y, *(self.test or ())):
            digest.update(f"{part.dtype} {tuple(part.shape)};".encode())
            digest.update(part.detach().cpu().contiguous().numpy().data)
        digest.update(repr((self.kind, self.classes)).encode())
        return digest.hexdigest()


def _check_kind(name: str, kind: str, x: Tensor) -> None:
    dims = {"image": (4, "(N, C, H, W)"), "table": (2, "(N, F)")}
    if kind not in dims:
        raise DataError(f"{name}: kind must be 'image' or 'table', got {kind!r}.")
    ndim, shape = dims[kind]
    if x.ndim != ndim or 0 in x.shape:
        raise DataError(f"{name}: {kind} examples must have shape {shape}, none of it 0, got {tuple(x.shape)}.")


def _check_examples(where: str, x: Tensor, y: Tensor, classes: int) -> None:
    if x.dtype != torch.float32 or y.dtype != torch.int64 or y.ndim != 1:
        raise DataError(
            f"{where}: float32 examples and one-dimensional int64 labels are required, "
            f"got {x.dtype} and {y.dtype} of shape {tuple(y.shape)}. Convert them first."
        )
    if len(x) != len(y):
        raise DataError(
            f"{where}: one label per example is required, got {len(x):,} examples and {len(y):,} labels. "
            "Check that both come from the same, complete source."
        )
    bad = ~torch.isfinite(x.flatten(1)) if len(x) else torch.zeros(0, 1, dtype=torch.bool)
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"{where}: every value must be finite in float32, got {int(bad.sum()):,} that are not; the first is "
            f"{float(x.flatten(1)[row, column])} in example {row}, feature {column} (counted from 0). "
            "Remove those examples or fill the values in."
        )
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise DataError(
            f"{where}: labels must be indices from 0 to {classes - 1} into the {classes} classes, "
            f"got {int(y.min())} to {int(y.max())}."
        )


def _check_counts(where: str, y: Tensor, classes: Sequence[str], least: int, who: str) -> None:
    counts = torch.bincount(y, minlength=len(classes)).tolist()
    few = [f"{name!r} has {count}" for name, count in zip(classes, counts, strict=True) if count < least]
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        what = f"at least {least} examples" if least > 1 else "an example"
        raise DataError(f"{where}: {who} needs {what}, but {shown}. Add examples, or leave out or merge those classes.")
