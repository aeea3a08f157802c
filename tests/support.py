"""The oracle: batch norm from its definition in extended precision, in numpy, and the one table of tolerances.

Nothing here calls the code under test. Values come from the definition (two passes, `numpy.longdouble`); derivatives
come from central differences of those values, so that no formula of a derivative is written down twice.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Wide = np.longdouble

# (relative, absolute) by what is compared and by the dtype of the tensor under test. The absolute part is in units of
# a normalised value (standard deviation 1), of which a test's numbers are made unless it says otherwise.
TOLERANCE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "variance": {  # the contract: 1e-6 for float32 input up to |mean| / std = 1e4, on every layout and thread count
        torch.float64: (1e-10, 0.0),
        torch.float32: (1e-6, 0.0),
        torch.float16: (1e-6, 0.0),
        torch.bfloat16: (1e-6, 0.0),
    },
    "statistic": {  # a mean, a sum, a merged m2
        torch.float64: (1e-10, 1e-10),
        torch.float32: (1e-6, 1e-6),
        torch.float16: (1e-6, 1e-6),
        torch.bfloat16: (1e-6, 1e-6),
    },
    "output": {  # half a unit in the last place of the dtype, and some
        torch.float64: (1e-11, 1e-11),
        torch.float32: (2e-6, 2e-6),
        torch.float16: (1e-3, 1e-3),
        torch.bfloat16: (8e-3, 8e-3),
    },
    "gradient": {
        torch.float64: (1e-8, 1e-8),  # limited by the central differences that it is compared with
        torch.float32: (2e-6, 2e-6),
        torch.float16: (1e-3, 1e-3),
        torch.bfloat16: (8e-3, 8e-3),
    },
}


def assert_close(actual: Tensor, expected: Array | Tensor, kind: str, dtype: torch.dtype | None = None) -> None:
    """Compares with the tolerance of `kind` for `dtype` (by default that of `actual`); NaN and inf must be expected."""
    relative, absolute = TOLERANCE[kind][dtype or actual.dtype]
    got, wanted = wide(actual), wide(expected)
    assert got.shape == wanted.shape, f"shape {got.shape}, expected {wanted.shape}"
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=absolute, err_msg=f"{kind} of {actual.dtype}")


def wide(value: Any) -> Array:
    """As an array of extended precision."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().to(torch.float64).numpy()
    return np.asarray(value, dtype=Wide)


class Stats(NamedTuple):
    """Count, mean and m2 of each channel, from the definition."""

    count: Array
    mean: Array
    m2: Array

    @property
    def biased(self) -> Array:
        return self.m2 / self.count

    @property
    def unbiased(self) -> Array:
        return self.m2 / (self.count - 1)


def stats(x: Any, channel_dim: int = 1, weight: Any = None) -> Stats:
    """n = Σ w, μ = Σ w x / n, m2 = Σ w (x - μ)² over all axes but the channels', channel by channel."""
    rows = np.moveaxis(wide(x), channel_dim, 0)
    shape = rows.shape[1:]
    rows = rows.reshape(rows.shape[0], -1)
    if weight is None:
        mean = rows.mean(1) if rows.shape[1] else np.zeros(len(rows), Wide)
        return Stats(np.full(len(rows), rows.shape[1], Wide), mean, ((rows - mean[:, None]) ** 2).sum(1))
    w = wide(weight)
    w = np.broadcast_to(w.reshape(*w.shape, *(1,) * (len(shape) - w.ndim)), shape).reshape(-1)
    rows, w = rows[:, w > 0], w[w > 0]
    n = w.sum()
    mean = (rows * w).sum(1) / n if n else np.zeros(len(rows), Wide)
    return Stats(np.full(len(rows), n, Wide), mean, (w * (rows - mean[:, None]) ** 2).sum(1))


def normalized(
    x: Any,
    mean: Array,
    biased_variance: Array,
    gamma: Any = None,
    beta: Any = None,
    eps: float = 1e-5,
    activation: Callable[[Array], Array] | None = None,
    residual: Any = None,
    mask: Any = None,
    channel_dim: int = 1,
) -> Array:
    """y = f(γ (x - μ) / sqrt(σ² + ε) + β + residual), 0 where masked."""
    x = wide(x)
    view = [1] * x.ndim
    view[channel_dim] = -1
    y = (x - mean.reshape(view)) / np.sqrt(biased_variance + Wide(eps)).reshape(view)
    y = y * (1 if gamma is None else wide(gamma).reshape(view)) + (0 if beta is None else wide(beta).reshape(view))
    if residual is not None:
        y = y + wide(residual)
    if activation is not None:
        y = activation(y)
    if mask is not None:
        m = np.asarray(mask)
        m = np.expand_dims(m.reshape(*m.shape, *(1,) * (x.ndim - 1 - m.ndim)), channel_dim)
        y = np.where(m, y, 0)
    return y


def batch_norm(x: Any, *args: Any, mask: Any = None, sample_weight: Any = None, **options: Any) -> Array:
    """One training step's output: `normalized` by the batch's own (weighted) mean and biased variance."""
    weight = sample_weight
    if mask is not None:
        m = np.asarray(mask)
        weight = (
            m if weight is None else wide(weight).reshape(*np.shape(weight), *(1,) * (m.ndim - np.ndim(weight))) * m
        )
    measured = stats(x, options.get("channel_dim", 1), weight)
    biased = measured.m2 / np.where(measured.count > 0, measured.count, 1)
    return normalized(x, measured.mean, biased, *args, mask=mask, **options)


def central_differences(f: Callable[[Array], Any], at: Any) -> Array:
    """df/dx of a scalar function of an array, entry by entry; the step balances rounding against truncation."""
    at = wide(at).copy()
    found = np.zeros_like(at)
    h = Wide(np.finfo(Wide).eps) ** (Wide(1) / 3)
    for index in np.ndindex(at.shape):
        kept = at[index]
        at[index] = kept + h
        above = f(at)
        at[index] = kept - h
        found[index] = (above - f(at)) / (2 * h)
        at[index] = kept
    return found


_erf = np.frompyfunc(math.erf, 1, 1)


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def _gelu(z: Array) -> Array:
    return z / 2 * (1 + _erf(z.astype(np.float64) / math.sqrt(2)).astype(Wide))


# The fusable activations from their definitions, at torch's default parameters.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda z: np.maximum(z, 0),
    "relu6": lambda z: np.clip(z, 0, 6),
    "leaky_relu": lambda z: np.where(z > 0, z, z * Wide(0.01)),
    "elu": lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))),
    "selu": lambda z: (
        Wide(1.0507009873554804934) * np.where(z > 0, z, Wide(1.6732632423543772848) * np.expm1(np.minimum(z, 0)))
    ),
    "celu": lambda z: np.maximum(z, 0) + np.minimum(0, np.expm1(z)),
    "silu": lambda z: z * _sigmoid(z),
    "gelu": _gelu,
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / Wide(math.pi)) * (z + Wide(0.044715) * z**3))),
    "hardswish": lambda z: z * np.clip(z + 3, 0, 6) / 6,
    "hardsigmoid": lambda z: np.clip(z + 3, 0, 6) / 6,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "softplus": lambda z: np.log1p(np.exp(z)),
    "mish": lambda z: z * np.tanh(np.log1p(np.exp(z))),
}


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Runs torch on n threads for the length of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    match layout:
        case "contiguous":
            return x.contiguous()
        case "channels_last":  # in any number of dimensions: the channels are the fastest axis
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "permuted":  # dense, but neither contiguous nor channels_last: the batch is the fastest axis
            return x.movedim(0, -1).contiguous().movedim(-1, 0)
        case "sliced":  # every second element of a larger tensor: not dense
            wider = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
            wider[..., ::2] = x
            return wider[..., ::2]
        case "offset":  # offset into a storage that is also somebody else's
            padded = torch.cat([x.new_full((1, *x.shape[1:]), float("inf")), x])
            return padded[1:]
    raise ValueError(layout)
