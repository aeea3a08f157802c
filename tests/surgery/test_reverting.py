"""revert_: back to torch.nn's layers, or to what a layer was converted from, with the very same tensors."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support_converting import (
    CASES,
    BatchNormAct2d,
    FrozenBatchNorm2d,
    Renamed,
    assert_same,
    built,
    by_definition,
    inputs,
    step,
    stirred,
)


def reason(layer: nn.Module) -> str:
    """Why a layer is left, which then must be as it was."""
    kind, state = type(layer), dict(vars(layer))
    report = sn.revert_(nn.Sequential(layer))
    assert type(layer) is kind
    assert vars(layer) == state
    return report.left[0].note


class TestThereAndBack:
    @pytest.mark.parametrize("name", CASES)
    def test_a_converted_model_is_what_it_was(self, name):
        model = built(name)
        kinds = [type(m) for m in model.modules()]
        attributes = [dict(vars(m)) for m in model.modules()]
        tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        sn.convert_(model)
        report = sn.revert_(model)
        assert len(report.converted) == CASES[name].layers
        assert [type(m) for m in model.modules()] == kinds
        assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
        for before, module in zip(attributes, model.modules(), strict=True):
            assert set(vars(module)) == set(before)
            same = {"eps", "momentum", "num_features", "affine", "track_running_stats", "training", "process_group"}
            assert {n: v for n, v in vars(module).items() if n in same} == {
                n: v for n, v in before.items() if n in same
            }
            assert list(module._modules) == list(before["_modules"])
            assert module._non_persistent_buffers_set == set()

    @pytest.mark.parametrize("name", ["residual", "with activation", "frozen with activation", "sync", "1d"])
    def test_it_learned_meanwhile_and_goes_on(self, name):
        model = built(name)
        definition = by_definition(model)
        sn.convert_(model)
        assert_same(step(model, inputs(name), True), step(definition, inputs(name), True))
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        sn.revert_(model)
        assert_same(step(model, inputs(name, 1), True), step(definition, inputs(name, 1), True))
        assert_same(step(model, inputs(name, 2), False), step(definition, inputs(name, 2), False))

    def test_torchscript_takes_the_model_then(self):
        model = stirred(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
        sn.convert_(model)
        x = torch.randn(2, 3, 4, 4)
        expected = model(x)
        sn.revert_(model)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)

    def test_half_precision_is_half_precision_again(self):
        model = stirred(nn.Sequential(nn.BatchNorm2d(3))).to(torch.bfloat16)
        kept = copy.deepcopy(model)
        sn.convert_(model)
        report = sn.revert_(model)
        assert report.converted[0].note == "running_mean and running_var in bfloat16"
        x = torch.randn(2, 3, 4, 4).to(torch.bfloat16)
        assert torch.equal(model(x), kept(x))

    def test_the_activation_put_back_is_in_the_layers_mode(self):
        model = nn.Sequential(BatchNormAct2d(3, nn.ReLU())).train()
        sn.convert_(model)
        model.eval()
        sn.revert_(model)
        assert [m.training for m in model.modules()] == [False] * 4


class TestBuiltAsOurs:
    @pytest.mark.parametrize(
        ("layer", "kind"),
        [
            (sn.BatchNorm1d(3), nn.BatchNorm1d),
            (sn.BatchNorm2d(3, affine=False), nn.BatchNorm2d),
            (sn.BatchNorm3d(3, momentum=None, track_running_stats=False), nn.BatchNorm3d),
            (sn.BatchNorm2d(3, process_group="world"), nn.SyncBatchNorm),
        ],
    )
    def test_becomes_torchs(self, layer, kind):
        layer(torch.randn(4, 3, *[2] * ({"1": 1, "2": 2, "3": 3}[type(layer).__name__[-2]])))
        sn.revert_(layer)
        assert type(layer) is kind
        assert set(vars(layer)) == set(vars(kind(3)))
        assert getattr(layer, "process_group", None) is None
        assert pickle.loads(pickle.dumps(layer)).eps == layer.eps

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"activation": "relu"}, "activation=relu"),
            ({"ghost_batch_size": 4}, "ghost_batch_size=4"),
            ({"domains": ("a", "b")}, "domains="),
            ({"masked": "pass"}, "masked=pass"),
            ({"single_value": "beta", "channel_dim": -1}, "channel_dim=-1, single_value=beta"),
            ({"renorm": sn.Renorm()}, "renorm="),
        ],
    )
    def test_what_torchs_layer_lacks_is_left_and_said(self, options, said):
        assert reason(sn.BatchNorm1d(3, **options)).startswith(f"torch.nn has no {said}")

    def test_a_frozen_layer_is_left_until_it_is_not_frozen(self):
        model = nn.Sequential(nn.BatchNorm1d(3))
        sn.convert_(model)
        sn.freeze_(model)
        assert sn.revert_(model).left[0].note == "torch.nn has no frozen=True"
        sn.revert_(sn.unfreeze_(model))
        assert type(model[0]) is nn.BatchNorm1d
        assert model[0].weight.requires_grad


class TestChangedSinceItWasConverted:
    def test_a_frozen_one_that_was_thawed_becomes_torchs(self):
        model = stirred(nn.Sequential(FrozenBatchNorm2d(3)))
        sn.convert_(model)
        sn.revert_(sn.unfreeze_(model))
        assert type(model[0]) is nn.BatchNorm2d
        x = torch.randn(4, 3, 2, 2) + 5
        y = model.train()(x)
        expected = model[0].bias.tolist()
        torch.testing.assert_close(y.mean((0, 2, 3)).tolist(), expected, atol=1e-5, rtol=1e-5)

    def test_one_with_another_activation_is_left(self):
        model = nn.Sequential(BatchNormAct2d(3, nn.ReLU()))
        sn.convert_(model)
        model[0].activation = sn.activations.resolve("elu")
        assert "activation=elu" in sn.revert_(model).left[0].note

    def test_one_without_its_activation_becomes_torchs(self):
        model = nn.Sequential(BatchNormAct2d(3, nn.ReLU()))
        sn.convert_(model)
        model[0].activation = None
        sn.revert_(model)
        assert type(model[0]) is nn.BatchNorm2d
        assert list(model[0].children()) == []

    def test_one_with_activation_that_was_synchronised_is_left(self):
        model = nn.Sequential(BatchNormAct2d(3, nn.ReLU()))
        sn.convert_(model)
        sn.sync_(model)
        assert "activation=relu" in sn.revert_(model).left[0].note

    def test_a_subclass_that_was_synchronised_becomes_torchs_synchronised(self):
        model = nn.Sequential(Renamed(3))
        sn.convert_(model, process_group="world")
        sn.revert_(model)
        assert type(model[0]) is nn.SyncBatchNorm
        assert model[0].eps == 1e-3

    def test_one_of_any_rank_that_is_not_synchronised_any_more_is_left(self):
        model = nn.Sequential(nn.SyncBatchNorm(3))
        sn.convert_(model)
        sn.sync_(model, None)
        assert "input of any rank" in sn.revert_(model).left[0].note


class TestLeft:
    def test_a_subclass_of_ours(self):
        class Mine(sn.BatchNorm1d):
            pass

        assert "subclass of steadynorm's" in reason(Mine(3))

    def test_one_whose_forward_was_replaced(self):
        layer = sn.BatchNorm1d(3)
        layer.forward = lambda x: x
        assert "forward of its own" in reason(layer)

    def test_a_parametrized_one(self):
        class Double(nn.Module):
            def forward(self, x):
                return 2 * x

        layer = sn.BatchNorm1d(3)
        parametrize.register_parametrization(layer, "weight", Double())
        assert "parametrized" in reason(layer)

    def test_inside_of_a_context(self):
        layer = sn.BatchNorm1d(3)
        with sn.no_commit(layer):
            assert "inside of a context" in reason(layer)
        layer = sn.BatchNorm1d(3, domains=("a", "b"))
        with sn.domain(layer, "b"):
            assert "inside of a context" in reason(layer)

    def test_what_only_does_not_mean(self):
        model = nn.Sequential(sn.BatchNorm1d(3), sn.BatchNorm1d(3), nn.BatchNorm1d(3))
        report = sn.revert_(model, only="1")
        assert [type(m) for m in model] == [sn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm1d]
        assert [(row.name, row.after is None) for row in report.layers] == [("0", True), ("1", False)]
        assert str(report).startswith("1 of 2 batch norms turned back")
        assert str(sn.revert_(nn.Linear(2, 2))) == "no batch norm to revert"


def test_refuses_what_is_no_model():
    with pytest.raises(ArgumentError, match="revert_ needs"):
        sn.revert_(3)
    with pytest.raises(ModelError, match="revert_ needs"):
        sn.revert_(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))))
