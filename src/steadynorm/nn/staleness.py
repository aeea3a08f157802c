"""A layer's memory of whether its weight has moved on without its running statistics, as in an EMA of parameters alone.

torch counts the in-place changes of every tensor (`Tensor._version`). A layer that was never trained itself, whose
weight has nevertheless changed time and again while its running mean has not, holds an average of another model's
weights beside statistics that are nobody's. That is worth a warning when it evaluates.
"""

import warnings

import torch
from torch import Tensor, nn

from steadynorm.errors import StaleStatisticsWarning

__all__ = ["CHANGES", "Staleness"]

CHANGES = 8
"""So many changes of the weight are an average being kept; fewer may be an initialisation or a checkpoint loaded."""

_MESSAGE = (
    "The weights of a batch norm that was never trained itself keep changing, and its running statistics do not: an "
    "average of weights (EMA, SWA) that leaves the buffers out? In evaluation it normalises by the statistics of other "
    "weights. Average both with steadynorm.average_(ema_model, model, decay), or measure them anew before evaluating, "
    "with steadynorm.recalibrate_(ema_model, loader). If they are as you want them, "
    "warnings.simplefilter('ignore', steadynorm.errors.StaleStatisticsWarning)."
)


class Staleness:
    """Beside one layer: how often weight and running mean had been changed when they last were known to fit.

    It starts anew whenever the layer's tensors do: with a copy, a checkpoint, another device.

    Attributes:
        settled: There is nothing to find any more: the layer is trained, has been warned about, or has nothing to look
            at. Ask this first, since it is all that a forward in training should pay for.

    Args:
        weight: γ as it is now, or None.
        mean: The running mean as it is now, or None.
    """

    __slots__ = ("_mean", "_mean_version", "_weight", "_weight_version", "settled")

    def __init__(self, weight: Tensor | None, mean: Tensor | None) -> None:
        # Tensors made in inference mode count no changes. A weight that is no plain parameter is somebody's:
        # torch.func's, a parametrization's or a sharded model's.
        self.settled = (
            weight is None
            or mean is None
            or type(weight) is not nn.Parameter
            or weight.is_inference()
            or mean.is_inference()
        )
        self._weight, self._weight_version = weight, -1
        self._mean, self._mean_version = mean, -1
        if weight is not None and mean is not None and not self.settled:
            self._weight_version, self._mean_version = weight._version, mean._version

    def look(self, weight: Tensor | None, mean: Tensor, evaluating: bool) -> None:
        """To be called in each eager forward while not `settled`: warns once if the statistics look stale.

        A forward that a gradient of the weight is wanted of settles it: this layer is itself being trained, with
        statistics of its own or frozen on purpose.

        Args:
            weight: γ as this forward uses it.
            mean: The running mean as this forward uses it.
            evaluating: Whether it normalises by the running statistics.

        Warns:
            StaleStatisticsWarning: The weight was changed at least `CHANGES` times since the mean last was.
        """
        if weight is None or (weight.requires_grad and torch.is_grad_enabled()):
            self.settled = True
        elif evaluating:
            if weight is not self._weight or mean is not self._mean or mean._version != self._mean_version:
                self.__init__(weight, mean)  # other tensors, or statistics that were seen to
            elif weight._version - self._weight_version >= CHANGES and not _excused(weight):
                self.settled = True
                warnings.warn(_MESSAGE, StaleStatisticsWarning, stacklevel=3)


def _excused(weight: Tensor) -> bool:
    """Whether it is being trained all the same, in a compiled graph that this does not see into, or traced."""
    return weight.grad is not None or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
