"""What fold leaves as it is, and says so; what it refuses."""

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support_folding import Block, Control, Optional, Twice, image, randomised


def hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    return model


def prepared():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].qconfig = object()
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (hooked, "hooks"),
        (tied, "shares its weights"),
        (prepared, "quantisation"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)), "parametrised"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), "no running"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)), "ReLU"),
        (Twice, "called 2 times"),
        (Optional, "optional arguments"),
    ],
)
def test_left_and_said(make, why):
    model = randomised(make())
    folded = sn.fold(model, verify=image(2))
    assert folded.fold_report.folded == 0
    assert why in str(folded.fold_report)
    assert folded.fold_report.error == 0


def test_domains_fold_with_the_one_in_use():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), sn.BatchNorm2d(4, domains=("day", "night")))
    model[1].running("night").mean.normal_()
    model.eval()
    assert "domain" in str(sn.fold(model).fold_report)
    with sn.domain(model, "night"):
        folded = sn.fold(model, verify=[image(2), (image(2),), {"input": image(2)}])
    assert folded.fold_report.folded == 1


def test_errors_of_use():
    with pytest.raises(ModelError, match="eval"):
        sn.fold(Block())
    with pytest.raises(ArgumentError, match="Module"):
        sn.fold("model")
    model = randomised(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model[0].kept = model[0].weight * 2
    with pytest.raises(ModelError, match="copied"):
        sn.fold(model)


def test_an_input_that_the_model_refuses_is_said():
    with pytest.raises(ModelError, match="inputs that the model takes"):
        sn.fold(randomised(Block()), verify=image(1))


def test_a_forward_that_needs_the_layer_itself_keeps_it():
    class Reads(Block):
        def forward(self, x):
            return super().forward(x) * self.bn1.num_features

    folded = sn.fold(randomised(Reads()), verify=image(2))
    assert folded.fold_report.folded == 0
    assert "needs the layer itself" in folded.fold_report.layers[0].how


def test_report_is_plain():
    folded = sn.fold(randomised(Control()), verify=image(2))
    plain = folded.fold_report.to_dict()
    assert plain["folded"] == 3
    assert {one["name"] for one in plain["untraced"]} == {"block"}
    assert plain["error"] <= plain["bound"] == 1e-4
    assert "could not be traced: block" in str(folded.fold_report)


def test_what_remains_is_shown():
    model = nn.Sequential(
        nn.Linear(4, 4), sn.BatchNorm1d(4, activation="relu"), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 3, 1, 1)
    )
    shown = str(sn.fold(randomised(model)))
    assert "(1): Remainder(activation=relu, dims=(2,))" in shown
    assert "(2): ChannelPad(4, padding=(1, 1))" in shown
