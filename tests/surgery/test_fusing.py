"""fuse: one op computes what two or three did, in training too, and nothing else about the model changes."""

import copy
import io
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError, ShapeError
from support_converting import assert_same, by_definition, in_single, near, step, stirred
from support_fusing import CASES, Basic, Branching, Case, Moved, inputs, reasons

OURS = (sn.BatchNorm1d, sn.BatchNorm2d, sn.BatchNorm3d)


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return stirred(case.build()).double()


class TestTheSameModel:
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("name", CASES)
    def test_outputs_gradients_and_updates_equal_the_definition(self, name, training):
        case = CASES[name]
        model = built(case)
        definition, state = by_definition(model), copy.deepcopy(model.state_dict())
        fused = sn.fuse(model)
        report = fused.fuse_report
        assert (len(report.layers), report.fused) == (case.layers, case.fused), str(report)
        activated = [m for m in fused.modules() if isinstance(m, OURS) and m.activation is not None]
        assert len(activated) == sum(layer.activation != "" for layer in report.layers)
        assert list(fused.state_dict()) == list(state)
        for seed in (0, 1):  # the second step starts from what the first has left
            x = inputs(case.shape, seed)
            assert_same(step(fused, x, training), step(definition, x, training))
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert not any(isinstance(m, OURS) for m in model.modules())

    @pytest.mark.parametrize("name", CASES)
    def test_in_float32_the_error_is_at_most_twice_the_originals(self, name):
        ours, theirs = in_single(built(CASES[name]), inputs(CASES[name].shape), sn.fuse)
        assert all(0 < one <= 2 * other for one, other in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
    @pytest.mark.parametrize("name", ["ResNet", "another forward in training"])
    def test_copies_compute_the_same(self, name, how):
        case = CASES[name]
        fused = sn.fuse(built(case))
        if how == "copy":
            again = copy.deepcopy(fused)
        elif how == "pickle":
            again = pickle.loads(pickle.dumps(fused))
        else:
            torch.save(fused, file := io.BytesIO())
            file.seek(0)
            again = torch.load(file, weights_only=False)
        assert type(again).__name__ == type(fused).__name__
        for training in (True, False):
            assert_same(step(again, inputs(), training), step(fused, inputs(), training), 0.0)

    def test_checkpoints_load_both_ways(self):
        model = built(CASES["ResNet"])
        fused = sn.fuse(model)
        step(fused, inputs(), True)
        model.load_state_dict(fused.state_dict())
        near(model.eval()(inputs()), fused.eval()(inputs()), 1e-12)
        sn.fuse(model).load_state_dict(model.state_dict())

    def test_classes_and_attributes_stay(self):
        model = built(CASES["ResNet"])
        model[0].note = "mine"
        fused = sn.fuse(model)
        assert isinstance(fused[0], Basic)
        assert type(fused[0]) is not Basic
        assert fused[0].note == "mine"
        assert repr(type(fused[0])) == repr(Basic)

    def test_fuses_what_is_ours_already(self):
        fused = sn.fuse(nn.Sequential(nn.Linear(3, 3), sn.BatchNorm1d(3, momentum=0.2), nn.ELU(0.5)))
        assert str(fused[1].activation) == "elu(0.5)"
        assert fused[1].momentum == 0.2
        again = sn.fuse(fused)
        assert [layer.how for layer in again.fuse_report.layers] == ["it applies elu(0.5) already"]

    @pytest.mark.parametrize("name", ["ResNet", "control flow", "moved in between"])
    def test_folds_afterwards(self, name):
        case = CASES[name]
        model = built(case)
        folded = sn.fold(sn.fuse(model).eval(), example=inputs(case.shape))
        near(folded(inputs(case.shape)), by_definition(model).eval()(inputs(case.shape)), 1e-9)
        assert folded.fold_report.folded == sn.fold(model.eval(), example=inputs(case.shape)).fold_report.folded

    def test_is_traced_and_exported(self):
        fused = sn.fuse(built(CASES["ResNet"])).eval()
        traced = torch.fx.symbolic_trace(fused)
        program = torch.export.export(fused, (inputs(),))
        near(traced(inputs()), fused(inputs()), 1e-12)
        near(program.module()(inputs()), fused(inputs()), 1e-12)

    def test_compiles(self):
        fused = sn.fuse(built(CASES["another forward in training"]))
        compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)
        for training in (True, False):
            near(compiled.train(training)(inputs()), fused.train(training)(inputs()), 1e-12)

    def test_a_forward_with_another_one_in_it_that_depends_on_the_mode(self):
        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

            def forward(self, x):
                y = F.relu(self.inner(x) + x)
                return 2 * y if self.training else y

        assert reasons(Outer()) == {
            "inner.1": "what holds it does something else in training, and so may what lies between"
        }

    def test_a_residual_that_broadcasts(self):
        class Conditioned(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.embed = nn.BatchNorm2d(3), nn.Linear(2, 3)

            def forward(self, x):
                return F.silu(self.bn(x) + self.embed(x[:, :2, 0, 0])[:, :, None, None])

        assert reasons(Conditioned()) == {}

    def test_a_residual_that_is_larger_is_an_error(self):
        class Larger(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, y):
                return F.relu(self.bn(x) + y)

        fused = sn.fuse(Larger())
        with pytest.raises(ShapeError, match=r"must broadcast to its shape \(2, 3, 1, 1\), got \(2, 3, 4, 4\).*only="):
            fused(torch.randn(2, 3, 1, 1), torch.randn(2, 3, 4, 4))


class TestUse:
    def test_errors(self):
        with pytest.raises(ArgumentError, match=r"fuse needs a torch\.nn\.Module, got int"):
            sn.fuse(3)
        with pytest.raises(ModelError, match="TorchScript"):
            sn.fuse(torch.jit.trace(nn.ReLU(), torch.zeros(1)))
        with pytest.raises(ArgumentError, match="fits no batch norm"):
            sn.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), only="nothing")
        model = nn.Linear(2, 2)
        model.kept = model(torch.zeros(1, 2))
        with pytest.raises(ModelError, match="fuse changes a copy of the model, and this Linear cannot be copied"):
            sn.fuse(model)

    def test_a_model_without_batch_norm(self):
        assert str(sn.fuse(nn.Linear(2, 2)).fuse_report) == "0 of 0 batch norms fused"

    def test_the_report(self):
        report = sn.fuse(Branching()).fuse_report
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain["fused"] == 5
        assert plain["untraced"][0]["name"] == ""
        assert plain["layers"][0] == {
            **{"name": "stem.1", "fused": True, "activation": "silu", "residual": False, "where": None},
            "how": "applies stem.2",
        }
        text = str(report)
        assert "5 of 6 batch norms fused" in text
        assert "2 with the sum and relu" in text
        assert "left blocks.1.shortcut.1: another batch norm adds its output" in text
        assert "could not be traced: the model (TypeError" in text

    def test_modes_of_the_parts_stay(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), Moved()).eval()
        model[2].train()
        fused = sn.fuse(model)
        assert [m.training for m in fused.modules()] == [m.training for m in model.modules()]
