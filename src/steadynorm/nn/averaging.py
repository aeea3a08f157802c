"""Averages of weights (EMA, SWA) with running statistics that fit them."""

import re
from itertools import chain
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.selection import unwrapped

__all__ = ["Treatment", "average_"]

Treatment = Literal["averaged", "copied"]

_Model = TypeVar("_Model", bound=nn.Module)
_Pairs = list[tuple[Tensor, Tensor]]  # (the average's, the model's)
_VARIANCE = re.compile(r"(?<![^.])running_var(_\w+)?$")  # a domain's is running_var_<domain>


def average_(ema_model: _Model, model: nn.Module, decay: float, *, statistics: Treatment = "averaged") -> _Model:
    """Moves an average of a model's weights towards the model, and running statistics that fit the average with it.

        θ_ema <- decay θ_ema + (1 - decay) θ      every parameter
        μ_ema <- decay μ_ema + (1 - decay) μ      every running mean
        σ_ema <- decay σ_ema + (1 - decay) σ      the root of every running (unbiased) variance

    An average of the parameters alone would be evaluated with the statistics it started with. The deviations are
    averaged, not the variances: for a given input, what averaged weights put out deviates by at most the average
    deviation (the triangle inequality), which is at most the root of the average variance. Measured, that comes nearest
    to statistics taken anew on the whole training set, once the average has forgotten its start.

    Start from `copy.deepcopy(model)`, and call this after each step of the optimiser. For an equally weighted average
    of n + 1 models (SWA) pass decay = n / (n + 1). While training is young, a smaller decay forgets the first weights
    sooner: min(decay, (1 + step) / (10 + step)).

    Keep the average of a half-precision model in float32 (`copy.deepcopy(model).float()`): in 8 or 11 bits the small
    steps of a long average round to none.

    Args:
        ema_model: The average, changed in place. It may be wrapped in `torch.optim.swa_utils.AveragedModel` (whose
            `n_averaged` is counted up), DataParallel, DistributedDataParallel or torch.compile, and lie on another
            device or in another dtype than `model`.
        model: The model in training, wrapped or not; only read.
        decay: The share of the average so far, in [0, 1]: 1 keeps it, 0 copies the model.
        statistics: `"averaged"` as above; `"copied"` takes the model's running statistics as they are, which is nearer
            only where the average hardly reaches further back than they do (decay around 1 - momentum).

    Returns:
        `ema_model`. Its `num_batches_tracked` and all other buffers of the state_dict are the model's, likewise
        parameters that are not floating-point.

    Raises:
        ArgumentError: decay lies outside [0, 1], an unknown `statistics`, or both models are one and the same.
        ModelError: The models differ in structure; the message names the first difference. Nothing has been changed.

    Source:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018); the treatments of
        the statistics are compared in the guide on averaged weights.

    Example:
        >>> import copy
        >>> from steadynorm import BatchNorm1d
        >>> model = BatchNorm1d(1)
        >>> ema_model = copy.deepcopy(model).eval()
        >>> model.running_mean.fill_(10.0), model.running_var.fill_(9.0)
        (tensor([10.]), tensor([9.]))
        >>> average_(ema_model, model, decay=0.5).running_mean, ema_model.running_var      # σ: between 1 and 3
        (tensor([5.]), tensor([4.]))
    """
    if not 0 <= decay <= 1:
        raise ArgumentError(f"decay must lie in [0, 1], the share of the average so far; got {decay}.")
    if statistics not in get_args(Treatment):
        raise ArgumentError(f"statistics must be one of {get_args(Treatment)}, got {statistics!r}.")
    average, live = unwrapped(ema_model), unwrapped(model)
    if average is live:
        raise ArgumentError("ema_model and model are one and the same; start the average from copy.deepcopy(model).")
    parameters = _paired(dict(average.named_parameters()), dict(live.named_parameters()), "parameter")
    buffers = _paired(_persistent_buffers(average), _persistent_buffers(live), "buffer")
    moved = [pair for pair in parameters.values() if _is_continuous(pair)]
    deviations: _Pairs = []
    if statistics == "averaged":
        variances = {_VARIANCE.sub(r"running_mean\1", name): name for name in buffers if _VARIANCE.search(name)}
        of_layers = {mean: variance for mean, variance in variances.items() if mean in buffers}
        moved += [buffers.pop(name) for name in of_layers]
        deviations = [buffers.pop(name) for name in of_layers.values()]
    copied = [pair for pair in parameters.values() if not _is_continuous(pair)] + list(buffers.values())
    with torch.no_grad():
        _interpolate(moved, 1 - decay)
        _interpolate(deviations, 1 - decay, root=True)
        _copy(copied)
        if isinstance(ema_model, AveragedModel):
            ema_model.n_averaged += 1
    return ema_model


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of the state_dict: the others are caches, whose size may differ from copy to copy."""
    passing = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }
    return {name: buffer for name, buffer in model.named_buffers() if name not in passing}


def _paired(average: dict[str, Tensor], live: dict[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of both models by name, less what torch.compile on a part of a model puts into the names."""
    average, live = ({name.replace("_orig_mod.", ""): t for name, t in part.items()} for part in (average, live))
    for name in chain(average, live):
        if name not in live or name not in average:
            which = ("averaged model", "model in training")
            has, lacks = which if name in average else which[::-1]
            raise ModelError(
                f"both models must have the same structure: the {has} has a {what} {name!r}, the {lacks} has none. "
                "Start the average from copy.deepcopy(model)."
            )
        if average[name].shape != live[name].shape:
            raise ModelError(
                f"both models must have the same structure: the {what} {name!r} has shape {tuple(average[name].shape)} "
                f"in the averaged model and {tuple(live[name].shape)} in the model in training. Start the average from "
                "copy.deepcopy(model)."
            )
    return {name: (tensor, live[name]) for name, tensor in average.items()}


def _is_continuous(pair: tuple[Tensor, Tensor]) -> bool:
    return all(t.is_floating_point() or t.is_complex() for t in pair)


def _interpolate(pairs: _Pairs, share: float, *, root: bool = False) -> None:
    """average <- average + share (live - average), or so for the roots of both; in float32 at least, rounded once."""
    if not pairs:
        return
    wide = [torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32) for a, b in pairs]
    old = [average.to(dtype) for (average, _), dtype in zip(pairs, wide, strict=True)]
    new = [live.to(average) for (_, live), average in zip(pairs, old, strict=True)]
    # In one go over all tensors, as AveragedModel does it: on a GPU a kernel for each would cost a step's time.
    if root:
        old, new = torch._foreach_sqrt(old), torch._foreach_sqrt(new)  # pyright: ignore
    torch._foreach_lerp_(old, new, share)  # pyright: ignore
    if root:
        torch._foreach_mul_(old, old)  # pyright: ignore
    elsewhere = [(average, moved) for (average, _), moved in zip(pairs, old, strict=True) if moved is not average]
    _copy(elsewhere)


def _copy(pairs: _Pairs) -> None:
    if pairs:
        torch._foreach_copy_([average for average, _ in pairs], [live for _, live in pairs])  # pyright: ignore
