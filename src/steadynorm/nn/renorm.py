"""Batch renormalization: the batch's statistics, corrected towards the running ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steadynorm.errors import ArgumentError
from steadynorm.ops.commit import Running
from steadynorm.ops.layout import accumulator_dtype
from steadynorm.ops.reference import Statistics

__all__ = ["Renorm"]


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization: how far a batch is corrected towards the running statistics, and from when on.

        z = (x - μ_B) / σ_B · r + d      r = clip(σ_B / σ, 1 / r_max, r_max)      d = clip((μ_B - μ) / σ, -d_max, d_max)

    with σ_B = sqrt(σ²_B + ε) of the batch (biased) and σ = sqrt(σ² + ε) of the running variance (unbiased). Within the
    limits this is what evaluation computes, so that small and non-iid batches train the network that will be used. r
    and d count as constants in backward. Until `warmup` batches are committed r = 1 and d = 0, which is plain batch
    norm, as is the first batch in any case; then the limits widen linearly to r_max and d_max. The defaults are the
    paper's, made for hundreds of thousands of steps: for a shorter training take a warmup of some 5 % of it.

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
        numbers = (self.r_max, self.d_max, self.warmup, *self._ramps)
        if not all(isinstance(n, (int, float)) for n in numbers):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ArgumentError(f"Renorm is made of numbers (ramp: one, or a tuple of two); got {self}.")
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
        if step is not None:  # mean 0 and variance 1, as a layer starts, are nobody's to be corrected towards
            r_max, d_max = torch.where(step > 0, r_max, 1.0), torch.where(step > 0, d_max, 0.0)
        biased = statistics.m2 / torch.where(statistics.count > 0, statistics.count, 1.0)
        sigma_batch = torch.sqrt(biased + eps)
        sigma = torch.sqrt(running.var.to(biased.dtype) + eps)
        r = torch.clamp(sigma_batch / sigma, 1 / r_max, r_max)
        d = torch.clamp((statistics.mean - running.mean) / sigma, -d_max, d_max)
        return r, d
