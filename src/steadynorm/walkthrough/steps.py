"""One mini-batch through a batch norm, every step exact."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from steadynorm.errors import ArgumentError, ShapeError, SingleValueError
from steadynorm.walkthrough import render
from steadynorm.walkthrough.exact import Exact
from steadynorm.walkthrough.numbers import Number, as_columns, as_number, per_feature

__all__ = ["Feature", "Walkthrough", "explain"]

_MOST_DIGITS: Final = 50


@dataclass(frozen=True)
class Feature:
    """One column of the batch, through every step. All numbers are exact (`Exact`): `float(f.mean)`, `f.mean.text(6)`.

    Attributes:
        name: The column's name; empty for a single list of values.
        values: The mini-batch, x_1 ... x_n.
        gamma: The scale.
        beta: The shift.
        eps: What is added to the variance.
        momentum: The weight of the new statistics in the running ones.
        total: Sum of the values.
        mean: total / n.
        differences: x_i - mean.
        squares: (x_i - mean)^2.
        total_square: Sum of the squares.
        variance: The biased variance, total_square / n, by which a training step normalises.
        deviation: sqrt(variance).
        divisor: sqrt(variance + eps).
        x_hat: differences / divisor.
        x_hat_shortfall: 1 minus the (biased) deviation of x_hat, which is deviation / divisor.
        y: gamma * x_hat + beta, the layer's output in training.
        unbiased_variance: total_square / (n - 1), which goes to the running variance.
        running_mean: After one commit, from 0: momentum * mean.
        running_variance: After one commit, from 1: (1 - momentum) + momentum * unbiased_variance.
        inference: What inference then gives for each value, whatever it comes with:
            gamma * (x_i - running_mean) / sqrt(running_variance + eps) + beta.
    """

    name: str
    values: tuple[Exact, ...]
    gamma: Exact
    beta: Exact
    eps: Exact
    momentum: Exact
    total: Exact
    mean: Exact
    differences: tuple[Exact, ...]
    squares: tuple[Exact, ...]
    total_square: Exact
    variance: Exact
    deviation: Exact
    divisor: Exact
    x_hat: tuple[Exact, ...]
    x_hat_shortfall: Exact
    y: tuple[Exact, ...]
    unbiased_variance: Exact
    running_mean: Exact
    running_variance: Exact
    inference: tuple[Exact, ...]


@dataclass(frozen=True, repr=False)
class Walkthrough:
    """A mini-batch step by step, one `Feature` per column. `print` it to read it; a notebook shows a table.

    Attributes:
        features: The columns.
        digits: Digits after the point in what is shown.
    """

    features: tuple[Feature, ...]
    digits: int

    def __str__(self) -> str:
        return render.as_text(self.features, self.digits)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return render.as_html(self.features, self.digits)

    def to_dict(self) -> dict[str, Any]:
        """Every step as plain data, ready for JSON.

        Returns:
            `digits`, and `features`: per column its steps by name, each the nearest double (None beyond their range),
            and under `shown` the same steps as text, rounded half to even as in the printed table.
        """
        return render.as_dict(self.features, self.digits)


def _feature(
    name: str, x: list[Fraction], gamma: Fraction, beta: Fraction, eps: Fraction, momentum: Fraction
) -> Feature:
    n = len(x)
    total = sum(x, Fraction(0))
    mean = total / n
    differences = [v - mean for v in x]
    squares = [d * d for d in differences]
    total_square = sum(squares, Fraction(0))
    variance, unbiased = total_square / n, total_square / (n - 1)
    noisy = variance + eps
    if noisy == 0:
        raise ArgumentError(
            "eps must be positive for a batch of equal values: its variance is 0, and 0 / 0 is nothing."
        )
    running_mean, running_variance = momentum * mean, 1 - momentum + momentum * unbiased
    running_noisy = running_variance + eps
    of = Exact.of

    def all_of(numbers: Iterable[Fraction]) -> tuple[Exact, ...]:
        return tuple(of(q) for q in numbers)

    # d / sqrt(v) is written d / v * sqrt(v), which keeps it in the form a + b sqrt(r).
    return Feature(
        name=name,
        values=all_of(x),
        gamma=of(gamma),
        beta=of(beta),
        eps=of(eps),
        momentum=of(momentum),
        total=of(total),
        mean=of(mean),
        differences=all_of(differences),
        squares=all_of(squares),
        total_square=of(total_square),
        variance=of(variance),
        deviation=of(0, 1, variance),
        divisor=of(0, 1, noisy),
        x_hat=tuple(of(0, d / noisy, noisy) for d in differences),
        x_hat_shortfall=of(1, -1, variance / noisy),
        y=tuple(of(beta, gamma * d / noisy, noisy) for d in differences),
        unbiased_variance=of(unbiased),
        running_mean=of(running_mean),
        running_variance=of(running_variance),
        inference=tuple(of(beta, gamma * (v - running_mean) / running_noisy, running_noisy) for v in x),
    )


def explain(
    values: Sequence[Number] | Sequence[Sequence[Number]] | Any,
    gamma: Number | Sequence[Number] = 1,
    beta: Number | Sequence[Number] = 0,
    eps: Number = 1e-5,
    *,
    momentum: Number | None = 0.1,
    digits: int = 6,
    names: Sequence[str] | None = None,
) -> Walkthrough:
    """A mini-batch through a batch norm, step by step, right in every digit shown.

    mean = sum x / n,  variance = sum (x - mean)^2 / n (biased),  x_hat = (x - mean) / sqrt(variance + eps),
    y = gamma x_hat + beta; then one commit from running statistics (0, 1), whose variance takes the unbiased
    sum (x - mean)^2 / (n - 1), and what inference gives afterwards for each value on its own.

    Every number is taken as it is written (0.1 is one tenth; a float is its shortest decimal) and carried as
    a + b sqrt(r) with rational a, b, r, so nothing is rounded before it is shown.

    Args:
        values: The mini-batch: n >= 2 numbers (or their text), or n rows with one number per feature; lists, arrays
            and tensors.
        gamma: The scale, one or one per feature.
        beta: The shift, one or one per feature.
        eps: What is added to the variance; >= 0.
        momentum: The weight of the new statistics at the commit, in [0, 1]; None: a cumulative average, whose first
            commit has weight 1.
        digits: Digits after the point, 1 to 50. In scientific notation: significant digits.
        names: What to call the features.

    Returns:
        The steps; `print` shows them, `to_dict()` gives them as data.

    Raises:
        SingleValueError: Fewer than 2 values.
        ShapeError: Rows of different lengths, or as many gamma, beta or names as there are no features.
        ArgumentError: Not a finite number; eps < 0, or 0 for equal values; momentum or digits out of range.

    Source:
        Ioffe and Szegedy, "Batch Normalization", ICML 2015, https://arxiv.org/abs/1502.03167, algorithms 1 and 2.

    Example:
        >>> steps = explain([3, 5, 8, 9, 11, 24])
        >>> feature = steps.features[0]
        >>> [feature.mean.text(4), feature.variance.text(4), feature.deviation.text(4)]
        ['10', '46', '6.7823']
        >>> [x.text(2) for x in feature.x_hat]
        ['-1.03', '-0.74', '-0.29', '-0.15', '0.15', '2.06']
    """
    if isinstance(digits, bool) or not isinstance(digits, int) or not 1 <= digits <= _MOST_DIGITS:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"digits must be a whole number from 1 to {_MOST_DIGITS}, got {digits!r}.")
    columns = as_columns(values)
    if len(columns[0]) < 2:
        raise SingleValueError(
            f"a training batch needs at least 2 values per feature, got {len(columns[0])}: a batch of one is its own "
            "mean and has variance 0, so nothing is left of it. Running statistics are for that: collected over "
            "training, they normalise one example alone."
        )
    width = len(columns)
    eps_, momentum_ = as_number(eps, "eps"), Fraction(1) if momentum is None else as_number(momentum, "momentum")
    if eps_ < 0:
        raise ArgumentError(f"eps must be 0 or more, as it keeps the divisor from being 0; got {eps}.")
    if not 0 <= momentum_ <= 1:
        raise ArgumentError(f"momentum must lie in [0, 1], the weight of the new statistics; got {momentum}.")
    gammas, betas = per_feature(gamma, "gamma", width), per_feature(beta, "beta", width)
    if names is None:
        names = [""] if width == 1 else [f"feature {j}" for j in range(1, width + 1)]
    elif len(names) != width:
        raise ShapeError(f"names must be one per feature: {width} features, {len(names)} names.")
    return Walkthrough(
        tuple(
            _feature(str(n), x, g, b, eps_, momentum_) for n, x, g, b in zip(names, columns, gammas, betas, strict=True)
        ),
        digits,
    )
