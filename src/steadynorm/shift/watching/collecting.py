"""Running a model over a loader, and what each of its layers sees of each example."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steadynorm.errors import DataError, ModelError
from steadynorm.nn.watched import BatchNormLayer, ExampleMoments, observing, running_statistics
from steadynorm.shift.watching.embedding import features
from steadynorm.shift.watching.observer import Look
from steadynorm.shift.watching.pools import concatenate

__all__ = ["checked_batch", "clean_features", "collect", "is_watchable"]

Floats: TypeAlias = npt.NDArray[np.float64]


def checked_batch(
    model: nn.Module, layers: Mapping[str, BatchNormLayer], batch: Any, forward: Callable[[Any], object] | None
) -> Callable[[], object]:
    """What runs the model on a batch: `forward`, or the model itself on the tensor that comes first.

    Raises:
        DataError: There is no such tensor.
        ModelError: The model, or one of the layers, is in training mode.
    """
    if model.training or any(layer.training for layer in layers.values()):
        raise ModelError(
            "the model is in training mode, where batches are normalised by themselves; call model.eval()."
        )
    if forward is not None:
        return lambda: forward(batch)
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise DataError(
            f"a batch must be a tensor, or a tuple or list with the inputs first, got {type(batch).__name__}. "
            "Say how to run the model on it: forward=lambda batch: model(batch['image'])."
        )
    there = running_statistics(next(iter(layers.values())))[0].device
    return lambda: model(inputs.to(there))


def collect(
    model: nn.Module,
    layers: Mapping[str, BatchNormLayer],
    loader: Iterable[Any],
    examples: int,
    forward: Callable[[Any], object] | None = None,
) -> tuple[dict[str, ExampleMoments], list[str]]:
    """The first examples of a loader as each layer sees them.

    Returns:
        Their moments by layer, all of the same examples, and notes on layers that are left out: those that did not run
        for every batch, or not on one row per example.

    Raises:
        DataError: The loader yields nothing, or what is no batch.
        ModelError: No layer ran.
    """
    parts: dict[str, list[ExampleMoments]] = {name: [] for name in layers}
    batches = total = 0
    for batch in loader:
        look = Look(0, frozenset(layers))
        run = checked_batch(model, layers, batch, forward)
        with torch.no_grad(), observing(list(layers.items()), look.see):
            run()
        batches += 1
        if not look.taken:
            raise ModelError("no batch norm layer ran on an input that can be read; run the plain model, uncompiled.")
        rows = len(next(iter(look.taken.values())).mean)  # the layer nearest to the input
        for name, seen in look.taken.items():
            if len(seen.mean) == rows:
                parts[name].append(ExampleMoments(seen.mean.cpu(), None if seen.var is None else seen.var.cpu()))
        total += rows
        if total >= examples:
            break
    if batches == 0:
        raise DataError("the loader yields no batches; a generator that was used up must be made anew.")
    whole = {name: concatenate(p) for name, p in parts.items() if len(p) == batches}
    notes = [
        f"{name} is not watched: it does not see one row per example of each batch"
        for name in layers
        if name not in whole
    ]
    return {name: _first(seen, examples) for name, seen in whole.items()}, notes


def clean_features(
    seen: Mapping[str, ExampleMoments], layers: Mapping[str, BatchNormLayer]
) -> tuple[dict[str, Floats], int]:
    """Features of each layer, of the examples that are finite at all of them; and how many are not."""
    values = {name: features(moments, layers[name]) for name, moments in seen.items()}
    finite = np.all([np.isfinite(v).all(axis=1) for v in values.values()], axis=0)
    return {name: v[finite] for name, v in values.items()}, int(np.sum(~finite))


def is_watchable(model: nn.Module) -> list[str]:
    """Why the hooks would see nothing of this model; empty where they do."""
    notes: list[str] = []
    for name, part in model.named_modules():
        what = f"its part {name!r}" if name else "the model"
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            notes.append(f"{what} is compiled: hooks see nothing in it; call monitor.update(batch) on the plain model")
        elif isinstance(part, torch.jit.ScriptModule):
            notes.append(f"{what} is TorchScript: hooks see nothing in it; watch the model it was made from")
        elif isinstance(part, nn.DataParallel):
            notes.append(f"{what} is DataParallel: its replicas run in threads of their own, which hooks do not see")
        else:
            continue
        break
    return notes


def _first(seen: ExampleMoments, examples: int) -> ExampleMoments:
    return ExampleMoments(seen.mean[:examples], None if seen.var is None else seen.var[:examples])
