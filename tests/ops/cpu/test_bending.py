"""Activations in the CPU's kernels: each by its definition, at its kinks, and at values that are not finite."""

import numpy as np
import pytest
import torch
from torch import Tensor

from steadynorm.activations import NAMES, Activation
from steadynorm.ops.cpu.backend import way_of
from steadynorm.ops.cpu.call import BENT, RELU
from steadynorm.ops.reference import Statistics
from support import ACTIVATIONS, assert_close, wide
from support_kernels import EPS, SHAPES, Step, check, expected, make, run


@pytest.mark.parametrize("shape", [(3, 4, 20, 30), (30, 7)], ids=["planes", "columns"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_every_activation(activation, shape):
    step = make(shape, activation=activation)
    step = step._replace(gamma=step.gamma * 3)  # so that both ends of relu6 and hardswish are met
    check(run(step), expected(step), torch.float32)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu"])
def test_nan_is_not_rectified(activation):
    """max(NaN, 0) is NaN in torch, and a loss must show it."""
    step = make((30, 7), activation=activation, grad_y=None)
    step.x[3, 2] = float("nan")
    assert run(step).y[:, 2].isnan().all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("activation", "at", "slope"),
    [("relu", 0.0, 0.0), ("relu6", 0.0, 0.0), ("relu6", 6.0, 0.0), ("leaky_relu", 0.0, 0.01)],
)
def test_at_a_kink_the_slope_of_the_flat_side(activation, at, slope, shape):
    """A constant channel lies on β to the bit; there the derivative is the one that torch's own backward takes."""
    step = make(shape, activation=activation)
    step = step._replace(x=torch.full_like(step.x, 3.0), beta=torch.full_like(step.beta, at))
    found = run(step)
    assert (found.y == at).all()
    root = np.sqrt(found.y.numel() / shape[1])
    wanted = wide(step.grad_y).sum((0, *range(2, len(shape)))) * slope
    assert_close(found.grad_beta / root, wanted / root, "gradient")


# None and ReLU have kernels of their own only where they are frequent; elsewhere they are a slope and a cap.
FOLDED = {
    "float32": (torch.float32, False),
    "float64": (torch.float64, False),
    "weighted float32": (torch.float32, True),
}


def folded(step: Step, weighted: bool) -> Step:
    """The step, by weights of 1 where it is to be weighted."""
    return step._replace(weight=torch.ones(len(step.x))) if weighted else step


def test_which_kernels_there_are_for_none_and_relu():
    relu = Activation("relu")
    for dtype in (torch.float32, torch.bfloat16):
        assert (way_of(None, dtype, False)[0], way_of(relu, dtype, False)[0]) == ("", RELU)
    for dtype, weighted in ((torch.float64, False), (torch.float16, False), (torch.float32, True)):
        assert {way_of(f, dtype, weighted)[0] for f in (None, relu)} == {BENT}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("case", FOLDED)
def test_none_and_relu_where_they_are_a_slope_and_a_cap(case, activation, shape):
    dtype, weighted = FOLDED[case]
    step = folded(make(shape, dtype, activation=activation), weighted)
    step = step._replace(gamma=step.gamma * 3)  # no value so near to the kink that it is on both sides in the oracle
    found = run(step)
    check(found, expected(step), dtype)
    if activation == "relu":
        assert (found.y >= 0).all()
        assert (found.y == 0).any()


INFINITY, NAN = float("inf"), float("nan")
AT = torch.tensor([-INFINITY, -2, -0.0, 0.0, 2, 7, INFINITY, NAN])
PULLS = torch.tensor([1.5, INFINITY, -INFINITY, NAN])


def anywhere(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every value of AT together with every one of PULLS, again and again."""
    i = torch.arange(torch.Size(shape).numel()).view(shape)
    return AT.to(dtype)[i % len(AT)], PULLS.to(dtype)[i // len(AT) % len(PULLS)]


def constants(channels: int) -> Statistics:
    """Mean 0 and variance 1 - eps: z is x."""
    count = torch.full((channels,), 100.0, dtype=torch.float64)
    return Statistics(count, torch.zeros_like(count), count * (1 - EPS))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("case", FOLDED)
def test_in_evaluation_what_is_not_finite(case, activation, shape):
    """By the definition: 0 at -inf where f is flat, 6 at inf for relu6, and NaN nowhere but at NaN."""
    dtype, weighted = FOLDED[case]
    x, pulls = anywhere(shape, dtype)
    step = folded(Step(x, activation=activation, grad_y=pulls), weighted)
    found = run(step, given=constants(shape[1]), constant=True)
    f = (lambda z: z) if activation is None else ACTIVATIONS[activation]
    assert_close(found.y, f(wide(x)), "output")
    slope = {None: 1.0, "relu": 0.0, "relu6": 0.0, "leaky_relu": 0.01}[activation]
    cap = 6.0 if activation == "relu6" else INFINITY
    below = slope * pulls if slope else torch.zeros_like(pulls)
    wanted = torch.where(x > 0, torch.where(x < cap, pulls, 0) if activation == "relu6" else pulls, below)
    known = x.isfinite()
    assert_close(found.grad_x[known], wanted[known], "gradient")
    if not slope:
        assert (found.grad_x[known & (x <= 0)] == 0).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("case", FOLDED)
def test_in_training_nothing_is_asked_of_what_is_cut_off(case, activation, shape):
    """An infinite gradient at an output that is constant does not reach the sums that the whole channel shares."""
    dtype, weighted = FOLDED[case]
    step = folded(make(shape, dtype, activation=activation), weighted)
    step = step._replace(gamma=step.gamma * 3)
    y = run(step._replace(grad_y=None)).y
    flat = (y == 0) | (y == 6) if activation == "relu6" else y == 0
    for pull in (INFINITY, -INFINITY, NAN):
        found = run(step._replace(grad_y=step.grad_y.masked_fill(flat, pull)))
        check(found, expected(step._replace(grad_y=step.grad_y.masked_fill(flat, 0))), dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_in_evaluation_the_gradient_at_infinite_values(activation, shape):
    """dx = γ / σ g f'(z): nothing is multiplied by x itself."""
    x, _ = anywhere(shape, torch.float32)
    x = x.nan_to_num(nan=-INFINITY, posinf=INFINITY, neginf=-INFINITY)
    step = Step(x, activation=activation, grad_y=make(shape).grad_y)
    found = run(step, given=constants(shape[1]), constant=True)
    wanted = step.grad_y if activation is None else torch.where(x > 0, step.grad_y, 0)
    assert_close(found.grad_x, wanted, "gradient")
