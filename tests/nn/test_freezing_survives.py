"""What is done to a frozen model and leaves it frozen."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import steadynorm as sn
from support import assert_close
from support_freezing import affine_map, assert_same, draw, settled, snapshot


def through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # our own bytes, of a moment ago


def assigned(layer: nn.Module) -> nn.Module:
    with_gradients = {name: t.clone() for name, t in layer.state_dict(keep_vars=True).items()}
    with_gradients["weight"] = nn.Parameter(layer.weight.detach().clone())
    layer.load_state_dict(with_gradients, assign=True)
    return layer


SURVIVED = {
    "train": lambda layer: layer.train(),
    "eval, train": lambda layer: layer.eval().train(),
    "requires_grad_ of a parent": lambda layer: nn.Sequential(layer).requires_grad_(True)[0],
    "deepcopy": lambda layer: copy.deepcopy(nn.Sequential(layer))[0].requires_grad_(True),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).requires_grad_(True),
    "torch.save of the module": through_a_file,
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()) and layer,
    "load_state_dict(assign=True)": assigned,
    "to and back": lambda layer: layer.float().double().requires_grad_(True),
}


class TestSurvives:
    @pytest.mark.parametrize("how", SURVIVED)
    def test_neither_statistics_nor_parameters_move_after(self, how):
        layer = SURVIVED[how](sn.freeze_(settled()))
        assert layer.frozen
        model = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), layer).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        before, first = snapshot(layer), model[0].weight.detach().clone()
        for seed in range(2):
            optimiser.zero_grad(set_to_none=False)
            model(draw(5, 4, seed=seed)).square().mean().backward()
            assert layer.weight.grad is None
            assert layer.bias.grad is None
            optimiser.step()
        assert_same(layer, before)
        assert not torch.equal(model[0].weight, first), "the rest goes on learning"

    def test_loading_into_a_frozen_layer_changes_its_numbers_and_not_its_being_frozen(self):
        layer, other = sn.freeze_(sn.BatchNorm1d(3, dtype=torch.float64)), settled()
        assert layer.load_state_dict(other.state_dict()).missing_keys == []
        assert_close(layer.requires_grad_(True)(draw(5, 3)), affine_map(other, draw(5, 3)), "output")
        assert layer.num_batches_tracked.item() == 7

    def test_a_copys_unfreeze_leaves_the_original_frozen(self):
        layer = sn.freeze_(settled())
        twin = sn.unfreeze_(copy.deepcopy(layer))
        assert (layer.frozen, layer.weight.requires_grad) == (True, False)
        assert (twin.frozen, twin.weight.requires_grad) == (False, True)

    def test_the_state_dict_says_nothing_of_it_and_loads_into_torchs_layer(self):
        layer, plain = sn.freeze_(settled()), nn.BatchNorm1d(3, dtype=torch.float64)
        assert list(layer.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(layer.state_dict(), strict=True)
        assert_close(plain.eval()(draw(4, 3)), affine_map(layer, draw(4, 3)), "output")
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = settled()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert not fresh.frozen, "a new model is frozen anew"

    def test_an_optimiser_that_still_has_its_gradient_leaves_it_alone(self):
        layer = settled()
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        layer(draw(5, 3)).backward(draw(5, 3, seed=1))
        optimiser.step()  # now there is momentum, too
        sn.freeze_(layer)
        before = snapshot(layer)
        optimiser.zero_grad(set_to_none=False)
        layer.requires_grad_(True)
        layer(draw(5, 3).requires_grad_()).backward(draw(5, 3, seed=1))
        optimiser.step()
        assert_same(layer, before)
