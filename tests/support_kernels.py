"""A training step and its derivatives in extended precision, and a backend run where every stray access shows.

Values come from the definition, as in `support`. The derivative is the chain rule over the step's few sums, with f' by
central differences of f; a test holds it against central differences of the whole step.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.ops.cpu import backend
from steadynorm.ops.layout import Layout, align
from steadynorm.ops.reference import Gradients, Operands, Statistics, Train
from support import ACTIVATIONS, Array, Wide, assert_close, stats, threads, wide

EPS = 1e-5
SHAPES = {"planes": (3, 4, 20, 30), "columns": (30, 7)}


def randn(*shape: int, seed: int = 0, mean: float = 0, std: float = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std + mean


def derivative(f: Callable[[Array], Array], z: Array) -> Array:
    """f'(z), value by value."""
    h = Wide(np.finfo(Wide).eps) ** (Wide(1) / 3)
    return (f(z + h) - f(z - h)) / (2 * h)


class Step(NamedTuple):
    """What a training step is given, as tensors of any dtype and strides; the channels are in dimension 1.

    Attributes:
        x, gamma, beta, residual: As in `batch_norm`.
        weight: How much each position counts, (N, *).
        mask: Which positions take part, (N, *).
        activation: Its name.
        grad_y, grad_mean, grad_m2: The gradients of the outputs.
        eps: Added to the variance.
    """

    x: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    residual: Tensor | None = None
    weight: Tensor | None = None
    mask: Tensor | None = None
    activation: str | None = None
    grad_y: Tensor | None = None
    grad_mean: Tensor | None = None
    grad_m2: Tensor | None = None
    eps: float = EPS

    def arguments(self) -> tuple[Operands, Train]:
        """As a backend takes them."""
        layout = Layout.of(self.x)
        valid = None if self.mask is None else align(self.mask, self.x, layout)
        used = valid
        if self.weight is not None:
            used = align(self.weight, self.x, layout)
            used = used if valid is None else torch.where(valid, used, 0)
        activation = None if self.activation is None else Activation(self.activation)
        return Operands(self.x, self.gamma, self.beta, self.residual, used, valid), Train(layout, self.eps, activation)


def make(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options) -> Step:
    """A step with an affine map, a ReLU and an upstream gradient, unless the options say otherwise."""
    channels = shape[1]
    given = {
        "gamma": (1 + 0.5 * randn(channels, seed=1)).to(dtype),
        "beta": (0.5 * randn(channels, seed=2)).to(dtype),
        "activation": "relu",
        "grad_y": randn(*shape, seed=3).to(dtype),
    }
    return Step(randn(*shape, mean=3, std=2).to(dtype), **{**given, **options})


class Result(NamedTuple):
    """What comes out of a step and its backward; None what was not asked for."""

    y: Any
    count: Any
    mean: Any
    m2: Any
    grad_x: Any
    grad_gamma: Any
    grad_beta: Any
    grad_residual: Any


def expected(step: Step, own: slice = slice(None)) -> Result:
    """The step by its definition; `own` are the examples whose gradients of gamma and beta are asked for."""
    x = wide(step.x)
    per_channel, axes = (1, -1, *(1,) * (x.ndim - 2)), (0, *range(2, x.ndim))
    position = (x.shape[0], 1, *x.shape[2:])

    def at_positions(values: Tensor) -> Array:
        full = values.reshape(*values.shape, *(1,) * (x.ndim - 1 - values.dim()))
        return np.broadcast_to(wide(full)[:, None], position)

    def line_up(values: Any, otherwise: float) -> Array:
        return np.full(1, otherwise, Wide) if values is None else wide(values).reshape(per_channel)

    valid = np.ones(position, bool) if step.mask is None else at_positions(step.mask) > 0
    w = np.where(valid, 1 if step.weight is None else at_positions(step.weight), 0).astype(Wide)
    x, residual = np.where(valid, x, 0), 0 if step.residual is None else np.where(valid, wide(step.residual), 0)
    batch = stats(x, weight=w[:, 0])
    n = np.where(batch.count > 0, batch.count, 1).reshape(per_channel)
    centred = x - batch.mean.reshape(per_channel)
    invstd = 1 / np.sqrt(batch.m2.reshape(per_channel) / n + Wide(step.eps))
    z, gamma = centred * invstd, line_up(step.gamma, 1)
    f = (lambda u: u) if step.activation is None else ACTIVATIONS[step.activation]
    u = z * gamma + line_up(step.beta, 0) + residual
    y = np.where(valid, f(u), 0)
    if step.grad_y is None:
        return Result(y, *batch, None, None, None, None)
    g = np.where(valid, wide(step.grad_y) * derivative(f, u), 0)
    pull = w / n * (g.sum(axes, keepdims=True) + z * (g * z).sum(axes, keepdims=True))
    dx = gamma * invstd * (g - pull)
    dx = dx + w / n * line_up(step.grad_mean, 0) + 2 * w * centred * line_up(step.grad_m2, 0)
    return Result(
        y, *batch, np.where(valid, dx, 0),
        None if step.gamma is None else (g * z)[own].sum(axes),
        None if step.beta is None else g[own].sum(axes),
        None if step.residual is None else g,
    )  # fmt: skip


_PAD = 128  # values on either side of what is handed out
_GUARD = -12345.0


class _Guarded:
    """Allocates memory that holds NaN between two guards."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _allocate(self, size: Any, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numel = math.prod(size)
        buffer = torch.full((numel + 2 * _PAD,), _GUARD, dtype=dtype)
        buffer[_PAD : _PAD + numel] = float("nan")
        self.buffers.append(buffer)
        return buffer.as_strided(size, stride, _PAD)

    def empty(self, size: Any, dtype: torch.dtype, device: str) -> Tensor:
        like = torch.empty(size, device="meta")
        return self._allocate(like.shape, like.stride(), dtype)

    def empty_like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._allocate(x.shape, torch.empty_like(x).stride(), dtype or x.dtype)

    def check(self) -> None:
        for buffer in self.buffers:
            guard = torch.tensor(_GUARD, dtype=buffer.dtype)
            assert (buffer[:_PAD] == guard).all(), "written in front of an array"
            assert (buffer[-_PAD:] == guard).all(), "written behind an array"


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Whatever the CPU backend allocates in this block holds NaN at first and lies between guards."""
    guarded = _Guarded()
    with patch.object(backend, "torch", guarded), patch.object(backend, "empty_like", guarded.empty_like):
        yield
    assert guarded.buffers, "the backend allocates elsewhere: the guards guard nothing"
    guarded.check()


def bits(t: Tensor) -> Tensor:
    """A copy of all of a tensor's memory, as integers, in which NaN equals itself."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).view(kind).clone()


def run(
    step: Step,
    n: int = 1,
    given: Statistics | None = None,
    over_ranks: Callable[[Tensor], Tensor] | None = None,
    constant: bool = False,
) -> Result:
    """The step and its backward by the CPU backend on n threads: no input may change, no access be out of bounds.

    Args:
        step: What is computed.
        n: How many threads.
        given: Statistics to normalise by, in place of the batch's own.
        over_ranks: As the backend takes it.
        constant: Whether the given statistics are no functions of x.
    """
    operands, spec = step.arguments()
    if over_ranks is not None:
        spec = spec._replace(group=object())  # only whether there is one matters to a backend
    spec = spec._replace(constant=constant)
    inputs = [t for t in (*step, *operands, *(given or ())) if isinstance(t, Tensor)]
    before = [bits(t) for t in inputs]
    with threads(n), guarded_memory():
        if given is None:
            y, statistics = backend.train(operands, spec)
        else:
            y, statistics = backend.normalize_by(given, operands, spec), given
        gradients = Gradients(None, None, None, None)
        if step.grad_y is not None:
            gradients = backend.backward(
                step.grad_y, step.grad_mean, step.grad_m2, operands, statistics, spec, over_ranks
            )
        assert torch.get_num_threads() == n
    for t, was in zip(inputs, before, strict=True):
        assert torch.equal(bits(t), was), "an input was written to"
    return Result(y, *statistics, *gradients)


def check(found: Result, wanted: Result, dtype: torch.dtype) -> None:
    """Compares all there is by the table of tolerances for the dtype of x."""
    assert_close(found.y, wanted.y, "output")
    assert_close(found.count, wanted.count, "statistic", dtype)
    assert_close(found.mean, wanted.mean, "statistic", dtype)
    if (wanted.count > 1).all():
        assert_close(found.m2 / found.count, wanted.m2 / wanted.count, "variance", dtype)
    for name in ("grad_x", "grad_residual"):
        assert (getattr(found, name) is None) == (getattr(wanted, name) is None), name
        if getattr(wanted, name) is not None:
            assert_close(getattr(found, name), getattr(wanted, name), "gradient")
    values = np.sqrt(wanted.grad_x.size / len(wanted.mean)) if wanted.grad_x is not None else 1  # what a sum grows with
    for name in ("grad_gamma", "grad_beta"):
        assert (getattr(found, name) is None) == (getattr(wanted, name) is None), name
        if getattr(wanted, name) is not None:
            assert_close(getattr(found, name).double() / values, getattr(wanted, name) / values, "gradient", dtype)
