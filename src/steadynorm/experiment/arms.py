"""The arms of the comparison: the same network without batch norm, with it before the nonlinearity, and after it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.experiment.models import ModelSource
from steadynorm.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.surgery.inserting import InsertedModel, insert
from steadynorm.surgery.operations import is_activation

__all__ = [
    "DEFAULT_ARMS",
    "Arm",
    "Init",
    "Where",
    "arms_for",
    "build",
    "is_weighted",
    "norm_layer",
    "takes_dropout",
]

Where: TypeAlias = Literal["before", "after", "own", "first"]
Init: TypeAlias = Literal["default", "corrected", "critical"]

_NORMS: Final = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}
_ANY_NORM: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WEIGHTED: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KEEPS_CHANNELS: Final = (
    nn.Dropout,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
)


@dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
        id: What the results call it.
        label: What the report calls it.
        where: Where batch norm goes: None for nowhere, "before" or "after" each hidden nonlinearity, "own" for where
            the user's factory puts it, "first" for a layer on the input alone.
        salt: Changes initialisation and data order, not the split; tells apart two arms of a null experiment.
    """

    id: str
    label: str
    where: Where | None = None
    salt: int = 0


PLAIN: Final = Arm("plain", "without batch norm")
BEFORE: Final = Arm("before", "batch norm before the nonlinearity", "before")
AFTER: Final = Arm("after", "batch norm after the nonlinearity", "after")
OWN: Final = Arm("norm", "batch norm where the factory puts it", "own")

DEFAULT_ARMS: Final = (PLAIN, BEFORE, AFTER)


def arms_for(source: ModelSource, arms: tuple[Arm, ...] | None) -> tuple[Arm, ...]:
    """The arms that this network can have, the plain one first.

    Raises:
        ArgumentError: The user's list repeats an id or does not start with a plain arm.
    """
    if arms is None:
        return (PLAIN, OWN) if source.places_norm and "where" not in source.asks else DEFAULT_ARMS
    ids = [arm.id for arm in arms]
    if len(arms) < 2 or len(set(ids)) != len(ids) or arms[0].where is not None:
        raise ArgumentError(
            "arms must be at least two with different ids, the first of them without batch norm; "
            f"got {', '.join(ids) or 'none'}."
        )
    return arms


def is_weighted(module: nn.Module) -> bool:
    """Whether this is a Linear or convolution: a layer that batch norm can follow."""
    return isinstance(module, _WEIGHTED)


def norm_layer(num_features: int, dims: int = 1) -> nn.Module:
    """The batch norm that a user's factory is handed: `norm(100)`, `norm(16, dims=2)`."""
    return _NORMS[dims](num_features)


def _sequentials(model: nn.Module) -> list[nn.Sequential]:
    return [m for m in model.modules() if isinstance(m, nn.Sequential) and type(m).forward is nn.Sequential.forward]


def _hidden_activations(sequence: nn.Sequential) -> list[tuple[int, int]]:
    """Positions of (layer, activation) pairs, last first, so that insertions do not move those still to come."""
    pairs: list[tuple[int, int]] = []
    layer: int | None = None
    for position, module in enumerate(sequence):
        if is_weighted(module):
            layer = position
        elif is_activation(module) and layer is not None:
            pairs.append((layer, position))
            layer = None
        elif not isinstance(module, (*_KEEPS_CHANNELS, *_ANY_NORM)):
            layer = None
    return pairs[::-1]


def _inserted(model: nn.Module, source: ModelSource, where: Literal["before", "after"], x: Tensor) -> nn.Module:
    made = insert(model, where, example=x)
    report = cast(InsertedModel, made).insert_report
    if report.inserted:
        return made
    whys = dict.fromkeys(f"at {row.nonlinearity}, {row.why}" for row in report.left)
    whys |= dict.fromkeys(f"{name or 'the model'} could not be traced ({why})" for name, why in report.untraced)
    raise _refuse_no_place(source, "; ".join(list(whys)[:3]))


def insert_dropout(model: nn.Module, p: float) -> int:
    """Puts dropout after each hidden activation (and the batch norm on it); returns after how many."""
    inserted = 0
    for sequence in _sequentials(model):
        for _, activation in _hidden_activations(sequence):
            position = activation + 1
            while position < len(sequence) and isinstance(sequence[position], _ANY_NORM):
                position += 1
            sequence.insert(position, nn.Dropout(p))
            inserted += 1
    return inserted


def takes_dropout(source: ModelSource, input_shape: tuple[int, ...], classes: int) -> bool:
    """Whether there is a hidden activation module that dropout could follow."""
    with torch.random.fork_rng(devices=[]):
        return insert_dropout(source.build(input_shape, classes), 0.5) > 0


def _refuse_batch_norm(model: nn.Module, source: ModelSource) -> None:
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):  # pyright: ignore[reportPrivateUsage]
        raise ModelError(
            f"the plain arm of {source.name} already holds batch norm, so there is nothing to compare. "
            "Leave it out, or write a factory f(norm) that builds without it when norm is None."
        )


def _refuse_no_place(source: ModelSource, why: str) -> ModelError:
    return ModelError(
        f"found no place for batch norm in {source.name}"
        + (f": {why}" if why else "")
        + ". It is put next to a hidden nonlinearity that follows a Linear or convolution. Write a factory f(norm) "
        "that calls norm(num_features) or norm(num_features, dims=2) where a layer belongs, and builds without when "
        "norm is None."
    )


def _first(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), BatchNorm1d(prod(input_shape)), nn.Unflatten(1, input_shape), model)


def build(
    source: ModelSource,
    arm: Arm,
    input_shape: tuple[int, ...],
    classes: int,
    *,
    init: Init = "default",
    dropout: float = 0.0,
) -> nn.Module:
    """One arm's network, initialised under torch's global random state.

    Where batch norm is put in (`sn.insert`), that happens after the initialisation, so that all arms of one seed start
    from the same weights.

    Args:
        source: Where the plain network comes from.
        arm: Which arm.
        input_shape: The shape of one example.
        classes: The number of classes.
        init: "default" is torch's own; "corrected" draws each layer's weights by the gain of the activation that
            follows it (`steadynorm.init.initialize_`), with zero biases; "critical" by the gain that preserves the
            gradient, which for functions with a large mean (the sigmoid) is the one that lets a plain network learn.
        dropout: Probability of dropout after each hidden activation; 0 for none.

    Raises:
        ModelError: Batch norm or dropout finds no place in the network, or the plain network already has batch norm.
    """
    own = arm.where is not None and arm.where != "first" and source.places_norm
    norm: Callable[..., nn.Module] | None = norm_layer if own else None
    model = source.build(input_shape, classes, norm, arm.where if own else None)
    if not own:
        _refuse_batch_norm(model, source)
    if init != "default":
        from steadynorm.init import initialize_

        initialize_(model, preserve="signal" if init == "corrected" else "gradient")
    if dropout and not insert_dropout(model, dropout):
        raise ModelError(f"found no activation module in {source.name} that dropout could follow.")
    if own and not any(isinstance(module, _ANY_NORM) for module in model.modules()):
        raise ModelError(
            f"the factory {source.name} was handed a batch norm to place and returned a network without one, so there "
            "is nothing to compare. Call norm(num_features) in it wherever norm is not None."
        )
    if own or arm.where is None:
        return model
    if arm.where == "first":
        return _first(model, input_shape)
    if arm.where == "own":
        raise _refuse_no_place(source, "it is to place it itself")
    return _inserted(model, source, arm.where, torch.zeros(2, *input_shape))
