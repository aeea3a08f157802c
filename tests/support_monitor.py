"""Small models and streams for the tests of the monitor."""

from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.shift.watching.monitor import Monitor


def points(n: int, seed: int) -> Tensor:
    """Independent standard normal examples of four features."""
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))


def images(n: int, seed: int) -> Tensor:
    """Images whose examples differ in brightness and contrast, and whose neighbouring pixels are alike."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=rng) * (0.5 + torch.rand(n, 1, 1, 1, generator=rng))
    smooth = nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    return smooth + torch.randn(n, 1, 1, 1, generator=rng)


def small() -> nn.Sequential:
    """Two layers on points, their buffers those of the points."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    return _measured(model, points(4000, 12345))


def network(make: Any) -> nn.Sequential:
    """Two convolutions with batch norm on images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), make(6), nn.ReLU(), nn.Conv2d(6, 8, 3), make(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    )
    return _measured(model, images(1000, 12345))


def calibrated(model: nn.Module, **options: Any) -> Monitor:
    """A monitor that looks at everything, calibrated on 1,000 points."""
    return Monitor(model, budget=None, **options).calibrate(points(1000, 54321).split(100))


def _measured(model: nn.Sequential, x: Tensor) -> nn.Sequential:
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval().requires_grad_(False)
