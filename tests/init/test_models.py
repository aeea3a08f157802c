"""Whole models: every layer gets the gain of what follows it, and the result says so."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm import init
from steadynorm.errors import ArgumentError

RELU = math.sqrt(2)
ELU = 1.2451983007007066  # these two are checked against mpmath in test_theory.py
SILU = 1.6765324703310913


def gains(model, **options):
    return {layer.name: layer.gain for layer in init.initialize_(model, **options).layers}


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        inner = F.elu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(inner)), inplace=True)


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Everything(nn.Module):
    """Functions, methods, a custom activation, a residual block, shapes, an unused and an output layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.act, self.block = nn.Conv2d(3, 8, 3), Swish(), Residual(8)
        self.up = nn.ConvTranspose2d(8, 4, 4, stride=2, groups=2)
        self.hidden, self.norm, self.bottleneck = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.head, self.unused = nn.Linear(2, 3), nn.Linear(2, 2)

    def forward(self, x):
        x = F.max_pool2d(self.block(self.act(self.stem(x))), 2)
        x = F.leaky_relu(self.up(x), 0.2).mean((2, 3))
        x = torch.sin(self.norm(self.hidden(x.view(x.size(0), -1))) * 1)
        return F.log_softmax(self.head(F.dropout(self.bottleneck(x), 0.5, self.training)), dim=1)


EXPECTED = {
    "stem": SILU,
    "block.conv1": ELU,
    "block.conv2": RELU,
    "up": math.sqrt(2 / 1.04),
    "hidden": math.sqrt(2 / (1 - math.exp(-2))),
    "bottleneck": 1.0,
    "head": 1.0,
}


def test_a_traced_model_gets_each_gain_by_what_follows_in_its_graph():
    done = init.initialize_(Everything())
    assert {layer.name: layer.gain for layer in done.layers} == pytest.approx(EXPECTED, rel=1e-9)
    assert {layer.name: layer.follows for layer in done.layers} == {
        "stem": "Swish",
        "block.conv1": "elu",
        "block.conv2": "relu",
        "up": "leaky_relu",
        "hidden": "sin",
        "bottleneck": "another layer",
        "head": "nothing (output)",
    }
    assert done.norms == ("block.bn1", "block.bn2")
    assert done.untouched == ("norm", "unused")
    assert done.untraced == ""


def test_what_the_table_says_is_what_the_weights_are():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 512, 3, groups=4), nn.ELU(), nn.ConvTranspose2d(512, 40, 4, stride=2, groups=2), nn.SiLU()
    ).append(nn.Conv2d(40, 60, 5))
    done = init.initialize_(model)
    fans = [8 / 4 * 9, 512 / 2 * 16 / 4, 40 * 25]
    assert [layer.fan for layer in done.layers] == fans
    for layer, fan, gain in zip(done.layers, fans, (ELU, SILU, 1.0), strict=True):
        module = model[int(layer.name)]
        assert float(module.weight.detach().std()) == pytest.approx(gain / math.sqrt(fan), rel=0.03)
        assert float(module.bias.detach().abs().max()) == 0
        assert layer.std == pytest.approx(gain / math.sqrt(fan), rel=1e-12)
    assert "elu(1)" in str(done)
    assert "ConvTranspose2d" in str(done)


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(4, 2, 1), (3, 3, 1), (3, 1, 2), (3, 2, 1)])
def test_the_fan_of_a_transposed_convolution_keeps_the_second_moment_away_from_the_borders(kernel, stride, dilation):
    layer = nn.ConvTranspose1d(64, 512, kernel, stride=stride, dilation=dilation)
    init.initialize_(layer, generator=torch.Generator().manual_seed(0))
    x = torch.randn(16, 64, 200, generator=torch.Generator().manual_seed(1))
    inner = layer(x).detach()[..., 12:-12]
    assert float(inner.square().mean()) == pytest.approx(1.0, rel=0.05)


def test_batch_norms_start_afresh():
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(8, 4) * 3 + 1)
    nn.init.constant_(norm.weight, 7.0)
    nn.init.constant_(norm.bias, 7.0)
    done = init.initialize_(nn.Sequential(nn.Linear(3, 4), norm, nn.BatchNorm1d(4, affine=False)))
    assert done.norms == ("1", "2")
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm.bias, torch.zeros(4))
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))


@pytest.mark.parametrize("traceable", [True, False])
def test_an_activation_fused_into_the_batch_norm_counts(traceable):
    model = nn.Sequential(nn.Linear(3, 4), sn.BatchNorm1d(4, activation="elu"), nn.Linear(4, 4), sn.BatchNorm1d(4))
    model.append(nn.SiLU()).append(nn.Linear(4, 2))
    if not traceable:
        model.append(Moody())
    assert gains(model) == pytest.approx({"0": ELU, "2": SILU, "5": 1.0}, rel=1e-12)


class Moody(nn.Module):
    """Looks at its data, which no graph can."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_model_that_cannot_be_traced_goes_by_module_order_and_says_so():
    layers = (nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.ELU(), nn.Linear(4, 4), nn.Linear(4, 2))
    done = init.initialize_(nn.Sequential(*layers, Moody()))
    assert [(layer.name, layer.gain) for layer in done.layers] == [
        ("0", pytest.approx(ELU, rel=1e-12)),
        ("4", 1.0),
        ("5", 1.0),
    ]
    assert done.untraced.startswith("TraceError")
    assert "module order" in str(done)


def test_activation_overrules_what_is_found_but_not_for_the_output():
    expected = dict.fromkeys(EXPECTED, 5 / 3) | {"head": 1.0}
    assert gains(Everything(), activation=lambda z: 0.6 * z) == pytest.approx(expected, rel=1e-12)
    for activation, label in ((nn.Softsign(), "Softsign"), ("tanh", "tanh"), (torch.sin, "sin")):
        layers = init.initialize_(Everything(), activation=activation).layers
        assert {layer.follows for layer in layers} == {label, "nothing (output)"}


def test_modules_with_many_parameters_are_not_tried_out_as_activations():
    layers = init.initialize_(nn.Sequential(nn.Linear(3, 3), nn.Embedding(2000, 3))).layers
    assert [(layer.follows, layer.gain) for layer in layers] == [("Embedding (no gain)", 1.0)]


def test_several_different_activations_on_one_layer_have_no_common_gain():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            a = self.a(x)
            return self.b(torch.tanh(a) * torch.sigmoid(a))

    first = init.initialize_(Gate()).layers[0]
    assert first.gain == 1.0
    assert first.follows == "several: sigmoid, tanh"


def test_one_layer_called_twice_and_one_model_that_is_a_layer():
    layer = nn.Linear(3, 3)
    assert gains(nn.Sequential(layer, nn.ELU(), layer, nn.ELU())) == pytest.approx({"0": ELU}, rel=1e-12)
    assert gains(nn.Linear(3, 3)) == {"": 1.0}
    assert "(model)" in str(init.initialize_(nn.Linear(3, 3)))


def test_a_parametrised_weight_is_set_through_its_parametrisation():
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(300, 400))
    done = init.initialize_(nn.Sequential(layer, nn.ELU(), nn.Linear(400, 2)))
    assert float(layer.weight.detach().std()) == pytest.approx(ELU / math.sqrt(300), rel=0.02)
    assert done.untouched == ()


def test_layers_inside_what_torch_computes_as_one_are_left_and_named():
    attention = nn.MultiheadAttention(4, 2)
    before = attention.out_proj.weight.clone()
    for tail in ((), (Moody(),)):
        done = init.initialize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.TransformerEncoderLayer(4, 2), *tail))
        assert [layer.name for layer in done.layers] == ["0"]
        assert "2.self_attn" in done.untouched
    init.initialize_(attention)
    assert torch.equal(attention.out_proj.weight, before)


def test_the_generator_and_the_distribution():
    def drawn(seed):
        model = Everything()
        init.initialize_(model, generator=torch.Generator().manual_seed(seed), distribution="uniform")
        return model

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert torch.equal(one.stem.weight, same.stem.weight)
    assert not torch.equal(one.stem.weight, other.stem.weight)
    assert float(one.stem.weight.detach().abs().max()) <= SILU * math.sqrt(3 / 27)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 3)), {"distribution": "cauchy"}, "cauchy"),
        (nn.Sequential(nn.Linear(3, 3)), {"activation": torch.zeros_like}, "gain"),
        (nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)), {}, "forward"),
    ],
)
def test_a_refused_call_changes_nothing(model, options, message):
    before = model[0].weight.clone()
    with pytest.raises(ArgumentError, match=message):
        init.initialize_(model, **options)
    assert torch.equal(model[0].weight, before)


def test_preserving_the_gradient_takes_the_derivative_s_gain() -> None:
    """sigmoid: 4.7226 = 1 / sqrt(E[f'^2]) in place of 1.8462; the output layer keeps gain 1."""
    net = nn.Sequential(nn.Linear(400, 300), nn.Sigmoid(), nn.Linear(300, 10))
    done = init.initialize_(net, preserve="gradient", generator=torch.Generator().manual_seed(0))
    assert [round(row.gain, 4) for row in done.layers] == [4.7226, 1.0]
    assert net[0].weight.std().item() == pytest.approx(4.7226 / 20, rel=0.02)


def test_a_prelu_with_a_slope_per_channel_has_its_gain():
    # 1 / sqrt((1 + a^2) / 2) at the default slope a = 1/4
    done = init.initialize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3)))
    assert done.layers[0].gain == pytest.approx((2 / (1 + 1 / 16)) ** 0.5)


def test_a_tied_weight_that_was_drawn_is_not_called_untouched():
    embedding, head = nn.Embedding(20, 6), nn.Linear(6, 20)
    head.weight = embedding.weight
    done = init.initialize_(nn.Sequential(embedding, head))
    assert done.untouched == ()
