"""The networks that benchmarks/folding.py folds: small ones of every form, and those of transformers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["OURS", "TRANSFORMERS", "example_of", "of_transformers", "stirred"]


def stirred(model: nn.Module) -> nn.Module:
    """In evaluation, with random running statistics and affine weights: as made, they would hide errors."""
    random = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.2, generator=random)
            layer.running_var.uniform_(0.5, 2, generator=random)
            with torch.no_grad():
                layer.weight.uniform_(0.5, 1.5, generator=random)
                layer.bias.normal_(0, 0.2, generator=random)
    return model.eval()


def _conv(inputs: int, outputs: int, kernel: int = 3, act: bool = True, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    options = {"padding": kernel // 2, "bias": False, **options}
    layers = [nn.Conv2d(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


def _network(stages: Iterable[nn.Module], features: int, last: Iterable[nn.Module] = ()) -> nn.Sequential:
    """A stem of 32 channels, the stages, and ten classes."""
    end = (*last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))
    return nn.Sequential(_conv(3, 32), *stages, *end)


class DenseLayer(nn.Module):
    """Huang et al. 2017: batch norm and ReLU before each convolution, and all before it side by side."""

    def __init__(self, inputs: int, growth: int = 16) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + growth, H, W)."""
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], 1)


class PreBlock(nn.Module):
    """He et al. 2016: a residual block with batch norm and ReLU before each convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.short = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        return self.short(x) + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class Shuffle(nn.Module):
    """Ma et al. 2018: one half of the channels through three convolutions, then both halves shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _conv(half, half, 1), _conv(half, half, 3, act=False, groups=half), _conv(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        one, other = x.chunk(2, 1)
        y = torch.cat([one, self.branch(other)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class RepVGG(nn.Module):
    """Ding et al. 2021: kernels of three and one and a batch norm alone, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.three = _conv(inputs, outputs, 3, act=False, stride=stride)
        self.one = _conv(inputs, outputs, 1, act=False, stride=stride)
        self.alone = nn.BatchNorm2d(inputs) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        y = self.three(x) + self.one(x)
        return F.relu(y if self.alone is None else y + self.alone(x))


class Inception(nn.Module):
    """Szegedy et al. 2016: branches of different kernels, side by side."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _conv(inputs, each, 1),
                nn.Sequential(_conv(inputs, each, 1), _conv(each, each, 3)),
                nn.Sequential(_conv(inputs, each, 1), _conv(each, each, 3), _conv(each, each, 3)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), _conv(inputs, each, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        return torch.cat([branch(x) for branch in self.branches], 1)


class UNet(nn.Module):
    """Ronneberger et al. 2015, three levels, with transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Sequential(_conv(a, b), _conv(b, b)) for a, b in ((3, 16), (16, 32), (32, 64))])
        self.up = nn.ModuleList(
            [
                nn.Sequential(nn.ConvTranspose2d(a, a // 2, 2, 2, bias=False), nn.BatchNorm2d(a // 2), nn.ReLU())
                for a in (64, 32)
            ]
        )
        self.join = nn.ModuleList([nn.Sequential(_conv(a, a // 2), _conv(a // 2, a // 2)) for a in (64, 32)])
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 2, H, W)."""
        seen: list[Tensor] = []
        for stage in self.down:
            x = stage(x if not seen else F.max_pool2d(x, 2))
            seen.append(x)
        for up, join, skip in zip(self.up, self.join, (seen[1], seen[0]), strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.last(x)


OURS: dict[str, Callable[[], nn.Module]] = {
    "DenseNet": lambda: _network(
        [DenseLayer(32 + 16 * i) for i in range(6)], 128, last=[nn.BatchNorm2d(128), nn.ReLU()]
    ),
    "PreResNet": lambda: _network(
        [PreBlock(a, b) for a, b in ((32, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))],
        128,
        last=[nn.BatchNorm2d(128), nn.ReLU()],
    ),
    "ShuffleNet": lambda: _network([_conv(32, 64, stride=2), *(Shuffle(64) for _ in range(6))], 64),
    "RepVGG": lambda: _network(
        [RepVGG(a, b) for a, b in ((32, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))], 128
    ),
    "Inception": lambda: _network([Inception(a, 32) for a in (32, 128, 128)], 128),
    "U-Net": UNet,
}
"""Small networks of every form, for images of 32 by 32."""

_SOUND = {"hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 576}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-50": ("ResNetModel", {}),
    "ResNet-18": ("ResNetModel", {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}),
    "RegNet": ("RegNetModel", {"hidden_sizes": [48, 104, 208, 440], "depths": [2, 4, 10, 1], "groups_width": 8}),
    "MobileNetV1": ("MobileNetV1Model", {}),
    "MobileNetV2": ("MobileNetV2Model", {}),
    "EfficientNet-B0": (
        "EfficientNetModel",
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 64},
    ),
    "LeViT-128": ("LevitModel", {"image_size": 64}),
    "MobileViT": ("MobileViTModel", {"image_size": 64}),
    "SwiftFormer": ("SwiftFormerModel", {"depths": [3, 2, 6, 4], "embed_dims": [48, 56, 112, 220]}),
    "TextNet": ("TextNetModel", {}),
    "wav2vec 2.0 Conformer": ("Wav2Vec2ConformerModel", {**_SOUND, "conv_dim": [128] * 7}),
}
"""Classes and options, for images of 64 by 64 or half a second of sound at 16 kHz."""


def of_transformers(name: str) -> nn.Module:
    """Built from a config, with random weights."""
    import transformers

    kind, options = TRANSFORMERS[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            module.reset_parameters()  # theirs are so small that next to nothing would reach the end
    return model


def example_of(name: str, rows: int) -> Tensor:
    """A batch for the model of that name."""
    side = 64 if name in TRANSFORMERS else 32
    shape = (rows, 8000) if "wav2vec" in name else (rows, 3, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
