"""A model run under one set of statistics or another: its own, each batch's, those of all the data. Then put back."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from steadynorm.errors import DataError, ModelError, SteadynormError
from steadynorm.moments import Moments
from steadynorm.nn.examining import examining
from steadynorm.nn.keeping import Buffers, uncompiled
from steadynorm.nn.watched import BatchNormLayer, channel_axis, observing, running_statistics
from steadynorm.population.examples import Batch

__all__ = ["Floats", "Losses", "Norms", "Statistics", "Swapper", "left_alone"]

Floats: TypeAlias = NDArray[np.float64]
Statistics: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and unbiased variance of each layer, (C,) each."""
Norms: TypeAlias = Sequence[tuple[str, BatchNormLayer]]


class Losses(NamedTuple):
    """The loss of each example (or batch, where `loss` gives a mean), and what it weighs.

    Attributes:
        loss: (U,).
        weight: (U,), examples in each.
        correct: (N,) 0 or 1, or None where there are no classes.
    """

    loss: Floats
    weight: Floats
    correct: Floats | None

    @property
    def mean(self) -> float:
        """The mean loss of an example."""
        return float(np.average(self.loss, weights=self.weight)) if len(self.loss) else float("nan")

    @property
    def accuracy(self) -> float | None:
        """The share of examples that are right."""
        return None if self.correct is None or not len(self.correct) else float(self.correct.mean())


class _Enough(Exception):
    """The layer in question has been reached: it stops a forward, and is no error."""


@contextmanager
def left_alone(model: nn.Module) -> Generator[None]:
    """Modes, buffers and the state of chance come back as they were, whatever happens inside."""
    modes = [(module, module.training) for module in model.modules()]
    kept = Buffers(model)  # all of them: a forward may count its calls
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with examining(), torch.random.fork_rng(devices=devices), uncompiled(model):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            kept.restore()


class Swapper:
    """Runs a model; use it inside of `left_alone`.

    Args:
        model: The network.
        layers: Its batch norms with running statistics, by name.
        forward: `forward(batch)`, or None for `model(inputs)`.
        loss: `loss(output, targets)`, or None for cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Norms,
        forward: Callable[[Any], Any] | None,
        loss: Callable[[Any, Any], Tensor] | None,
    ) -> None:
        self.model, self.layers = model, layers
        self._forward, self._loss = forward, loss
        self.own: Statistics = {name: _copy(running_statistics(layer)) for name, layer in layers}

    def write(self, statistics: Statistics) -> None:
        """Puts statistics in the place of the running ones."""
        with torch.no_grad():
            for name, layer in self.layers:
                if name in statistics:
                    for buffer, value in zip(running_statistics(layer), statistics[name], strict=True):
                        buffer.copy_(value)

    def run(self, batch: Batch) -> Any:
        """One forward; what the model raises becomes one clear error."""
        try:
            with torch.no_grad():
                return self.model(batch.x) if self._forward is None else self._forward(batch.given)
        except (_Enough, SteadynormError):
            raise
        except Exception as error:  # the user's own forward
            raise ModelError(
                f"the forward failed on a batch of {batch.size}: {type(error).__name__}: {error}. Pass forward=lambda "
                "batch: model(...) if the batches have another form."
            ) from error

    def losses(
        self, batches: Sequence[Batch], statistics: Statistics | None = None, *, by_batch: bool = False
    ) -> Losses | None:
        """The losses under running statistics (other ones, if given), or under each batch's own.

        None where there are no targets that the loss can use.
        """
        self.model.eval()
        self.write({**self.own, **(statistics or {})})
        if by_batch:
            for _, layer in self.layers:
                layer.train()
        loss: list[Floats] = []
        weight: list[Floats] = []
        correct: list[Floats] = []
        for batch in batches:
            output = self.run(batch)
            found = self._of(output, batch)
            if found is None:
                return None
            loss.append(found)
            weight.append(np.full(len(found), batch.size / len(found)))
            right = _correct(output, batch.y)
            if right is not None:
                correct.append(right)
        whole = np.concatenate(correct) if len(correct) == len(batches) else None
        return Losses(np.concatenate(loss), np.concatenate(weight), whole)

    def _of(self, output: Any, batch: Batch) -> Floats | None:
        if batch.y is None:
            return None
        if self._loss is not None:
            value = self._loss(output, batch.y)
        elif isinstance(output, Tensor) and isinstance(batch.y, Tensor) and _is_classes(output, batch.y):
            value = functional.cross_entropy(output.double(), batch.y.long(), reduction="none")
        else:
            return None
        value = torch.as_tensor(value).detach().to("cpu", torch.float64)
        return (value.flatten(1).mean(1) if value.dim() > 1 else value.reshape(-1)).numpy()

    def population(self, batches: Sequence[Batch], dropping: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and unbiased variance of each layer's input over all batches, layer after layer.

        Each is measured with the layers before it already in evaluation on theirs: what a recalibrated model would
        hold. Moments are pooled over the batches by the law of total variance.

        Args:
            batches: The data.
            dropping: Whether dropout is active, as in training.

        Raises:
            DataError: What reaches a layer is not finite.
        """
        self.model.eval()
        self.write(self.own)
        calls = self._calls(batches)
        for module in self.model.modules():
            if dropping and isinstance(module, nn.modules.dropout._DropoutNd):  # pyright: ignore[reportPrivateUsage]
                module.train()
        found: dict[str, tuple[Tensor, Tensor]] = {}
        modules = dict(self.layers)
        for name, once in calls.items():
            seen: list[Moments] = []

            def see(
                _: str,
                layer: BatchNormLayer,
                x: Tensor,
                mask: Tensor | None,
                seen: list[Moments] = seen,
                last: bool = once,
            ) -> None:
                seen.append(Moments.of(x.detach(), channel_axis(layer), weight=mask))
                if last:
                    raise _Enough

            with observing([(name, modules[name])], see):
                for batch in batches:
                    try:
                        self.run(batch)
                    except _Enough:
                        continue
            pooled = Moments.merge_all(seen)
            if not bool(torch.isfinite(pooled.m2).all()):
                raise DataError(f"what reaches {name} is not finite on finite inputs: look at the weights before it.")
            var = pooled.variance(unbiased=True)
            found[name] = (pooled.mean, torch.where(torch.isnan(var), 1.0, var))
            self.write(found)
        return found

    def _calls(self, batches: Sequence[Batch]) -> dict[str, bool]:
        """Whether each layer runs at most once in a forward, in the order of the first time in the fullest forward."""
        each: list[dict[str, int]] = []

        def see(name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None) -> None:
            each[-1][name] = each[-1].get(name, 0) + 1

        with observing(self.layers, see):
            for batch in batches:
                each.append({})
                self.run(batch)
        most: dict[str, bool] = {}
        for calls in sorted(each, key=len, reverse=True):  # a forward may leave a branch out
            for name, times in calls.items():
                most[name] = most.get(name, True) and times == 1
        if not most:
            raise ModelError("the forward used none of the model's batch norms. Does `forward` run this very model?")
        return most


def _copy(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0].detach().clone(), pair[1].detach().clone()


def _is_classes(output: Tensor, y: Tensor) -> bool:
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    fits = whole and output.dim() >= 2 and output.shape[1] > 1 and output.shape[:1] + output.shape[2:] == y.shape
    return fits and bool(((y >= 0) & (y < output.shape[1])).all())  # a label to be ignored is a loss of the user's own


def _correct(output: Any, y: Any) -> Floats | None:
    if not (isinstance(output, Tensor) and isinstance(y, Tensor) and _is_classes(output, y)):
        return None
    right = (output.argmax(1) == y).double()
    return (right.flatten(1).mean(1) if right.dim() > 1 else right).cpu().numpy()
