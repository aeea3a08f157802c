"""How a batch of whatever form is given to a model: decided from the signature of the model's forward."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn

from steadynorm.errors import ArgumentError
from steadynorm.nn.batches import first_tensor, moved

__all__ = ["Caller", "batches_of", "examples_in"]

LABELS: Final = frozenset({"label", "labels", "target", "targets", "label_ids", "y"})
"""Entries of a dict that are no inputs, unless the model cannot do without them."""


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    said: str


class Caller:
    """Runs a model on a batch.

    Args:
        model: The model itself, without wrappers.
        forward: The user's own `batch -> anything`, or None to decide by the signature of `model.forward`.

    Attributes:
        note: What was decided where it could have been otherwise, or None.
    """

    def __init__(self, model: nn.Module, forward: Callable[[Any], object] | None) -> None:
        if forward is not None and not callable(forward):
            raise ArgumentError(f"forward must be a function of one batch, or None; got {type(forward).__name__}.")
        self._model, self._forward = model, forward
        self.note: str | None = None
        self._parameters = [] if forward is not None else _parameters(model)
        first = next((t for t in (*model.parameters(), *model.buffers())), None)
        self._device = torch.device("cpu") if first is None else first.device

    def __call__(self, batch: Any) -> None:
        """One forward; an error raised within says how the batch was handed over."""
        if self._forward is not None:
            self._forward(batch)
            return
        args, kwargs, said = self._bound(batch)
        args, kwargs = moved(args, self._device), {name: moved(v, self._device) for name, v in kwargs.items()}
        try:
            self._model(*args, **kwargs)
        except Exception as error:
            error.add_note(f"recalibrate_ called {said} for a batch of {_shape(batch)}; forward= decides otherwise.")
            raise

    def _bound(self, batch: Any) -> _Call:
        if isinstance(batch, Mapping):
            return self._by_name(cast("Mapping[Any, Any]", batch), "batch")
        if not isinstance(batch, (tuple, list)):
            self._require(1, batch)
            return _Call((batch,), {}, "model(batch)")
        entries = cast("Sequence[Any]", batch)
        if not entries:
            raise ArgumentError("a batch is an empty tuple. Pass forward=lambda batch: model(...).")
        first = entries[0]
        if isinstance(first, Mapping) and self._takes(cast("Mapping[Any, Any]", first)):
            return self._by_name(cast("Mapping[Any, Any]", first), "batch[0]")
        if isinstance(first, (tuple, list)) and len(cast("Sequence[Any]", first)) == len(self._required()) > 1:
            return _Call(tuple(cast("Sequence[Any]", first)), {}, "model(*batch[0])")
        return self._leading(entries, batch)

    def _leading(self, entries: Sequence[Any], batch: Any) -> _Call:
        """As many leading entries as the forward cannot do without, at least one: the others are labels."""
        if any(p.kind is p.VAR_POSITIONAL for p in self._parameters) and len(entries) > 1:
            raise ArgumentError(
                f"model.forward{self._signature()} takes any number of inputs, so that which of the {len(entries)} "
                "entries of a batch are labels is unknown. Pass forward=lambda batch: model(...)."
            )
        wanted = max(1, len([p for p in self._required() if p.kind is not p.KEYWORD_ONLY]))
        if wanted > len(entries):
            self._require(len(entries), batch)
        self._require(wanted, batch)
        optional = [p.name for p in self._parameters if p.kind in _POSITIONAL][wanted:]
        if len(entries) > wanted and optional:
            self.note = (
                f"of each batch's {len(entries)} entries the first {wanted} went to model.forward{self._signature()}, "
                f"as many as it cannot do without; the others were taken for labels. Were one meant for "
                f"{optional[0]}, pass forward=."
            )
        said = "model(batch[0])" if wanted == 1 else f"model(*batch[:{wanted}])"
        return _Call(tuple(entries[:wanted]), {}, said)

    def _by_name(self, batch: Mapping[Any, Any], what: str) -> _Call:
        by_name = {p.name: p for p in self._parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        needed = [p.name for p in self._required()]
        missing = [name for name in needed if name not in batch]
        if missing:
            raise ArgumentError(
                f"model.forward{self._signature()} needs {', '.join(missing)}, and {what} has the entries "
                f"{', '.join(map(str, batch))}. Pass forward=lambda batch: model(...)."
            )
        anything = any(p.kind is p.VAR_KEYWORD for p in self._parameters)
        taken = {
            name: value
            for name, value in batch.items()
            if name in needed or ((name in by_name or anything) and name not in LABELS)
        }
        left = [str(name) for name in batch if name not in taken and name not in LABELS]
        if left:
            self.note = (
                f"the entries {', '.join(left)} of each batch are no parameters of model.forward and were left out."
            )
        if not taken:
            raise ArgumentError(
                f"none of the entries {', '.join(map(str, batch))} of {what} is a parameter of "
                f"model.forward{self._signature()}. Pass forward=lambda batch: model(...)."
            )
        return _Call((), taken, f"model(**{what}) with {', '.join(taken)}")

    def _takes(self, entries: Mapping[Any, Any]) -> bool:
        names = {p.name for p in self._parameters}
        anything = any(p.kind is p.VAR_KEYWORD for p in self._parameters)
        needed = {p.name for p in self._required()}
        return needed <= set(entries) and (anything or bool(names & set(entries)))

    def _required(self) -> list[inspect.Parameter]:
        return [p for p in self._parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    def _require(self, given: int, batch: Any) -> None:
        """That the forward can be called with so many inputs by position."""
        positional = [p for p in self._parameters if p.kind in _POSITIONAL]
        needed = self._required()
        many = any(p.kind is p.VAR_POSITIONAL for p in self._parameters)
        if len(needed) > given or any(p.kind is p.KEYWORD_ONLY for p in needed) or not (many or positional):
            raise ArgumentError(
                f"model.forward{self._signature()} cannot be called with {given} inputs, which is what a batch of "
                f"{_shape(batch)} holds. Pass forward=lambda batch: model(...)."
            )

    def _signature(self) -> str:
        return f"({', '.join(str(p) for p in self._parameters)})"


_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward written in another language
        return [inspect.Parameter("input", inspect.Parameter.POSITIONAL_ONLY)]


def batches_of(loader: Any) -> Iterable[Any]:
    """What is iterated over: a loader as it is, one tensor as one batch.

    Raises:
        ArgumentError: It is nothing to iterate over.
    """
    if isinstance(loader, Tensor):
        return [loader]
    if isinstance(loader, (str, bytes, Mapping)) or not isinstance(loader, Iterable):
        raise ArgumentError(f"loader must be an iterable of batches or one tensor, got {type(loader).__name__}.")
    return cast("Iterable[Any]", loader)


def examples_in(batch: Any) -> int | None:
    """The length of a batch's first tensor; None where there is none.

    Example:
        >>> examples_in({"x": torch.zeros(5, 2), "y": torch.zeros(5)})
        5
    """
    first = first_tensor(batch)
    return None if first is None or first.dim() == 0 else first.shape[0]


def _shape(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, (tuple, list)):
        parts = cast("Sequence[Any]", batch)
        return f"a {type(parts).__name__} of {len(parts)} ({', '.join(type(one).__name__ for one in parts[:4])})"
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(str, cast('Mapping[Any, Any]', batch)))}"
    return f"a {type(batch).__name__}"
