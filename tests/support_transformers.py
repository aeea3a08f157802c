"""Models of transformers, small, built from a config, with random weights and running statistics."""

import torch
from torch import Tensor, nn

from support_converting import stirred

RESNET = {"hidden_sizes": [8, 16], "depths": [2, 1], "embedding_size": 8}
LEVIT = {"hidden_sizes": [16, 24, 32], "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
NO_DROPOUT = dict.fromkeys(
    ["hidden_dropout", "attention_dropout", "feat_proj_dropout", "conformer_conv_dropout", "activation_dropout"], 0.0
)
CONFORMER = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "layerdrop": 0.0},
    **{"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embeddings": 4},
    **{"num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, **NO_DROPOUT},
}

# Options that make a model small, which of its outputs to look at, and how many batch norms it has, counted by hand.
SMALL = {
    "ResNet": (RESNET, "pooler_output", 1 + 6 + 4),
    "RegNet": ({**RESNET, "depths": [1, 1], "groups_width": 8}, "pooler_output", 1 + 4 + 4),
    "MobileNetV1": ({"depth_multiplier": 0.25, "min_depth": 4}, "pooler_output", 27),
    "MobileNetV2": ({"depth_multiplier": 0.25, "min_depth": 4}, "pooler_output", 52),
    "EfficientNet": (
        {"width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 256},
        "pooler_output",
        1 + 2 + 6 * 3 + 1,
    ),
    "Levit": ({**LEVIT, "mlp_ratio": [2] * 3, "attention_ratio": [2] * 3, "image_size": 64}, "pooler_output", 26),
    "Wav2Vec2Conformer": (CONFORMER, "last_hidden_state", 2),
}


class Output(nn.Module):
    """One of a model's outputs: a tensor, as the tests' step wants it."""

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model(x.detach() if x.dim() == 2 else x), self.name)  # sounds want no gradient


def model_of(family: str) -> nn.Module:
    import transformers

    options, name, _ = SMALL[family]
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()  # transformers' own are so small that next to nothing reaches the end
    return stirred(Output(model, name)).double()


def inputs_of(family: str) -> Tensor:
    shape = (3, 400) if "Conformer" in family else (4, 3, 64, 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
