"""convert_ on models that others wrote: those of transformers, small, with random weights and running statistics."""

import copy

import pytest
import torch
from torch import nn

import steadynorm as sn
from support_converting import Step, assert_same, near, step, stirred
from support_transformers import SMALL, inputs_of, model_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("family", SMALL)
def test_equals_the_original(family, training):
    original = model_of(family)
    model = copy.deepcopy(original)
    report = sn.convert_(model)
    assert len(report.converted) == SMALL[family][2]
    assert report.left == ()
    assert list(model.state_dict()) == list(original.state_dict())
    x = inputs_of(family)

    def seeded(one: nn.Module) -> Step:
        torch.manual_seed(3)  # some drop paths at random
        return step(one, x, training)

    assert_same(seeded(model), seeded(original))
    sn.revert_(model)
    model.load_state_dict(original.state_dict(), strict=True)
    with torch.no_grad():
        near(model.eval()(x), original.eval()(x), 1e-12)


def test_detrs_frozen_batch_norm():
    modeling = pytest.importorskip("transformers.models.detr.modeling_detr")
    original = stirred(nn.Sequential(nn.Conv2d(3, 4, 3), modeling.DetrFrozenBatchNorm2d(4), nn.ReLU())).double()
    model = copy.deepcopy(original)
    assert str(sn.convert_(model)).splitlines()[1:] == [
        "  1 transformers.DetrFrozenBatchNorm2d -> steadynorm.FrozenBatchNorm2d (frozen)"
    ]
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert_same(step(model, x, True), step(original, x, True))


def test_a_model_without_batch_norm_is_left_alone():
    import transformers

    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    assert sn.convert_(transformers.ConvNextModel(config)).layers == ()
