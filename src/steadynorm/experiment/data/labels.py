"""Labels of any plain type to class indices and class names."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadynorm.errors import DataError

__all__ = ["encode"]


def encode(
    where: str, y: NDArray[Any], y_test: NDArray[Any] | None = None
) -> tuple[tuple[str, ...], Tensor, Tensor | None]:
    """Numbers the classes in sorted order.

    Args:
        where: The source, for messages.
        y: (N,) or (N, 1) text, whole numbers or truth values.
        y_test: The same of a fixed test set, whose classes must be among those of `y`.

    Returns:
        The class names, y as int64 indices into them, and y_test likewise.

    Raises:
        DataError: Another shape, missing or continuous values, or a test label that training does not have.

    Example:
        >>> encode("colours", np.array(["red", "blue", "red"]))
        (('blue', 'red'), tensor([1, 0, 1]), None)
    """
    plain = _plain(where, y)
    values, codes = np.unique(plain, return_inverse=True)
    classes = tuple(str(value) for value in values.tolist())
    train = torch.from_numpy(codes.reshape(-1).astype(np.int64))
    if y_test is None:
        return classes, train, None
    plain_test = _plain(f"{where}, test", y_test)
    unknown = [value for value in np.unique(plain_test).tolist() if str(value) not in classes]
    if unknown or plain_test.dtype.kind != plain.dtype.kind:
        raise DataError(
            f"{where}: the test set's classes must be among the training set's ({_some(classes)}), "
            f"got {_some(unknown)} of dtype {plain_test.dtype}. Use the same labels in both."
        )
    return classes, train, torch.from_numpy(np.searchsorted(values, plain_test).astype(np.int64))


def _plain(where: str, y: NDArray[Any]) -> NDArray[Any]:
    """(N,) of whole numbers, truth values or text."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        onehot = " Take the argmax of one-hot labels." if y.ndim == 2 else ""
        raise DataError(f"{where}: one label per example, of shape (N,), is required, got shape {y.shape}.{onehot}")
    if y.dtype.kind == "O" and all(isinstance(value, str) for value in y.tolist()):
        y = y.astype(np.str_)
    if y.dtype.kind == "f":
        fractional = ~(np.abs(y) < 2**53) | (y != np.floor(y))  # ~(... < ...) holds for NaN as well
        if bool(fractional.any()):
            raise DataError(
                f"{where}: labels must be classes, got {int(fractional.sum()):,} that are not whole numbers (the first "
                f"is {y[fractional][0]:g}). A continuous target has to be cut into classes first; drop missing ones."
            )
    if y.dtype.kind not in "biufU":
        raise DataError(f"{where}: labels must be text, whole numbers or truth values, got dtype {y.dtype}.")
    return y.astype(np.int64) if y.dtype.kind in "iuf" else y


def _some(values: "tuple[Any, ...] | list[Any]") -> str:
    return ", ".join(str(value) for value in values[:10]) + (", ..." if len(values) > 10 else "")
