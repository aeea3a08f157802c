"""A trial of the kernels on the device at hand, before anything is entrusted to them: a few seconds, once per machine.

What a compiler makes of a kernel differs from GPU to GPU and from version to version. Triton also needs a C compiler,
and a driver that fits. Here all kernels compute two small steps, which torch's own operations repeat in float64.
"""

import torch
from torch import Tensor

from steadynorm.activations import Activation
from steadynorm.ops import reference
from steadynorm.ops.commit import Running, updated
from steadynorm.ops.gpu import backend, committing
from steadynorm.ops.layout import Layout
from steadynorm.ops.reference import Operands, Train
from steadynorm.ops.tables import as_table

__all__ = ["failure"]

SHAPES = ((4, 8, 6, 6), (700, 24))  # kept on chip, in planes; split over programs, in columns
TOLERANCE = 1e-4


def failure(device: torch.device) -> str | None:
    """What is wrong with the kernels on this device; None if they compute what they should."""
    try:
        with torch.no_grad():
            worst = max(_error(shape, device) for shape in SHAPES)
    except Exception as error:  # whatever a compiler, a driver or a device comes up with
        said = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {said[0]}"
    return None if worst <= TOLERANCE else f"they are off by {worst:.1e} of a standard deviation"


def _error(shape: tuple[int, ...], device: torch.device) -> float:
    """The largest error of a step, its backward and its commit; infinite for what is no number."""
    channels = shape[1]
    operands = Operands(
        _waves(shape, 1.7, device) * 2 + 3,
        1 + 0.5 * _waves((channels,), 2.3, device),
        _waves((channels,), 3.1, device),
    )
    spec, grad_y = Train(Layout.of(operands.x), 1e-5, Activation("relu")), _waves(shape, 0.9, device)
    y, statistics = backend.train(operands, spec)
    found = backend.backward(grad_y, None, None, operands, statistics, spec)
    exact = Operands(*(None if t is None else t.double() for t in operands))  # pyright: ignore[reportArgumentType]
    right_y, right = reference.train(exact, spec)
    right_found = reference.backward(grad_y.double(), None, None, exact, right, spec)
    running = Running(torch.zeros(channels, device=device), torch.ones(channels, device=device))
    moved, _ = updated(running, right, 0.1)
    committing.commit(*running, as_table(statistics), 0.1, False)
    pairs = [(y, right_y), *zip(statistics, right, strict=True), *zip(running[:2], moved[:2], strict=True)]
    pairs += [(a, b) for a, b in zip(found, right_found, strict=True) if a is not None and b is not None]
    return max(_apart(a, b) for a, b in pairs)


def _apart(found: Tensor, right: Tensor) -> float:
    """The largest difference, in units of the largest value or 1."""
    apart = (found.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1)
    return float(torch.nan_to_num(apart, nan=float("inf")))


def _waves(shape: tuple[int, ...], step: float, device: torch.device) -> Tensor:
    """Numbers between -1 and 1 in float32, without a random one: the user's generators stay as they are."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, device=device, dtype=torch.float64) * step).float().reshape(shape)
