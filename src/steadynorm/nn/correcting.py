"""Batch renorm within a layer: its corrections, and the same ones again for a forward that is run again."""

from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from steadynorm.errors import RecomputationError
from steadynorm.nn.renorm import Renorm
from steadynorm.ops.autograd import composite_is_needed
from steadynorm.ops.commit import Running, opaque, recomputing
from steadynorm.ops.reference import Statistics

__all__ = ["Corrector"]

# Forwards of a layer (ghost batches: chunks) that can wait for their backward at once. Each costs 5 C numbers.
CAPACITY = 4096


@dataclass
class _Made:
    """What a batch was corrected by, and towards which running mean (its address; unknown in a compiled graph)."""

    statistics: Statistics
    towards: int | None
    r: Tensor
    d: Tensor
    used: bool = False


class Corrector:
    """Applies a layer's corrections, the same ones again when activation checkpointing runs a forward again.

    By then the forward's own commit has moved the running statistics that r and d are made from. So the corrections of
    forwards that may be run again are remembered, and found by the batch's statistics, which come out the same. Of
    several forwards of one batch the last is run again first, as backward goes. In a compiled graph this is an opaque
    op: a graph's own recomputation would read the moved buffers, too.
    """

    def __init__(self, renorm: Renorm) -> None:
        self.renorm = renorm
        self._made: list[_Made] = []
        self._forgotten = False
        number = next(_numbers)
        _correctors[number] = self
        self._number = torch.tensor(number)  # a tensor, so that one compiled graph serves all layers

    def __getstate__(self) -> Renorm:
        return self.renorm  # a copy has no forward to run again

    def __setstate__(self, renorm: Renorm) -> None:
        self.__init__(renorm)

    def correct(
        self, statistics: Statistics, running: Running, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """γ r and γ d + β: the weight and bias with which plain batch norm gives γ (z r + d) + β."""
        r, d = self.corrections(statistics, running, eps)
        if weight is not None:
            r, d = weight * r, weight * d
        return r, d if bias is None else d + bias

    def corrections(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        """r and d: those of the first time where this is the second one."""
        plain = Statistics(*(t.detach() for t in statistics))
        if opaque():
            with torch.no_grad():
                return torch.ops.steadynorm.corrections(*plain, *running[:3], eps, self._number)
        again = not composite_is_needed() and _may_run_again()  # under a transform nothing may outlive it
        with torch.no_grad():
            return self.once(plain, running, eps, running.mean.data_ptr()) if again else self._anew(plain, running, eps)

    def once(self, statistics: Statistics, running: Running, eps: float, towards: int | None) -> tuple[Tensor, Tensor]:
        """r and d, remembered the first time and found the second."""
        if not recomputing():
            r, d = self._anew(statistics, running, eps)
            self._remember(_Made(Statistics(*(t.clone() for t in statistics)), towards, r.clone(), d.clone()))
            return r, d
        found = [m for m in list(self._made) if _alike(m.towards, towards) and _same(m.statistics, statistics)]
        if not found:
            if self._forgotten:
                raise RecomputationError(
                    f"activation checkpointing runs a forward again whose corrections are no longer known: more than "
                    f"{CAPACITY} forwards of this layer (chunks, with ghost_batch_size) were waiting for their "
                    "backward. Run backward earlier, or leave the layer out of the checkpoint."
                )
            return self._anew(statistics, running, eps)
        one = next((m for m in reversed(found) if not m.used), found[-1])
        one.used = True
        return one.r.clone(), one.d.clone()

    def _anew(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        return self.renorm.corrections(statistics, running, eps)

    def _remember(self, made: _Made) -> None:
        # What was used is kept until the next forward: a retained graph may run it once more.
        if any(m.used for m in self._made):
            self._made = [m for m in self._made if not m.used]
        if len(self._made) >= CAPACITY:
            self._made, self._forgotten = self._made[CAPACITY // 2 :], True
        self._made.append(made)


def _may_run_again() -> bool:
    """Whether this forward is a checkpoint's: within hooks on saved tensors, or without gradients, or the second."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
    return hooked or not torch.is_grad_enabled() or recomputing()


def _alike(a: int | None, b: int | None) -> bool:
    return a is None or b is None or a == b


def _same(a: Statistics, b: Statistics) -> bool:
    """Up to the order of summation, which a graph may change the second time; another batch is far further away."""
    spread = torch.sqrt(a.m2 / torch.where(a.count > 0, a.count, 1.0))
    near = ((a.mean - b.mean).abs() <= 1e-9 * (a.mean.abs() + spread)) & ((a.m2 - b.m2).abs() <= 1e-9 * a.m2)
    return bool((near & (a.count == b.count)).all())


_numbers = count()
_correctors: WeakValueDictionary[int, Corrector] = WeakValueDictionary()


def _corrections_op(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    eps: float,
    number: Tensor,
) -> tuple[Tensor, Tensor]:
    running = Running(running_mean, running_var, num_batches_tracked)
    return _correctors[int(number)].once(Statistics(count, mean, m2), running, eps, None)


def _corrections_shape(count: Tensor, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


_library = torch.library.Library("steadynorm", "FRAGMENT")
_library.define(
    "corrections(Tensor count, Tensor mean, Tensor m2, Tensor running_mean, Tensor running_var, "
    "Tensor? num_batches_tracked, float eps, Tensor number) -> (Tensor, Tensor)"
)
_library.impl("corrections", _corrections_op, "CompositeExplicitAutograd")
torch.library.register_fake("steadynorm::corrections", _corrections_shape, lib=_library)
