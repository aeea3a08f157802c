"""A layer that has laid a shortcut and is then changed goes by what holds now.

Each test takes a plain step first. The next one is compared with the definition, outputs, gradients and running
statistics, or must raise what a layer raises that has laid no shortcut.
"""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import steadynorm as sn
from steadynorm.errors import ArgumentError, DeviceError, DtypeError, RejectedBatchWarning, ShapeError, SingleValueError
from support import ACTIVATIONS, assert_close, batch_norm, normalized, stats, wide
from support_kernels import Step, expected, randn
from support_shortcuts import assert_refused, check_next, trained, values

META = torch.zeros(3, device="meta")


def replace(layer: nn.Module, name: str, value: Tensor | None) -> None:
    """Whether it is a parameter or a buffer."""
    of = layer._parameters if name in layer._parameters else layer._buffers
    of[name] = nn.Parameter(value) if of is layer._parameters and value is not None else value


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


CHANGES: dict[str, Callable[[sn.BatchNorm2d], object]] = {
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "no activation": lambda layer: setattr(layer, "activation", None),
    "another activation": lambda layer: setattr(layer, "activation", sn.BatchNorm2d(3, activation="relu6").activation),
    "no weight": lambda layer: setattr(layer, "weight", None),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.tensor([1.5, -1, 0.5]))),
    "a weight of another kind": lambda layer: replace(layer, "weight", torch.tensor([[2.0, 9], [3, 9], [4, 9]])[:, 0]),
    "a weight of negated memory": lambda layer: replace(layer, "weight", torch._neg_view(torch.tensor([1.0, 2, 3]))),
    "a bias of negated memory": lambda layer: replace(layer, "bias", torch._neg_view(torch.tensor([1.0, 2, 3]))),
    "a parametrized weight": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "a parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", Doubled()),
    "running statistics in float64": lambda layer: [
        replace(layer, name, randn(3, seed=5).abs()) for name in ("running_mean", "running_var")
    ],
    "a running_var in float64": lambda layer: replace(layer, "running_var", randn(3, seed=5).abs()),
    "running statistics at intervals": lambda layer: [
        replace(layer, name, torch.ones(3, 2)[:, 1]) for name in ("running_mean", "running_var")
    ],
    "a running_mean of negated memory": lambda layer: replace(layer, "running_mean", torch._neg_view(torch.ones(3))),
    "no running statistics": lambda layer: [
        replace(layer, name, None) for name in ("running_mean", "running_var", "num_batches_tracked", "_rejected")
    ],
    "num_batches_tracked in int32": lambda layer: replace(
        layer, "num_batches_tracked", torch.tensor(7, dtype=torch.int32)
    ),
    "no num_batches_tracked": lambda layer: replace(layer, "num_batches_tracked", None),
    "the average of all batches": lambda layer: setattr(layer, "momentum", None),
    "momentum": lambda layer: setattr(layer, "momentum", 0.75),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_changed(change):
    layer = trained()
    CHANGES[change](layer)
    check_next(layer)
    check_next(layer, values(3))  # and on, by another shortcut or none


def test_ghost_batches_from_now_on():
    layer, x = trained(), values(1)
    layer.ghost_batch_size = 3
    halves = [batch_norm(half, layer.weight, layer.bias, activation=ACTIVATIONS["relu"]) for half in x.split(3)]
    for _ in range(2):
        assert_close(layer(x), np.concatenate(halves), "output")


ERRORS: dict[str, tuple[type[Exception], Callable[[sn.BatchNorm2d], object]]] = {
    "a weight of another size": (ShapeError, lambda layer: replace(layer, "weight", torch.ones(4))),
    "a weight for all": (ShapeError, lambda layer: replace(layer, "weight", torch.ones(1))),
    "a bias of another size": (ShapeError, lambda layer: replace(layer, "bias", torch.ones(2))),
    "a weight in float64": (DtypeError, lambda layer: replace(layer, "weight", torch.ones(3).double())),
    "a bias in bfloat16": (DtypeError, lambda layer: replace(layer, "bias", torch.ones(3).bfloat16())),
    "a weight elsewhere": (DeviceError, lambda layer: replace(layer, "weight", META)),
    "a bias elsewhere": (DeviceError, lambda layer: replace(layer, "bias", META)),
    "a running_mean of another size": (ShapeError, lambda layer: replace(layer, "running_mean", torch.zeros(4))),
    "a running_var of another size": (ShapeError, lambda layer: replace(layer, "running_var", torch.ones(1))),
    "a running_mean elsewhere": (DeviceError, lambda layer: replace(layer, "running_mean", META)),
    "a running_var elsewhere": (DeviceError, lambda layer: replace(layer, "running_var", META)),
    "no running_mean beside a running_var": (ArgumentError, lambda layer: replace(layer, "running_mean", None)),
    "no running_var beside a running_mean": (ArgumentError, lambda layer: replace(layer, "running_var", None)),
    "the average of untold batches": (
        ArgumentError,
        lambda layer: (setattr(layer, "momentum", None), replace(layer, "num_batches_tracked", None)),
    ),
    "a negative eps": (ArgumentError, lambda layer: setattr(layer, "eps", -1.0)),
    "an eps of NaN": (ArgumentError, lambda layer: setattr(layer, "eps", float("nan"))),
    "channels elsewhere": (ShapeError, lambda layer: setattr(layer, "channel_dim", 2)),
    "channels nowhere": (ShapeError, lambda layer: setattr(layer, "channel_dim", 5)),
    "channels for examples": (ShapeError, lambda layer: setattr(layer, "channel_dim", 0)),
}


@pytest.mark.parametrize("change", ERRORS)
def test_a_layer_that_no_longer_fits(change):
    error, apply = ERRORS[change]
    layer = trained()
    apply(layer)
    assert_refused(error, layer, values(1))


def test_channels_in_another_dimension():
    layer = trained(values(shape=(6, 3, 3, 5)))
    layer.channel_dim = 2
    check_next(layer, values(1, (6, 3, 3, 5)))
    layer.channel_dim = -3  # as a dimension, 1 again
    check_next(layer, values(2, (6, 3, 3, 5)))


@pytest.mark.parametrize("how", ["eval", "frozen"])
def test_running_statistics_from_now_on(how):
    layer, x = trained(), values(1)
    before = [t.clone() for t in layer.buffers()]
    sn.freeze_(layer, affine=False) if how == "frozen" else layer.eval()
    y = layer(x)
    mean, var = wide(layer.running_mean), wide(layer.running_var)
    wanted = normalized(x, mean, var, layer.weight, layer.bias, activation=ACTIVATIONS["relu"])
    assert_close(y, wanted, "output")
    assert all(torch.equal(t, was) for t, was in zip(layer.buffers(), before, strict=True))
    sn.unfreeze_(layer).train()
    check_next(layer)


def test_a_single_value_no_longer_taken_for_the_mean():
    layer = sn.BatchNorm1d(3, single_value="beta")
    x = randn(1, 3).float()
    layer(x)
    layer.single_value = "error"
    assert_refused(SingleValueError, layer, x)
    layer.single_value = "running"
    assert_close(layer(x), normalized(x, np.zeros(3), np.ones(3)), "output")


def test_an_input_of_another_dtype_with_the_layer_or_without():
    layer = trained()
    assert_refused(DtypeError, layer, values(1).double())
    assert_refused(DtypeError, layer, values(1).long())
    check_next(layer.double(), values(1).double())


@pytest.mark.parametrize("shape", [(6, 4, 4, 5), (6, 3, 20), (1, 3, 1, 1)], ids=str)
def test_inputs_that_do_not_fit(shape):
    error = SingleValueError if shape == (1, 3, 1, 1) else ShapeError
    assert_refused(error, trained(), values(1, shape))


def test_an_input_elsewhere():
    assert_refused(DeviceError, trained(), values(1).to("meta"))


class Logged(Tensor):
    """A subclass as users write them: what is done with it is seen, and the results are of its kind."""

    seen: list[object] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_input_of_a_subclass():
    layer = trained()
    Logged.seen.clear()
    y = layer(values(1).as_subclass(Logged))
    assert type(y) is Logged
    assert len(Logged.seen) > 0
    wanted = batch_norm(values(1), layer.weight, layer.bias, activation=ACTIVATIONS["relu"])
    assert_close(y.as_subclass(Tensor), wanted, "output")


def test_residuals_that_do_not_fit():
    layer = trained(residual=values(5))
    assert_refused(ShapeError, layer, values(1), values(4)[:5])
    assert_refused(DtypeError, layer, values(1), values(4).long())
    assert_refused(DeviceError, layer, values(1), values(4).to("meta"))


def test_remember_of_the_layer_itself():
    """What contexts set: it is handed the statistics, and nothing else is written."""
    layer, x, handed = trained(), values(1), []
    before = [t.clone() for t in layer.buffers()]
    layer.remember = lambda *a: (handed.append(a), False)[1]
    y = layer(x)
    assert_close(y, batch_norm(x, layer.weight, layer.bias, activation=ACTIVATIONS["relu"]), "output")
    ((itself, domain, statistics, weighted),) = handed
    assert (itself, domain, weighted) == (layer, None, False)
    assert_close(statistics.mean, wide(x).mean((0, 2, 3)), "statistic", torch.float32)
    assert_close(statistics.m2 / statistics.count, wide(x).var((0, 2, 3)), "variance", torch.float32)
    assert all(torch.equal(t, was) for t, was in zip(layer.buffers(), before, strict=True))
    del layer.remember
    check_next(layer)


def test_a_batch_that_is_refused_is_warned_about_and_counted():
    layer, x = trained(), values(1)
    before = [t.clone() for t in layer.buffers()]
    x[2, 1, 0, 0] = float("inf")
    with pytest.warns(RejectedBatchWarning) as warned:
        layer(x)
    assert warned[0].filename == __file__
    assert layer.rejected_batches == 1
    assert all(torch.equal(t, was) for t, was in zip(list(layer.buffers())[:3], before, strict=False))
    check_next(layer)


@pytest.fixture
def traced() -> tuple[sn.BatchNorm2d, torch.jit.ScriptModule]:
    """A layer that has laid a shortcut, and its trace in training."""
    layer = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of shapes, which are a trace's own
        return layer, torch.jit.trace(layer, values(1), check_trace=False)


def test_a_traced_module_remembers(traced):
    """As torch.nn's does: what is written is a part of the trace."""
    layer, module = traced
    mean, var, tracked = layer.running_mean.clone(), layer.running_var.clone(), layer.num_batches_tracked.item()
    x = values(2)
    module(x)
    assert_close(layer.running_mean, 0.9 * wide(mean) + 0.1 * stats(x).mean, "statistic")
    assert_close(layer.running_var, 0.9 * wide(var) + 0.1 * stats(x).unbiased, "statistic")
    assert layer.num_batches_tracked.item() == tracked + 1


def test_a_traced_module_computes_the_step(traced):
    """A trace holds operations, of which no kernel is one."""
    layer, module = traced
    x = values(2).requires_grad_()
    y = module(x)
    wanted = expected(Step(x, layer.weight, layer.bias, activation="relu", grad_y=values(6)))
    assert_close(y, wanted.y, "output")
    assert_close(torch.autograd.grad(y, x, values(6))[0], wanted.grad_x, "gradient")
    check_next(layer)
