"""Small networks on scikit-learn's digits, trained in a second, to plant defects in."""

from collections.abc import Callable
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 in random order: (N, 1, 8, 8) in [0, 1], and their classes."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16, torch.tensor(y)[order]


def batches(x: Tensor, y: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for a, b in zip(x.split(size), y.split(size), strict=True) if len(a) == size]


def mlp(norm: Callable[..., nn.Module] = nn.BatchNorm1d, **options: object) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 48, bias=False), norm(48, **options), nn.ReLU()),
        *(nn.Linear(48, 32, bias=False), norm(32, **options), nn.ReLU()),
        nn.Linear(32, 10),
    )


def cnn(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), norm(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 16, 10)),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, *, seed: int, steps: int = 150, size: int = 64) -> nn.Module:
    """Adam on random batches; the model comes back in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(x), (size,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval()


def trained(build: Callable[[], nn.Module], seed: int, **options: int) -> nn.Module:
    """A healthy network: the first 1,200 digits are its training data."""
    torch.manual_seed(seed)
    x, y = digits()
    return train(build(), x[:1200], y[:1200], seed=seed, **options)
