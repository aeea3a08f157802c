"""Draws for one tensor: variance gain^2 / fan, bounded where uniform, from the generator given."""

import math

import pytest
import torch
from torch import nn

from steadynorm import init
from steadynorm.errors import ArgumentError, DtypeError, ShapeError

ELU_GAIN = 1.2451983007007066  # checked against mpmath in test_theory.py


@pytest.mark.parametrize("fill", [init.he_normal_, init.he_uniform_])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", 30 * 9), ("fan_out", 200 * 9)])
def test_mean_and_variance_of_the_draws(fill, mode, fan):
    weight = torch.empty(200, 30, 3, 3)
    assert fill(weight, "elu", mode=mode, generator=torch.Generator().manual_seed(1)) is weight
    n = weight.numel()
    std = ELU_GAIN / math.sqrt(fan)
    assert abs(float(weight.double().mean())) < 5 * std / math.sqrt(n)
    assert float(weight.double().std()) == pytest.approx(std, rel=5 / math.sqrt(n))  # normal: sd of s is s / sqrt(2 n)
    kurtosis = float((weight.double() / std).pow(4).mean())
    assert kurtosis == pytest.approx(3.0 if fill is init.he_normal_ else 9 / 5, rel=0.05)
    if fill is init.he_uniform_:
        assert float(weight.abs().max()) <= math.sqrt(3) * std * (1 + 1e-6)


def test_the_generator_decides_and_the_global_one_is_left_alone():
    before = torch.get_rng_state()
    first, second = (init.he_normal_(torch.empty(3, 4), generator=torch.Generator().manual_seed(5)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_keeps_requiring_its_gradient():
    weight = nn.Parameter(torch.empty(3, 4))
    init.he_uniform_(weight)
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floating_dtypes(dtype):
    weight = init.he_normal_(torch.full((50, 40), math.nan, dtype=dtype))
    assert weight.dtype == dtype
    assert float(weight.double().std()) == pytest.approx(math.sqrt(2 / 40), rel=0.1)


def test_nothing_to_fill():
    assert init.he_normal_(torch.empty(3, 0)).numel() == 0


@pytest.mark.parametrize(
    ("tensor", "arguments", "error", "message"),
    [
        (torch.empty(3), {}, ShapeError, r"\(3,\)"),
        (torch.empty(3, 4, dtype=torch.int64), {}, DtypeError, "int64"),
        (torch.empty(3, 4), {"mode": "fan_avg"}, ArgumentError, "fan_avg"),
        (torch.empty(3, 4), {"activation": torch.zeros_like}, ArgumentError, "gain"),
        (nn.LazyLinear(4).weight, {}, ArgumentError, "forward"),
    ],
)
def test_errors(tensor, arguments, error, message):
    with pytest.raises(error, match=message):
        init.he_normal_(tensor, **arguments)
