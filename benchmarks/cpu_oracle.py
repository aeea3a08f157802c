"""Batch norm with its gradients in float64, from the definition, and how far a result may be from it.

    μ = mean(x), σ² = mean((x - μ)²) (biased), x̂ = (x - μ) / sqrt(σ² + ε), z = γ x̂ + β [+ residual], y = max(z, 0)
    h = g [y > 0], dβ = Σ h, dγ = Σ h x̂, dx = γ / sqrt(σ² + ε) (h - mean(h) - x̂ mean(h x̂)), dresidual = h

(Ioffe & Szegedy 2015.) The mask of the gradients is the tested y's own: where z is 0 up to rounding, both sides are
right, and y itself has been held against the truth before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EPS", "Outcome", "Problem", "worst_error"]

EPS = 1e-5
CHUNK = 1 << 22  # values at a time: channels are independent, and float64 copies of everything would not fit
# Half a unit in the last place of bfloat16 is 2^-9 of a value; sums over the batch are taken in float32 or better.
TOLERANCE = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 2e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (5e-3, 5e-4),
}


@dataclass(frozen=True)
class Problem:
    """What a row starts from. `residual` is None where nothing is added; `rectify` says whether a ReLU follows."""

    x: Tensor
    residual: Tensor | None
    gradient: Tensor  # of y
    weight: Tensor
    bias: Tensor
    rectify: bool


@dataclass(frozen=True)
class Outcome:
    """What an implementation made of it."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    dresidual: Tensor | None


def worst_error(problem: Problem, outcome: Outcome) -> float:
    """The largest distance from the truth in units of the tolerance: at most 1 where all is right, inf for a NaN."""
    worst = 0.0
    for channels in _chunks(problem.x):
        for error in _errors(problem, outcome, channels):
            worst = max(worst, error)
    return worst


def _chunks(x: Tensor) -> Iterator[slice]:
    channels = x.shape[1]
    step = max(1, CHUNK * channels // max(x.numel(), 1))
    return (slice(start, start + step) for start in range(0, channels, step))


def _by_channel(t: Tensor, channels: slice) -> Tensor:
    return t.detach()[:, channels].movedim(1, 0).flatten(1).double()


def _errors(problem: Problem, outcome: Outcome, channels: slice) -> Iterator[float]:
    relative, absolute = TOLERANCE[problem.x.dtype]
    x, g, y = (_by_channel(t, channels) for t in (problem.x, problem.gradient, outcome.y))
    weight, bias = (t.detach()[channels, None].double() for t in (problem.weight, problem.bias))
    centred = x - x.mean(1, keepdim=True)
    invstd = (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
    x_hat = centred * invstd
    z = weight * x_hat + bias
    if problem.residual is not None:
        z += _by_channel(problem.residual, channels)
    truth = z.relu() if problem.rectify else z
    yield _distance(y, truth, relative, absolute)
    h = g * (y > 0) if problem.rectify else g
    along = (h * x_hat).mean(1, keepdim=True)
    mean = h.mean(1, keepdim=True)
    dx = weight * invstd * (h - mean - x_hat * along)
    yield _distance(_by_channel(outcome.dx, channels), dx, relative, absolute)
    # A sum of n terms of about 1 is about sqrt(n) large: that is its scale, also where it happens to be near 0.
    n = x.shape[1]
    narrow = max(TOLERANCE[outcome.dweight.dtype])
    for sums, found in ((along * n, outcome.dweight), (mean * n, outcome.dbias)):
        yield _distance(found.detach()[channels, None].double(), sums, narrow, narrow * n**0.5)
    if outcome.dresidual is not None:
        yield _distance(_by_channel(outcome.dresidual, channels), h, relative, absolute)


def _distance(found: Tensor, truth: Tensor, relative: float, absolute: float) -> float:
    error = float(((found - truth).abs() / (absolute + relative * truth.abs())).amax())
    return error if error == error else float("inf")  # NaN is never within a tolerance
