"""What is looked at inside a network while it trains: gradients per layer, and the input of the last nonlinearity."""

import copy
import math
from collections.abc import Sequence
from statistics import median
from typing import Final, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steadynorm.experiment.arms import is_weighted
from steadynorm.experiment.split import Split
from steadynorm.surgery.normed import OUTPUT, Normed
from steadynorm.surgery.operations import is_activation

__all__ = ["DriftRecord", "GradientRecord", "Recorder", "gradient_norms", "spread_decades", "verdict"]

PROBE_EXAMPLES: Final = 256
"""Examples of the training part, always the same ones, whose gradients are looked at."""

DRIFT_POINTS: Final = 40
"""How often over a run the percentiles are taken."""

BEYOND: Final = 10.0
"""First and last hidden layer's gradients this many times apart are called vanishing or exploding."""


class GradientRecord(TypedDict):
    """Gradient norms of one network at one step; see `gradient_norms`."""

    step: int
    layers: list[str]
    norms: list[float]


class DriftRecord(TypedDict):
    """Percentiles over the validation part of one typical unit's input to the last hidden nonlinearity."""

    steps: list[int]
    p15: list[float]
    p50: list[float]
    p85: list[float]
    drift: float


def gradient_norms(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[str], list[float]]:
    """The size of the error signal that reaches each hidden layer.

        RMS over batch and units of N * dL/dz_l,   z_l the output of the l-th Linear or convolution,

    L the mean cross-entropy over N examples (so N * dL is per example), in training mode: batch norm takes the batch's
    own statistics. The network itself, its running statistics included, stays untouched. The last Linear or convolution
    is left out: what reaches it comes from the loss and has not passed through any layer.

    Returns:
        The layers' names, input side first, and their norms; a norm that is not finite comes back as infinity.
    """
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen: list[tuple[str, Tensor]] = []
    for name, module in model.named_modules():
        if is_weighted(module):

            def keep(_module: nn.Module, _inputs: object, output: Tensor, name: str = name) -> Tensor:
                seen.append((name, output))
                return output.clone()  # an activation with inplace=True would overwrite what is to be looked at

            def keep_before(_norm: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> tuple[Tensor]:
                seen.append((name, inputs[0]))
                return (inputs[0].clone(),)

            inside = module.get_submodule(OUTPUT) if isinstance(module, Normed) and hasattr(module, OUTPUT) else None
            if inside is None:
                module.register_forward_hook(keep)
            else:
                inside.register_forward_pre_hook(keep_before)  # the layer gives what its batch norm makes of its output
    loss = F.cross_entropy(model(x), y, reduction="sum")
    hidden = seen[:-1]
    if not hidden:
        return [], []
    gradients = torch.autograd.grad(loss, [output for _, output in hidden])
    norms = [g.double().square().mean().sqrt().item() for g in gradients]
    return [name for name, _ in hidden], [n if math.isfinite(n) else math.inf for n in norms]


def spread_decades(norms: Sequence[float]) -> float | None:
    """log10(largest / smallest); None where one is zero or not finite, so that there is no such number."""
    if not norms or not math.isfinite(max(norms)) or min(norms) <= 0:
        return None
    return math.log10(max(norms) / min(norms))


def verdict(norms: Sequence[float]) -> Literal["steady", "vanishing", "exploding"]:
    """Names what happens to gradients on their way from the last hidden layer to the first.

    "vanishing" if the first layer's norm is less than a tenth of the last one's, "exploding" if it is more than ten
    times that (or not finite), else "steady".

    Example:
        >>> verdict([0.001, 0.01, 0.1]), verdict([5.0, 1.0]), verdict([3.0, 0.2])
        ('vanishing', 'steady', 'exploding')
    """
    first, last = norms[0], norms[-1]
    if not math.isfinite(first) or first > BEYOND * last:
        return "exploding"
    return "vanishing" if first * BEYOND < last else "steady"


class Recorder:
    """Takes the probes of one run: at its start, middle and end, and every so many steps in between."""

    def __init__(self, model: nn.Module, parts: Split, steps: int) -> None:
        self._model = model
        self._x, self._y = parts.x_train[:PROBE_EXAMPLES], parts.y_train[:PROBE_EXAMPLES]
        self._val = parts.x_val
        self._phases = {1: "start", max(1, steps // 2): "middle", steps: "end"}
        self._every = max(1, steps // DRIFT_POINTS)
        self._taken: list[tuple[int, Tensor]] = []
        self.gradients: dict[str, GradientRecord] = {}

    def after(self, step: int) -> None:
        """Looks at the network after this many updates, if this is one of the times for it."""
        if step in self._phases:
            layers, norms = gradient_norms(self._model, self._x, self._y)
            self.gradients[self._phases[step]] = {"step": step, "layers": layers, "norms": norms}
        if step == 1 or step % self._every == 0:
            percentiles = _input_percentiles(self._model, self._val)
            if percentiles is not None:
                self._taken.append((step, percentiles))

    def drift(self) -> DriftRecord | None:
        """The percentiles over time of the unit with the median drift; None without a hidden activation module."""
        if not self._taken:
            return None
        taken = torch.stack([percentiles for _, percentiles in self._taken])  # (times, 3, units)
        width = taken[-1, 2] - taken[-1, 0]
        drifts = (taken[:, 1] - taken[-1, 1]).abs().mean(0) / width
        drifts = drifts.where((width > 0) & drifts.isfinite(), math.nan)
        ranked = [int(unit) for unit in drifts.argsort(stable=True)[: int((~drifts.isnan()).sum())]]
        if not ranked:
            return None
        typical = ranked[(len(ranked) - 1) // 2]
        p15, p50, p85 = (taken[:, k, typical].tolist() for k in range(3))
        steps = [step for step, _ in self._taken]
        return {"steps": steps, "p15": p15, "p50": p50, "p85": p85, "drift": median(drifts[ranked].tolist())}


@torch.no_grad()
def _input_percentiles(model: nn.Module, x: Tensor) -> Tensor | None:
    """(3, units): the 15th, 50th and 85th percentile of each unit that enters the last hidden nonlinearity."""
    last: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        last[:] = [inputs[0].clone()]  # an activation with inplace=True overwrites its input

    handles: list[RemovableHandle] = [
        module.register_forward_pre_hook(keep) for module in model.modules() if is_activation(module)
    ]
    training = model.training
    model.eval()
    try:
        model(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not last:
        return None
    units = last[0].movedim(1, -1).flatten(0, -2).double() if last[0].ndim > 2 else last[0].double()
    # quantile() accepts up to 2^24 elements; evenly spaced rows of a larger input say the same.
    units = units[:: math.ceil(units.numel() / 2**24)]
    return units.quantile(torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64), dim=0)
