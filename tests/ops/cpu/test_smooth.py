"""The smooth activations of the CPU kernels: against mpmath in both tails, at kinks, at the ends of the range."""

import math
import re
from functools import cache

import mpmath as mp
import numpy as np
import pytest

from steadynorm.activations import NAMES, Activation
from steadynorm.errors import ArgumentError

numba = pytest.importorskip("numba")
from steadynorm.ops.cpu.smooth import code_of, slopes, values  # noqa: E402

PIECEWISE_LINEAR = {"relu", "relu6", "leaky_relu"}
SMOOTH = [Activation(name) for name in NAMES if name not in PIECEWISE_LINEAR]
VARIANTS = [
    *SMOOTH,
    Activation("elu", (0.3,)),
    Activation("celu", (2.3,)),
    Activation("softplus", (1.7, 12.0)),
    Activation("softplus", (-0.7, 5.0)),
]
DTYPES = [np.float32, np.float64]
NAN, INF = math.nan, math.inf

_RANDOM = np.random.default_rng(20)
POINTS = np.concatenate(
    [
        _RANDOM.standard_normal(50) * 2,  # where a batch norm puts its values
        _RANDOM.uniform(-14, 14, 30),  # the tails of the normal distribution, and beyond float32's
        _RANDOM.uniform(-87, 87, 16),  # where exp comes to the end of float32
        10.0 ** _RANDOM.uniform(-35, 0, 12),
        -(10.0 ** _RANDOM.uniform(-35, 0, 12)),
        [-300.3, -37.1, -3.001, -2.999, 2.999, 3.001, 300.3],
    ]
)


def applied(function, f, points, dtype):
    block = np.array(points, dtype)
    function(*code_of(f), block, block.size)
    return block


def exactly(f, z):
    """f(z) in mpmath, from the definition; (1 + tanh y) / 2 is written as the sigmoid of 2 y, which loses no digits."""
    p = [mp.mpf(value) for value in f.params]
    match f.name:
        case "elu":
            return z if z > 0 else p[0] * mp.expm1(z)
        case "celu":
            return z if z > 0 else p[0] * mp.expm1(z / p[0])
        case "selu":  # the constants as the paper prints them (Klambauer et al. 2017)
            scale, alpha = mp.mpf("1.0507009873554804934193349852946"), mp.mpf("1.6732632423543772848170429916717")
            return scale * (z if z > 0 else alpha * mp.expm1(z))
        case "silu":
            return z / (1 + mp.exp(-z))
        case "gelu":
            return z * mp.ncdf(z)
        case "gelu_tanh":
            return z / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))
        case "hardswish":
            return z * min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6
        case "hardsigmoid":
            return min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6
        case "sigmoid":
            return 1 / (1 + mp.exp(-z))
        case "tanh":
            return mp.tanh(z)
        case "softplus":
            return z if p[0] * z > p[1] else mp.log1p(mp.exp(p[0] * z)) / p[0]
        case "mish":
            return z * mp.tanh(mp.log1p(mp.exp(z)))
    raise ValueError(f.name)


@cache
def derivatives(f, dtype):
    """f, f' and f'' of the points as the dtype has them."""
    found = []
    for point in POINTS.astype(dtype):
        with mp.workdps(60 + int(abs(point))):  # elu, tanh: f' is what is left where f has become -1 or 1
            z = mp.mpf(float(point))
            found.append([exactly(f, z), *(mp.diff(lambda t: exactly(f, t), z, n) for n in (1, 2))])
    return list(zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", VARIANTS, ids=str)
def test_value_and_slope_are_good_to_a_few_units_in_the_last_place(f, dtype):
    points, limits = POINTS.astype(dtype), np.finfo(dtype)
    exact = derivatives(f, dtype)
    for order, function in enumerate([values, slopes]):
        found = applied(function, f, points, dtype)
        assert found.dtype == dtype
        for z, got, wanted, change in zip(points, found, exact[order], exact[order + 1], strict=True):
            error = abs(mp.mpf(float(got)) - wanted)
            where = f"order {order} at {z!r}: {got!r}, not {mp.nstr(wanted, 20)}"
            assert error <= 2 * float(limits.eps) * max(1, abs(wanted)), where
            # Relative to f, too, to as much as rounding z itself would move it; what is subnormal has no more digits.
            tolerated = 4 * float(limits.eps) * (abs(wanted) + abs(mp.mpf(float(z)) * change))
            assert error <= tolerated + float(limits.tiny), where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, 1e30, None])
@pytest.mark.parametrize(
    ("name", "left", "right", "left_slope", "right_slope"),
    [
        ("elu", -1, None, 0, 1),
        ("selu", -1.7580993408473766, None, 0, 1.0507009873554805),
        ("celu", -1, None, 0, 1),
        ("silu", 0, None, 0, 1),
        ("gelu", 0, None, 0, 1),
        ("gelu_tanh", 0, None, 0, 1),
        ("hardswish", 0, None, 0, 1),
        ("hardsigmoid", 0, 1, 0, 0),
        ("sigmoid", 0, 1, 0, 0),
        ("tanh", -1, 1, 0, 0),
        ("softplus", 0, None, 0, 1),
        ("mish", 0, None, 0, 1),
    ],
)
def test_large_values_reach_the_limits(name, left, right, left_slope, right_slope, size, dtype):
    size = float(np.finfo(dtype).max) / 2 if size is None else size
    f, far = Activation(name), np.array([-size, size], dtype)
    right = right_slope * far[1] if right is None else right  # None: the line of that slope
    relative = 2 * np.finfo(dtype).eps
    np.testing.assert_allclose(applied(values, f, far, dtype), np.array([left, right], dtype), rtol=relative)
    np.testing.assert_allclose(applied(slopes, f, far, dtype), [left_slope, right_slope], rtol=relative)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", VARIANTS, ids=str)
def test_nan_stays_nan(f, dtype):
    assert np.isnan(applied(values, f, [NAN] * 19, dtype)).all()
    found = applied(slopes, f, [NAN] * 19, dtype)
    if f.name == "hardsigmoid":  # piecewise constant, as in torch
        assert (found == 0).all()
    else:
        assert np.isnan(found).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("elu", -1, INF),
        ("celu", -1, INF),
        ("silu", NAN, INF),  # NaN: -inf times 0, as in torch
        ("gelu", NAN, INF),
        ("gelu_tanh", NAN, INF),
        ("hardswish", NAN, INF),
        ("hardsigmoid", 0, 1),
        ("sigmoid", 0, 1),
        ("tanh", -1, 1),
        ("softplus", 0, INF),
        ("mish", NAN, INF),
    ],
)
def test_infinities(name, left, right, dtype):
    np.testing.assert_array_equal(applied(values, Activation(name), [-INF, INF], dtype), [left, right])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("f", "kink", "value", "slope"),
    [
        (Activation("elu", (0.3,)), 0, 0, 0.3),
        (Activation("celu", (2.0,)), 0, 0, 1),
        (Activation("selu"), 0, 0, 1.7580993408473766),
        (Activation("hardswish"), -3, 0, 0),
        (Activation("hardswish"), 3, 3, 1),
        (Activation("hardsigmoid"), -3, 0, 0),
        (Activation("hardsigmoid"), 3, 1, 0),
        (Activation("softplus", (2.0, 4.0)), 2, math.log1p(math.exp(4)) / 2, 1 / (1 + math.exp(-4))),
        (Activation("softplus", (2.0, 4.0)), 2.0000005, 2.0000005, 1),
    ],
    ids=str,
)
def test_a_kink_has_the_value_and_the_slope_that_torch_gives_it(f, kink, value, slope, dtype):
    relative = 2 * np.finfo(dtype).eps
    np.testing.assert_allclose(applied(values, f, [kink], dtype), np.array([value], dtype), rtol=relative)
    np.testing.assert_allclose(applied(slopes, f, [kink], dtype), np.array([slope], dtype), rtol=relative)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [values, slopes])
@pytest.mark.parametrize("f", SMOOTH, ids=str)
def test_only_the_first_n_change_whatever_n(f, function, dtype):
    points = POINTS[:80].astype(dtype)
    whole = applied(function, f, points, dtype)
    for n in (0, 1, 7, 33, 79):
        block = points.copy()
        function(*code_of(f), block, n)
        np.testing.assert_array_equal(block[n:], points[n:])
        np.testing.assert_allclose(block[:n], whole[:n], rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [values, slopes])
def test_every_loop_is_vectorised_in_the_dtype_of_the_block(function, dtype):
    applied(function, Activation("silu"), [0.0], dtype)
    kind = numba.typeof(np.empty(0, dtype))
    (signature,) = [s for s in function.signatures if s[3] == kind]
    code = function.inspect_llvm(signature)
    loops = len({code_of(f)[0] for f in SMOOTH}) - 1  # elu and selu share one
    assert len(re.findall(r"^vector\.body\d*:", code, re.M)) >= loops
    assert not re.search(r"call .*@(exp|log|tanh|erf|pow)", code)
    other = "double" if dtype == np.float32 else "float"
    assert not re.search(rf"<\d+ x {other}>", code)


def test_codes_know_the_parameters():
    assert {f.name for f in SMOOTH} | PIECEWISE_LINEAR == set(NAMES)
    assert code_of(Activation("softplus", (2.0, 15.0)))[1:] == (2.0, 15.0)
    assert code_of(Activation("celu", (4.0,)))[1:] == (4.0, 0.25)
    assert all(isinstance(part, (int, float)) for f in VARIANTS for part in code_of(f))


@pytest.mark.parametrize("alpha", [0.0, -1.0, NAN])
def test_a_celu_that_grows_to_both_sides_is_refused(alpha):
    with pytest.raises(ArgumentError, match=r"alpha above 0, got"):
        code_of(Activation("celu", (alpha,)))
