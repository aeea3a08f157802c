"""What `check` says of a model: figures against a step computed apart, the verdict, and a model left as it was."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.base import BatchNorm
from steadynorm.surgery import apart, checking, side_by_side
from support_checking import Doubled, Net, by_definition, by_hand, conv_net, errors_by_hand, rand

IMAGES = rand(6, 3, 8, 8)
BRIEF = {"seconds": 0.01}


def test_errors_are_those_of_a_step_by_hand():
    model = conv_net()
    report = sn.check(model, IMAGES, **BRIEF)
    exact = by_hand(by_definition(model), IMAGES)
    fused = sn.fuse(model)
    converted = copy.deepcopy(model)
    sn.convert_(converted)
    for side, version in zip(report.sides, (model, converted, fused), strict=True):
        expected = errors_by_hand(by_hand(version, IMAGES), exact)
        assert side.errors.keys() == expected.keys()
        for name, error in side.errors.items():
            assert 0 < error == pytest.approx(expected[name], rel=1e-3), (side.name, name)
        assert side.error == max(side.errors.values())
        assert side.seconds > 0
    assert report.sides[0].ratio is None
    assert report.sides[1].ratio > 0
    assert (report.fused.fused, report.folded.folded, report.batch_norms) == (1, 2, 2)
    assert not [reason for reason in report.reasons if "error" in reason]


def test_memory_is_what_autograd_holds_on_to():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh(), nn.Dropout(0.5))
    torch_side = sn.check(model, rand(50, 3), **BRIEF).sides[0]
    # Batch norm keeps its input, mean and deviation; tanh its output; dropout its mask, drawn in the numbers' dtype.
    numbers = 50 * 3 * 4
    assert 3 * numbers <= torch_side.memory + numbers
    assert torch_side.memory <= 3 * numbers + 2 * 3 * 4 + 8


class Counted(nn.Module):
    """Draws from every generator there is, and counts."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.drop(self.norm(x)) * (1 + random.random() + np.random.rand())


def test_the_model_and_chance_stay_as_they_were():
    model = Counted()
    model.norm.eval()
    model.norm.weight.grad = torch.full((4,), 7.0)
    tensors = {name: (t, t.clone(), t.data_ptr()) for name, t in model.state_dict(keep_vars=True).items()}
    kinds = [type(m) for m in model.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    wanted = (random.random(), np.random.rand(), torch.rand(()).item())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    example = rand(8, 4)
    given = example.clone()
    report = sn.check(model, example, **BRIEF)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == wanted
    assert [type(m) for m in model.modules()] == kinds
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    assert torch.equal(model.norm.weight.grad, torch.full((4,), 7.0))
    for name, now in model.state_dict(keep_vars=True).items():
        same, before, place = tensors[name]
        assert now is same
        assert now.data_ptr() == place
        assert torch.equal(now, before)
    assert torch.equal(example, given)
    assert not example.requires_grad
    model.norm.weight.grad = None
    assert sn.check(model, example, **BRIEF).sides[1].errors == report.sides[1].errors
    assert report.sides[0].error < 1e-5, "the same seeds for all, of every generator"


def test_named_inputs_and_outputs_of_every_form():
    example = {"x": rand(7, 3), "ids": torch.arange(14).reshape(7, 2) % 9}
    report = sn.check(Net(), example, **BRIEF)
    assert report.sides[1].error < 1e-5
    assert not [reason for reason in report.reasons if "error" in reason]
    with torch.no_grad():
        assert sn.check(Net(), example, **BRIEF).sides[1].error == report.sides[1].error


def test_a_layer_that_is_left_stands_in_the_way():
    report = sn.check(nn.Sequential(Doubled(3), nn.Linear(3, 3), nn.BatchNorm1d(3)), rand(8, 3), **BRIEF)
    assert not report.safe
    assert report.reasons[0].startswith("1 of 2 batch norms are left as they are (0, ")
    assert report.verdict.startswith("what stands in the way: 1 of 2")
    assert "  left 0: it is a subclass" in str(report)
    assert [row.name for row in report.conversion.left] == ["0"]


BREAKS = {
    "output": lambda y: y * (1 + 1e-4),
    "input gradient": lambda y: y + (y - y.detach()) * 1e-4,
}


@pytest.mark.parametrize("quantity", BREAKS)
def test_a_broken_layer_is_found(quantity, monkeypatch):
    forward = BatchNorm.forward
    monkeypatch.setattr(BatchNorm, "forward", lambda self, *args, **options: BREAKS[quantity](forward(self, *args)))
    # A nonlinearity of its own, so that the next layer does not normalise the scale away.
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Softplus())
    report = sn.check(model, rand(40, 3), **BRIEF)
    mine, theirs = report.sides[1].errors, report.sides[0].errors
    assert mine[quantity] == pytest.approx(1e-4, rel=0.7)
    assert theirs[quantity] < 1e-6
    assert any(f"steadynorm: the error of the {quantity} is" in reason for reason in report.reasons)
    assert ("steadynorm: the error of the output is" in report.verdict) == (quantity == "output")


def test_broken_statistics_are_found(monkeypatch):
    forward = BatchNorm.forward

    def drifting(self, *args, **options):
        y = forward(self, *args, **options)
        if self.training:
            self.running_var.mul_(1.001)
        return y

    monkeypatch.setattr(BatchNorm, "forward", drifting)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(40, 3), **BRIEF)
    assert report.sides[1].errors["running statistics"] == pytest.approx(1e-3, rel=0.01)
    assert any("running statistics" in reason for reason in report.reasons)

    def counting_twice(self, *args, **options):
        self.num_batches_tracked += self.training
        return forward(self, *args, **options)

    monkeypatch.setattr(BatchNorm, "forward", counting_twice)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(40, 3), **BRIEF)
    assert math.isnan(report.sides[1].errors["running statistics"])
    assert math.isnan(report.sides[1].error)
    assert report.to_dict()["sides"][1]["errors"]["running statistics"] == "nan"
    assert "nan" in str(report)
    assert not report.safe


def test_one_draw_by_chance_is_no_reason(monkeypatch):
    """Rounding alone can give three times torch's error once; only what lasts is a reason."""
    exact = (1e-6,) * 5
    drawn = iter([3e-6, 1e-6, 0.5e-6, 3e-6, 0.9e-6, 1e-6, 3e-6, 1e-6, 1e-6])

    def errors(*_):
        return side_by_side._Errors({"torch": exact, "steadynorm": (next(drawn),) * 5}, 1e-7)

    monkeypatch.setattr(side_by_side, "_errors", errors)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(8, 3), seconds=5)
    assert next(drawn, None) is None
    assert report.sides[1].error == 1e-6
    assert not [reason for reason in report.reasons if "error" in reason]
    drawn = iter([3e-6] * 6 + [0.5e-6] * 3)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(8, 3), seconds=5)
    assert report.sides[1].error == 3e-6, "more than twice torch's in the median, but less in three draws of nine"
    assert not [reason for reason in report.reasons if "error" in reason]
    monkeypatch.setattr(
        side_by_side, "_errors", lambda *_: side_by_side._Errors({"torch": exact, "steadynorm": (3e-6,) * 5}, 1e-7)
    )
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(8, 3), **BRIEF)
    assert "3.0 times torch's" in report.verdict


@pytest.mark.parametrize(
    ("ours", "slow"),
    [([1.3] * 8, True), ([1.05] * 8, False), ([1.3] * 5 + [0.7] * 3, False), ([3.0, 3.0], False)],
    ids=["slower", "little", "unsure", "too few"],
)
def test_a_slower_step_stands_in_the_way(ours, slow, monkeypatch):
    times = {"torch": [0.01] * len(ours), "steadynorm": [0.01 * one for one in ours]}
    monkeypatch.setattr(side_by_side, "seconds_of", lambda *_: times)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3)), rand(8, 3))
    assert report.safe != slow
    assert any("scatters" in note for note in report.notes) == (not slow and np.median(ours) > 1.1)
    if slow:
        assert report.verdict.endswith("on this example a training step takes 1.30 times torch's")
    else:
        assert report.verdict.startswith("safe to switch: its batch norm converts, no error is larger than twice")
    times = {name: [t / 100 for t in taken] for name, taken in times.items()} | {"fused": [1e-4] * len(ours)}
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), rand(8, 3))
    assert ("(after fuse 1.00); a step of 0.1 ms is mostly calls" in report.verdict) == slow


class Changing(nn.Module):
    """Another output each time."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        type(self).calls += 1
        return self.norm(x) * type(self).calls


class Single(nn.Module):
    """Fails in float64."""

    def __init__(self):
        super().__init__()
        self.lin, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.lin(x.float()))


def uncopied():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.kept = model[0].weight * 2
    return model


def hooked():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("make", "dtype", "said"),
    [
        (Changing, torch.float32, "reason: its forward gives something else each time"),
        (lambda: nn.Sequential(nn.LazyBatchNorm1d()), torch.float32, "reason: its lazy layers"),
        (uncopied, torch.float32, "reason: check changes a copy"),
        (lambda: torch.jit.script(nn.Sequential(nn.BatchNorm1d(3))), torch.float32, "reason: check needs a model of P"),
        (lambda: nn.Sequential(nn.SyncBatchNorm(3)), torch.float32, "reason: it has SyncBatchNorm"),
        (hooked, torch.float32, "note: hooks on 0 stay"),
        (lambda: nn.DataParallel(nn.Sequential(nn.BatchNorm1d(3))), torch.float32, "note: the model inside of DataP"),
        (lambda: torch.compile(nn.Sequential(nn.BatchNorm1d(3))), torch.float32, None),
        (Single, torch.float32, "note: the model does not run in float64"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, dtype=torch.bfloat16)), torch.bfloat16, "note: running statistics in"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64)), torch.float64, None),
        (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(3, affine=False)), torch.float32, None),
        (lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), torch.float32, None),
        (lambda: nn.Sequential(sn.BatchNorm1d(3)), torch.float32, "note: 1 batch norm of steadynorm's already"),
        (lambda: sn.BatchNorm1d(3, activation="relu"), torch.float32, "note: the model could not be turned back"),
    ],
    ids=[
        *("changing", "lazy", "uncopied", "script", "sync", "hooked", "parallel", "compiled", "float32 alone"),
        *("half", "double", "in place", "no statistics", "ours", "not as torch's"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_of_every_kind(make, dtype, said):
    report = sn.check(make(), rand(8, 3).to(dtype), **BRIEF)
    lines = [f"reason: {one}" for one in report.reasons] + [f"note: {one}" for one in report.notes]
    assert said is None or any(line.startswith(said) for line in lines), lines
    if said is None or said.startswith("note"):
        assert not [line for line in lines if line.startswith("reason") and "training step" not in line]
        assert report.sides[1].error is not None
    assert report.safe == (not report.reasons)
    assert report.verdict in " ".join(str(report).split("\n\n")[0].split()) or len(report.verdict) > 90
    if make is Single:
        assert report.sides[0].errors == {}


class Asking(nn.Module):
    """As transformers' models of sound under gradient checkpointing: it asks for gradients itself."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        if self.training:
            x.requires_grad = True
        return self.norm(x)


class Spoiling(nn.Module):
    """Works in place on its input."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x.add_(1).tanh_())


def test_a_forward_that_works_in_place_leaves_the_example():
    example = rand(8, 3)
    before = example.clone()
    report = sn.check(Spoiling(), example, **BRIEF)
    assert torch.equal(example, before)
    assert report.sides[1].error < 1e-5
    assert sn.fold(Spoiling().eval(), verify=example).fold_report.error < 1e-5
    assert torch.equal(example, before)


def test_an_input_that_may_not_ask_for_gradients():
    example = rand(8, 3).requires_grad_()
    report = sn.check(Asking(), example, **BRIEF)
    assert report.sides[1].errors["input gradient"] is None
    assert report.sides[1].errors["parameter gradients"] < 1e-6
    assert example.grad is None
    assert example.requires_grad


def test_dropout_that_draws_differently_in_float64(monkeypatch):
    """As on CUDA: then it is left out of the errors."""
    bernoulli = nn.Dropout.forward

    def other(self, x):
        if self.training and self.p and x.dtype == torch.float64:
            torch.rand(1)
        return bernoulli(self, x)

    monkeypatch.setattr(nn.Dropout, "forward", other)
    report = sn.check(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()), rand(30, 3), **BRIEF)
    assert any("measured without it" in note for note in report.notes)
    assert report.sides[0].error < 1e-5


def test_without_an_example_nothing_is_run():
    report = sn.check(conv_net())
    assert report.sides == ()
    assert report.verdict == "what stands in the way: nothing was run: give an example of the model's input"
    assert "fold: 2 of 2 batch norms folded" in str(report)
    assert sn.check(nn.Linear(2, 2)).verdict == "nothing to switch: the model has no batch norm"
    assert sn.check(nn.Linear(2, 2), rand(3, 2)).safe


@pytest.mark.parametrize(
    ("model", "example", "said"),
    [
        (nn.Sequential(nn.BatchNorm1d(3)), rand(8, 4), "failed: RuntimeError"),
        (nn.Sequential(nn.BatchNorm1d(3)), rand(1, 3), "failed on the example: ValueError: Expected more than 1 value"),
        (nn.Sequential(nn.BatchNorm1d(3)), "text", "failed"),
    ],
)
def test_a_model_that_fails_on_the_example_says_why(model, example, said):
    with pytest.raises(ModelError, match=said):
        sn.check(model, example)


class Backward(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(x)
        if y.requires_grad:
            y.register_hook(lambda grad: 1 / 0)
        return y


def test_a_backward_that_fails_says_why():
    with pytest.raises(ModelError, match="backward pass of this Backward failed on the example: ZeroDivisionError"):
        sn.check(Backward(), rand(8, 3))


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="Module"):
        sn.check("model", rand(2, 3))
    with pytest.raises(ArgumentError, match="seconds"):
        sn.check(nn.BatchNorm1d(3), rand(2, 3), seconds=0)


def test_an_operation_that_fails_is_a_note(monkeypatch):
    def wrong(*_, **__):
        raise KeyError("odd")

    monkeypatch.setattr(checking, "fuse", wrong)
    monkeypatch.setattr(checking, "fold", lambda *_, **__: (_ for _ in ()).throw(ModelError("beyond the bound")))
    report = sn.check(conv_net(), IMAGES, **BRIEF)
    assert report.notes[:2] == ("fuse failed: KeyError: 'odd'", "fold: beyond the bound")
    assert (report.fused, report.folded) == (None, None)
    assert [side.name for side in report.sides] == ["torch", "steadynorm"]


def test_values_that_are_not_finite():
    model = nn.Sequential(nn.BatchNorm1d(3))
    report = sn.check(model, torch.full((8, 3), float("nan")), **BRIEF)
    assert not [reason for reason in report.reasons if "error" in reason]
    one = apart.Step([torch.tensor([1.0, float("inf")])], [], {}, {}, [])
    assert apart.errors_of(one, one)[0] == 0
    others = [
        one._replace(outputs=[torch.tensor([1.0, 2.0])]),
        one._replace(outputs=[torch.zeros(3)]),
        one._replace(gradients={"weight": torch.ones(2)}),
    ]
    for place, other in zip((0, 0, 2), others, strict=True):
        assert math.isnan(apart.errors_of(other, one)[place])
    wanted = one._replace(statistics={"running_mean": torch.tensor([3.0]), "running_var": torch.tensor([4.0])})
    off = one._replace(statistics={"running_mean": torch.tensor([3.5]), "running_var": torch.tensor([4.4])})
    assert apart.errors_of(off, wanted)[3] == pytest.approx(0.25), "half a unit, of which two are a deviation"
    off.statistics["running_var"].fill_(2.0)
    assert apart.errors_of(off, wanted)[3] == pytest.approx(0.5), "half of the variance"
    learned = one._replace(statistics={"0.running_mean": torch.ones(2), "0.running_var": torch.ones(2)})
    assert math.isnan(apart.errors_of(one, learned)[3])


def test_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3)
    report = sn.check(transformers.ResNetForImageClassification(config), {"pixel_values": rand(4, 3, 32, 32)}, **BRIEF)
    assert len(report.conversion.converted) == report.batch_norms == 8
    assert not [reason for reason in report.reasons if "error" in reason]
    assert report.sides[1].error < 1e-4
