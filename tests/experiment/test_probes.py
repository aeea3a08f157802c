import math

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.experiment.arms import BEFORE, build
from steadynorm.experiment.models import resolve
from steadynorm.experiment.probes import Recorder, _input_percentiles, gradient_norms, spread_decades, verdict
from steadynorm.experiment.split import Split


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_norms_are_those_of_backpropagation_by_hand():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = rand(20, 5), torch.arange(20) % 3
    w = [layer.weight.detach().double().numpy() for layer in model if isinstance(layer, nn.Linear)]
    b = [layer.bias.detach().double().numpy() for layer in model if isinstance(layer, nn.Linear)]
    a1 = np.tanh(x.double().numpy() @ w[0].T + b[0])
    a2 = np.tanh(a1 @ w[1].T + b[1])
    scores = a2 @ w[2].T + b[2]
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    d2 = (p - np.eye(3)[y.numpy()]) @ w[2] * (1 - a2**2)
    d1 = d2 @ w[1] * (1 - a1**2)
    names, norms = gradient_norms(model, x, y)
    assert names == ["0", "2"]
    np.testing.assert_allclose(norms, [np.sqrt((d1**2).mean()), np.sqrt((d2**2).mean())], rtol=1e-5)


def test_looking_at_gradients_changes_nothing():
    model = build(resolve("relu-mlp"), BEFORE, (5,), 3).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient_norms(model, rand(20, 5), torch.arange(20) % 3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_network_without_hidden_layers_has_no_gradient_profile():
    assert gradient_norms(nn.Linear(5, 3), rand(6, 5), torch.arange(6) % 3) == ([], [])


def test_a_gradient_that_is_not_finite_is_infinite():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[2].weight.fill_(math.nan)
    assert gradient_norms(model, rand(6, 5), torch.arange(6) % 3)[1] == [math.inf]


@pytest.mark.parametrize(
    ("norms", "expected"),
    [([1.0, 100.0, 10.0], 2.0), ([2.0, 2.0], 0.0), ([0.0, 1.0], None), ([math.inf, 1.0], None), ([], None)],
)
def test_the_spread_is_in_decades(norms, expected):
    assert spread_decades(norms) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([0.9, 5.0, 10.0], "vanishing"),
        ([1.1, 5.0, 10.0], "steady"),
        ([9.0, 1.0], "steady"),
        ([11.0, 1.0], "exploding"),
        ([math.inf, math.inf], "exploding"),
        ([0.0, 1.0], "vanishing"),
    ],
)
def test_a_factor_of_ten_between_first_and_last_has_a_name(norms, expected):
    assert verdict(norms) == expected


def parts_of(x):
    y = torch.arange(len(x)) % 2
    return Split(x, y, x, y, x, y)


def test_percentiles_are_those_of_what_enters_the_last_nonlinearity():
    x = rand(101, 3) * torch.tensor([1.0, 2.0, 3.0])
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(3))
            layer.bias.zero_()
    recorder = Recorder(model, parts_of(x), steps=3)
    shifts = [4.0, 1.0, 0.0]  # of every unit, by the bias; at the end 0
    for step, shift in enumerate(shifts, 1):
        with torch.no_grad():
            model[2].bias.fill_(shift)
        recorder.after(step)
    found = recorder.drift()
    p15, p50, p85 = np.percentile(x.double().numpy(), [15, 50, 85], axis=0)
    drifts = np.mean(shifts) / (p85 - p15)  # the median of each unit is off its last value by the shift
    typical = int(np.argsort(drifts)[1])
    assert found["steps"] == [1, 2, 3]
    for got, last in ((found["p15"], p15), (found["p50"], p50), (found["p85"], p85)):
        np.testing.assert_allclose(got, last[typical] + np.array(shifts), rtol=1e-6, atol=1e-6)
    assert found["drift"] == pytest.approx(np.median(drifts), rel=1e-6)


def test_channels_of_images_are_units():
    x = rand(10, 2, 4, 4)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2)[:, :, None, None])
        model[0].bias.zero_()
    recorder = Recorder(model, parts_of(x), steps=1)
    recorder.after(1)
    medians = np.percentile(x.double().numpy().transpose(1, 0, 2, 3).reshape(2, -1), 50, axis=1)
    assert recorder.drift()["p50"][0] == pytest.approx(medians[0], abs=1e-6)


def test_a_network_without_activation_modules_has_no_percentiles():
    recorder = Recorder(nn.Linear(3, 2), parts_of(rand(10, 3)), steps=1)
    recorder.after(1)
    assert recorder.drift() is None


def test_dead_units_have_no_drift():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    recorder = Recorder(model, parts_of(rand(10, 3)), steps=1)
    recorder.after(1)
    assert recorder.drift() is None


def test_gradients_are_taken_at_start_middle_and_end():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    recorder = Recorder(model, parts_of(rand(10, 3)), steps=10)
    for step in range(1, 11):
        recorder.after(step)
    assert {phase: record["step"] for phase, record in recorder.gradients.items()} == {
        "start": 1,
        "middle": 5,
        "end": 10,
    }


def test_inplace_activations_change_nothing_of_what_is_seen():
    """The gradients at a layer's output, and the inputs of the last activation, before it overwrites them."""
    torch.manual_seed(0)
    linears = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)
    apart = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
    inplace = nn.Sequential(linears[0], nn.ReLU(inplace=True), linears[1], nn.ReLU(inplace=True), linears[2])
    x, y = torch.randn(16, 3), torch.randint(2, (16,))
    assert gradient_norms(apart, x, y) == gradient_norms(inplace, x, y)
    assert torch.equal(_input_percentiles(apart, x), _input_percentiles(inplace, x))


class Own(nn.Module):
    """A forward of its own, whose batch norms `insert` puts inside the layers."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.tanh(layer(x))
        return last(x)


def test_the_gradient_is_that_of_the_layer_s_own_output_also_with_a_batch_norm_inside():
    torch.manual_seed(1)
    layers = [nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)]
    one, two, last = layers
    plain = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), last)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    expected = gradient_norms(sn.insert(plain), x, y)
    got = gradient_norms(sn.insert(Own(layers)), x, y)
    assert (expected[0], got[0]) == (["0", "3"], ["layers.0", "layers.1"])
    assert got[1] == pytest.approx(expected[1], rel=1e-6)
