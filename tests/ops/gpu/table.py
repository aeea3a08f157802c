"""The kernels against the definition, case by case.

`test_kernels` runs this table in a process of its own where TRITON_INTERPRET=1, on the CPU; `test_on_gpu` on a GPU.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from steadynorm.activations import NAMES
from steadynorm.functional import batch_norm
from steadynorm.ops import accelerator, backends
from steadynorm.ops.commit import Running, updated
from steadynorm.ops.gpu import backend, blocks, committing, trial
from steadynorm.ops.reference import Gradients, Statistics
from support import ACTIVATIONS, assert_close, laid_out, normalized, stats, wide
from support_kernels import Step, expected, make, randn

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
_empty_like, _new_empty = torch.empty_like, Tensor.new_empty


def nan_like(x, **options):
    return _empty_like(x, **options).fill_(float("nan"))


def nan_new(x, size, **options):
    memory = _new_empty(x, size, **options)
    return memory.fill_(float("nan")) if memory.is_floating_point() else memory


def placed(t: Tensor) -> Tensor:
    """On the device, behind the same strides."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(DEVICE)
    return memory.as_strided(t.shape, t.stride(), t.storage_offset())


def there(step: Step) -> Step:
    """All its tensors on the device."""
    return Step(*(placed(t) if isinstance(t, Tensor) else t for t in step))


def run(step: Step) -> tuple[Tensor, Statistics, Gradients]:
    """A step on the kernels, into memory full of NaN: what they leave out shows."""
    step = there(step)
    operands, spec = step.arguments()
    with patch.object(torch, "empty_like", nan_like), patch.object(Tensor, "new_empty", nan_new):
        y, statistics = backend.train(operands, spec)
        found = backend.backward(step.grad_y, step.grad_mean, step.grad_m2, operands, statistics, spec)
    return y, statistics, found


def check(step: Step, output_scale: float = 1.0) -> None:
    """Both ways: kept on chip, where that can be, and split over two programs, each of several tiles."""
    check_one(step, output_scale)
    with split_over_two():
        check_one(step, output_scale)


@contextmanager
def split_over_two() -> Iterator[None]:
    """Small tiles, and two programs to share a channel."""
    blocks.blocks_of.cache_clear()
    with patch.multiple(blocks, _RESIDENT=0, _MOST_PARTS=2, _TILE_BYTES=1024):
        yield
    blocks.blocks_of.cache_clear()


def check_one(step: Step, output_scale: float) -> None:
    y, statistics, found = run(step)
    right, dtype, root = expected(step), step.x.dtype, step.arguments()[1].layout.count ** 0.5
    strides = torch.empty_like(step.x).stride()  # those that an elementwise function gives
    assert (y.dtype, y.stride()) == (dtype, strides)
    assert (found.x.dtype, found.x.stride()) == (dtype, strides)
    assert_close(statistics.count, right.count, "statistic", dtype)
    assert_close(statistics.mean, right.mean, "statistic", dtype)
    assert_close(statistics.m2, right.m2, "variance" if (right.m2 > 0).all() else "statistic", dtype)
    assert_close(y / output_scale, right.y / output_scale, "output", dtype)
    assert_close(found.x / output_scale, right.grad_x / output_scale, "gradient", dtype)
    if step.gamma is not None:  # sums: their error is in units of the root of how many there are
        assert_close(found.weight / root, right.grad_gamma / root, "gradient", dtype)
    if step.beta is not None:
        assert_close(found.bias / root, right.grad_beta / root, "gradient", dtype)
    if step.residual is not None:
        assert_close(found.residual, right.grad_residual, "gradient", dtype)


SHAPES = {
    "planes": (3, 4, 5, 7),
    "a row is longer than a tile": (2, 2, 2100),
    "more columns than a block": (37, 70),
    "one channel": (4, 1, 3, 3),
    "one position each": (5, 3, 1, 1),
    "many rows": (2500, 3),
    "channels not a power of two": (6, 12, 2, 2),
    "rows that end within a tile": (5, 2, 300),
    "more images than fit beside each other": (70, 2, 6),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, layout):
    step = make(shape, residual=randn(*shape, seed=4).float())
    check(step._replace(x=laid_out(step.x, layout), grad_y=laid_out(step.grad_y, layout)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype, layout):
    step = make((4, 3, 5, 5), dtype, residual=randn(4, 3, 5, 5, seed=4).to(dtype), activation="silu")
    check(step._replace(x=laid_out(step.x, layout)))


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (30, 5)], ids=["planes", "columns"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float64])
def test_a_residual_of_another_dtype(narrow, shape):
    """Its gradient has that dtype, and the others lose no digit by it."""
    step = make(shape, activation="silu", residual=randn(*shape, seed=4).to(narrow))
    for context in (nullcontext(), split_over_two()):
        with context:
            _, _, found = run(step)
        right, limit = expected(step), torch.bfloat16 if narrow == torch.bfloat16 else torch.float32
        assert found.residual.dtype == narrow
        assert_close(found.residual, right.grad_residual, "gradient", limit)
        assert_close(found.x, right.grad_x, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_activations(name, dtype):
    check(make((4, 3, 5, 5), dtype, activation=name, residual=randn(4, 3, 5, 5, seed=4, std=3).to(dtype)))


@pytest.mark.parametrize(
    "shape", [(4, 3, 6), (3, 2, 300), (24, 5)], ids=["planes", "rows longer than a tile", "columns"]
)
@pytest.mark.parametrize("kind", ["weight", "mask", "both"])
def test_weights_and_masks(kind, shape):
    """What is masked holds NaN, which reaches nothing."""
    positions = (shape[0], *shape[2:])
    step = make(shape, activation="sigmoid")  # which is 0 nowhere, as a masked output is
    mask, weight = randn(*positions, seed=7) > -0.4, randn(*positions, seed=8).abs().float()
    if kind != "weight":
        x = torch.where(mask[:, None], step.x, float("nan"))
        step = step._replace(x=x, mask=mask)
    check(step if kind == "mask" else step._replace(weight=weight))


def test_weights_that_are_all_zero():
    step = make((4, 3, 6), weight=torch.zeros(4, 6))
    y, statistics, found = run(step)
    assert not statistics.count.any()
    assert y.isfinite().all()
    assert found.x.isfinite().all()


def test_gradients_of_the_statistics():
    check(make((4, 3, 6), grad_mean=randn(3, seed=5), grad_m2=randn(3, seed=6)))


@pytest.mark.parametrize("affine", ["none", "gamma", "beta"])
def test_without_parts_of_the_affine_map(affine):
    step = make((4, 3, 6))
    check(step._replace(gamma=step.gamma if affine == "gamma" else None, beta=step.beta if affine == "beta" else None))


@pytest.mark.parametrize("shape", [(4, 2, 20, 20), (1600, 2)], ids=["planes", "columns"])
@pytest.mark.parametrize("mean", [1e4, 1e6, -1e6])
def test_a_mean_far_from_zero(mean, shape):
    """N(1e6, 1) in float32: the definition sees the rounded values, and so do the kernels."""
    check(make(shape, activation=None)._replace(x=randn(*shape, mean=mean).float()))


def sorted_images(x):
    """Rows that differ more among each other than within: the first tile's mean is far from the others'."""
    return x + 100 * torch.arange(len(x)).reshape(-1, *(1,) * (x.dim() - 1))


def one_outlier(x):
    x[(0,) * x.dim()] = 3e4
    return x


@pytest.mark.parametrize("shape", [(40, 2, 7, 9), (2000, 2)], ids=["planes", "columns"])
@pytest.mark.parametrize("data", [sorted_images, one_outlier, lambda x: x * 1e30])
def test_data_that_sums_in_float32_are_bad_at(data, shape):
    x = data(randn(*shape)).float()
    operands, spec = there(Step(x)).arguments()
    with split_over_two():
        y, statistics = backend.train(operands, spec)
    right = expected(Step(x))
    assert_close(statistics.m2, right.m2, "variance", torch.float32)
    assert_close(y, right.y, "output")


@pytest.mark.parametrize("shape", [(40, 2, 9), (900, 2)], ids=["planes", "columns"])
def test_nothing_counts_at_first(shape):
    """Weights begin with zeros, as where short sequences come first; the values far from zero come later."""
    weight = torch.zeros(shape[0], *shape[2:])
    weight[shape[0] // 3 :] = 0.5
    check(make(shape, activation=None, weight=weight)._replace(x=randn(*shape, mean=1e5).float()))


def test_eps_in_full():
    """A kernel is given numbers of float32, in which 1e-5 is off by 2e-8 of itself."""
    check(make((4, 3, 6), torch.float64, eps=1e-5)._replace(x=randn(4, 3, 6) * 1e-3))


def test_offsets_of_64_bits():
    for shape in ((4, 3, 5, 6), (9, 6)):
        blocks.blocks_of.cache_clear()
        with patch.object(blocks, "_FAR", 0):
            check(make(shape))
        blocks.blocks_of.cache_clear()


def test_a_constant_channel():
    """The variance is 0, and what is left is beta."""
    x = randn(4, 3, 6).float()
    x[:, 1] = 7.3
    check(make((4, 3, 6), activation=None)._replace(x=x), output_scale=300)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_channel(value):
    x = randn(4, 3, 6).float()
    x[2, 1, 3] = value
    y, statistics, found = run(make((4, 3, 6))._replace(x=x))
    assert not torch.isfinite(statistics.mean[1] + statistics.m2[1])
    for t in (y, found.x):
        assert t[:, [0, 2]].isfinite().all()
        assert not t[:, 1].isfinite().all()


def test_measure_and_normalize_apart_are_train():
    operands, spec = there(make((4, 3, 6))).arguments()
    with patch.object(blocks, "_RESIDENT", 0):
        y, statistics = backend.train(operands, spec)
    measured = backend.measure(operands.x, None, spec.layout)
    assert all(torch.equal(a, b) for a, b in zip(measured, statistics, strict=True))
    assert torch.equal(backend.normalize_by(measured, operands, spec), y)


def test_constant_statistics_pull_at_nothing():
    step = make((4, 3, 6), activation=None)
    step = there(step)
    operands, spec = step.arguments()
    given = Statistics(*map(placed, (torch.ones(3), torch.zeros(3), torch.full((3,), 4.0))))
    found = backend.backward(step.grad_y, None, None, operands, given, spec._replace(constant=True))
    slope = step.gamma.double() / (4 + spec.eps) ** 0.5
    assert_close(found.x, step.grad_y.double() * slope[:, None], "gradient")


def test_other_ranks_pull_at_the_statistics_alone():
    """Twice the same batch: each rank's sums double, and so does the count; own gradients stay."""
    step = make((4, 3, 6))
    operands, spec = there(step).arguments()
    alone = backend.measure(operands.x, None, spec.layout)
    both = Statistics(alone.count * 2, alone.mean, alone.m2 * 2)
    found = backend.backward(placed(step.grad_y), None, None, operands, both, spec, lambda sums: sums * 2)
    right = expected(step)
    assert_close(found.x, right.grad_x, "gradient")
    assert_close(found.bias / 5, right.grad_beta / 5, "gradient")


@pytest.fixture
def entrusted(monkeypatch):
    """The kernels compute for `batch_norm` on the device."""
    monkeypatch.setattr(accelerator, "_found", {DEVICE: backend})
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "_cpu", lambda: backend)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(4, 3, 3), (5, 2)], ids=["planes", "columns"])
def test_derivatives_of_first_and_second_order(entrusted, shape, activation):
    """By central differences of the kernels' own output."""
    mask = placed(torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(2)) > 0.2)

    def step(x, weight, bias, residual):
        options = {"activation": activation, "residual": residual, "mask": mask}
        return batch_norm(x, None, None, weight, bias, True, **options)

    sizes = (shape, (shape[1],), (shape[1],), shape)
    given = [placed(randn(*size, seed=i)).requires_grad_() for i, size in enumerate(sizes)]
    assert torch.autograd.gradcheck(step, given)
    assert torch.autograd.gradgradcheck(step, given)


def test_running_statistics_and_evaluation(entrusted):
    step = there(make((6, 3, 4, 4)))
    mean, var = placed(torch.zeros(3)), placed(torch.ones(3))
    batch_norm(step.x, mean, var, step.gamma, step.beta, True, 0.25)
    right = stats(step.x)
    assert_close(mean, 0.25 * right.mean, "statistic")
    assert_close(var, 0.75 + 0.25 * right.unbiased, "statistic")
    affine = wide(step.gamma), wide(step.beta)
    right = normalized(step.x, wide(mean), wide(var), *affine, activation=ACTIVATIONS["relu"])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = batch_norm(step.x, mean, var, step.gamma, step.beta, False, activation="relu")
        assert_close(y, right, "output")


@pytest.mark.parametrize("broken", [None, "gamma", "nothing is written", "an error"])
def test_the_trial(broken):
    """It finds what is wrong, and says so without an error of its own."""
    wrong = {
        None: lambda found, *_: found,
        "gamma": lambda found, *_: found._replace(weight=found.weight * 1.01),
        "nothing is written": lambda found, *_: found._replace(x=found.x * float("nan")),
        "an error": lambda found, *_: 1 / 0,
    }[broken]
    right = backend.backward
    with patch.object(backend, "backward", lambda *given: wrong(right(*given))):
        said = trial.failure(torch.device(DEVICE))
    assert (said is None) == (broken is None), said
    if broken == "an error":
        assert said == "ZeroDivisionError: division by zero"
    elif broken:
        assert "of a standard deviation" in said


def batch(kind: str, channels: int) -> Statistics:
    count, mean, m2 = torch.full((channels,), 9.0).double(), randn(channels), randn(channels, seed=1).abs() * 9
    match kind:
        case "not finite":
            mean[-1] = float("nan")
        case "too large for the buffer":
            m2[0] = 1e300
        case "too small" | "too small, weighted":
            count.fill_(1.0)
        case "empty" | "empty, weighted":
            count.zero_()
    return Statistics(count, mean, m2)


@pytest.mark.parametrize("channels", [3, 1030], ids=["one block", "two blocks"])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize(
    "kind",
    ["usual", "not finite", "too large for the buffer", "too small", "too small, weighted", "empty", "empty, weighted"],
)
def test_commit(kind, momentum, channels):
    """Against the commit in torch's operations, which has tests of its own by the definition."""
    statistics, weighted = Statistics(*map(placed, batch(kind, channels))), kind.endswith("weighted")
    buffers = randn(channels, seed=2).float(), 1 + randn(channels, seed=3).abs().float(), *torch.tensor([4, 2])
    running = Running(*map(placed, buffers))
    versions = running.mean._version, running.var._version
    right, refused = updated(running, statistics, momentum, weighted=weighted)
    found = committing.commit(*running, torch.stack(statistics), momentum, weighted)
    assert bool(found) == bool(refused)
    assert_close(running.mean, right.mean, "statistic")
    assert_close(running.var, right.var, "statistic")
    assert running[2:] == right[2:]
    assert (running.mean._version, running.var._version) == (versions[0] + 1, versions[1] + 1)
