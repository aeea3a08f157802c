"""Folded models against the originals in float64, each batch norm an explicit affine map; and small models to fold."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.modules.batchnorm import _BatchNorm

import steadynorm as sn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OURS = {1: sn.BatchNorm1d, 2: sn.BatchNorm2d, 3: sn.BatchNorm3d}


def image(n: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *[7, 6, 5][:n], generator=torch.Generator().manual_seed(1))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            if layer.running_mean is not None:
                layer.running_mean.normal_(generator=generator)
                layer.running_var.uniform_(0.3, 3, generator=generator)
            with torch.no_grad():
                if layer.weight is not None:
                    layer.weight.uniform_(-2, 2, generator=generator)
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
    return model.eval()


class Explicit(nn.Module):
    """The definition: (x - mean) / sqrt(var + eps) * gamma + beta, along axis 1."""

    def __init__(self, layer: _BatchNorm):
        super().__init__()
        self.layer = layer
        self.activation = getattr(layer, "activation", None)
        self.axis = getattr(layer, "channel_dim", 1)

    def forward(self, x: Tensor, *, residual: Tensor | None = None) -> Tensor:
        def along(v: Tensor | None, default: float) -> Tensor:
            v = torch.full((x.shape[self.axis],), default, dtype=x.dtype) if v is None else v.double()
            shape = [1] * x.dim()
            shape[self.axis] = -1
            return v.reshape(shape)

        bn = self.layer
        y = (x - along(bn.running_mean, 0)) / (along(bn.running_var, 1) + bn.eps).sqrt()
        y = y * along(bn.weight, 1) + along(bn.bias, 0)
        y = y if residual is None else y + residual
        return y if self.activation is None else self.activation(y)


def explicit(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent)._modules[own] = Explicit(layer)
    return model


def agree(model: nn.Module, x: Tensor, count: int, **options) -> nn.Module:
    """Folds in both precisions; returns the model folded in float64."""
    model = randomised(model)
    before = copy.deepcopy(model.state_dict())
    wanted = explicit(model)(x.double())
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        folded = sn.fold(copy.deepcopy(model).to(dtype), **{k: v.to(dtype) for k, v in options.items()})
        error = (folded(x.to(dtype)).double() - wanted).abs().max() / wanted.abs().max()
        assert error <= bound
        assert folded.fold_report.folded == count, str(folded.fold_report)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sn.fold(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    left = [m for m in folded.modules() if isinstance(m, _BatchNorm)]
    assert len(left) == len(folded.fold_report.layers) - count
    return folded


def fewest(model: nn.Module) -> int:
    """How many batch norms torch.fx's own pass removes: none where it cannot trace the model."""
    try:
        fused = fx_fuse(model)
    except Exception:
        return 0
    called = [fused.get_submodule(node.target) for node in fused.graph.nodes if node.op == "call_module"]
    return sum(isinstance(m, _BatchNorm) for m in model.modules()) - sum(isinstance(m, _BatchNorm) for m in called)


class Called(nn.Module):
    """A function of modules and an input."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


class Block(nn.Module):
    def __init__(self, norm=sn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = norm(4)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.loose, self.loose_norm = Block(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        if int(x.sum()) > 1e9:
            return x
        return self.loose_norm(self.loose(self.inner(x)))


class Control(nn.Module):
    """The middle does not trace; what is around it and inside it does."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.block = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Branching()

    def forward(self, x):
        return self.block(self.norm(self.conv(x)))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x, scale=None):
        y = self.conv(x)
        return self.norm(y) if scale is not None else self.norm(torch.tanh(y))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(self.conv(self.a(self.conv(x))))
