"""A whole training step of ResNet-50 under AMP, with the channels last, before and after `sn.fuse`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import steadynorm as sn
from gpu_timing import Clock, in_rounds, quartiles

__all__ = ["exact_difference", "measure_step", "resnet50"]

DEPTHS = (3, 4, 6, 3)
EXACT = (1e-9, 1e-6)  # relative, of the loss and of the whole gradient, in float64
ROUNDED = 0.02  # of the loss, under autocast


class Bottleneck(nn.Module):
    """As most write it: modules for batch norm and ReLU, a sum in between (He et al. 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block of ResNet-50."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += shortcut
        return self.relu(y)


def resnet50(depths: tuple[int, ...] = DEPTHS, classes: int = 1000) -> nn.Sequential:
    """The stem, four stages that halve the image and double the channels, and a linear classifier."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    blocks: list[nn.Module] = []
    channels = 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            width = 64 * 2**stage
            blocks.append(Bottleneck(channels, width, 2 if stage > 0 and i == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor, dtype: torch.dtype) -> None:
        self.model, self.x, self.target, self.dtype = model, x, target, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def loss(self) -> Tensor:
        """Of a training forward, under autocast but for float64."""
        with torch.autocast(self.x.device.type, self.dtype, enabled=self.dtype != torch.float64):
            return nn.functional.cross_entropy(self.model(self.x), self.target)

    def step(self) -> None:
        """One whole step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def gradient(self) -> tuple[float, Tensor]:
        """The loss, and the gradient of all parameters in one vector; nothing is updated."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in self.model.parameters()])


def exact_difference(device: str, depths: tuple[int, ...], fuse: Callable[[nn.Module], nn.Module]) -> dict[str, float]:
    """What fusing changes in float64, relatively, on the same weights and a small batch.

    Raises:
        ArithmeticError: It is more than rounding.
    """
    torch.manual_seed(0)
    model = resnet50(depths, 10).to(device, torch.float64)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, device=device)
    target = torch.randint(10, (4,), device=device)
    (loss, gradient), (fused_loss, fused_gradient) = (
        Training(network, x, target, torch.float64).gradient() for network in (model, fuse(model))
    )
    found = {
        "loss": abs(fused_loss - loss) / abs(loss),
        "gradient": float((fused_gradient - gradient).norm() / gradient.norm()),
    }
    if not all(value <= allowed for value, allowed in zip(found.values(), EXACT, strict=True)):
        raise ArithmeticError(
            f"in float64 the fused model's loss differs by {found['loss']:.1e}, its gradient by "
            f"{found['gradient']:.1e}; allowed are {EXACT[0]:.0e} and {EXACT[1]:.0e}"
        )
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def measure_step(
    clock: Clock,
    batch: int = 128,
    side: int = 224,
    rounds: int = 15,
    depths: tuple[int, ...] = DEPTHS,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Checked first: both models must give the same loss and gradient on the same weights, as closely as dtypes allow.

    cuDNN picks its convolutions by trying them (`torch.backends.cudnn.benchmark`), as a training run would have it.

    Raises:
        ArithmeticError: They do not.
    """
    exact = exact_difference(clock.device, depths, sn.fuse)
    clock.settle()
    torch.manual_seed(0)
    model = resnet50(depths).to(clock.device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=clock.device).to(memory_format=torch.channels_last)
    target = torch.randint(1000, (batch,), device=clock.device)
    fused = sn.fuse(model)
    runs = {"before": Training(model, x, target, dtype), "after": Training(fused, x, target, dtype)}
    losses = {name: float(run.loss().detach()) for name, run in runs.items()}
    if not abs(losses["after"] - losses["before"]) <= ROUNDED * abs(losses["before"]):
        raise ArithmeticError(f"the fused model's loss is {losses['after']}, the original's {losses['before']}")
    steps = {name: [run.step] for name, run in runs.items()}
    clock.ahead_us = 0  # a training run waits for its host, if that is slower
    tried, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        host = in_rounds(clock.host_us, steps, 5)
        times = in_rounds(clock.device_us, steps, rounds)
    finally:
        torch.backends.cudnn.benchmark = tried
    medians = {name: quartiles(found)[1] for name, found in times.items()}
    return {
        "batch": batch,
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "fused": fused.fuse_report.fused,
        "losses": losses,
        "difference": exact,
        "times_us": {name: quartiles(found) for name, found in times.items()},
        "host_us": {name: quartiles(found) for name, found in host.items()},
        "faster": float(f"{medians['before'] / medians['after'] - 1:.4g}"),
    }
