"""The CPU backend against the definition: every way through memory, dtype, layout, activation and option.

Each step runs where all that the backend allocates holds NaN and lies between guards: an element that is not written,
or written to where it should not be, fails the comparison or the guard. Tests share what kernels are compiled for
(dtypes, kind of activation, which arrays there are): compiling, not running them, is what they take time for.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from steadynorm.activations import NAMES
from steadynorm.ops.cpu import backend
from steadynorm.ops.cpu.geometry import geometry
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Statistics, Train
from support import assert_close, batch_norm, central_differences, laid_out, stats, threads, wide
from support_kernels import EPS, Result, Step, check, expected, guarded_memory, randn, run


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


class Path(NamedTuple):
    """A shape, the threads, and what `geometry` must make of them for the shape to test what it is here for."""

    why: str
    shape: tuple[int, ...]
    threads: int
    columns: bool
    chunks: bool  # whether there are several
    parts: bool
    folded: bool = False  # whether a row has several examples


PATHS = [
    Path("planes longer than a run of 1024, the last run shorter", (3, 5, 33, 40), 1, False, True, False),
    Path("planes shorter than a run, too few rows for columns", (3, 4, 10), 1, False, True, False),
    Path("one channel on many threads: parts that begin within a plane", (5, 1, 101, 103), 4, False, False, True),
    Path("two channels in parts", (3, 2, 109, 111), 2, False, True, True),
    Path("one example", (1, 4, 30, 30), 1, False, True, False),
    Path("more threads than channels, which are too small for parts", (1, 2, 150, 110), 4, False, True, False),
    Path("many channels on several threads", (2, 33, 25, 25), 4, False, True, False),
    Path("rows of a whole example", (20, 700), 1, True, False, False),
    Path("more rows than a block of 64, in fours and a rest", (150, 600), 1, True, False, False),
    Path("rows of fewer columns than a vector holds several times", (37, 48), 1, True, False, False),
    Path("26 examples a row, four rows but for the last one's end", (99, 19), 1, True, False, False, True),
    Path("a width that is no multiple of a vector", (55, 19), 1, True, False, False, True),
    Path("fewer examples than fit into a row", (5, 3), 1, True, False, False, True),
    Path("the smallest batch with a variance", (2, 1), 1, True, False, False, True),
    Path("more channels than a chunk holds, the last chunk shorter", (9, 2500), 1, True, True, False),
    Path("two full chunks, spatial size 1", (6, 2048, 1, 1), 1, True, True, False),
    Path("as many chunks as keep two threads busy without parts", (8, 5000), 2, True, True, False),
    Path("small planes, an example a row", (9, 3, 7, 5), 1, True, False, False),
    Path("small planes, 17 examples a row", (40, 3, 2, 5), 1, True, False, False, True),
    Path("small planes in chunks of 24 channels", (5, 40, 6, 7), 1, True, True, False),
    Path("the largest of small planes: a chunk holds two", (4, 5, 511), 1, True, True, False),
    Path("parts of rows that are folded, the last row shorter", (4099, 16), 4, True, False, True, True),
    Path("parts of several chunks, more than stays in the cache", (360, 1500), 2, True, True, True),
    Path("small planes in parts", (600, 2, 5, 6), 2, True, False, True, True),
    Path("small planes: all rows of some channels for each thread", (64, 8, 8, 10), 2, True, True, False),
    Path("all rows of some columns for each thread", (140, 500), 2, True, True, False),
    Path("one channel, one position: a row of examples", (40001, 1), 2, True, False, True, True),
]  # fmt: skip


@cache
def answer(shape: tuple[int, ...]) -> Result:
    return expected(make(shape))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.shape}, {path.why}")
def test_every_way_through_memory(path):
    step = make(path.shape)
    read = geometry(step.x, Layout.of(step.x), path.threads, False)
    folded = read.width > path.shape[1] * read.inner
    assert (read.columns, read.chunks > 1, read.parts > 1, folded) == path[3:], "the shape no longer takes its path"
    check(run(step, path.threads), answer(path.shape), torch.float32)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("shape", [(140, 500), (5, 1, 101, 103), (600, 2, 5, 6)], ids=str)
def test_any_number_of_threads_gives_the_same_to_tolerance(shape, n):
    check(run(make(shape), n), answer(shape), torch.float32)


def channels_last_of_3d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


LAYOUTS = {
    "contiguous": ((6, 3, 8, 9), torch.Tensor.contiguous),
    "channels last, 2d": ((6, 3, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels last, 2d, one example": ((1, 3, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels last, 3d": ((3, 5, 4, 3, 5), channels_last_of_3d),
    "channels last, (N, C, L)": ((6, 5, 7), lambda x: laid_out(x, "channels_last")),
    "batch fastest": ((6, 3, 8, 9), lambda x: laid_out(x, "permuted")),
    "batch fastest, (N, C)": ((40, 7), lambda x: laid_out(x, "permuted")),
    "width before height": ((6, 3, 24, 25), lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
    "channels between the axes": ((6, 3, 8, 9), lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)),
    "channels first": ((6, 3, 30, 9), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
    "sliced": ((6, 3, 8, 9), lambda x: laid_out(x, "sliced")),
    "sliced channels last": ((6, 3, 8, 9), lambda x: laid_out(torch.cat([x, x], 1), "channels_last")[:, :3]),
    "offset": ((6, 3, 8, 9), lambda x: laid_out(x, "offset")),
    "expanded": ((6, 3, 8, 9), lambda x: x[:1].expand_as(x)),
    "one channel, channels last": ((6, 1, 8, 9), lambda x: x.contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(name):
    shape, lay_out = LAYOUTS[name]
    step = make(shape)
    step = step._replace(x=lay_out(step.x))
    wanted = expected(step)
    for upstream in (step.grad_y, lay_out(step.grad_y)):  # laid out as the input is, or not
        if name == "expanded" and upstream is not step.grad_y:
            wanted = expected(step._replace(grad_y=upstream))
        found = run(step._replace(grad_y=upstream))
        check(found, wanted, torch.float32)
        assert found.y.stride() == found.grad_x.stride() == torch.empty_like(step.x).stride()


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_and_masks_in_every_layout(name):
    """One weight per position, wherever in memory that is; what is masked holds NaN."""
    shape, lay_out = LAYOUTS[name]
    positions = (shape[0], *shape[2:])
    mask = randn(*positions, seed=5) > -1
    hidden = ~mask.unsqueeze(1).expand(shape)
    step = make(shape, weight=(randn(*positions, seed=6).abs() + 0.1).float(), mask=mask)
    if name != "expanded":
        step = step._replace(
            x=step.x.masked_fill(hidden, float("nan")), grad_y=step.grad_y.masked_fill(hidden, float("nan"))
        )
    step = step._replace(x=lay_out(step.x))
    found, wanted = run(step), expected(step)
    check(found, wanted, torch.float32)
    assert not found.y[hidden].any()
    assert not found.grad_x[hidden].any()


@pytest.mark.parametrize("shape", [(3, 4, 20, 30), (30, 7)], ids=["planes", "columns"])
@pytest.mark.parametrize("activation", [None, *NAMES])
def test_every_activation(activation, shape):
    step = make(shape, activation=activation)
    step = step._replace(gamma=step.gamma * 3)  # so that both ends of relu6 and hardswish are met
    check(run(step), expected(step), torch.float32)


SHAPES = {"planes": (3, 4, 20, 30), "columns": (30, 7)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dtype", "affine", "residual", "activation", "weighted"),
    [
        (torch.float64, torch.float64, torch.float64, "gelu_tanh", True),
        (torch.float64, torch.float64, None, None, False),
        (torch.bfloat16, torch.float32, torch.bfloat16, "relu", False),
        (torch.float16, torch.float16, torch.float32, "relu6", True),
    ],
)
def test_dtypes(dtype, affine, residual, activation, weighted, shape):
    """float32 arithmetic for the half precisions; weight, bias and residual may be of other dtypes."""
    step = make(shape, dtype, activation=activation)
    step = step._replace(gamma=(step.gamma * 2).to(affine), beta=step.beta.to(affine))
    if residual is not None:
        step = step._replace(residual=randn(*shape, seed=4).to(residual))
    if weighted:
        step = step._replace(weight=randn(shape[0], seed=5).abs().float())
    found, wanted = run(step), expected(step)
    check(found, wanted, dtype)
    assert (found.y.dtype, found.grad_x.dtype, found.grad_gamma.dtype) == (dtype, dtype, affine)
    if residual is not None:
        assert found.grad_residual.dtype == residual


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_precision_results_are_the_nearest_ones(shape):
    """The sum with the residual and the activation are taken before anything is rounded, and then it is to nearest."""
    step = make(shape, torch.bfloat16, residual=randn(*shape, seed=4).bfloat16())
    step = step._replace(gamma=step.gamma.float(), beta=step.beta.float())
    found, wanted = run(step), expected(step)
    nearest = torch.from_numpy(wanted.y.astype(np.float64)).bfloat16()
    off = (found.y != nearest).double().mean()  # a few lie so near to a tie that float32's own rounding decides
    assert off < 2e-3
    assert ((found.y.double() - nearest.double()).abs() <= nearest.double().abs() * 2**-7).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced"])
def test_a_residual_behind_any_strides(layout, shape):
    step = make(shape)
    residual = randn(*shape, seed=4).float()
    check(
        run(step._replace(residual=laid_out(residual, layout))),
        expected(step._replace(residual=residual)),
        torch.float32,
    )


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


def test_weight_and_bias_of_different_dtypes():
    """Neither is narrowed to the other's dtype: one has too few digits for that, the other too small a range."""
    step = make((30, 7))
    gamma, beta = step.gamma.bfloat16(), step.beta.half()
    gamma[0] = 2.0**17
    step = step._replace(gamma=gamma, beta=beta)
    found, wanted = run(step), expected(step)
    assert_close(found.y, wanted.y, "output")
    assert_close(found.grad_gamma, wanted.grad_gamma, "gradient")
    assert_close(found.grad_beta, wanted.grad_beta, "gradient")
    scale = wide(gamma).reshape(1, -1)
    assert_close(found.grad_x / torch.from_numpy(scale.astype(np.float32)), wanted.grad_x / scale, "gradient")


def test_a_weight_that_is_not_contiguous():
    step = make((30, 7))
    padded = torch.stack([step.gamma, torch.full_like(step.gamma, float("nan"))], 1)
    check(run(step._replace(gamma=padded[:, 0])), expected(step), torch.float32)


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
