"""A stratified training, validation and test part of a data set, the same ones for the same seed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steadynorm.errors import ArgumentError, DataError
from steadynorm.experiment.data.labelled import LabelledData

__all__ = ["Split", "split", "standardisation"]


@dataclass(frozen=True, eq=False)
class Split:
    """The three parts of one seed's split.

    Attributes:
        x_train: (n_train, *) float32, and likewise `x_val`, `x_test`.
        y_train: (n_train,) int64, and likewise `y_val`, `y_test`.
        mean: (F,) float32: what `split` subtracted from each feature of a table; None for images.
        scale: (F,) float32: what it then multiplied each feature by, 0 for a constant one; None for images.
    """

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None


def split(data: LabelledData, seed: int, *, val: float = 0.2, test: float = 0.2) -> Split:
    """Shares a data set out into training, validation and test parts, class by class.

    Of a class with n examples, round(n * test) go to the test part and round(n * val) to the validation part, at least
    one to each; the rest is for training. A fixed test set is kept as it is, and only the rest is shared out. Each
    part comes in random order.

    The features of a table are standardised by the mean and biased standard deviation of the training part alone
    (what a model in use would know). This is on purpose: columns on wild scales slow down a network without batch
    norm far more than one with it, so a comparison on them would measure the missing standardisation and credit batch
    norm with it. Images already lie on one scale and are left as they are.

    Args:
        data: The data set.
        seed: A non-negative integer; the same seed gives the same split.
        val: Fraction of each class for validation, in (0, 1).
        test: Fraction of each class for testing, in (0, 1); unused with a fixed test set.

    Returns:
        The parts, with every class in each of them.

    Raises:
        ArgumentError: A fraction or the seed is out of range.
        DataError: A class is too small for these fractions.

    Example:
        >>> x = torch.arange(40.0).reshape(20, 2)
        >>> data = LabelledData("stripes", x, torch.arange(20) % 2, ("even", "odd"), "table")
        >>> parts = split(data, seed=0)
        >>> parts.y_train.bincount(), parts.y_val.bincount(), parts.y_test.bincount()
        (tensor([6, 6]), tensor([2, 2]), tensor([2, 2]))
    """
    if not (val > 0 and test > 0 and val + test < 1):
        raise ArgumentError(f"val and test must be positive fractions with a sum below 1, got {val!r} and {test!r}.")
    if seed < 0:
        raise ArgumentError(f"seed must be a non-negative integer, got {seed!r}.")
    train_rows, val_rows, test_rows = _rows(data, seed, val, 0.0 if data.test else test)
    x_test, y_test = data.test or (data.x[test_rows], data.y[test_rows])
    x_train, x_val = data.x[train_rows], data.x[val_rows]
    mean = scale = None
    if data.kind == "table":
        mean, scale = standardisation(x_train)
        x_train, x_val, x_test = ((x - mean) * scale for x in (x_train, x_val, x_test))
    return Split(x_train, data.y[train_rows], x_val, data.y[val_rows], x_test, y_test, mean, scale)


def standardisation(x: Tensor) -> tuple[Tensor, Tensor]:
    """The shift and factor that bring each feature to mean 0 and biased variance 1: (x - mean) * scale.

    Args:
        x: (N, *) training examples.

    Returns:
        mean and scale, (*) in x's dtype, computed in float64; scale = 1 / sqrt(biased variance), and 0 for a feature
        that is constant in `x` (it says nothing there, so it becomes 0 everywhere).

    Example:
        >>> standardisation(torch.tensor([[1.0, 7.0], [5.0, 7.0]]))
        (tensor([3., 7.]), tensor([0.5000, 0.0000]))
    """
    wide = x.double()
    deviation, mean = torch.std_mean(wide, dim=0, correction=0)
    scale = (1 / deviation).to(x.dtype)
    # inf: the deviation is 0, or so small that its inverse does not fit the dtype, which is no different here
    return mean.to(x.dtype), scale.masked_fill(scale.isinf(), 0.0)


def _rows(data: LabelledData, seed: int, val: float, test: float) -> tuple[Tensor, Tensor, Tensor]:
    """Row indices of the training, validation and test part; an empty test part if `test` is 0."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.y)))
    part = torch.zeros_like(data.y)
    for label, name in enumerate(data.classes):
        rows = order[data.y[order] == label]
        n_test = max(1, round(len(rows) * test)) if test else 0
        n_val = max(1, round(len(rows) * val))
        if n_test + n_val >= len(rows):
            raise DataError(
                f"{data.name}: class {name!r} has {len(rows)} examples, too few to give {n_val} to validation and "
                f"{n_test} to test and keep one for training. Use smaller fractions or add examples."
            )
        part[rows[:n_test]] = 2
        part[rows[n_test : n_test + n_val]] = 1
    return order[part[order] == 0], order[part[order] == 1], order[part[order] == 2]
