"""The fusable activations: values and derivatives against 40-digit arithmetic, and how they are named."""

import copy
import pickle

import mpmath as mp
import pytest
import torch
from torch import nn

from steadynorm.activations import NAMES, Activation, resolve
from steadynorm.errors import ArgumentError, UnknownActivationError
from support import ACTIVATIONS

# Both tails, the kinks' neighbourhoods (never a kink itself), tiny values, and where exp overflows float32.
POINTS = [-200.0, -30.0, -6.1, -3.01, -2.99, -1.0, -1e-3, -1e-10, 1e-10, 1e-3, 0.7, 2.99, 3.01, 5.99, 6.01, 30.0, 200.0]


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def exactly(name: str, params: tuple[float, ...], z):
    """f(z) in mpmath, from its definition."""
    p = [mp.mpf(value) for value in params]
    match name:
        case "relu":
            return max(z, mp.mpf(0))
        case "relu6":
            return min(max(z, mp.mpf(0)), mp.mpf(6))
        case "leaky_relu":
            return z if z > 0 else p[0] * z
        case "elu":
            return z if z > 0 else p[0] * mp.expm1(z)
        case "celu":
            return z if z > 0 else p[0] * mp.expm1(z / p[0])
        case "selu":  # Klambauer et al. 2017: the fixed point (0, 1) of the moments' map determines both constants
            e, root = mp.erfc(1 / mp.sqrt(2)) * mp.exp(mp.mpf(1) / 2), mp.sqrt(2 / mp.pi)
            alpha = -root / (e - 1)
            power = mp.erfc(mp.sqrt(2)) * mp.exp(2)
            scale = (1 - mp.erfc(1 / mp.sqrt(2)) * mp.sqrt(mp.e)) * mp.sqrt(2 * mp.pi)
            scale *= (2 * power + mp.pi * e**2 + mp.pi - 2 * (2 + mp.pi) * e + 2) ** mp.mpf("-0.5")
            return scale * (z if z > 0 else alpha * mp.expm1(z))
        case "silu":
            return z * sigmoid(z)
        case "gelu":
            return z * mp.ncdf(z)
        case "gelu_tanh":
            return z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)))
        case "hardswish":
            return z * min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6
        case "hardsigmoid":
            return min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6
        case "sigmoid":
            return sigmoid(z)
        case "tanh":
            return mp.tanh(z)
        case "softplus":
            return z if p[0] * z > p[1] else mp.log1p(mp.exp(p[0] * z)) / p[0]
        case "mish":
            return z * mp.tanh(mp.log1p(mp.exp(z)))
    raise ValueError(name)


VARIANTS = [Activation(name) for name in NAMES] + [
    Activation("leaky_relu", (0.3,)),
    Activation("elu", (0.5,)),
    Activation("celu", (2.0,)),
    Activation("softplus", (2.0, 15.0)),
]


@pytest.mark.parametrize("f", VARIANTS, ids=str)
def test_value_and_derivative_equal_40_digit_arithmetic(f):
    z = torch.tensor(POINTS, dtype=torch.float64)
    with mp.workdps(40):
        values = [float(exactly(f.name, f.params, mp.mpf(p))) for p in POINTS]
        slopes = [float(mp.diff(lambda t: exactly(f.name, f.params, t), mp.mpf(p), h=mp.mpf("1e-15"))) for p in POINTS]
    # torch's own softplus and mish round 1 + exp(z) for very negative z, hence an absolute part.
    assert f(z).tolist() == pytest.approx(values, rel=1e-13, abs=1e-15)
    assert f.derivative(z).tolist() == pytest.approx(slopes, rel=1e-13, abs=1e-14)


@pytest.mark.parametrize("f", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_dtypes_stay_finite_and_keep_their_dtype(f, dtype):
    z = torch.tensor(POINTS, dtype=dtype)
    for found in (f(z), f.derivative(z)):
        assert found.dtype == dtype
        assert torch.isfinite(found).all()


@pytest.mark.parametrize("f", VARIANTS, ids=str)
def test_derivative_at_a_kink_is_the_one_autograd_uses(f):
    z = torch.tensor([-3.0, 0.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(f(z), z, torch.ones_like(z))
    torch.testing.assert_close(f.derivative(z.detach()), found)


def test_the_oracle_knows_every_name():
    assert set(ACTIVATIONS) == set(NAMES)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.ReLU(inplace=True), Activation("relu")),
        (nn.ReLU6(), Activation("relu6")),
        (nn.LeakyReLU(0.2), Activation("leaky_relu", (0.2,))),
        (nn.ELU(0.5), Activation("elu", (0.5,))),
        (nn.SELU(), Activation("selu")),
        (nn.CELU(0.7), Activation("celu", (0.7,))),
        (nn.SiLU(), Activation("silu")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (nn.Hardswish(), Activation("hardswish")),
        (nn.Hardsigmoid(), Activation("hardsigmoid")),
        (nn.Sigmoid(), Activation("sigmoid")),
        (nn.Tanh(), Activation("tanh")),
        (nn.Softplus(beta=2, threshold=10), Activation("softplus", (2.0, 10.0))),
        (nn.Mish(), Activation("mish")),
    ],
    ids=str,
)
def test_a_module_is_taken_over_with_its_parameters(module, expected):
    assert resolve(module) == expected
    z = torch.linspace(-4.0, 4.0, 16)  # the same function, to the module's own rounding
    torch.testing.assert_close(expected(z), module(z.clone()), rtol=1e-6, atol=1e-6)


def test_names_aliases_and_the_identity():
    assert resolve(None) is None
    assert resolve(nn.Identity()) is None
    assert resolve("ReLU") == Activation("relu") == resolve(Activation("relu"))
    assert resolve("swish") == Activation("silu")
    assert resolve("LeakyReLU") == Activation("leaky_relu", (0.01,))
    assert str(Activation("elu", (0.5,))) == "elu(0.5)"
    assert str(Activation("relu")) == "relu"


def test_is_a_value():
    f = Activation("softplus", (2, 15))
    assert f == Activation("softplus", (2.0, 15.0))
    assert hash(f) == hash(Activation("softplus", (2.0, 15.0)))
    assert pickle.loads(pickle.dumps(f)) == copy.deepcopy(f) == f
    with pytest.raises(AttributeError):
        f.name = "relu"


class Doubled(nn.ELU):
    """A subclass that computes something else must not be taken for its parent."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "unknown",
    ["no_such", "prelu", nn.PReLU(), nn.Softmax(1), nn.Linear(1, 1), Doubled(), torch.relu, 3],
    ids=lambda u: u if isinstance(u, str) else type(u).__name__,
)
def test_what_cannot_be_fused_is_refused_with_the_names_that_can(unknown):
    with pytest.raises(UnknownActivationError, match=r"relu, .*mish.*after the layer"):
        resolve(unknown)


def test_a_wrong_number_of_parameters_is_refused():
    with pytest.raises(ArgumentError, match=r"'relu' takes 0 parameters, got \(1\.0,\)"):
        Activation("relu", (1.0,))
    with pytest.raises(ArgumentError, match=r"'softplus' takes 2 parameters"):
        Activation("softplus", (1.0,))
