"""E[h(z)] for z ~ N(0, 1), to machine precision also where h has kinks."""

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steadynorm.errors import ArgumentError

__all__ = ["Elementwise", "Floats", "expect_square", "values"]

Elementwise = Callable[[Tensor], Tensor]
Floats = npt.NDArray[np.float64]

_PANEL: Final = 0.5
_REACH: Final = 39.0  # the normal density is 0 in float64 from here on
_POINTS: Final = 24  # per panel


@lru_cache(maxsize=1)
def _rule() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    return nodes, weights


def _grid(scale: float) -> tuple[Floats, Floats]:
    """Nodes z and weights w with sum_i w_i h(scale z_i) = E[h(scale z)]; panels never straddle a kink at k/2."""
    edges = np.arange(-_REACH, _REACH + _PANEL / 2, _PANEL)
    if scale not in (0.0, 1.0):
        with np.errstate(over="ignore"):
            kinks = edges / scale
        edges = np.union1d(edges, kinks[np.abs(kinks) < _REACH])
    nodes, weights = _rule()
    half = np.diff(edges)[:, None] / 2
    z = (edges[:-1, None] + half * (1 + nodes)).ravel()
    w = (half * weights).ravel() * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
    return z, w


def values(f: Elementwise, z: Floats) -> Floats:
    """f(z) in float64, for an f that is elementwise.

    Raises:
        ArgumentError: f fails on a vector, returns something of another shape or type, or its value at one element
            depends on the others (or on chance).
    """
    with torch.no_grad():
        try:
            out = f(torch.from_numpy(z.copy()))
            part = f(torch.from_numpy(z[::-3].copy()))
        except Exception as error:  # a user's function may fail in any way
            raise ArgumentError(
                f"an activation must map float64 tensors to ones of the same shape, element by element; got {error!r}"
            ) from error
    for result, given in ((out, z), (part, z[::-3])):
        if not isinstance(result, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]  (a user's callable)
            raise ArgumentError(
                f"an activation must return a tensor, got {type(result).__name__}. "
                "Pass an instance such as nn.ReLU(), not the class."
            )
        if result.shape != given.shape or not result.dtype.is_floating_point:
            raise ArgumentError(
                f"an activation must keep shape and kind, element by element: a float64 tensor of shape {given.shape} "
                f"became {result.dtype} of shape {tuple(result.shape)}."
            )
    whole, some = out.double().numpy(), part.double().numpy()
    if not np.allclose(whole[::-3], some, rtol=1e-9, atol=1e-300, equal_nan=True):
        raise ArgumentError(
            "an activation must work element by element: its value at one element changed when others were left out. "
            "Softmax, normalisations and random functions have no gain."
        )
    return whole


def expect_square(f: Elementwise, scale: float = 1.0, factor: Callable[[Floats], Floats] | None = None) -> float:
    """E[factor(z) f(scale z)^2] for z ~ N(0, 1), in float64.

    Composite Gauss-Legendre: panels with edges at the multiples of 1/2 in [-39, 39], both of z and of scale * z, with
    24 points each, weighted by the normal density. Gauss-Hermite quadrature, the textbook choice, lays one polynomial
    over the whole line and converges slowly where f has a kink at 0 or elsewhere: with 100 points the gain of ELU is
    off by 2e-5 and that of hardswish by 1e-4, and neither gains more than a digit from 100 points on to 200. Here
    every panel sees a smooth function as long as kinks lie at multiples of 1/2, as those of the usual activations do,
    and the error is that of float64. A kink elsewhere costs up to 1e-5, a jump up to 1e-2.

    Returns:
        The expectation; inf or nan where f is not finite.
    """
    z, w = _grid(scale)
    f_z = values(f, scale * z)
    with np.errstate(over="ignore", invalid="ignore"):
        terms = (f_z * np.sqrt(w)) ** 2
        return float(np.sum(terms if factor is None else terms * factor(z)))
