"""fold on models that others wrote: those of transformers, small, with random weights and running statistics."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import steadynorm as sn
from support_converting import ByDefinition, stirred
from support_folding import fewest
from support_transformers import SMALL

transformers = pytest.importorskip("transformers")

WIDE = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
HEADS = {"num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
DETR = {
    **{"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
}
TEXTNET = {
    **{"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 16], "image_size": [64, 64]},
    "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3], [1, 3]], [[3, 3]], [[3, 1]]],
    "conv_layer_strides": [[1], [2, 1], [2], [2]],
}
MOBILEVIT = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 2}
SOUND = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4}
SPEECH = {**{k: v for k, v in DETR.items() if k != "d_model"}, "hidden_size": 16, "vocab_size": 10, "num_mel_bins": 8}
SPEECH |= {"speech_decoder_prenet_units": 8, "speech_decoder_postnet_units": 8, "reduction_factor": 1}
SPEECH |= {"speech_decoder_prenet_dropout": 0.0, "speaker_embedding_dim": 8}
SERIES = {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "num_hidden_layers": 2}

# The class, options that make it small, how many batch norms there are, and how many go: both counted by hand.
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    # the stem; two bottlenecks of three; one of three and the projection of its shortcut
    "ResNet": ("ResNetModel", SMALL["ResNet"][0], 11, 1 + 2 * 3 + (3 + 1)),
    # the stem; two in each of four blocks; the projections of three, which stride
    "ResNet, basic": ("ResNetModel", {**WIDE, "layer_type": "basic"}, 12, 1 + 4 * 2 + 3),
    # the stem; three in each of two blocks, which both stride, with their projections
    "RegNet": ("RegNetModel", SMALL["RegNet"][0], 9, 1 + 2 * (3 + 1)),
    # the stem; thirteen pairs of a depthwise and a pointwise convolution
    "MobileNetV1": ("MobileNetV1Model", {**SMALL["MobileNetV1"][0], "tf_padding": False}, 27, 1 + 13 * 2),
    "MobileNetV1, tf_padding": ("MobileNetV1Model", SMALL["MobileNetV1"][0], 27, 1 + 13 * 2),
    # three in the stem; sixteen inverted residuals of three; the last convolution
    "MobileNetV2": ("MobileNetV2Model", {**SMALL["MobileNetV2"][0], "tf_padding": False}, 52, 3 + 16 * 3 + 1),
    "MobileNetV2, tf_padding": ("MobileNetV2Model", SMALL["MobileNetV2"][0], 52, 3 + 16 * 3 + 1),
    # the stem; a block without expansion (two); six with (three); the last, called by the encoder itself
    "EfficientNet": ("EfficientNetModel", SMALL["EfficientNet"][0], 22, 1 + 2 + 6 * 3 + 1),
    # four patch convolutions; three stages of an attention (two) and an MLP (two); two between of three and two;
    # each behind a linear layer, its first two axes flattened into one
    "Levit": ("LevitModel", SMALL["Levit"][0], 26, 4 + 3 * (2 + 2) + 2 * (3 + 2)),
    # the two heads have a batch norm before a linear layer each
    "Levit, heads": ("LevitForImageClassificationWithTeacher", SMALL["Levit"][0], 28, 26 + 2),
    # between the depthwise convolution and the activation of each of two layers
    "Wav2Vec2Conformer": ("Wav2Vec2ConformerModel", SMALL["Wav2Vec2Conformer"][0], 2, 2),
    # before a convolution that pads by two
    "Hubert": (
        "HubertModel",
        {**HEADS, **SOUND, "num_hidden_layers": 1, "num_conv_pos_embedding_groups": 2, "conv_pos_batch_norm": True},
        *(1, 1),
    ),
    # five convolutions of the postnet
    "SpeechT5": ("SpeechT5ForTextToSpeech", SPEECH, 5, 5),
    # frozen ones, in a ResNet: the stem; four bottlenecks of three; the projections of all blocks but the first
    "Detr": ("DetrModel", {**DETR, "d_model": 16, "num_queries": 4}, 16, 1 + 4 * 3 + 3),
    # the stem; main, vertical, horizontal and none (3 x 3 by stride 1); main, vertical, horizontal (by 2); main,
    # vertical, none (1 x 3); main, vertical, horizontal; main and horizontal (3 x 1): where there is none, its batch
    # norm goes only because the branches are merged
    "TextNet": ("TextNetModel", TEXTNET, 16, 1 + 4 + 3 + 3 + 3 + 2),
    # the stem; four inverted residuals of three; three stages of one such and three convolutions; the last
    "MobileViT": ("MobileViTModel", {**MOBILEVIT, "image_size": 64}, 32, 1 + 4 * 3 + 3 * (3 + 3) + 1),
    # two patch convolutions; in each of four stages one behind a depthwise convolution and one before that of an MLP;
    # one between each two stages
    "SwiftFormer": ("SwiftFormerModel", {"depths": [1] * 4, "embed_dims": [8, 16, 24, 32]}, 13, 2 + 4 * 2 + 3),
    # one behind a transposed convolution; four pooled, three lateral, three of the pyramid, two bottlenecks; one aside
    "Beit": (
        "BeitForSemanticSegmentation",
        {**HEADS, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16, "out_indices": [1, 2, 3, 4]},
        *(14, 1 + 4 + 3 + 3 + 2 + 1),
    ),
    # two in each of two layers, behind a residual sum, whose output goes into the next
    "PatchTST": ("PatchTSTModel", {**SERIES, "d_model": 16, "ffn_dim": 16, "num_attention_heads": 2}, 4, 0),
    # layer norms alone
    "ConvNext": ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 0, 0),
}


def model_of(name: str) -> nn.Module:
    kind, options, *_ = MODELS[name]
    if name == "Detr":
        backbone = transformers.ResNetConfig(**WIDE, out_features=["stage4"])
        options = {**options, "use_timm_backbone": False, "backbone": None, "backbone_config": backbone}
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()  # transformers' own are so small that next to nothing reaches the end
    return stirred(model).eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    if name in ("Wav2Vec2Conformer", "Hubert"):
        return {"input_values": normal(2, 400)}
    if name == "SpeechT5":
        given = {"decoder_input_values": normal(1, 5, 8), "speaker_embeddings": normal(1, 8)}
        return {"input_ids": torch.arange(6)[None], **given}
    return {"past_values": normal(2, 32, 2)} if name == "PatchTST" else {"pixel_values": normal(2, 3, 64, 64)}


def by_definition(model: nn.Module) -> nn.Module:
    """A copy in which every batch norm, and frozen one, is its definition."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm) or type(child).__name__.endswith("FrozenBatchNorm2d"):
                parent._modules[name] = ByDefinition(child).eval()
    return model


def outputs(model: nn.Module, given: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
    with torch.no_grad():
        found = pytree.tree_leaves(tuple(model.to(dtype)(**given).values()))
    return [one.double() for one in found if isinstance(one, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition(name):
    _, _, layers, count = MODELS[name]
    model, given = model_of(name), inputs_of(name)
    wanted = outputs(by_definition(model), given, torch.float64)
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        folded = sn.fold(model.to(dtype))
        for one, other in zip(outputs(folded, given, dtype), wanted, strict=True):
            assert (one - other).abs().max() <= bound * other.abs().max()
        assert folded.fold_report.folded == count, str(folded.fold_report)
        assert len(folded.fold_report.layers) == layers
    left = [m for m in folded.modules() if isinstance(m, _BatchNorm) or "FrozenBatchNorm" in type(m).__name__]
    assert len(left) == layers - count
    assert count >= fewest(model)


def test_what_is_left_of_them_is_said():
    report = sn.fold(model_of("PatchTST")).fold_report
    assert {layer.how for layer in report.layers} == {"transpose comes before it; transpose comes after it"}
