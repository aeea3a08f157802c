"""Batch renorm within a layer: its corrections, and the same ones again for a forward that is run again."""

import warnings
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from steadynorm.errors import RecomputationError, SteadynormWarning
from steadynorm.nn.renorm import Renorm
from steadynorm.ops.autograd import composite_is_needed
from steadynorm.ops.commit import Running, opaque, recomputing
from steadynorm.ops.reference import Statistics

__all__ = ["Corrector"]

_BYTES = 2**24  # what a layer may remember, of 5 C numbers of 8 bytes for each forward (ghost batches: chunk)
_FEWEST, _MOST = 64, 4096


def capacity(channels: int) -> int:
    """Forwards of a layer that can wait for their backward at once.

    Example:
        >>> capacity(2048), capacity(64)
        (204, 4096)
    """
    return min(max(_BYTES // (40 * channels), _FEWEST), _MOST)


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
        # A tensor, so that one compiled graph serves all layers; here, whatever device the layer is built on.
        self._number = torch.tensor(number, device="cpu")

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
        if torch.compiler.is_exporting():  # a program runs where no layer remembers its forwards
            return self._anew(plain, running, eps)
        if opaque():
            with torch.no_grad():
                return torch.ops.steadynorm.corrections(*plain, *running[:3], eps, self._number)
        # Under a transform nothing may outlive it, and on "meta" there is nothing to compare.
        again = not composite_is_needed() and _may_run_again() and not plain.mean.is_meta
        in_turn = again and _runs_again_in_turn()
        with torch.no_grad():
            if not again:
                return self._anew(plain, running, eps)
            return self.once(plain, running, eps, running.mean.data_ptr(), in_turn)

    def forget(self) -> None:
        """Forgets all forwards: those of statistics that are being reset."""
        self._made, self._forgotten = [], False

    def once(
        self, statistics: Statistics, running: Running, eps: float, towards: int | None, in_turn: bool = False
    ) -> tuple[Tensor, Tensor]:
        """r and d, remembered the first time and found the second, and a third where the second is one of several."""
        if not recomputing():
            r, d = self._anew(statistics, running, eps)
            self._remember(_Made(Statistics(*(t.clone() for t in statistics)), towards, r.clone(), d.clone()))
            return r, d
        found = self._found(statistics, towards)
        if found is None:
            self._tell_of_a_miss(len(statistics.mean))
            return self._anew(statistics, running, eps)
        found.used = not in_turn
        if in_turn:  # a checkpoint within a checkpoint: the next one to run again is this one once more
            self._made = [m for m in self._made if m is not found] + [found]
        return found.r.clone(), found.d.clone()

    def _found(self, statistics: Statistics, towards: int | None) -> _Made | None:
        """The newest forward of this batch that was not run again yet, or else the newest one."""
        used = None
        for made in list(reversed(self._made)):  # each look waits for the device: no further than needed
            if (used is None or not made.used) and _alike(made.towards, towards) and _same(made.statistics, statistics):
                if not made.used:
                    return made
                used = made
        return used

    def _tell_of_a_miss(self, channels: int) -> None:
        if self._forgotten:
            raise RecomputationError(
                "activation checkpointing runs a forward again whose corrections by batch renorm are no longer known: "
                f"more than {capacity(channels)} forwards of this layer (chunks, with ghost_batch_size) came between "
                "it and its backward, those without gradients included. Run backward earlier, or leave the layer out "
                "of the checkpoint."
            )
        if self._made:
            warnings.warn(
                "a forward within a backward is none of those that this batch renorm layer remembers, so it is "
                "corrected anew. If it is activation checkpointing's, it does not repeat the first one's arithmetic, "
                "and gradients are those of another correction.",
                SteadynormWarning,
                stacklevel=2,
            )

    def _anew(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        return self.renorm.corrections(statistics, running, eps)

    def _remember(self, made: _Made) -> None:
        # What was used is kept until the next forward: a retained graph may run it once more.
        if any(m.used for m in self._made):
            self._made = [m for m in self._made if not m.used]
        most = capacity(len(made.r))
        if len(self._made) >= most:
            self._made, self._forgotten = self._made[most // 2 :], True
        self._made.append(made)


def _may_run_again() -> bool:
    """Whether this forward is a checkpoint's: within hooks on saved tensors, or without gradients, or the second."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore
    return not torch.is_inference_mode_enabled() and (hooked or not torch.is_grad_enabled() or recomputing())


def _runs_again_in_turn() -> bool:
    """Whether what is run again is a checkpoint's forward once more: one within the checkpoint that is running."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)  # pyright: ignore
    within = hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook")
    return within or not torch.is_grad_enabled()


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
