"""ResNet-18, ResNet-50 and MobileNet-V2, with any batch norm in the places of theirs.

Layers and their order are the papers' (He et al. 2015, with the stride in the 3x3 convolution; Sandler et al. 2018).
A model asks its `norm` for every batch norm, says which activation follows, and hands over what is to be added in
between. So the framework's layers and fused ones stand in the same places, under the same names, and take each other's
state_dict:

    resnet50(torch_norm)    nn.BatchNorm2d, then an add and an activation in place, as torchvision writes them
    resnet50(fused_norm)    sn.BatchNorm2d(activation=...), called with residual=
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import steadynorm as sn

Norm = Callable[[int, str | None], nn.Module]  # channels, activation -> a layer called as layer(x, residual=...)

__all__ = ["MODELS", "Norm", "fused_norm", "mobilenet_v2", "norm_shapes", "resnet18", "resnet50", "torch_norm"]

ACTIVATIONS = {"relu": nn.functional.relu, "relu6": nn.functional.relu6}


class TorchNorm(nn.BatchNorm2d):
    """The framework's batch norm, followed by what a fused one does at once."""

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__(channels)
        self.activation = None if activation is None else ACTIVATIONS[activation]

    def forward(self, input: Tensor, *, residual: Tensor | None = None) -> Tensor:
        """Normalises, adds, activates; the last two in place."""
        y = super().forward(input)
        if residual is not None:
            y += residual
        return y if self.activation is None else self.activation(y, inplace=True)


def torch_norm(channels: int, activation: str | None) -> nn.Module:
    """`torch.nn`'s layer with the activation after it."""
    return TorchNorm(channels, activation)


def fused_norm(channels: int, activation: str | None) -> nn.Module:
    """Ours, the activation and the residual inside."""
    return sn.BatchNorm2d(channels, activation=activation)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Without bias, which a batch norm would take away, and padded to keep the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = convolution(inputs, width, 3, stride), norm(width, "relu")
        self.conv2, self.norm2 = convolution(width, width, 3), norm(width, "relu")
        self.shortcut = shortcut(inputs, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """The block of ResNet-18."""
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), residual=self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution four times as wide, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.norm1 = convolution(inputs, width, 1), norm(width, "relu")
        self.conv2, self.norm2 = convolution(width, width, 3, stride), norm(width, "relu")
        self.conv3, self.norm3 = convolution(width, outputs, 1), norm(outputs, "relu")
        self.shortcut = shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """The block of ResNet-50."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), residual=self.shortcut(x))


def shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """The identity where the shapes allow it."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), norm(outputs, None))


def resnet(block: type[Basic] | type[Bottleneck], depths: tuple[int, ...], norm: Norm, classes: int) -> nn.Sequential:
    """The stem, four stages that halve the image and double the channels, and a linear classifier."""
    layers: list[nn.Module] = [convolution(3, 64, 7, 2), norm(64, "relu"), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            width = 64 * 2**stage
            layers.append(block(channels, width, 2 if stage > 0 and i == 0 else 1, norm))
            channels = block.expansion * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def resnet18(norm: Norm, classes: int = 1000) -> nn.Sequential:
    """ResNet-18."""
    return resnet(Basic, (2, 2, 2, 2), norm, classes)


def resnet50(norm: Norm, classes: int = 1000) -> nn.Sequential:
    """ResNet-50."""
    return resnet(Bottleneck, (3, 4, 6, 3), norm, classes)


class Inverted(nn.Module):
    """Widen (1x1), filter each channel (3x3), narrow (1x1, no activation), and a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm: Norm) -> None:
        super().__init__()
        width = inputs * expansion
        widen = [convolution(inputs, width, 1), norm(width, "relu6")] if expansion > 1 else []
        filtered = [convolution(width, width, 3, stride, groups=width), norm(width, "relu6")]
        self.inner = nn.Sequential(*widen, *filtered, convolution(width, outputs, 1))
        self.norm = norm(outputs, None)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block of MobileNet-V2."""
        y = self.inner(x)
        return self.norm(y, residual=x) if self.adds else self.norm(y)


# Table 2 of the paper: expansion, channels, repeats, stride of the first.
INVERTED = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2(norm: Norm, classes: int = 1000) -> nn.Sequential:
    """MobileNet-V2 of width 1, without its dropout: two models must compute the same."""
    layers: list[nn.Module] = [convolution(3, 32, 3, 2), norm(32, "relu6")]
    channels = 32
    for expansion, width, repeats, stride in INVERTED:
        for i in range(repeats):
            layers.append(Inverted(channels, width, stride if i == 0 else 1, expansion, norm))
            channels = width
    layers += [convolution(channels, 1280, 1), norm(1280, "relu6")]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


MODELS = {"resnet18": resnet18, "resnet50": resnet50, "mobilenet_v2": mobilenet_v2}


class _Recorder(nn.Module):
    """Passes its input on and notes its shape."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        self.shapes.append(tuple(x.shape[1:]))
        return x


def norm_shapes(name: str, image: int = 224) -> list[tuple[int, ...]]:
    """Channels, height and width of every batch norm's input, each once, in the order of the network."""
    shapes: list[tuple[int, ...]] = []
    with torch.device("meta"):
        MODELS[name](lambda channels, activation: _Recorder(shapes))(torch.empty(1, 3, image, image))
    return list(dict.fromkeys(shapes))
