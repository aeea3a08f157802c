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
from support_fusing import CASES, IMAGE, Basic, Branching, Case, Modal, Moved

OURS = (sn.BatchNorm1d, sn.BatchNorm2d, sn.BatchNorm3d)


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return stirred(case.build()).double()


def inputs(shape: tuple[int, ...] = IMAGE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def reasons(model: nn.Module, **options) -> dict[str, str]:
    """Why batch norms were left, by name; the fused model must compute what the model does."""
    model = stirred(model).double()
    fused = sn.fuse(model, **options)
    if not options:
        for training in (True, False):
            definition = by_definition(model)
            assert_same(step(copy.deepcopy(fused), inputs(), training), step(definition, inputs(), training))
    return {layer.name: layer.how for layer in fused.fuse_report.layers if not layer.fused}


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


class TestLeft:
    def test_hooks(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
        model[1].register_forward_hook(lambda *_: None)
        model[4].register_forward_hook(lambda *_: None)
        left = reasons(model)
        assert "1 has forward hooks" in left["1"]
        assert "4 has forward hooks" in left["3"]

    def test_hooks_of_what_lies_between(self):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

            def forward(self, x):
                return F.relu(self.body(x) + x)

        model = Around()
        calls = []
        model.body.register_forward_hook(lambda *_: calls.append(1))
        assert reasons(model) == {"body.1": "hooks of what lies between would not be called any more"}
        assert calls

    def test_an_output_that_is_used_twice_too(self):
        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                y = self.bn(x)
                return F.relu(y) * y

        assert reasons(Both()) == {"bn": "its output is used 2 times"}

    def test_a_layer_that_is_called_twice(self):
        class Same(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(F.relu(self.bn(x))))

        assert reasons(Same()) == {"bn": "bn is called 2 times"}

    def test_what_depends_on_the_mode(self):
        class Mode(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x)) if self.training else torch.tanh(self.bn(x))

        assert "depends on training" in reasons(Mode())["bn"]

    def test_what_depends_on_an_optional_argument(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, act=None):
                y = self.bn(x)
                return F.relu(y) if act is None else torch.tanh(y)

        assert "optional arguments" in reasons(Optional())["bn"]

    def test_a_forward_to_rewrite_that_depends_on_an_optional_argument(self):
        class Optional(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, scale=None):
                y = F.relu(self.bn(x) + x)
                return y if scale is None else scale * y

        assert reasons(Optional()) == {"bn": "the forward of what holds it depends on its optional arguments"}

    def test_an_optional_shortcut(self):
        class Shortcut(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x, shortcut=None):
                if shortcut is None:
                    shortcut = x
                return F.relu(self.bn(x) + shortcut)

        assert reasons(Shortcut()) == {"bn": "the forward of what holds it depends on its optional arguments"}

    def test_an_optional_argument_that_is_only_handed_on(self):
        class Inner(nn.Module):
            def forward(self, x, factor, shift=None):
                return x * factor if shift is None else x * factor + shift

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.inner = nn.BatchNorm2d(3), Inner()

            def forward(self, x, factor=2.0, shift=None):
                return self.inner(F.relu(self.bn(x) + x), factor, shift=shift)

        assert reasons(Outer()) == {}

    def test_an_activation_that_serves_another_branch_too(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act = nn.BatchNorm2d(3), nn.SiLU()

            def forward(self, x):
                return self.act(self.bn(x) if x.sum() < 1e9 else x)

        assert reasons(Branch()) == {"bn": "act is called without it, too"}

    def test_branches_that_agree(self):
        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act, self.other = nn.BatchNorm2d(3), nn.SiLU(), nn.BatchNorm2d(3)

            def forward(self, x, scale=None):
                if x.shape[1] != 3:
                    raise ValueError("three channels are wanted")
                y = self.act(self.bn(x))
                if x.sum() > 1e9:
                    y = self.other(y)
                return y if scale is None else scale * y

        assert list(reasons(Branch())) == ["other"]

    def test_a_forward_that_draws_at_random(self):
        class Random(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.p = nn.BatchNorm2d(3), 0.0

            def forward(self, x):
                y = self.bn(x) + x
                return F.relu(y) if torch.rand(()).item() >= self.p else y

        assert "draws at random" in reasons(Random())["bn"]

    def test_a_forward_that_changes_attributes(self):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.calls = nn.BatchNorm2d(3), 10**6

            def forward(self, x):
                self.calls += 1
                return F.relu(self.bn(x))

        assert "changes attributes" in reasons(Counting())["bn"]

    def test_a_forward_that_makes_tensors_of_its_own(self):
        class Making(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x + torch.ones(3, 1, 1, dtype=torch.float64)))

        assert "tensors of its own" in reasons(Making())["bn"]

    def test_a_sum_written_into_what_is_used_elsewhere(self):
        class Written(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                short = same = x * 2
                y = self.bn(self.conv(x))
                short += y
                return F.relu(short) + same

        assert "used elsewhere" in reasons(Written())["bn"]

    def test_what_is_written_in_place_stays_written(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                y = x * 2
                same = y
                y += 1
                return F.relu(self.bn(self.conv(x)) + same)

        assert reasons(InPlace()) == {}

    def test_an_input_that_is_written_into_before_the_sum(self):
        class Late(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3, affine=False)

            def forward(self, x):
                x = x * 2
                y = self.bn(x.detach()) if False else self.bn(x)
                short = x.clone()
                with torch.no_grad():
                    x.detach().add_(1)
                return F.relu(y + short)

        # Not computed here: eager itself refuses the backward of what was written into.
        assert "written into its input" in {r.name: r.how for r in sn.fuse(Late()).fuse_report.layers}["bn"]

    def test_no_activation_that_a_layer_has(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.PReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        assert reasons(model) == {
            "0": "neither an activation nor a sum follows it, but 1 (PReLU)",
            "2": "neither an activation nor a sum follows it, but 3 (Conv2d)",
            "4": "neither an activation nor a sum follows it, but the end of what was traced",
        }

    def test_a_sum_of_a_multiple(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(torch.add(self.bn(x), x, alpha=2))

        assert reasons(Scaled()) == {"bn": "neither an activation nor a sum follows it, but add"}

    def test_a_layer_of_ours_that_adds_already(self):
        class Adding(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = sn.BatchNorm2d(3)

            def forward(self, x):
                return F.relu(self.bn(x, residual=x) + x)

        model = Adding().double()
        fused = sn.fuse(model)
        assert [layer.how for layer in fused.fuse_report.layers] == ["it adds something to its output already"]
        assert torch.equal(fused(inputs()), model(inputs()))

    def test_a_forward_that_was_replaced(self):
        model = Modal()
        model.forward = lambda x: F.relu(model.bn(model.conv(x)) + x)
        fused = sn.fuse(model)
        assert fused.fuse_report.fused == 0

    def test_what_convert_leaves(self):
        class Own(nn.BatchNorm2d):
            def forward(self, input):
                return 2 * super().forward(input)

        fused = sn.fuse(nn.Sequential(Own(3), nn.ReLU()))
        assert fused.fuse_report.layers[0].how.startswith("it is a subclass that does something of its own")

    def test_what_only_does_not_mean(self):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
        fused = sn.fuse(model, only="2")
        assert [layer.fused for layer in fused.fuse_report.layers] == [False, True]
        assert "only=" in fused.fuse_report.layers[0].how
        assert type(fused[0]) is nn.BatchNorm2d

    def test_a_forward_that_needs_the_activation_itself(self):
        class Asking(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn, self.act = nn.BatchNorm2d(3), nn.ELU(0.5)

            def forward(self, x):
                return self.act(self.bn(x)) * self.act.alpha

        assert "needs the activation itself" in reasons(Asking())["bn"]

    def test_a_batch_norm_that_is_reached_into(self):
        class Reaching(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Sequential()
                self.block.add_module("bn", nn.BatchNorm2d(3))
                self.block.add_module("act", nn.ReLU())

            def forward(self, x):
                return self.block.bn(x) if int(x.sum()) > 1e9 else self.block(x)

        assert "directly" in reasons(Reaching())["block.bn"]


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
