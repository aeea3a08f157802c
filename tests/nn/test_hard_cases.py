"""Cases a batch norm must get right: each in every layout, on 1, 2 and 4 threads, against the definition.

Every case says why its shape or its values are there, with the error of torch's own layer that it stems from.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import steadynorm as sn
from steadynorm.errors import RejectedBatchWarning, ShapeError
from support import LAYOUTS, assert_close, batch_norm, laid_out, normalized, stats, threads

THREADS = (1, 2, 4)
LAYER = {2: sn.BatchNorm1d, 3: sn.BatchNorm1d, 4: sn.BatchNorm2d, 5: sn.BatchNorm3d}


def randn(*shape: int, mean: float = 0, std: float = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std + mean


class Case(NamedTuple):
    """An input and the reason why it is hard."""

    why: str
    make: Callable[[], Tensor]


CASES = {
    "images_1000_to_1010": Case(
        "long float32 chains in channels_last are off by 2.29 standard deviations",
        lambda: torch.rand(32, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 10 + 1000,
    ),
    "mean_1e6_std_1": Case(
        "x and x² of a large mean cancel in float32: running_var 934 instead of 1",
        lambda: randn(16, 8, 32, 32, mean=1e6).float(),
    ),
    "mean_over_std_1e4": Case("the contract's far end", lambda: randn(16, 8, 24, 24, mean=-1e4).float()),
    "after_relu": Case(
        "half zeros, many positions, channels_last: an error of 0.016 that changes with the thread count",
        lambda: randn(64, 16, 112, 112).float().relu_(),
    ),
    "outlier_first": Case(
        "a shift by the first value loses digits where that one is the outlier",
        lambda: randn(8, 4, 16, 16).float().index_fill_(0, torch.tensor([0]), 1e4),
    ),
    "one_channel": Case("no parallelism over channels", lambda: randn(16, 1, 20, 20, mean=3).float()),
    "odd_channels": Case("not a multiple of any vector width", lambda: randn(4, 13, 7, 5, mean=3).float()),
    "one_position": Case("spatial size 1: contiguous and channels_last at once", lambda: randn(32, 5, 1, 1).float()),
    "two_values": Case("the smallest batch with a variance", lambda: randn(2, 3).float()),
    "big_batch": Case("a batch beyond 65535, the size of a GPU's grid", lambda: randn(70_000, 2, mean=5).float()),
    "volume": Case("five dimensions", lambda: randn(3, 4, 3, 4, 5, mean=10, std=0.1).float()),
    "tiny_variance": Case("a variance far below eps", lambda: randn(8, 3, 4, std=1e-6).float()),
    "subnormal": Case("values that float32 holds only as subnormals", lambda: randn(8, 3, std=1e-40).float()),
    "float64_large_mean": Case("float64 input must not be narrowed", lambda: randn(16, 3, 8, mean=1e4)),
    "float16_range": Case("sums overflow half precision", lambda: randn(64, 3, 16, mean=1e4, std=400).half()),
    "bfloat16": Case("8 bits of mantissa", lambda: randn(64, 3, 16, mean=30, std=4).bfloat16()),
}


@pytest.mark.parametrize("name", CASES)
def test_hard_case(name: str):
    x = CASES[name].make()
    large = x.numel() > 1_000_000  # float64 with numpy's pairwise sums is exact enough there, and ten times faster
    if large:
        rows = x.double().movedim(1, 0).flatten(1).numpy()
        mean, biased, unbiased = rows.mean(1), rows.var(1), rows.var(1, ddof=1)
        view = (1, -1, 1, 1)
        expected = torch.from_numpy((x.double().numpy() - mean.reshape(view)) / np.sqrt(biased + 1e-5).reshape(view))
    else:
        batch = stats(x)
        mean, unbiased, expected = batch.mean, batch.unbiased, batch_norm(x)
    for layout in LAYOUTS:
        laid = laid_out(x, layout)
        for n in THREADS:
            with threads(n), torch.no_grad():
                layer = LAYER[x.dim()](x.shape[1], momentum=1.0, dtype=x.dtype)
                y = layer(laid)
            if large:
                assert (y - expected).abs_().max() < 1e-5  # 2e-6 relative to |y| up to 5
            else:
                assert_close(y, expected, "output")
            assert_close(layer.running_mean, mean, "statistic", torch.float32)
            if name != "subnormal":  # there the variance, 1e-80, is 0 in a float32 buffer
                assert_close(layer.running_var, unbiased, "variance", torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("n", THREADS)
def test_the_contract_on_the_variance(layout, ratio, n):
    """The relative error of the variance stays under 1e-6 for float32 input up to |mean| / std = 1e4."""
    for std in (1e-3, 1.0, 1e3):
        x = randn(8, 5, 16, 16, mean=ratio * std, std=std).float()
        with threads(n):
            m = sn.Moments.of(laid_out(x, layout))
        assert np.abs(m.variance().numpy() / stats(x).biased - 1).max() < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", THREADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_constant_channel_gives_exactly_beta(layout, n, dtype):
    """The framework returns 56 for a channel that is 7654321 everywhere."""
    values = torch.tensor([7654321.0, 0.1, -1e30, 1 / 3, 0.0], dtype=torch.float64)
    if dtype == torch.float16:
        values = values.clamp(-6e4, 6e4)
    x = values.to(dtype).view(1, 5, 1, 1).expand(7, 5, 3, 11)
    layer = sn.BatchNorm2d(5, dtype=dtype)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.5, -1.25, 3.0, 0.0, 1e-3]))
        layer.weight.fill_(3.0)
    for options in ({}, {"sample_weight": torch.tensor([0.1, 0.7, 0.3, 1 / 3, 0.9, 0.2, 1.1])}):
        with threads(n):
            y = layer(laid_out(x, layout), **options)
        assert torch.equal(y, layer.bias.view(1, 5, 1, 1).expand_as(y))
    torch.testing.assert_close(layer.running_var, torch.full_like(layer.running_var, 0.81))  # 0.9² of its start at 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", THREADS)
def test_values_around_1e30(layout, n):
    """Squares overflow float32: the framework returns 0 everywhere. The variance does not fit a float32 buffer."""
    x = (randn(8, 3, 6, 6) * 1e30).float()
    layer = sn.BatchNorm2d(3)
    with threads(n), pytest.warns(RejectedBatchWarning, match="variance too large for the buffer"):
        y = layer(laid_out(x, layout))
    assert_close(y, batch_norm(x), "output")
    assert layer.rejected_batches == 1
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    wide = sn.BatchNorm2d(3, momentum=1.0).double()  # float64 buffers hold it
    wide(laid_out(x.double(), layout))
    np.testing.assert_allclose(wide.running_var.numpy(), stats(x).unbiased.astype(float), rtol=1e-10)


@pytest.mark.parametrize("narrow", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_half_precision_layers_keep_wide_running_statistics(narrow):
    """float16 buffers overflow at a variance of 65504 (std 400 gives 160000), and evaluation then returns 0."""
    layer = narrow(sn.BatchNorm1d(3, momentum=1.0))
    assert layer.weight.dtype in (torch.float16, torch.bfloat16)
    x = randn(64, 3, 16, std=400).to(layer.weight.dtype)
    layer(x)
    assert layer.running_var.dtype == layer.running_mean.dtype == torch.float32
    assert_close(layer.running_var, stats(x).unbiased, "variance")
    y = layer.eval()(x)
    assert_close(y, normalized(x, stats(x).mean, stats(x).unbiased), "output")


def test_half_precision_by_constructor_and_by_assigned_state_keeps_them_wide():
    """Both ways go around `.half()`, where the widening would otherwise be caught."""
    built = sn.BatchNorm1d(3, dtype=torch.float16)
    assert built.weight.dtype == torch.float16
    assert built.running_var.dtype == torch.float32
    state = nn.BatchNorm1d(3, dtype=torch.float16).state_dict()
    state["running_mean"] += 2
    assigned = sn.BatchNorm1d(3)
    assigned.load_state_dict(state, assign=True)
    assert assigned.weight.dtype == torch.float16
    assert assigned.running_mean.dtype == assigned.running_var.dtype == torch.float32
    assert assigned.running_mean.tolist() == [2, 2, 2]


def test_bfloat16_training_does_not_stall():
    """bfloat16 buffers stop moving once momentum times the difference is below their spacing: 2.00 instead of 4.75."""
    layer = sn.BatchNorm1d(1, momentum=0.001).bfloat16()
    x = torch.tensor([[4.0], [6.0]], dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3000):
            layer(x)
    assert layer.running_mean.item() == pytest.approx(5 * (1 - 0.999**3000), rel=1e-4)  # 4.75


def test_narrowing_loses_no_digit_of_the_running_statistics():
    layer = sn.BatchNorm1d(2)
    layer.running_mean.copy_(torch.tensor([1 / 3, 1e5]))
    before = layer.running_mean.clone()
    assert torch.equal(layer.half().running_mean, before)
    assert torch.equal(layer.float().bfloat16().running_mean, before)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_an_empty_batch_changes_nothing(shape):
    """The framework counts it."""
    layer = sn.BatchNorm1d(3)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    y.backward(torch.empty(shape))
    assert x.grad.shape == shape
    assert layer.weight.grad.tolist() == [0, 0, 0]
    assert layer.eval()(x).shape == shape


def test_an_all_masked_batch_changes_nothing_and_returns_0():
    """Count 0 must not divide; NaN in the padding must not appear."""
    layer = sn.BatchNorm1d(3, activation="sigmoid")
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.full((4, 3, 5), float("nan"), requires_grad=True)
    y = layer(x, mask=torch.zeros(4, 5, dtype=torch.bool))
    assert torch.equal(y, torch.zeros(4, 3, 5))
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_a_mask_that_leaves_one_value_has_no_variance_and_is_not_committed():
    layer = sn.BatchNorm1d(2)
    torch.nn.init.constant_(layer.bias, 0.5)
    y = layer(randn(3, 2).float(), mask=torch.tensor([False, True, False]))
    assert y.tolist() == [[0, 0], [0.5, 0.5], [0, 0]]
    assert layer.num_batches_tracked.item() == 0


def test_gamma_0():
    """A zero-initialised γ (the last layer of a residual branch): y is β, dx is 0, yet γ has its gradient."""
    layer = sn.BatchNorm1d(3)
    nn.init.zeros_(layer.weight)
    x, upstream = randn(6, 3, mean=1e3).float().requires_grad_(), randn(6, 3).float().flip(0)
    y = layer(x)
    assert torch.equal(y, torch.zeros_like(y))
    y.backward(upstream)
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert_close(layer.weight.grad, (batch_norm(x) * upstream.double().numpy()).sum(0), "gradient")


@pytest.mark.parametrize("training", [True, False])
def test_no_channels_where_five_are_expected(training):
    """The framework accepts an input of 0 channels."""
    with pytest.raises(ShapeError, match=r"expected 5 channels in dimension 1, got 0"):
        sn.BatchNorm1d(5).train(training)(torch.zeros(4, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_in_every_layout_and_thread_count(layout, dtype):
    """dx = γ/σ (g - mean(g) - z mean(g z)) in extended precision, with |mean| / std of 1e3."""
    x, g = randn(4, 3, 5, 6, mean=1e3).to(dtype), randn(4, 3, 5, 6).flip(0).to(dtype)
    batch, axes = stats(x), (0, 2, 3)
    z = normalized(x, batch.mean, batch.biased)
    wide = g.double().numpy().astype(np.longdouble)
    invstd = 1 / np.sqrt(batch.biased + np.longdouble(1e-5)).reshape(1, 3, 1, 1)
    expected = invstd * (wide - wide.mean(axes, keepdims=True) - z * (wide * z).mean(axes, keepdims=True))
    for n in THREADS:
        leaf = laid_out(x, layout).detach().requires_grad_()
        layer = sn.BatchNorm2d(3, dtype=dtype)
        with threads(n):
            layer(leaf).backward(laid_out(g, layout))
        assert_close(leaf.grad, expected, "gradient")
        assert_close(layer.weight.grad, (wide * z).sum(axes), "gradient")
        assert_close(layer.bias.grad, wide.sum(axes), "gradient")


def test_the_same_input_gives_the_same_bits():
    x, g = randn(16, 3, 20, 20).float(), randn(16, 3, 20, 20).flip(0).float()
    for n in THREADS:
        runs = []
        with threads(n):
            for _ in range(2):
                leaf = x.clone().requires_grad_()
                y = sn.BatchNorm2d(3, activation="gelu")(leaf)
                y.backward(g)
                runs.append((y.detach(), leaf.grad))
        assert torch.equal(runs[0][0], runs[1][0])
        assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_bad_batch_does_not_poison_the_running_statistics(wrong):
    """In the framework one infinite value is still there after 200 clean batches."""
    layer, x = sn.BatchNorm1d(2, momentum=0.5), randn(16, 2).float()
    spoilt = x.clone()
    spoilt[3, 1] = wrong
    layer(x)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.warns(RejectedBatchWarning):
        layer(spoilt)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    assert layer.rejected_batches == 1
    layer(x)
    assert layer.num_batches_tracked.item() == 2
    assert_close(layer.running_mean, 0.75 * stats(x).mean, "statistic")
