"""fuse on models that others wrote: those of transformers, small, with random weights and running statistics."""

import pytest
import torch

import steadynorm as sn
from support_converting import Step, assert_same, by_definition, in_single, step
from support_transformers import SMALL, inputs_of, model_of

pytest.importorskip("transformers")

# How many batch norms can be fused, and why not the others, from the models' code.
FUSED = {
    "ResNet": 1 + 6 + 3,  # all but the projection of one shortcut, which another one adds
    "RegNet": 1 + 4 + 2,  # all but the projections of two shortcuts
    "EfficientNet": 1 + 1 + 6 * 2 + 1,  # all but the 7 at the blocks' ends, with dropout or nothing behind them
    "MobileNetV1": 27,
    "MobileNetV2": 52 - 17,  # all but the 17 at the blocks' ends: no activation, and padding that needs sizes
    "Levit": 3 + 5,  # before a hardswish: three in the patches, and in each of five MLPs one
    "Wav2Vec2Conformer": 2,
}


def converted(model: torch.nn.Module) -> torch.nn.Module:
    sn.convert_(model)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("family", FUSED)
def test_one_step_equals_the_definition(family, training):
    original = model_of(family)
    fused = sn.fuse(original)
    assert fused.fuse_report.fused == FUSED[family], str(fused.fuse_report)
    assert len(fused.fuse_report.layers) == SMALL[family][2]
    assert list(fused.state_dict()) == list(original.state_dict())

    def seeded(one: torch.nn.Module) -> Step:
        torch.manual_seed(3)  # some drop paths at random
        return step(one, inputs_of(family), training)

    assert_same(seeded(fused), seeded(by_definition(original)))


@pytest.mark.parametrize("change", [converted, sn.fuse], ids=["convert", "fuse"])
@pytest.mark.parametrize("family", SMALL)
def test_in_float32_the_error_is_at_most_twice_the_originals(family, change):
    ours, theirs = in_single(model_of(family), inputs_of(family), change)
    assert all(0 < one <= 2 * other for one, other in zip(ours, theirs, strict=True))
