"""The CPU backend against the definition: weights and masks, the halves that ranks exchange, values of every size.

As in test_backend.py, all memory is guarded, and tests share what kernels are compiled for.
"""

import numpy as np
import pytest
import torch

from steadynorm.ops.cpu import backend
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Statistics, Train
from support import assert_close, batch_norm, central_differences, laid_out, stats, threads, wide
from support_kernels import EPS, SHAPES, Result, Step, check, expected, guarded_memory, make, randn, run


def test_the_oracle_itself():
    """The derivatives in extended precision against central differences of the whole step."""
    step = make(
        (4, 2, 3), torch.float64, activation="gelu_tanh", residual=randn(4, 2, 3, seed=4),
        weight=randn(4, 3, seed=5).abs(), mask=randn(4, 3, seed=6) > -1,
        grad_mean=randn(2, seed=7), grad_m2=randn(2, seed=8),
    )  # fmt: skip
    found = expected(step)
    assert not step.mask.all()

    def loss(**changed):
        now = expected(step._replace(grad_y=None, **changed))
        return sum(
            (wide(g) * v).sum() for g, v in ((step.grad_y, now.y), (step.grad_mean, now.mean), (step.grad_m2, now.m2))
        )

    for name, got in (("x", "grad_x"), ("gamma", "grad_gamma"), ("beta", "grad_beta"), ("residual", "grad_residual")):
        differences = central_differences(lambda v, name=name: loss(**{name: v}), getattr(step, name))
        assert_close(torch.from_numpy(getattr(found, got).astype(np.float64)), differences, "gradient")


@pytest.mark.parametrize("shape", [(5, 1, 101, 103), (4099, 16), (3, 4, 20, 30), (30, 7)], ids=str)
def test_everything_at_once(shape):
    """In parts and not: residual, weights (some 0), mask (NaN behind it), a smooth activation."""
    positions = (shape[0], *shape[2:])
    mask = randn(*positions, seed=5) > -1
    hidden = ~mask.unsqueeze(1).expand(shape)
    step = make(
        shape, activation="silu", residual=randn(*shape, seed=4).bfloat16().masked_fill(hidden, float("nan")),
        weight=(randn(*positions, seed=6) - 0.3).clamp(min=0).float(), mask=mask,
        grad_mean=randn(shape[1], seed=7), grad_m2=randn(shape[1], seed=8) / 1000,
    )  # fmt: skip
    step = step._replace(
        x=step.x.masked_fill(hidden, float("nan")), grad_y=step.grad_y.masked_fill(hidden, float("inf"))
    )
    wanted = expected(step)
    for n in (1, 4):
        found = run(step, n)
        check(found, wanted, torch.float32)
        assert not found.grad_residual[hidden].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_where_a_weight_is_0_x_may_hold_anything_yet_has_its_output(shape):
    """Positions that are valid but weigh nothing: no share in the statistics, a gradient of their own."""
    weight = torch.ones(shape[0])
    weight[::3] = 0
    step = make(shape, weight=weight, mask=torch.ones(shape[0], dtype=torch.bool))
    check(run(step), expected(step), torch.float32)
    spoilt = step.x.clone()
    spoilt[0] = float("inf")
    found, wanted = run(step._replace(x=spoilt, grad_y=None)), expected(step)
    assert_close(found.mean, wanted.mean, "statistic", torch.float32)
    assert_close(found.m2 / found.count, wanted.m2 / wanted.count, "variance", torch.float32)
    assert_close(found.y[1:], wanted.y[1:], "output")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_that_are_all_0(shape):
    """No count: the statistics are 0 and nothing is divided by it; what is masked gets 0."""
    step = make(shape, mask=torch.zeros(shape[0], dtype=torch.bool))
    found = run(step._replace(x=torch.full_like(step.x, float("nan"))))
    for values in (*found[:6], found.grad_beta):
        assert not values.any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(gamma, beta, shape):
    step = make(shape)
    step = step._replace(gamma=step.gamma if gamma else None, beta=step.beta if beta else None)
    check(run(step), expected(step), torch.float32)


@pytest.mark.parametrize("shape", [(40, 3, 25, 25), (4099, 16), (30, 7)], ids=str)
def test_one_of_two_ranks(shape):
    """Normalised by the statistics of both, with what the other rank pulls at them added in backward."""
    both = make((2 * shape[0], *shape[1:]), grad_mean=randn(shape[1], seed=7), grad_m2=randn(shape[1], seed=8) / 1000)
    wanted = expected(both, own=slice(shape[0]))
    own, other = both._replace(x=both.x[: shape[0]], grad_y=both.grad_y[: shape[0]]), both.x[shape[0] :]
    axes = (0, *range(2, both.x.dim()))
    rest = both._replace(grad_mean=None, grad_m2=None)
    alone = expected(rest, own=slice(shape[0], None))
    assert other.shape == shape
    # The other rank's own sums, and half of each gradient of the statistics.
    from_other = torch.stack(
        [torch.from_numpy(t.astype(np.float64)) for t in (alone.grad_beta, alone.grad_gamma)]
        + [both.grad_mean / 2, both.grad_m2 / 2]
    )
    own = own._replace(grad_mean=both.grad_mean / 2, grad_m2=both.grad_m2 / 2)
    given = Statistics(*(torch.from_numpy(t.astype(np.float64)) for t in stats(both.x)))
    for n in (1, 4):
        found = run(own, n, given, lambda mine: mine + from_other)
        half = Result(wanted.y[: shape[0]], *wanted[1:4], wanted.grad_x[: shape[0]], *wanted[5:])
        check(found, half, torch.float32)
    assert len(axes) == both.x.dim() - 1


@pytest.mark.parametrize("shape", [(40, 3, 25, 25), (4099, 16), (30, 7)], ids=str)
def test_statistics_that_are_constants(shape):
    """A frozen layer: y is an affine map of x before the activation, and nothing flows through the statistics."""
    step = make(shape)
    per_channel, axes = (1, -1, *(1,) * (len(shape) - 2)), (0, *range(2, len(shape)))
    mean, variance, n = randn(shape[1], seed=7), randn(shape[1], seed=8).abs() + 0.5, 1e6
    given = Statistics(torch.full((shape[1],), n, dtype=torch.float64), mean, variance * n)
    invstd = 1 / np.sqrt(wide(variance) + wide(EPS)).reshape(per_channel)
    z = (wide(step.x) - wide(mean).reshape(per_channel)) * invstd
    gamma = wide(step.gamma).reshape(per_channel)
    u = z * gamma + wide(step.beta).reshape(per_channel)
    g = np.where(u > 0, wide(step.grad_y), 0)
    wanted = Result(
        np.maximum(u, 0), *(wide(t) for t in given), g * gamma * invstd, (g * z).sum(axes), g.sum(axes), None
    )
    for threads_used in (1, 4):
        check(run(step, threads_used, given, constant=True), wanted, torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_measuring_alone(weighted, shape):
    x = randn(*shape, mean=1e3).float()
    weight = randn(shape[0], seed=1).abs().float() if weighted else None
    layout = Layout.of(x)
    aligned = None if weight is None else weight.view(-1, *(1,) * (x.dim() - 1))
    with guarded_memory():
        count, mean, m2 = backend.measure(x, aligned, layout)
    wanted = stats(x, weight=weight)
    assert_close(count, wanted.count, "statistic", torch.float32)
    assert_close(mean, wanted.mean, "statistic", torch.float32)
    assert_close(m2 / count, wanted.biased, "variance", torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_the_statistics_alone(shape):
    """dμ/dx = w / n and dm2/dx = 2 w (x - μ), where y itself gets no gradient."""
    step = make(shape)
    operands, spec = step.arguments()
    _, statistics = backend.train(operands, spec)
    to_mean, to_m2 = randn(shape[1], seed=7), randn(shape[1], seed=8)
    found = backend.backward(None, to_mean, to_m2, operands, statistics, spec).x
    zero = step._replace(grad_y=torch.zeros_like(step.x), grad_mean=to_mean, grad_m2=to_m2)
    assert_close(found / 10, expected(zero).grad_x / 10, "gradient", torch.float32)


@pytest.mark.parametrize("shape", [(64, 5), (4, 5, 24, 24)], ids=["columns", "planes"])
def test_wide_ranges_of_values(shape):
    """Channels whose float32 sums lose digits are measured again in float64: outliers, 1e30, subnormals, constants."""
    x = randn(*shape).float()
    x[0, 0] = 1e4  # where sums are taken relative to
    x[:, 1] *= 1e30
    x[:, 2] *= 1e-40
    x[:, 3] = 7654321
    x[:, 4] = x[:, 4] * 1e-3 + 10
    for layout in ("contiguous", "channels_last"):
        found = run(Step(laid_out(x, layout)))
        assert_close(found.y, batch_norm(x), "output")
        wanted = stats(x)
        relative = np.abs(wide(found.m2) / np.where(wanted.m2 > 0, wanted.m2, 1) - (wanted.m2 > 0))
        assert relative.max() < 1e-6
        assert found.m2[3] == 0
        assert found.mean[3] == 7654321
        assert not found.y[:, 3].any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_large_mean_costs_no_digits(shape):
    """The mean itself, rounded to float32, is off by far more than the tolerance; so would everything be."""
    step = make(shape)._replace(x=randn(*shape, mean=-1e4).float())
    check(run(step), expected(step), torch.float32)


@pytest.mark.parametrize("shape", [(64, 4), (4, 4, 24, 24)], ids=["columns", "planes"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_channel_and_is_seen(wrong, shape):
    """Fast-math must not assume it away; the other channels know nothing of it."""
    step = make(shape)
    spoilt = step.x.clone()
    spoilt[-1, 2] = wrong
    found, wanted = run(step._replace(x=spoilt)), expected(step)
    others = [0, 1, 3]
    assert_close(found.y[:, others], wanted.y[:, others], "output")
    assert_close(found.grad_x[:, others], wanted.grad_x[:, others], "gradient")
    assert not found.m2[2].isfinite()
    assert found.y[:, 2].isnan().any()


def test_the_same_plan_serves_another_eps_layout_and_activation():
    """What is remembered from call to call is told apart by all that it depends on."""
    x = randn(16, 6).float()
    for eps in (1e-5, 1e-1):
        for activation in (None, "relu"):
            step = Step(x, activation=activation)
            operands, spec = step.arguments()
            y, _ = backend.train(operands, spec._replace(eps=eps))
            f = None if activation is None else lambda z: np.maximum(z, 0)
            assert_close(y, batch_norm(x, eps=eps, activation=f), "output")
    cube = randn(6, 6, 6).float()
    for dim in (1, 2):
        layout = Layout.of(cube, dim)
        y, _ = backend.train(Operands(cube), Train(layout, EPS, None))
        assert_close(y, batch_norm(cube, channel_dim=dim), "output")
    with threads(1):
        y, _ = backend.train(Operands(cube.transpose(0, 2)), Train(Layout.of(cube), EPS, None))
    assert_close(y, batch_norm(cube.transpose(0, 2)), "output")
