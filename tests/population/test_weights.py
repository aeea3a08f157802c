"""The rules from weights alone: their limits, and the figures they give."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import steadynorm as sn
from steadynorm.population.states import LayerState, states_of
from steadynorm.population.weights import from_weights


def state(**changed: object) -> LayerState:
    generator = torch.Generator().manual_seed(0)
    values: dict[str, object] = {
        "name": "bn",
        "mean": torch.randn(16, generator=generator),
        "var": torch.rand(16, generator=generator) + 0.5,
        "gamma": torch.rand(16, generator=generator).double() + 0.5,
        "beta": torch.randn(16, generator=generator).double(),
        "tracked": 1000,
        "eps": 1e-5,
        "momentum": 0.1,
        "settings_known": True,
    }
    return LayerState(**{**values, **changed})


def kinds(**changed: object) -> list[tuple[str, str]]:
    return [(f.kind, f.severity) for f in from_weights([state(**changed)])]


def test_a_healthy_layer_is_not_mentioned():
    assert kinds() == []
    assert kinds(gamma=None, beta=None, tracked=None, eps=None, momentum=None, settings_known=False) == []


@settings(max_examples=50, deadline=None)
@given(momentum=st.floats(0.001, 0.5), tracked=st.integers(1, 5000))
def test_what_is_left_of_the_start_is_that_of_the_recursion(momentum, tracked):
    left = 1.0
    for _ in range(tracked):
        left *= 1 - momentum
    found = from_weights([state(momentum=momentum, tracked=tracked)])
    if left > 0.0100001:
        (one,) = found
        assert one.kind == "momentum not converged"
        assert one.evidence["initial_share"] == pytest.approx(left, rel=1e-9)
        assert one.severity == "note"
        needed = one.evidence["batches_needed"]
        assert (1 - momentum) ** needed <= 0.01001
        assert (1 - momentum) ** (needed - 1) > 0.0099
    elif left < 0.0099999:
        assert found == []


def test_zero_variance_is_an_error_where_no_training_can_have_made_it():
    var = state().var.clone()
    var[3] = 0
    assert kinds(var=var, tracked=100) == [("zero variance", "error")]
    assert kinds(var=var, tracked=2000) == [("zero variance", "warning")]
    assert kinds(var=var, tracked=None) == [("zero variance", "warning")]
    assert kinds(var=torch.zeros(16), tracked=None) == [("zero variance", "error")]
    (found,) = from_weights([state(var=var, eps=1e-4)])
    assert found.evidence["factor"] == pytest.approx(100)


def test_eps_takes_its_share_of_the_deviation():
    found = from_weights([state(var=torch.full((16,), 3e-5))])[0]
    assert (found.kind, found.severity) == ("eps comparable to variance", "warning")
    assert found.evidence["scale"] == pytest.approx((3 / 4) ** 0.5, rel=1e-5)
    var = state().var.clone()
    var[0] = 1e-5
    assert kinds(var=var) == [("eps comparable to variance", "note")]
    assert "does not say" in from_weights([state(var=var, eps=None, settings_known=False)])[0].summary


def test_dead_channels_are_counted_against_the_largest():
    gamma = torch.linspace(0.1, 1, 16).double()
    gamma[[2, 5, 9]] = torch.tensor([0.0, -9e-4, 1e-5]).double()
    (found,) = from_weights([state(gamma=gamma)])
    assert (found.kind, found.evidence["channels"], found.evidence["share"]) == ("dead channels", 3, 3 / 16)
    assert "All γ are 0" in from_weights([state(gamma=torch.zeros(16).double())])[0].summary
    assert kinds(gamma=torch.zeros(1).double(), var=torch.ones(1) * 2, mean=torch.ones(1)) == []


def test_exploded_relative_to_the_layer_and_to_the_dtype():
    var = state().var.clone()
    var[1] = 5e9  # an input in units of its own, beside shares
    assert kinds(var=var) == []
    var[1] = 5e11
    assert kinds(var=var) == [("exploded variance", "error")]
    assert kinds(var=torch.full((16,), 1e20)) == [("exploded variance", "error")]
    assert kinds(var=torch.full((16,), 1e9)) == []
    assert ("exploded variance", "error") in kinds(var=torch.full((16,), 3e4).half())


def test_never_updated_with_and_without_a_counter():
    new = {"mean": torch.zeros(16), "var": torch.ones(16)}
    for tracked in (0, 300, None):
        assert kinds(**new, tracked=tracked) == [("never updated", "error")]
    assert kinds(tracked=0) == [("count lost", "note")]


def test_each_domain_is_a_layer_of_its_own():
    layer = sn.BatchNorm1d(3, domains=("photo", "sketch"), domain_affine=True)
    with torch.no_grad():
        layer.running("sketch").var[1] = -1
    states = states_of(nn.Sequential(layer))
    assert [s.name for s in states] == ["0[photo]", "0[sketch]"]
    assert [s.tracked for s in states] == [0, 0]
    found = from_weights(states)
    assert ("negative variance", "0[sketch]") in {(f.kind, f.layer) for f in found}
    assert ("negative variance", "0[photo]") not in {(f.kind, f.layer) for f in found}


def test_layers_without_statistics_are_a_note():
    found = sn.diagnose(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    assert [(f.kind, f.severity) for f in found.findings] == [("no running statistics", "note")]
