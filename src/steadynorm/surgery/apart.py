"""How far one training step is from another."""

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

__all__ = ["QUANTITIES", "Step", "apart", "coarsest", "errors_of"]

QUANTITIES: Final = ("output", "input gradient", "parameter gradients", "running statistics", "output in evaluation")
"""What a step is judged by, in the order in which `errors_of` has them."""


class Step(NamedTuple):
    """What came out of one: forward and backward in training, then a forward in evaluation by the statistics learned.

    Attributes:
        outputs: The floating-point tensors of the model's output.
        inputs: The gradients of those of its input that ask for them.
        gradients: Those of the parameters, by name.
        statistics: The running statistics and their counts after it, by name.
        evaluated: The outputs in evaluation.
    """

    outputs: list[Tensor]
    inputs: list[Tensor]
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]
    evaluated: list[Tensor]


def errors_of(got: Step, wanted: Step) -> tuple[float | None, ...]:
    """How far one step is from another, for each of `QUANTITIES`.

    Of outputs and gradients ‖got - wanted‖ / ‖wanted‖, all tensors of a kind together; of running statistics the
    largest of |mean - mean'| / σ' and |variance - variance'| / σ'², where σ'² is the wanted variance, unbiased.

    Returns:
        NaN where there is no such number: tensors of other shapes, values that are not finite on one side alone. None
        where there is nothing to compare.

    Example:
        >>> one = Step([torch.ones(4)], [], {}, {}, [])
        >>> errors_of(one._replace(outputs=[torch.full((4,), 1.5)]), one)
        (0.5, None, None, None, None)
    """
    missing = got.gradients.keys() != wanted.gradients.keys()
    return (
        apart(got.outputs, wanted.outputs),
        apart(got.inputs, wanted.inputs),
        math.nan if missing else apart([got.gradients[n] for n in wanted.gradients], list(wanted.gradients.values())),
        _learned(got.statistics, wanted.statistics),
        apart(got.evaluated, wanted.evaluated),
    )


def apart(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float | None:
    """‖got - wanted‖ / ‖wanted‖, all tensors together; of a wanted 0, ‖got‖. NaN and None as of `errors_of`."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return math.nan
    if not wanted:
        return None
    a, b = (torch.cat([t.double().cpu().flatten() for t in side]) for side in (got, wanted))
    finite = b.isfinite()
    if not torch.equal(a.isfinite(), finite):
        return math.nan
    scale = b[finite].norm().item()
    error = (a[finite] - b[finite]).norm().item()
    return error / scale if scale > 0 else error


def _learned(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float | None:
    counts = {name for name in got.keys() & wanted.keys() if name.endswith("num_batches_tracked")}
    if any(got[name].item() != wanted[name].item() for name in counts):
        return math.nan
    worst: float | None = None
    for name, var in wanted.items():
        if not name.endswith("running_var"):
            continue
        at = name.removesuffix("running_var")
        if at + "running_mean" not in wanted or not {at + "running_mean", name} <= got.keys():
            return math.nan
        mean, sigma2 = wanted[at + "running_mean"].double(), var.double().clamp_min(1e-12)
        off = (got[at + "running_mean"].double() - mean).abs() / sigma2.sqrt()
        spread = (got[name].double() - var.double()).abs() / sigma2
        here = torch.cat([off, spread]).max().item() if var.numel() else 0.0
        worst = here if worst is None or here != here else max(worst, here)
    return worst


def coarsest(tensors: Sequence[Tensor]) -> float:
    """The largest machine epsilon of the tensors' dtypes."""
    return max((torch.finfo(t.dtype).eps for t in tensors), default=torch.finfo(torch.float32).eps)
