"""`diagnose`: what is wrong with a model's batch norms, from its weights, its structure and, where given, data."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.nn.watched import BatchNormLayer, bn_layers
from steadynorm.population.causes import figures as measured
from steadynorm.population.causes import from_gap
from steadynorm.population.findings import Diagnosis, Value
from steadynorm.population.gap import measure_gap
from steadynorm.population.states import states_of
from steadynorm.population.structure import from_optimizer, from_structure, from_sync
from steadynorm.population.weights import from_weights

__all__ = ["diagnose"]


def diagnose(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    reference: Iterable[Any] | None = None,
    forward: Callable[[Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    expect_sync: bool | None = None,
    examples: int = 4096,
    progress: bool = False,
) -> Diagnosis:
    """Finds out what is wrong with the batch norms of a model: each finding has its figures and its remedy.

    From the weights alone: running statistics that are not finite, negative, zero, exploded or never updated, dead
    channels, ε beside the variance, half-precision buffers, momentum; from the structure: biases before batch norm,
    weight decay, layers that should sync. With data: the loss under running statistics, under the batches' own and
    under those of all the data (pooled Moments), and which layer and which cause the gap is due to.

    The model is left as it was, down to its modes and random state.

    Args:
        model: Batch norms of `torch.nn` (SyncBatchNorm included) or steadynorm.
        loader: Batches as in evaluation or training: (inputs, targets), or inputs alone; with the batch size and the
            order that are in question. None: only weights and structure are looked at.
        reference: Batches of training data, where `loader` is of other data: tells a shift between the two from
            statistics that fit neither.
        forward: `forward(batch)` gives the output; by default the model is called with the inputs.
        loss: `loss(output, targets)` gives one number per example, (N,), or their mean; cross-entropy by default where
            targets are class indices.
        optimizer: Its parameter groups are searched for γ and β under weight decay.
        expect_sync: Whether layers should sync over ranks; by default if a process group of several ranks is there.
        examples: Read at most so many (whole batches), all kept in memory.
        progress: Whether to show a progress bar on the standard error.

    Returns:
        The findings, the worst first. A healthy model has none above "note".

    Raises:
        ArgumentError: An argument cannot be used.
        ModelError: The model has no batch norm, or its forward fails on a batch.
        DataError: The loader holds no batch that can be read.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
        >>> diagnose(model).findings[0].kind
        'never updated'
    """
    states = states_of(model)
    layers = sum(isinstance(module, BatchNormLayer) for module in model.modules())
    if not layers:
        raise ModelError(f"diagnose needs a model with batch norm layers; this {type(model).__name__} has none.")
    findings = [*from_weights(states), *from_structure(model), *from_sync(model, expect_sync)]
    if optimizer is not None:
        findings += from_optimizer(model, optimizer)
    figures: dict[str, Value] = {}
    if loader is not None:
        gap = measure_gap(
            model,
            bn_layers(model),
            loader,
            reference=reference,
            forward=forward,
            loss=loss,
            examples=examples,
            progress=progress,
        )
        findings += from_gap(gap)
        figures = measured(gap)
    elif reference is not None:
        raise ArgumentError("reference= is compared with the data of loader: give both.")
    return Diagnosis.ranked(type(model).__name__, layers, findings, figures)
