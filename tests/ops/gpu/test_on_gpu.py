"""On a GPU: the whole table of cases, and what only a GPU can show."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from tests.ops.gpu.table import *  # noqa: F403 (every test of it)
from tests.ops.gpu.table import there

import steadynorm as sn
from steadynorm.ops import accelerator
from steadynorm.ops.gpu import backend
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Statistics, Train
from support import assert_close, stats
from support_kernels import expected, make, randn

pytestmark = pytest.mark.gpu
LAYERS = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}
# Smooth activations where gradients are compared: at the kink of a ReLU rounding decides, once in a million values.
FILLING = 2**31 + 2**24  # elements that 32 bits do not count


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    monkeypatch.setattr(accelerator, "_found", {"cuda": backend})


def layer_for(step, **options):
    layer = LAYERS[step.x.dim()](step.x.shape[1], activation=step.activation, **options).cuda()
    with torch.no_grad():
        layer.weight.copy_(step.gamma)
        layer.bias.copy_(step.beta)
    return layer


def test_the_kernels_are_chosen(monkeypatch):
    monkeypatch.setattr(accelerator, "_found", {})
    monkeypatch.delenv(accelerator.NAME, raising=False)
    assert accelerator.kernels("cuda") is backend


@pytest.mark.parametrize("shape", [(64, 70), (9, 4, 33), (64, 2, 40, 40), (32, 96, 7, 7), (3, 4, 5, 6, 7)], ids=str)
def test_a_layer(shape):
    step = make(shape, residual=randn(*shape, seed=4).float(), activation="silu")
    layer, given = layer_for(step), there(step)
    x = given.x.requires_grad_()
    y = layer(x, residual=given.residual)
    y.backward(given.grad_y)
    right = expected(step)
    assert_close(y, right.y, "output")
    assert_close(x.grad, right.grad_x, "gradient")
    assert_close(layer.running_mean, 0.1 * right.mean, "statistic")
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype):
    step = make((16, 8, 20, 20))
    layer, given = layer_for(step), there(step)
    with torch.autocast("cuda", dtype):
        y = layer(given.x.to(dtype))
    assert y.dtype == dtype
    assert_close(y, expected(step._replace(x=step.x.to(dtype))).y, "output")


def test_the_same_bits_each_time():
    step = there(make((16, 12, 56, 56)))
    operands, spec = step.arguments()
    runs = []
    for _ in range(3):
        y, statistics = backend.train(operands, spec)
        runs.append([y, *statistics, *backend.backward(step.grad_y, None, None, operands, statistics, spec)[:3]])
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_the_host_waits_for_nothing():
    step = there(make((16, 12, 56, 56)))
    layer = layer_for(step)
    x = step.x.requires_grad_()
    layer(x).backward(step.grad_y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).backward(step.grad_y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", [(16, 12, 56, 56), (32, 64, 7, 7)], ids=["split", "on chip"])
def test_a_cuda_graph(shape):
    """Captured once, replayed on other data: output, gradients, running statistics and their counter."""
    step = make(shape, activation="silu")
    layer, given = layer_for(step), there(step)
    x = given.x.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            layer(x).backward(given.grad_y)
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    layer.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(given.grad_y)
    other = step._replace(x=randn(*shape, seed=9, mean=-2).float())
    for values in (step, other):
        with torch.no_grad():
            x.copy_(values.x)
        x.grad.zero_()
        graph.replay()
    right = expected(other)
    assert_close(y, right.y, "output")
    assert_close(x.grad, right.grad_x, "gradient")
    assert_close(layer.running_mean, 0.09 * expected(step).mean + 0.1 * right.mean, "statistic")
    assert int(layer.num_batches_tracked) == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled(mode):
    """Tuning runs kernels many times over: the running statistics are those of one batch."""
    step = make((32, 12, 28, 28), activation="silu")
    layer, given = layer_for(step), there(step)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    x = given.x.requires_grad_()
    y = compiled(x)
    y.backward(given.grad_y)
    right = expected(step)
    assert_close(y, right.y, "output")
    assert_close(x.grad, right.grad_x, "gradient")
    assert_close(layer.running_mean, 0.1 * right.mean, "statistic")
    assert_close(layer.running_var, 0.9 + 0.1 * stats(step.x).unbiased, "statistic")
    assert int(layer.num_batches_tracked) == 1


def test_on_a_stream_of_its_own():
    step = make((16, 12, 56, 56))
    layer, given = layer_for(step), there(step)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = layer(given.x)
    torch.cuda.current_stream().wait_stream(side)
    assert_close(y, expected(step).y, "output")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    step = make((16, 8, 20, 20))
    layer = layer_for(step).to("cuda:1")
    assert_close(layer(step.x.to("cuda:1")), expected(step).y, "output")


@pytest.mark.parametrize("shape", [(70_000, 3, 2, 2), (140_000, 5)], ids=["planes", "columns"])
def test_more_examples_than_a_grid_is_wide(shape):
    step = make(shape)
    operands, spec = there(step).arguments()
    y, statistics = backend.train(operands, spec)
    right = expected(step._replace(grad_y=None))
    assert_close(y, right.y, "output")
    assert_close(statistics.m2, right.m2, "variance", torch.float32)


@pytest.mark.skipif(torch.cuda.mem_get_info()[1] < 24 * 2**30, reason="needs 24 GiB of GPU memory")
@pytest.mark.parametrize("columns", [False, True], ids=["planes", "columns"])
def test_more_elements_than_32_bits_count(columns):
    """The last values are known, and found where they belong; a half of them 1 and a half 3 otherwise."""
    channels = 64
    shape = (FILLING // channels // 2**12, channels, 2**12) if not columns else (FILLING // channels, channels)
    x = torch.ones(shape, dtype=torch.float16, device="cuda")
    x[::2] = 3
    x[-1] = 7
    spec = Train(Layout.of(x), 0.0, None)
    given = Statistics(*(torch.full((channels,), v, dtype=torch.float64, device="cuda") for v in (1.0, 2.0, 1.0)))
    y = backend.normalize_by(given, Operands(x), spec)
    assert (y[-1] == 5).all()
    assert (y[:-1:2] == 1).all()
    assert (y[1:-1:2] == -1).all()
    del y
    found = backend.measure(x, None, spec.layout)
    sizes = [(x[i].numel() // channels, v) for i, v in ((-1, 7),)]
    odd = (shape[0] - 1) // 2
    sizes += [(odd * sizes[0][0], 1), ((shape[0] - 1 - odd) * sizes[0][0], 3)]
    n = sum(size for size, _ in sizes)
    mean = sum(size * v for size, v in sizes) / n
    m2 = sum(size * (v - mean) ** 2 for size, v in sizes)
    assert (found.count == n).all()
    torch.testing.assert_close(found.mean, torch.full_like(found.mean, mean), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.m2, torch.full_like(found.m2, m2), rtol=1e-6, atol=0)
