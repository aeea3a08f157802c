"""Small models in which batch norms are followed by activations and sums, with the number of those that can be fused,
counted by hand."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import steadynorm as sn
from support_converting import assert_same, by_definition, step, stirred


class Basic(nn.Module):
    """The block of ResNet-18: one activation at two places, a sum in place, a shortcut with a batch norm."""

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out, momentum=0.3)
        alike = channels == out and stride == 1
        self.shortcut = (
            None if alike else nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out, eps=1e-3))
        )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


class ShortcutFirst(nn.Module):
    """The other operand first, and functions."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        short = self.shortcut(x)
        y = torch.add(short, self.bn(self.conv(x)))
        return F.leaky_relu(y, 0.2)


class PreActivation(nn.Module):
    """Batch norm and activation before each convolution; the sum at the end is followed by none."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(torch.tanh(self.bn2(y)))


class Dense(nn.Module):
    """DenseNet's layers, over concatenations."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(3 + 2 * i), nn.ELU(0.7), nn.Conv2d(3 + 2 * i, 2, 3, padding=1))
            for i in range(3)
        )

    def forward(self, x):
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


class Moved(nn.Module):
    """As LeViT has it: a linear layer over tokens, and the batch norm over its features."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.act = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Hardswish()

    def forward(self, x):
        y = self.linear(x)
        return self.act(self.bn(y.flatten(0, 1)).reshape_as(y))


class Methods(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.a(x).relu_()
        y = self.b(y).sigmoid()
        return F.gelu(self.c(y).permute(0, 2, 3, 1), approximate="tanh")


class Branching(nn.Module):
    """A forward that cannot be traced, around parts that can be."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU())
        self.blocks = nn.ModuleList([Basic(4, 4), Basic(4, 6, 2)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if int(x.abs().max()) >= 0:
                x = block(x)
        return x


class Inverted(nn.Module):
    """MobileNet-V2's block: no activation behind the sum, which is used twice."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)
        )

    def forward(self, x):
        y = self.body(x)
        y += x
        return torch.cat([y, y * y], 1)


class Sized(nn.Module):
    """The shapes of the batch norm's output and of the sum are read on the way."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.bn(self.conv(x))
        n = y.size(0)
        y = y + x
        return F.relu(y).reshape(n, y.shape[1], -1)


class Nested(nn.Module):
    """A forward to rewrite around another one, whose end it adds to."""

    def __init__(self):
        super().__init__()
        self.block = Basic(3, 3)
        self.tail = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return F.relu(self.tail(self.block(x)) + x)


class Inner(nn.Module):
    """Its end lies before the sum of what holds it, and its own sum before that."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.conv(F.relu(self.first(x) + x)))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def forward(self, x):
        return torch.sigmoid(x + self.inner(x))


class MovedSum(nn.Module):
    """What is moved before the sum cannot be added in the batch norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.linear(x)
        return F.relu(self.bn(y.flatten(0, 1)).reshape_as(y) + x)


class Modal(nn.Module):
    """Another forward in training."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)) + x)
        return 2 * y if self.training else y


class Twice(nn.Module):
    """A block that is called twice, each time another batch norm's turn."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second, self.act = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3),
            nn.Mish(),
        )

    def forward(self, x):
        x = self.act(self.first(self.conv(x)))
        return self.act(self.second(self.conv(x)))


def _one_activation():
    act = nn.Softplus(2.0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: int
    fused: int


IMAGE = (4, 3, 6, 6)
CASES = {
    "sequence": Case(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Sigmoid(), nn.Linear(5, 2), nn.BatchNorm1d(2)),
        (7, 3), 2, 1,
    ),
    "one activation at two places": Case(_one_activation, IMAGE, 2, 2),
    "ResNet": Case(lambda: nn.Sequential(Basic(3, 4, 2), Basic(4, 4)), IMAGE, 2 + 1 + 2, 4),
    "the shortcut first": Case(ShortcutFirst, IMAGE, 2, 1),
    "PreResNet": Case(lambda: nn.Sequential(PreActivation(), PreActivation()), IMAGE, 4, 4),
    "DenseNet": Case(lambda: nn.Sequential(Dense(), nn.Conv2d(9, 2, 1)), IMAGE, 3, 3),
    "moved in between": Case(Moved, (4, 5, 3), 1, 1),
    "methods": Case(Methods, IMAGE, 3, 3),
    "MobileNet": Case(Inverted, IMAGE, 2, 2),
    "shapes that are read": Case(Sized, IMAGE, 1, 1),
    "nested": Case(Nested, IMAGE, 3, 3),
    "both ends": Case(Outer, IMAGE, 2, 2),
    "moved before a sum": Case(MovedSum, (4, 5, 3), 1, 0),
    "control flow": Case(Branching, IMAGE, 1 + 2 + 3, 1 + 2 + 2),
    "another forward in training": Case(Modal, IMAGE, 1, 1),
    "one activation of a block": Case(Twice, IMAGE, 2, 2),
    "3d": Case(
        lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), nn.Identity(), nn.ReLU6()), (3, 3, 4, 3, 4), 1, 1
    ),
}  # fmt: skip


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
