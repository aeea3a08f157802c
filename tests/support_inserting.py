"""Plain models to put batch norms into, and a batch norm by its definition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalized(z: Tensor, norm: nn.BatchNorm2d, axis: int = 1) -> Tensor:
    """γ (z - μ) / sqrt(σ² + ε) + β in float64, by the batch in training and the running statistics in evaluation."""
    z = z.double().movedim(axis, 1)
    axes = [a for a in range(z.dim()) if a != 1]
    shape = [1, -1, *[1] * (z.dim() - 2)]
    if norm.training:
        mean, var = z.mean(axes), ((z - z.mean(axes, keepdim=True)) ** 2).mean(axes)
    else:
        mean, var = norm.running_mean.double(), norm.running_var.double()
    y = (z - mean.view(shape)) / torch.sqrt(var.view(shape) + norm.eps)
    return (y * norm.weight.double().view(shape) + norm.bias.double().view(shape)).movedim(1, axis)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with weights, γ, β and running statistics that hide no error."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("running_var", "batchnorm.weight", "_bn.weight")):
                tensor.copy_(torch.rand(tensor.shape, generator=random, dtype=torch.float64) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=random, dtype=torch.float64) / 2)
    return model


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Functional(nn.Module):
    """Functions for nonlinearities, a forward that asks whether it is training, and a method of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3)
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def encode(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return torch.flatten(F.adaptive_avg_pool2d(torch.tanh(self.conv2(x)), 1), 1)

    def forward(self, x):
        x = F.dropout(self.encode(x), 0.5, self.training)
        return F.log_softmax(self.fc2(F.elu(self.fc1(x), 0.5)), 1)


class SharedRelu(nn.Module):
    """One module for all nonlinearities."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5)])
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(5, 2)

    def forward(self, x):
        for layer in self.layers:
            x = self.relu(layer(x))
        return self.out(x)


class Block(nn.Module):
    """A residual block: relu(conv(relu(conv(x))) + shortcut)."""

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.down = nn.Conv2d(channels, width, 1, stride) if channels != width else None
        self.relu = nn.ReLU()

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        out = self.conv2(self.relu(self.conv1(x)))
        out += shortcut
        return self.relu(out)


def residual() -> nn.Sequential:
    """Two blocks, one with a convolution in its shortcut."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        Block(4, 4),
        Block(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class PreActivated(nn.Module):
    """x + conv(relu(x)): the stem feeds a nonlinearity and a sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.act1, self.act2, self.out = nn.ReLU(), nn.ReLU(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.one(self.act1(x))
        x = x + self.two(self.act2(x))
        return self.out(x)


class Untraceable(nn.Module):
    """Loops over what is in its input, and calls one part once and the other as often as that says."""

    def __init__(self):
        super().__init__()
        self.once = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        self.often = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        x = self.once(x)
        for _ in range(int(x.shape[0])):
            x = self.often(x)
        return x


class Branching(nn.Module):
    """Two ways through, each with a nonlinearity, and one that both have."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        if x.sum() > 3:
            return self.out(torch.relu(self.b(x)))
        return self.out(torch.relu(self.c(x)))


class Attention(nn.Module):
    """A linear layer on (N, L, C), gated by itself, with a normalisation that stands elsewhere."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 5)

    def forward(self, x, scale=None):
        z = self.up(self.norm(x))
        y = x + self.down(z * torch.sigmoid(z))
        return y if scale is None else y * scale
