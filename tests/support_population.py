"""Networks, loaders and float64 references for the tests of recalibrating."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import steadynorm as sn

Layers = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> mean, unbiased variance


def images(n: int, seed: int = 0, mean: float = 3.0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 + mean


def network(kind: str = "ours", seed: int = 0) -> nn.Sequential:
    """Two batch norms over images and one over rows; a Dropout whose chance must play no part."""
    torch.manual_seed(seed)
    two, one = (sn.BatchNorm2d, sn.BatchNorm1d) if kind == "ours" else (nn.BatchNorm2d, nn.BatchNorm1d)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), two(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3, stride=2), two(5), nn.Tanh(),
        nn.Flatten(), nn.Linear(20, 6), one(6), nn.ReLU(), nn.Linear(6, 2),
    )  # fmt: skip
    with torch.no_grad():
        for m in norms(model).values():
            m.weight.uniform_(0.5, 1.5)
            m.bias.normal_()
            m.running_mean.normal_()
            m.running_var.uniform_(0.1, 4)
    return model


def norms(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def expected(model: nn.Sequential, batches: Sequence[Tensor], order: str) -> Layers:
    """From the definition, in float64: all inputs of each layer kept and put together, then mean and variance."""
    found: Layers = {}
    parts = [b.double() for b in batches]
    for name, module in model.double().named_children():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            with torch.no_grad():
                parts = [module(p) for p in parts]
            continue
        rows = [p.movedim(1, -1).reshape(-1, p.shape[1]).numpy() for p in parts]
        union = np.concatenate(rows)
        found[name] = union.mean(0), union.var(0, ddof=1)
        weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        out = []
        for part, row in zip(parts, rows, strict=True):
            mean, var = (row.mean(0), row.var(0)) if order == "joint" else found[name]
            y = (row - mean) / np.sqrt(var + module.eps) * weight + bias
            out.append(torch.from_numpy(y).reshape(part.movedim(1, -1).shape).movedim(-1, 1))
        parts = out
    return found


def check(model: nn.Module, wanted: Layers, tolerance: float = 1e-6) -> None:
    """Errors in standard units: of the mean by the deviation, of the variance relative to it."""
    for name, (mean, var) in wanted.items():
        layer = norms(model)[name]
        assert np.abs((layer.running_mean.double().numpy() - mean) / np.sqrt(var)).max() < tolerance, name
        assert np.abs(layer.running_var.double().numpy() / var - 1).max() < tolerance, name


def bits(model: nn.Module) -> dict[str, Any]:
    """All that a model is made of, its modes included."""
    state: dict[str, Any] = {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers())}
    return state | {f"mode of {n}": m.training for n, m in model.named_modules()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )
