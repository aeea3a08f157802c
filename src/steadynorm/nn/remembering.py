"""What becomes of a batch's statistics: committed at once, never, held for one commit later, or returned aside.

A layer hands them to its `remember`, which is `commit_now` unless a context (`no_commit`, `accumulate`,
`functional_call`) has put another one there.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steadynorm.errors import ModelError, TransformError
from steadynorm.ops import commit as committing
from steadynorm.ops.autograd import composite_is_needed, peeled
from steadynorm.ops.commit import Running
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.ops.reference import Statistics

if TYPE_CHECKING:
    from steadynorm.nn.base import BatchNorm

__all__ = ["Held", "Remember", "aside", "commit_now", "never"]

# (layer, the domain's name or None, the batch's statistics, whether they were weighted) -> whether they were rejected
Remember = Callable[["BatchNorm", "str | None", Statistics, bool], "Tensor | bool"]


def commit_now(layer: "BatchNorm", domain: str | None, statistics: Statistics, weighted: bool) -> Tensor | bool:
    """The default: the running statistics move towards the batch's."""
    running = layer.running(domain)
    if not composite_is_needed():
        return committing.commit(running, statistics, layer.momentum, weighted=weighted)
    with _outside_of_transforms(layer, running, statistics) as plain:
        return committing.commit(running, plain, layer.momentum, weighted=weighted)


def never(layer: "BatchNorm", domain: str | None, statistics: Statistics, weighted: bool) -> Tensor | bool:
    """Writes nothing."""
    return False


def aside(layer: "BatchNorm", domain: str | None, statistics: Statistics, weighted: bool) -> Tensor | bool:
    """Puts new tensors in the buffers' place; `functional_call` takes them out and gives them to its caller."""
    with torch.no_grad():
        fresh, _ = committing.updated(layer.running(domain), statistics, layer.momentum, weighted=weighted)
    layer.replace_running(domain, fresh)
    return False


class Held:
    """Merges statistics, of each domain on its own, until they are committed in one go."""

    def __init__(self, layer: "BatchNorm") -> None:
        place = layer.running(None if not layer.domains else layer.domains[0]).mean.device
        with torch.inference_mode(False):  # ordinary tensors, wherever the block is entered
            zero = torch.zeros(layer.num_features, dtype=accumulator_dtype(place), device=place)
            self.parts = {
                domain: Statistics(zero.clone(), zero.clone(), zero.clone()) for domain in layer.domains or (None,)
            }
        self.weighted = False

    def __call__(self, layer: "BatchNorm", domain: str | None, statistics: Statistics, weighted: bool) -> Tensor | bool:
        """Merges a batch's statistics into the domain's."""
        if torch.compiler.is_exporting():
            raise ModelError(
                f"{layer} cannot be exported inside of steadynorm.accumulate: the program would hold its statistics "
                "back for a commit that never comes. Export outside of it, or inside of steadynorm.no_commit(model) "
                "for a program that remembers nothing."
            )
        self.weighted = self.weighted or weighted
        running = layer.running(domain)
        with _outside_of_transforms(layer, running, statistics) as plain:
            return committing.hold(self.parts[domain], plain, running.rejected)

    def release(self, layer: "BatchNorm") -> None:
        """Hands what was merged on, to be committed."""
        for domain, statistics in self.parts.items():
            layer.note(layer.remember(layer, domain, statistics, self.weighted))


@contextmanager
def _outside_of_transforms(layer: "BatchNorm", running: Running, statistics: Statistics) -> Generator[Statistics]:
    """The statistics as plain values, with any torch.func transform suspended, so that a buffer can be written.

    Buffers that are an argument of the transform themselves are written as they are, inside of it.
    """
    wrapped = torch._C._functorch  # pyright: ignore
    inside = not torch.compiler.is_compiling() and wrapped.peek_interpreter_stack() is not None
    if not inside or wrapped.is_functorch_wrapped_tensor(running.mean):
        yield statistics
        return
    plain = [peeled(t.detach()) for t in statistics]
    if any(wrapped.is_batchedtensor(t) for t in plain):
        raise TransformError(
            f"{layer}: under torch.func.vmap there is one batch per mapped element, so the running statistics cannot "
            "be written. Call the model through steadynorm.functional_call, which returns them, or inside "
            "steadynorm.no_commit(model)."
        )
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield Statistics(*plain)
