"""Batch renormalization: the batch's statistics, corrected towards the running ones."""

import math
from collections import deque
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from steadynorm.errors import ArgumentError
from steadynorm.ops.autograd import composite_is_needed
from steadynorm.ops.commit import Running, opaque, recomputing
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.ops.reference import Statistics

__all__ = ["Corrector", "Renorm"]

# Forwards of one layer that may be waiting for their backward, each to be run again by a checkpoint.
_REMEMBERED = 64


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization: how far a batch is corrected towards the running statistics, and from when on.

        z = (x - μ_B) / σ_B · r + d      r = clip(σ_B / σ, 1 / r_max, r_max)      d = clip((μ_B - μ) / σ, -d_max, d_max)

    with σ_B = sqrt(σ²_B + ε) of the batch (biased) and σ = sqrt(σ² + ε) of the running variance (unbiased). Within the
    limits this is what evaluation computes, so that small and non-iid batches train the network that will be used. r
    and d count as constants in backward. Until `warmup` batches are committed r = 1 and d = 0, which is plain batch
    norm; then the limits widen linearly to r_max and d_max. The defaults are the paper's, made for hundreds of
    thousands of steps: for a shorter training take a warmup of some 5 % of it.

    Args:
        r_max: The limit of r, >= 1; 1 never corrects the scale.
        d_max: The limit of d, >= 0, in standard deviations; 0 never corrects the mean.
        warmup: Committed batches (`num_batches_tracked`) of plain batch norm.
        ramp: Batches over which the limits then widen: one number for both, or (for r, for d); 0 is at once.

    Raises:
        ArgumentError: One of them is out of range.

    Source:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models" (2017): 5,000
        steps with r = 1 and d = 0, r_max 3 by step 40,000, d_max 5 by step 25,000; momentum 0.01.

    Example:
        >>> r_max, d_max = Renorm(warmup=100, ramp=200).limits(200)
        >>> r_max.item(), d_max.item()
        (2.0, 2.5)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5_000
    ramp: int | tuple[int, int] = (35_000, 20_000)

    def __post_init__(self) -> None:
        if not (1 <= self.r_max < math.inf and 0 <= self.d_max < math.inf):
            raise ArgumentError(f"Renorm needs 1 <= r_max and 0 <= d_max, both finite; got {self}.")
        if self.warmup < 0 or len(self._ramps) != 2 or min(self._ramps) < 0:
            raise ArgumentError(f"Renorm needs warmup >= 0 and ramp >= 0 (one number, or two); got {self}.")

    @property
    def _ramps(self) -> tuple[int, ...]:
        return self.ramp if isinstance(self.ramp, tuple) else (self.ramp, self.ramp)

    def limits(self, step: Tensor | int) -> tuple[Tensor, Tensor]:
        """The limits of r and of |d| after so many committed batches; reads no value of a tensor.

        Args:
            step: Batches committed so far.

        Returns:
            r_max and d_max at that step, scalars.
        """
        step = torch.as_tensor(step)
        since = (step - self.warmup).to(accumulator_dtype(step.device))
        for_r, for_d = (torch.clamp(since / max(ramp, 1) if ramp else since + 1.0, 0, 1) for ramp in self._ramps)
        return 1 + (self.r_max - 1) * for_r, self.d_max * for_d

    def corrections(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        """r and d of each channel, (C,), for a batch measured as `statistics`."""
        step = running.num_batches_tracked
        r_max, d_max = self.limits(0 if step is None else step)
        biased = statistics.m2 / torch.where(statistics.count > 0, statistics.count, 1.0)
        sigma_batch = torch.sqrt(biased + eps)
        sigma = torch.sqrt(running.var.to(biased.dtype) + eps)
        r = torch.clamp(sigma_batch / sigma, 1 / r_max, r_max)
        d = torch.clamp((statistics.mean - running.mean) / sigma, -d_max, d_max)
        return r, d


class Corrector:
    """Applies a layer's corrections, the same ones again when activation checkpointing runs a forward again.

    By then the forward's own commit has moved the running statistics that r and d are made from. So the last few
    batches' corrections are remembered, and found again by the batch's statistics, which come out the same. In a
    compiled graph this is an opaque op: a graph's own recomputation would read the moved buffers, too.
    """

    def __init__(self, renorm: Renorm) -> None:
        self.renorm = renorm
        self._made: deque[tuple[Statistics, Tensor, Tensor]] = deque(maxlen=_REMEMBERED)
        self._key = next(_keys)
        _correctors[self._key] = self

    def __getstate__(self) -> Renorm:
        return self.renorm  # a copy has no forward to run again

    def __setstate__(self, renorm: Renorm) -> None:
        self.__init__(renorm)

    @torch.no_grad()
    def corrections(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        """r and d: those of the first time where this is the second one."""
        plain = Statistics(*(t.detach() for t in statistics))
        if opaque():
            return torch.ops.steadynorm.corrections(*plain, *running[:3], eps, self._key)
        if composite_is_needed():  # under a transform nothing of this forward may outlive it
            return self.renorm.corrections(plain, running, eps)
        return self._once(plain, running, eps)

    def _once(self, statistics: Statistics, running: Running, eps: float) -> tuple[Tensor, Tensor]:
        if recomputing():
            for made, r, d in reversed(self._made):
                if _same(made, statistics):
                    return r.clone(), d.clone()
        r, d = self.renorm.corrections(statistics, running, eps)
        if not recomputing():
            self._made.append((Statistics(*(t.clone() for t in statistics)), r.clone(), d.clone()))
        return r, d

    def correct(
        self, statistics: Statistics, running: Running, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        """γ r and γ d + β: the weight and bias with which plain batch norm gives γ (z r + d) + β."""
        r, d = self.corrections(statistics, running, eps)
        if weight is not None:
            r, d = weight * r, weight * d
        return r, d if bias is None else d + bias


def _same(a: Statistics, b: Statistics) -> bool:
    """Up to the order of summation, which a graph may change the second time; another batch is far further away."""
    spread = torch.sqrt(a.m2 / torch.where(a.count > 0, a.count, 1.0))
    near = ((a.mean - b.mean).abs() <= 1e-9 * (a.mean.abs() + spread)) & ((a.m2 - b.m2).abs() <= 1e-9 * a.m2)
    return bool((near & (a.count == b.count)).all())


_keys = count()
_correctors: WeakValueDictionary[int, Corrector] = WeakValueDictionary()


def _corrections_op(
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    eps: float,
    key: int,
) -> tuple[Tensor, Tensor]:
    running = Running(running_mean, running_var, num_batches_tracked)
    return _correctors[key]._once(Statistics(count, mean, m2), running, eps)  # pyright: ignore[reportPrivateUsage]


def _corrections_shape(count: Tensor, mean: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


_library = torch.library.Library("steadynorm", "FRAGMENT")
_library.define(
    "corrections(Tensor count, Tensor mean, Tensor m2, Tensor running_mean, Tensor running_var, "
    "Tensor? num_batches_tracked, float eps, int key) -> (Tensor, Tensor)"
)
_library.impl("corrections", _corrections_op, "CompositeExplicitAutograd")
torch.library.register_fake("steadynorm::corrections", _corrections_shape, lib=_library)
