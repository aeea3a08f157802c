"""Tent moves γ and β towards sure predictions, and leaves no other trace."""

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import DataError, ModelError
from steadynorm.nn.watched import bn_layers
from steadynorm.shift.adapting.adaptation import adapt_
from steadynorm.shift.adapting.tent import affine_parameters, minimise_entropy, prediction_entropy
from support_adapting import changed, mixed_labels, state, stream, two_layers

X = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(1)) + 1


def test_the_entropy_is_that_of_the_definition():
    logits = torch.randn(5, 3, 2, dtype=torch.float64)
    p = torch.softmax(logits, 1)
    assert torch.allclose(prediction_entropy(logits), torch.special.entr(p).sum(1).mean())
    assert torch.isfinite(prediction_entropy(torch.tensor([[1e4, 0.0]])))


@pytest.mark.parametrize("kind", ["torch", "steadynorm"])
def test_only_gamma_and_beta_change(kind: str):
    model = two_layers(kind)
    model[0].weight.requires_grad_(False)
    model[6].weight.grad = torch.ones_like(model[6].weight)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    before, chance = state(model), torch.get_rng_state()
    minimise_entropy(model, bn_layers(model), [lambda: model(X)], lr=1e-2, steps=3)
    assert changed(model, before) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + 9 * [True]
    assert (model[6].weight.grad == 1).all()
    assert (model[1].weight.grad == 1).all()
    assert model[6].bias.grad is None
    assert torch.equal(chance, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["torch", "steadynorm"])
def test_a_step_is_adams_on_the_entropy_under_batch_statistics(kind: str):
    model, twin = two_layers(kind), two_layers("torch")
    twin.train()
    learnt = [twin[1].weight, twin[1].bias, twin[4].weight, twin[4].bias]
    p = twin(X).softmax(1)
    gradients = torch.autograd.grad(torch.special.entr(p).sum(1).mean(), learnt)
    with torch.no_grad():
        for parameter, g in zip(learnt, gradients, strict=True):
            parameter -= 1e-2 * g / (g.abs() + 1e-8)  # Adam's first step
    minimise_entropy(model, bn_layers(model), [lambda: model(X)], lr=1e-2, steps=1)
    for mine, want in zip(affine_parameters(bn_layers(model)), learnt, strict=True):
        assert torch.allclose(mine, want, atol=1e-4)


def test_the_entropy_falls():
    model = two_layers()
    layers = bn_layers(model)

    def by_batch() -> float:
        model.train()
        found = prediction_entropy(model(X)).item()
        model.eval()
        return found

    first = by_batch()
    minimise_entropy(model, layers, [lambda: model(X)], lr=1e-2, steps=20)
    assert by_batch() < first - 0.01


def test_frozen_affine_is_left_out_and_nothing_to_learn_is_said():
    model = sn.freeze_(nn.Sequential(sn.BatchNorm1d(4), nn.Linear(4, 4))).eval()
    assert affine_parameters(bn_layers(model)) == []
    x = stream(mixed_labels(8))
    with pytest.raises(ModelError, match="γ and β"):
        minimise_entropy(model, bn_layers(model), [lambda: model(x)], 1e-3, 1)


def test_outputs_that_are_no_logits_are_refused_and_all_comes_back():
    model = two_layers()
    before = state(model)
    with pytest.raises(ModelError, match="logits"):
        minimise_entropy(model, bn_layers(model), [lambda: model(X)[:, :1]], 1e-3, 1)
    assert changed(model, before) == set()
    assert not model[1].training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_learns_as_float32_and_is_rounded(dtype: torch.dtype):
    """Adam's eps is 0 in float16, where a gradient of 0 gave 0 / 0; a step of 1e-3 from 1 is lost in bfloat16."""
    model, twin = two_layers("torch"), two_layers("torch")
    model.to(dtype)
    twin.to(dtype).float()
    runs = 40
    minimise_entropy(twin, bn_layers(twin), [lambda: twin(X)], lr=1e-3, steps=runs)
    minimise_entropy(model, bn_layers(model), [lambda: model(X.to(dtype))], lr=1e-3, steps=runs)
    for mine, want in zip(affine_parameters(bn_layers(model)), affine_parameters(bn_layers(twin)), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), want, atol=0.02, rtol=0.02)
    assert (model[1].weight.float() - 1).abs().max() > 0.01


def test_what_becomes_infinite_is_refused():
    """A step of 1e5 leaves float32 finite and float16 not; the model is then put back by adapt_."""
    model = two_layers().half()
    before = state(model)
    with pytest.raises(DataError, match="Lower lr"):
        adapt_(model, X.half(), "tent", lr=1e5, guard=False)
    assert changed(model, before) == set()
