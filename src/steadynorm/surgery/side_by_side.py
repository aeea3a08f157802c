"""Versions of a model side by side: their errors against float64, time and memory, and which of these stand out."""

import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import SteadynormError
from steadynorm.report.wording import number
from steadynorm.surgery.apart import QUANTITIES, Step, coarsest, errors_of
from steadynorm.surgery.check_report import Side
from steadynorm.surgery.outputs import bound_of
from steadynorm.surgery.sites import copied
from steadynorm.surgery.stepping import kept_for_backward, seconds_of, step

__all__ = ["Compared", "side_by_side"]

_LARGER: Final = 2.0
"""How many times torch's error another may be."""
_SLOWER: Final = 1.1
"""How many times torch's time a step of ours may take."""
_SHORT: Final = 1e-3
"""A step of fewer seconds is one of calls, not of arithmetic."""
_ULPS: Final = 4
"""Errors below so many times the dtype's epsilon are not told apart."""
_DRAWS: Final = 9
"""One draw's rounding errors can differ by chance; the median of so many cannot by much."""
_ROUNDS: Final = 3
"""Fewer say nothing about the time."""
_ASTRAY: Final = 0.05
"""An error of torch's own beyond which the model in float64 must have drawn other random numbers."""


class Compared(NamedTuple):
    """What came out.

    Attributes:
        sides: The versions, torch's first.
        reasons: Errors and times that speak against them.
        notes: What is to be known about how it was measured.
    """

    sides: tuple[Side, ...]
    reasons: list[str]
    notes: list[str]


class _Errors(NamedTuple):
    """Of one draw: by version, one for each quantity, and what is taken for none."""

    found: dict[str, tuple[float | None, ...]]
    bound: float


def side_by_side(versions: Mapping[str, nn.Module], example: Any, seconds: float) -> Compared:
    """Runs them.

    Args:
        versions: "torch", "steadynorm" and perhaps more; they learn from it.
        example: Their input.
        seconds: What the timing may take, and about what repeating a draw may.

    Raises:
        ModelError: One of them fails on the example.
    """
    notes: list[str] = []
    drawn = _drawn(versions, example, seconds, notes)
    bound = drawn[0].bound
    errors = {name: _middle([one.found[name] for one in drawn]) for name in versions if name in drawn[0].found}
    memory = {name: kept_for_backward(model, example) for name, model in versions.items()}
    taken = seconds_of(versions, example, seconds)
    ratios = {name: [a / b for a, b in zip(taken[name], taken["torch"], strict=True)] for name in versions}
    sides = tuple(
        Side(n, errors.get(n, {}), median(taken[n]), None if n == "torch" else median(ratios[n]), memory[n])
        for n in versions
    )
    ratio = sides[1].ratio
    slow = list(_too_slow(ratios, median(taken["torch"])))
    if ratio is not None and ratio > _SLOWER and not slow:
        notes.append("the time of a step scatters too much here to say which is faster; give more seconds")
    far = _too_far(sides, bound, [one.found for one in drawn])
    return Compared(sides, [*far, *slow], notes)


def _drawn(versions: Mapping[str, nn.Module], example: Any, seconds: float, notes: list[str]) -> list[_Errors]:
    """The errors of one draw, or of several where in the first one of them stands out."""
    kept = {name: copied(model, "check") for name, model in versions.items()}
    first = _errors(kept, example, 0)
    if "torch" not in first.found:
        notes.append("the model does not run in float64, so the errors are against torch's layers")
        return [first]
    drops = [module for model in kept.values() for module in model.modules() if isinstance(module, _DropoutNd)]
    if drops and (first.found["torch"][0] or 0.0) > _ASTRAY:
        notes.append("dropout draws differently in float64 here, so the errors were measured without it")
        for module in drops:
            module.p = 0.0
        first = _errors(kept, example, 0)
    drawn, started = [first], time.perf_counter()
    sides = tuple(Side(name, _middle([found])) for name, found in first.found.items())
    suspect = any(_too_far(sides, first.bound, [first.found]))
    while suspect and len(drawn) < _DRAWS:
        if len(drawn) > 2 and time.perf_counter() - started > seconds:
            break
        drawn.append(_errors(kept, _nearby(example, len(drawn)), len(drawn)))
    return drawn


def _nearby(example: Any, seed: int) -> Any:
    """Another input of the kind: each number off by a thousandth, so that all is rounded anew."""
    chance = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        off = torch.randn(tensor.shape, generator=chance).to(tensor.device, tensor.dtype)
        return (tensor.detach() * (1 + 1e-3 * off)).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, moved, example)


def _errors(kept: Mapping[str, nn.Module], example: Any, seed: int) -> _Errors:
    steps = {name: step(copied(model, "check"), example, seed) for name, model in kept.items()}
    exact = _in_float64(kept["torch"], example, seed)
    theirs = steps["torch"]
    if exact is None:
        ours = {name: errors_of(one, theirs) for name, one in steps.items() if name != "torch"}
        return _Errors(ours, bound_of(theirs.outputs))
    return _Errors({name: errors_of(one, exact) for name, one in steps.items()}, _ULPS * coarsest(theirs.outputs))


def _in_float64(model: nn.Module, example: Any, seed: int) -> Step | None:
    try:
        return step(copied(model, "check").double(), example, seed)
    except (SteadynormError, RuntimeError, TypeError):
        return None


def _middle(drawn: list[tuple[float | None, ...]]) -> dict[str, float | None]:
    """The median of each quantity over the draws; NaN if one of them is."""
    middle: dict[str, float | None] = {}
    for quantity, several in zip(QUANTITIES, zip(*drawn, strict=True), strict=True):
        known = [error for error in several if error is not None]
        gone = next((error for error in known if error != error), None)
        middle[quantity] = gone if gone is not None else median(known) if known else None
    return middle


def _too_far(sides: tuple[Side, ...], bound: float, drawn: list[dict[str, tuple[float | None, ...]]]) -> Iterator[str]:
    """What is more than twice torch's in the median, and more than torch's in all draws, or all but one of many."""
    theirs = next((side.errors for side in sides if side.name == "torch"), {})
    for side in sides:
        if side.name == "torch":
            continue
        for place, (quantity, error) in enumerate(side.errors.items()):
            beside = theirs.get(quantity)
            if error is None or (beside is not None and beside != beside):
                continue  # torch's own has gone astray as well
            pairs = [(one[side.name][place], one["torch"][place] if theirs else 0.0) for one in drawn]
            nearer = sum(ours is not None and beyond is not None and ours <= beyond for ours, beyond in pairs)
            if not error <= max(_LARGER * (beside or 0.0), bound) and nearer <= len(drawn) // _DRAWS:
                than = f", {error / beside:.1f} times torch's" if beside else ""
                yield f"{side.name}: the error of the {quantity} is {error:.1e}{than}"


def _too_slow(ratios: Mapping[str, list[float]], seconds: float) -> Iterator[str]:
    ours = ratios["steadynorm"]
    sure = len(ours) >= _ROUNDS and sum(r > 1 for r in ours) >= 0.75 * len(ours)
    if sure and median(ours) > _SLOWER:
        fused = f" (after fuse {median(ratios['fused']):.2f})" if "fused" in ratios else ""
        small = f"; a step of {number(seconds * 1e3)} ms is mostly calls, so try a larger example"
        more = small if seconds < _SHORT else ""
        yield f"on this example a training step takes {median(ours):.2f} times torch's{fused}{more}"
