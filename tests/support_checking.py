"""Models for `check`, and a training step in float64 by elementary operations to hold its figures against."""

import copy

import torch
from torch import Tensor, nn

from support_converting import ByDefinition


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv_net() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 5))


class Net(nn.Module):
    """Named inputs and several outputs, integers among both; a parameter that gets no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.lin, self.norm = nn.Embedding(9, 4), nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, ids, x=None):
        y = self.norm(self.lin(x) + self.embed(ids).mean(1))
        return {"y": y, "parts": (torch.tanh(y), None), "class": y.argmax(1)}


class Doubled(nn.BatchNorm1d):
    def forward(self, input):
        return 2 * super().forward(input)


def by_definition(model: nn.Module) -> nn.Module:
    """The model in float64, its batch norms in elementary operations."""
    model = copy.deepcopy(model).double()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            parent, _, own = name.rpartition(".")
            model.get_submodule(parent)._modules[own] = ByDefinition(layer)
    return model


def by_hand(model: nn.Module, x: Tensor, seed: int = 0) -> dict[str, list[Tensor]]:
    """A training step of a model with one input and one output, and the output in evaluation after it."""
    model = copy.deepcopy(model).train()
    x = x.clone().to(next(model.parameters()).dtype).requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (y * upstream.to(y.dtype)).sum().backward()
    found = {"output": [y], "input gradient": [x.grad], "parameter gradients": [p.grad for p in model.parameters()]}
    found["means"] = [b for n, b in model.named_buffers() if n.endswith("mean")]
    found["variances"] = [b for n, b in model.named_buffers() if n.endswith("var")]
    found["output in evaluation"] = [model.eval()(x)]
    return {name: [t.detach().double() for t in tensors] for name, tensors in found.items()}


def errors_by_hand(got: dict[str, list[Tensor]], exact: dict[str, list[Tensor]]) -> dict[str, float]:
    errors = {}
    for name in ("output", "input gradient", "parameter gradients", "output in evaluation"):
        a, b = (torch.cat([t.flatten() for t in side[name]]) for side in (got, exact))
        errors[name] = (((a - b) ** 2).sum() / (b**2).sum()).sqrt().item()
    off = [
        max(((m - m64).abs() / v64.sqrt()).max().item(), ((v - v64).abs() / v64).max().item())
        for m, v, m64, v64 in zip(got["means"], got["variances"], exact["means"], exact["variances"], strict=True)
    ]
    return errors | {"running statistics": max(off)}
