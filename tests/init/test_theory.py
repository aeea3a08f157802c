"""Gains and the mean-field map, against mpmath from the definitions."""

import math
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steadynorm import init
from steadynorm.activations import NAMES
from steadynorm.errors import ArgumentError, UnknownActivationError


def softplus(z):
    return mp.log1p(mp.exp(-abs(z))) + max(z, 0)


SELU_ALPHA, SELU_SCALE = mp.mpf("1.6732632423543772848170429916717"), mp.mpf("1.0507009873554804934193349852946")

# Each function written down once more from its definition, with the kinks that the integral is split at.
DEFINITIONS = {
    "relu": (lambda z: max(z, 0), [0]),
    "relu6": (lambda z: min(max(z, 0), 6), [0, 6]),
    "leaky_relu": (lambda z: z if z > 0 else mp.mpf(0.01) * z, [0]),
    "elu": (lambda z: z if z > 0 else mp.expm1(z), [0]),
    "selu": (lambda z: SELU_SCALE * (z if z > 0 else SELU_ALPHA * mp.expm1(z)), [0]),
    "celu": (lambda z: z if z > 0 else mp.expm1(z), [0]),
    "silu": (lambda z: z / (1 + mp.exp(-z)), [0]),
    "gelu": (lambda z: z * mp.ncdf(z), [0]),
    "gelu_tanh": (lambda z: z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3))), [0]),
    "hardswish": (lambda z: z * min(max(z + 3, 0), 6) / 6, [-3, 3]),
    "hardsigmoid": (lambda z: min(max(z + 3, 0), 6) / mp.mpf(6), [-3, 3]),
    "sigmoid": (lambda z: 1 / (1 + mp.exp(-z)), [0]),
    "tanh": (mp.tanh, [0]),
    "softplus": (softplus, [0]),
    "mish": (lambda z: z * mp.tanh(softplus(z)), [0]),
}


def mean_square(name, q=1):
    """E[f(sqrt(q) z)^2] by mpmath's own (tanh-sinh) quadrature, split at the kinks."""
    f, kinks = DEFINITIONS[name]
    root = mp.sqrt(q)
    points = sorted({mp.mpf(-14), mp.mpf(14), mp.mpf(-4), mp.mpf(4), *(k / root for k in kinks)})
    return mp.quad(lambda z: f(root * z) ** 2 * mp.npdf(z), points)


def test_every_fusable_activation_has_a_definition_here():
    assert set(DEFINITIONS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_gain_agrees_with_mpmath_to_1e_12(name):
    with mp.workdps(25):
        expected = 1 / mp.sqrt(mean_square(name))
        assert abs(init.gain(name) / expected - 1) < 1e-12


def test_closed_forms():
    assert init.gain("relu") == pytest.approx(math.sqrt(2), rel=1e-15)
    assert init.gain("identity") == init.gain("linear") == init.gain(None) == init.gain(nn.Identity()) == 1.0
    for slope in (0.01, 0.2, 1.0):
        torchs = nn.init.calculate_gain("leaky_relu", slope)
        assert init.gain(nn.LeakyReLU(slope)) == pytest.approx(torchs, rel=1e-15)
    slopes = torch.tensor([0.0, 0.5, 1.0])
    prelu = nn.PReLU(3)
    prelu.weight.data = slopes
    assert init.gain(prelu) == pytest.approx(1 / math.sqrt((1 + (0 + 0.25 + 1) / 3) / 2), rel=1e-7)


@pytest.mark.parametrize(
    ("activation", "mean_square_"),
    [
        (F.relu, 0.5),  # by quadrature here: the closed form is for the name
        (torch.abs, 1.0),
        (torch.sin, (1 - math.exp(-2)) / 2),
        (torch.exp, math.exp(2)),
        (torch.square, 3.0),
        (lambda z: (z > 1.5).double(), 0.5 * math.erfc(1.5 / math.sqrt(2))),  # a jump on the grid of panels
        (nn.Hardtanh(), 1 - math.sqrt(2 / (math.pi * math.e))),
        (lambda z: z.new_full(z.shape, -2.0), 4.0),
    ],
)
def test_gain_of_callables_and_modules_with_known_second_moments(activation, mean_square_):
    assert init.gain(activation) == pytest.approx(1 / math.sqrt(mean_square_), rel=1e-13)


def test_gain_of_a_custom_float32_module_is_evaluated_in_float64_and_eval_mode():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, z):
            return F.dropout(z * self.scale, 0.5, self.training)

    module = Scaled()
    assert init.gain(module) == pytest.approx(1 / 3, rel=1e-14)
    assert module.training
    assert module.scale.dtype == torch.float32


def test_a_kink_off_the_grid_costs_at_most_the_stated_error():
    threshold = 0.3017  # nn.Threshold jumps here; E[z^2; z > t] = t pdf(t) + P(z > t)
    density = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi)
    expected = threshold * density + 0.5 * math.erfc(threshold / math.sqrt(2))
    kinked = (1 + threshold**2) * 0.5 * math.erfc(threshold / math.sqrt(2)) - threshold * density
    assert init.gain(lambda z: F.relu(z - threshold)) == pytest.approx(1 / math.sqrt(kinked), rel=1e-5)
    assert init.gain(nn.Threshold(threshold, 0.0)) == pytest.approx(1 / math.sqrt(expected), rel=1e-2)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (nn.Softmax(dim=0), "element by element"),
        (lambda z: z - z[0], "element by element"),
        (lambda z: z.sum(), "shape"),
        (lambda z: z > 0, "bool"),
        (lambda z: 3.0, "tensor"),
        (nn.ReLU, "instance"),
        (lambda z: z @ torch.ones(3, 3), "element by element"),
        (torch.log, "finite"),
        (lambda z: torch.exp(z * z), "finite"),
        (torch.zeros_like, "0"),
        (torch.rand_like, "element by element"),
        (3, "callable"),
    ],
)
def test_what_has_no_gain_is_an_error_that_says_why(activation, message):
    with pytest.raises(ArgumentError, match=message):
        init.gain(activation)


def test_a_module_that_cannot_be_copied_is_an_error_that_says_why():
    module = nn.Hardtanh()
    module.history = (torch.ones(1, requires_grad=True) * 2,)  # not a leaf: deepcopy refuses it
    with pytest.raises(ArgumentError, match="Hardtanh cannot be"):
        init.gain(module)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnknownActivationError, match="softplus"):
        init.gain("swoosh")


@pytest.mark.parametrize(("name", "stable"), [("elu", True), ("tanh", True), ("gelu", False), ("silu", False)])
def test_slope_at_one_and_what_it_says_of_stability(name, stable):
    with mp.workdps(30):
        h = mp.mpf("1e-8")
        expected = (mean_square(name, 1 + h) - mean_square(name, 1 - h)) / (2 * h) / mean_square(name)
        assert abs(init.slope(name) - expected) < 1e-11
        assert (expected < 1) is stable
    far = init.mean_field(name, q=1.5, layers=50)
    assert (abs(far[-1] - 1) < abs(far[0] - 1)) is stable


@pytest.mark.parametrize(("name", "q"), [("hardswish", 2.7), ("elu", 0.01), ("relu6", 300.0), ("sigmoid", 1e6)])
def test_mean_field_and_slope_away_from_one(name, q):
    with mp.workdps(25):
        h = mp.mpf(q) * mp.mpf("1e-7")
        step = 1.3**2 * mean_square(name, q)
        derivative = 1.3**2 * (mean_square(name, q + h) - mean_square(name, q - h)) / (2 * h)
    assert init.mean_field(name, 1.3, q, layers=1) == pytest.approx([q, float(step)], rel=1e-10)
    assert init.slope(name, 1.3, q) == pytest.approx(float(derivative), rel=1e-7)


def test_mean_field_of_relu_neither_grows_nor_shrinks_and_of_a_wrong_gain_is_a_power():
    assert init.mean_field("relu", q=0.3, layers=20) == pytest.approx([0.3] * 21, rel=1e-13)
    assert init.mean_field("linear", gain=0.5, q=2.0, layers=3) == pytest.approx([2, 0.5, 0.125, 0.03125], rel=1e-13)


def test_mean_field_that_overflows_ends_in_inf():
    moments = init.mean_field(torch.square, gain=1.0, q=1.0, layers=60)
    assert moments[:3] == pytest.approx([1, 3, 27])
    assert moments[-1] == math.inf
    assert len(moments) == 61


@pytest.mark.parametrize("arguments", [{"q": 0.0}, {"q": math.nan}, {"q": -1.0}, {"gain": math.inf}, {"layers": 0}])
def test_mean_field_refuses_what_it_cannot_start_from(arguments):
    with pytest.raises(ArgumentError, match=r"must be"):
        init.mean_field("elu", **arguments)


def test_elu_at_its_own_gain_stays_within_a_factor_two_of_one_through_50_layers_and_comes_back_from_outside():
    depth, width, batch = 50, 256, 128
    gain = 1.2451983007007066  # test_gain_agrees_with_mpmath_to_1e_12
    for seed, start in ((0, 1.0), (1, 1.0), (2, 3.0), (3, 0.3)):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(batch, width, generator=generator) * math.sqrt(start)
        seen = []
        for _ in range(depth):
            weight = init.he_normal_(torch.empty(width, width), "elu", generator=generator)
            h = F.elu(h) @ weight.T
            seen.append(float(h.square().mean()))
        assert min(seen[15:]) > 0.5, (seed, min(seen[15:]))
        assert max(seen[15:]) < 2.0, (seed, max(seen[15:]))
        assert start != 1.0 or (min(seen) > 0.5 and max(seen) < 2.0)
        assert float(weight.std()) == pytest.approx(gain / math.sqrt(width), rel=0.02)


def test_gradient_gain_against_mpmath() -> None:
    """1 / sqrt(E[f'^2]) by 30-digit quadrature; sigmoid and ELU by name, softplus as a bare callable (autograd)."""

    def reference(square: Callable) -> float:
        density = lambda z: mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)  # noqa: E731
        return float(1 / mp.sqrt(mp.quad(lambda z: square(z) * density(z), [-12, -2, 0, 2, 12])))

    with mp.workdps(30):
        logistic = lambda z: 1 / (1 + mp.exp(-z))  # noqa: E731
        sigmoid = reference(lambda z: (logistic(z) * (1 - logistic(z))) ** 2)
        elu = reference(lambda z: mp.mpf(1) if z > 0 else mp.exp(2 * z))
        softplus = reference(lambda z: logistic(z) ** 2)
    assert init.gain("sigmoid", "gradient") == pytest.approx(sigmoid, rel=1e-12)
    assert init.gain("elu", "gradient") == pytest.approx(elu, rel=1e-12)
    assert init.gain(lambda z: torch.log1p(torch.exp(z)), "gradient") == pytest.approx(softplus, rel=1e-12)


@pytest.mark.parametrize("activation", ["relu", nn.LeakyReLU(0.3), None])
def test_signal_and_gradient_gain_agree_for_piecewise_linear_functions(activation: str | nn.Module | None) -> None:
    assert init.gain(activation, "gradient") == pytest.approx(init.gain(activation), rel=1e-12)


@pytest.mark.parametrize("bad", [torch.sign, torch.round, lambda z: torch.from_numpy(z.detach().numpy().copy())])
def test_gradient_gain_refuses_what_has_no_derivative(bad: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ArgumentError):
        init.gain(bad, "gradient")


def test_gain_refuses_to_preserve_anything_else() -> None:
    with pytest.raises(ArgumentError, match="preserve"):
        init.gain("relu", "energy")  # pyright: ignore[reportArgumentType]
