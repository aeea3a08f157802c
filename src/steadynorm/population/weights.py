"""What the stored tensors of a batch norm say by themselves, without data and without the model's code."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from steadynorm.population.findings import Finding
from steadynorm.population.states import LayerState

__all__ = ["from_weights"]

_DEFAULT_EPS: Final = 1e-5
_SMALLEST: Final = 1e-38
"""Below it float32 loses digits: an average that decays from 1 gets here by many steps only."""
_EXPLODED: Final = 1e6
_NO_UNIT: Final = 1e11
"""Below, a channel may be an input in units of its own, such as an income beside shares."""
_DEAD: Final = 1e-3
_EPS_SHARE: Final = 0.1
_STARTED: Final = 0.01
_UNCONVERGED: Final = 0.05
_RECALIBRATE: Final = "Measure the statistics anew over training data: steadynorm.recalibrate_(model, loader)."


def from_weights(states: Sequence[LayerState]) -> list[Finding]:
    """All findings that running statistics, γ, β, ε and momentum give alone.

    Variances are the stored, unbiased ones.

    Args:
        states: The layers, in the order of the model.

    Returns:
        The findings, unsorted; none for healthy layers.

    Example:
        >>> state = LayerState("bn", torch.tensor([0.3, 0.1]), torch.tensor([1.2, -1.0]), tracked=500)
        >>> [(finding.kind, finding.severity) for finding in from_weights([state])]
        [('negative variance', 'error')]
    """
    return [finding for state in states for rule in _RULES for finding in rule(state)]


def _non_finite(state: LayerState) -> Iterator[Finding]:
    bad = ~(torch.isfinite(state.mean) & torch.isfinite(state.var))
    if bad.any():
        yield Finding(
            "non-finite statistics",
            "error",
            state.name,
            f"Running statistics of {_of(bad)} channels are NaN or infinite: evaluation puts out NaN or zeros.",
            {"channels": int(bad.sum()), "of": state.channels, "first_channel": _first(bad)},
            "A batch with NaN or infinite values was committed, and no later batch can take it out again. "
            f"{_RECALIBRATE} steadynorm's layers keep such batches out.",
            2.0 + _share(bad),
        )
    for name, tensor in (("γ", state.gamma), ("β", state.beta)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            wrong = ~torch.isfinite(tensor)
            yield Finding(
                "non-finite weights",
                "error",
                state.name,
                f"{name} of {_of(wrong)} channels is NaN or infinite.",
                {"parameter": name, "channels": int(wrong.sum()), "of": state.channels, "first_channel": _first(wrong)},
                "Training diverged. Go back to an earlier checkpoint; lower the learning rate or clip gradients.",
                3.0 + _share(wrong),
            )


def _negative(state: LayerState) -> Iterator[Finding]:
    bad = state.var < 0
    if bad.any():
        yield Finding(
            "negative variance",
            "error",
            state.name,
            f"The running variance of {_of(bad)} channels is negative, which no data gives.",
            {
                "channels": int(bad.sum()),
                "of": state.channels,
                "first_channel": _first(bad),
                "smallest": float(state.var[bad].min()),
            },
            "Averaging checkpoints with negative weights, an optimizer that holds buffers, or a damaged file does it. "
            f"{_RECALIBRATE}",
            1.9 + _share(bad),
        )


def _zero(state: LayerState) -> Iterator[Finding]:
    bad = state.var == 0
    if not bad.any():
        return
    m, t = state.momentum, state.tracked
    possible = m is None or t is None or not 0 < m < 1 or (1 - m) ** t <= _SMALLEST
    worst = not possible or _share(bad) > 0.5
    yield Finding(
        "zero variance",
        "error" if worst else "warning",
        state.name,
        f"The running variance of {_of(bad)} channels is 0: evaluation multiplies any deviation there by "
        f"{(state.eps or _DEFAULT_EPS) ** -0.5:.0f}"
        + ("." if possible else f", and {t} steps at momentum {m} cannot have brought it there."),
        {
            "channels": int(bad.sum()),
            "of": state.channels,
            "first_channel": _first(bad),
            "factor": (state.eps or _DEFAULT_EPS) ** -0.5,
            "steps": t,
            "momentum": m,
        },
        "If it is constant in training (a dead unit, an empty pixel), prune it or set γ to 0 there. "
        f"Otherwise the buffer was overwritten. {_RECALIBRATE}",
        1.5 + _share(bad),
    )


def _exploded(state: LayerState) -> Iterator[Finding]:
    var = state.var.double()
    fine = torch.isfinite(var)
    usual = float(var[fine & (var > 0)].median()) if bool((fine & (var > 0)).any()) else 1.0
    huge = float(torch.finfo(state.var.dtype).max) ** 0.5 if state.var.dtype.is_floating_point else 1e19
    huge = 1e4 if state.var.dtype == torch.float16 else huge
    bad = fine & (((var > _EXPLODED * usual) & (var > _NO_UNIT)) | (var > huge))
    if bad.any():
        worst = float(var[bad].max())
        yield Finding(
            "exploded variance",
            "error",
            state.name,
            f"The running variance of {_of(bad)} channels is up to {worst:.3g}, the layer's median is {usual:.3g}: "
            "evaluation makes these channels constant.",
            {
                "channels": int(bad.sum()),
                "of": state.channels,
                "first_channel": _first(bad),
                "largest": worst,
                "median": usual,
            },
            f"A batch of extreme values was committed, or the input is not scaled. {_RECALIBRATE} "
            "If it comes back, look at the input's units.",
            1.7 + _share(bad),
        )


def _never_updated(state: LayerState) -> Iterator[Finding]:
    default = bool((state.mean == 0).all() and (state.var == 1).all())
    if default:
        yield Finding(
            "never updated",
            "error",
            state.name,
            "Running mean 0 and variance 1 in all channels: the statistics are still those of a new layer"
            + ("." if state.tracked is None else f", after {state.tracked} batches."),
            {"batches": state.tracked, "channels": state.channels},
            f"The layer was never run in train mode, or its buffers were not loaded or saved. {_RECALIBRATE}",
            1.8,
        )
    elif state.tracked == 0:
        yield Finding(
            "count lost",
            "note",
            state.name,
            "num_batches_tracked is 0 beside statistics that were measured.",
            {"batches": 0},
            "Harmless in evaluation. With momentum=None the next batch in train mode replaces all of them.",
        )


def _dead(state: LayerState) -> Iterator[Finding]:
    if state.gamma is None or state.gamma.numel() < 2 or not bool(torch.isfinite(state.gamma).all()):
        return
    size = state.gamma.abs()
    top = float(size.max())
    bad = size <= _DEAD * top
    if bad.any():
        share = _share(bad)
        what = "All γ are 0: the layer puts out β alone." if top == 0 else (
            f"|γ| of {_of(bad)} channels is below a thousandth of the layer's largest ({top:.3g}): they carry nothing."
        )  # fmt: skip
        yield Finding(
            "dead channels",
            "warning",
            state.name,
            what,
            {"channels": int(bad.sum()), "of": state.channels, "share": share, "first_channel": _first(bad),
             "largest_gamma": top},
            f"{int(bad.sum())} of the channels could be pruned, with the weights that make and read them (their β "
            "moves into the next layer's bias). If they should be alive, exclude γ from weight decay.",
            share,
        )  # fmt: skip


def _eps(state: LayerState) -> Iterator[Finding]:
    eps = _DEFAULT_EPS if state.eps is None else state.eps
    var = state.var.double()
    fine = torch.isfinite(var) & (var > 0)
    if not fine.any():
        return
    lost = eps / (var + eps)
    bad = fine & (lost >= _EPS_SHARE)
    if bad.any():
        many = _share(bad) >= 0.5
        scale = float((var[bad] / (var[bad] + eps)).sqrt().median())
        assumed = "" if state.settings_known else " (torch's default, the file does not say)"
        yield Finding(
            "eps comparable to variance",
            "warning" if many else "note",
            state.name,
            f"ε = {eps:g}{assumed} is no longer small beside the variance of {_of(bad)} channels: they leave the layer "
            f"with {scale:.2g} of the deviation that γ asks for.",
            {"eps": eps, "channels": int(bad.sum()), "of": state.channels, "median_variance": float(var[fine].median()),
             "scale": scale},
            "Lower eps (and train on), or scale what feeds the layer; folding and other frameworks must use the same "
            "eps.",
            _share(bad),
        )  # fmt: skip


def _half(state: LayerState) -> Iterator[Finding]:
    kinds = {t.dtype for t in (state.mean, state.var)} & {torch.float16, torch.bfloat16}
    if kinds:
        name = str(sorted(map(str, kinds))[0]).removeprefix("torch.")
        yield Finding(
            "half-precision buffers",
            "warning",
            state.name,
            f"The running statistics are {name}: small updates are rounded away"
            + (", and variances above 65504 overflow." if name == "float16" else "."),
            {"dtype": name, "largest_variance": float(state.var.double().max())},
            "Keep the buffers in float32 (steadynorm's layers do so under .half() and .bfloat16()), then measure anew.",
            0.5,
        )


def _momentum(state: LayerState) -> Iterator[Finding]:
    m, t = state.momentum, state.tracked
    if not state.settings_known:
        return
    if m is None:
        yield Finding(
            "cumulative average",
            "note",
            state.name,
            "momentum=None: the running statistics weigh the first batch of training as much as the last.",
            {"momentum": None, "batches": t},
            "Right for measuring with fixed weights. For training use a momentum such as 0.1.",
        )
    elif m == 0:
        yield Finding("momentum 0", "warning", state.name, "momentum=0: the running statistics never change.",
                      {"momentum": m, "batches": t}, "Use 0.1, or freeze the layer outright: steadynorm.freeze_.",
                      0.6)  # fmt: skip
    elif m > 0.5:
        yield Finding("large momentum", "warning", state.name,
                      f"momentum={m:g} is the share of the new batch: the statistics are little more than the last "
                      "batch's.", {"momentum": m, "batches": t},
                      f"Keras and TensorFlow count the other way: their 0.99 is 0.01 here. {_RECALIBRATE}",
                      0.6 + m / 10)  # fmt: skip
    elif t and (1 - m) ** t > _STARTED:
        left = (1 - m) ** t
        yield Finding(
            "momentum not converged",
            "note",  # the count is that of the batches measured where recalibrate_ or update_bn has set the statistics
            state.name,
            f"After {t} batches at momentum {m:g}, {left:.0%} of the running statistics still is the initial 0 and 1, "
            "unless they were measured anew.",
            {"momentum": m, "batches": t, "initial_share": left, "batches_needed": _steps_for(m)},
            f"{_steps_for(m)} batches bring it below {_STARTED:.0%}. {_RECALIBRATE}",
            left + 0.5,
        )


def _steps_for(m: float) -> int:
    return int(torch.ceil(torch.log(torch.tensor(_STARTED)) / torch.log1p(torch.tensor(-m))))


def _of(bad: Tensor) -> str:
    return f"{int(bad.sum())} of {bad.numel()}"


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])


def _share(bad: Tensor) -> float:
    return float(bad.double().mean())


_RULES: Final[tuple[Callable[[LayerState], Iterator[Finding]], ...]] = (
    *(_non_finite, _negative, _zero, _exploded, _never_updated, _dead, _eps, _half, _momentum),
)
