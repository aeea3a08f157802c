"""Moments: a weighted, mergeable summary of data, per channel. The noun that batch norm's three verbs are about."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from steadynorm.errors import ArgumentError, DeviceError, DtypeError, ShapeError, WeightError
from steadynorm.ops import autograd, merging
from steadynorm.ops.groups import resolve_group
from steadynorm.ops.layout import Layout, accumulator_dtype, align
from steadynorm.ops.reference import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Moments"]


class Moments(NamedTuple):
    """Total weight, mean and sum of squared deviations of each channel.

        n = Σ w      μ = Σ w x / n      m2 = Σ w (x - μ)²

    Merging two of them gives those of the concatenated data, exactly up to rounding; it is associative and commutative,
    and the empty one (n = 0, μ = 0, m2 = 0) is its identity. A `NamedTuple`, hence a pytree: it passes through
    `torch.func`, `torch.compile` and collectives as it is.

    Attributes:
        count: n, (C,): the number of positions, or the sum of their weights (a weight of 2 is the position twice).
        mean: μ, (C,).
        m2: Σ w (x - μ)², (C,). All three are float64, on the data's device (float32 where it has no float64).

    Source:
        Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979);
        Welford, "Note on a method for calculating corrected sums of squares and products" (1962).

    Example:
        >>> m = Moments.of(torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]]))
        >>> m.mean.item(), m.variance().item(), m.variance(unbiased=True).item()
        (10.0, 46.0, 55.2)
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, x: Tensor, channel_dim: int = 1, weight: Tensor | None = None) -> "Moments":
        """Measures a tensor: two passes in float64, so that no digit is lost to a large mean.

        Args:
            x: (N, C, *), any floating dtype and strides. N or the positions may be 0: the result is the identity.
            channel_dim: The axis of the channels; -1 for channels last.
            weight: Boolean mask or weights >= 0, broadcastable to the positions (N, *) from the batch axis on: (N,)
                weighs examples. Where it is 0, x may hold anything, NaN included. No gradient flows to it.

        Returns:
            The Moments, differentiable with respect to `x`.

        Raises:
            ShapeError: `x` has no such axis, or `weight` does not fit.
            DtypeError: `x` is not floating, or `weight` is complex.
            DeviceError: `weight` is on another device.
            WeightError: A weight is negative or not finite (on the CPU; elsewhere a device-side assertion, so that no
                host synchronisation is needed).

        Example:
            >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0], [float("nan"), 0.0]])
            >>> Moments.of(x, weight=torch.tensor([True, True, False])).mean
            tensor([ 2., 20.], dtype=torch.float64)
        """
        if not x.is_floating_point():
            raise DtypeError(f"expected a floating-point tensor, got {x.dtype}. Convert it first, e.g. with x.float().")
        layout = Layout.of(x, channel_dim)
        return cls(*autograd.measure(x, None if weight is None else checked_weight(weight, x, layout), layout))

    @classmethod
    def empty(cls, num_channels: int, device: torch.device | str | None = None) -> "Moments":
        """The identity of `merge`: nothing measured yet.

        Example:
            >>> Moments.empty(2).count
            tensor([0., 0.], dtype=torch.float64)
        """
        place = torch.device("cpu") if device is None else torch.device(device)
        zero = torch.zeros(num_channels, dtype=accumulator_dtype(place), device=place)
        return cls(zero, zero.clone(), zero.clone())

    def variance(self, unbiased: bool = False) -> Tensor:
        """The variance of each channel.

            biased  m2 / n  (the one that normalises)       unbiased  m2 / (n - 1)  (the one that is remembered)

        Args:
            unbiased: Which of the two; the biased one by default. The unbiased one takes weights as repetitions.

        Returns:
            (C,); NaN where it is not defined: n = 0, or n <= 1 where unbiased.

        Example:
            >>> Moments.of(torch.tensor([[1.0], [3.0]])).variance(unbiased=True)
            tensor([2.], dtype=torch.float64)
        """
        degrees = self.count - 1 if unbiased else self.count
        return torch.where(degrees > 0, self.m2 / torch.where(degrees > 0, degrees, 1.0), torch.nan)

    def merge(self, other: "Moments") -> "Moments":
        """The Moments of both data sets together.

            n = nₐ + n_b     μ = μₐ + δ n_b / n     m2 = m2ₐ + m2_b + δ² nₐ n_b / n,     δ = μ_b - μₐ

        Args:
            other: Moments of as many channels, on the same device.

        Raises:
            ShapeError: The numbers of channels differ.
            DeviceError: They are on different devices.

        Example:
            >>> a, b = torch.randn(5, 2), torch.randn(3, 2)
            >>> together = Moments.of(torch.cat([a, b]))
            >>> torch.allclose(Moments.of(a).merge(Moments.of(b)).m2, together.m2)
            True
        """
        _check_alike([self, other], "merged")
        return Moments(*merging.merge(Statistics(*self), Statistics(*other)))

    @classmethod
    def merge_all(cls, moments: Iterable["Moments"]) -> "Moments":
        """The Moments of all data sets together, by the law of total variance in one go.

        Args:
            moments: At least one; all of as many channels.

        Raises:
            ArgumentError: There is none, so that the number of channels is unknown (see `Moments.empty`).
            ShapeError: The numbers of channels differ.
            DeviceError: They are on different devices.

        Example:
            >>> x = torch.randn(12, 3)
            >>> torch.allclose(Moments.merge_all(map(Moments.of, x.split(5))).m2, Moments.of(x).m2)
            True
        """
        parts = list(moments)
        if not parts:
            raise ArgumentError(
                "merge_all needs at least one Moments; for none at all, use Moments.empty(num_channels)."
            )
        _check_alike(parts, "merged")
        return cls(*merging.merge_all([Statistics(*m) for m in parts]))

    def all_reduce(self, group: "ProcessGroup | None" = None) -> "Moments":
        """The Moments of all ranks' data together; every rank of the group must call this, one without data as well.

        Two sums over the ranks in float64: counts are exact to 2^53. Differentiable to any order, where a gradient
        through it is the sum over the ranks of theirs.

        Args:
            group: A process group of `torch.distributed` (gloo on the CPU included); None for all ranks. In a process
                that is not part of any (`torch.distributed` not initialised) the Moments themselves are the result.

        Raises:
            DistributedError: A rank has gone, or the ranks do not take part alike; the message names those missing.

        Example:
            >>> m = Moments.of(torch.randn(4, 3))
            >>> m.all_reduce().count                                            # one process is the whole world
            tensor([4., 4., 4.], dtype=torch.float64)
        """
        ranks = resolve_group("world" if group is None else group)
        return self if ranks is None else Moments(*autograd.over_ranks(Statistics(*self), ranks))

    def mix(self, other: "Moments", prior: float = 16, *, examples: float | None = None) -> "Moments":
        """Between what is remembered and what is seen: these Moments count as `prior` examples against `other`'s own.

            a = prior / (prior + n_other)      μ = a μ_self + (1 - a) μ_other      σ² = a σ²_self + (1 - a) σ²_other

        The variances (biased) are mixed without the spread between the two means: the mixture stands for one
        distribution somewhere between the two, not for data drawn from both, which `merge` is for.

        Args:
            other: Freshly measured Moments.
            prior: Pseudo-examples that these Moments are worth, >= 0; 0 takes `other` alone.
            examples: How many examples `other` is worth; by default its count. For images give the number of images:
                neighbouring pixels say the same thing, so they are not independent examples.

        Returns:
            Moments of count prior + examples. Where `other` is empty, this mean and variance unchanged.

        Raises:
            ArgumentError: `prior` or `examples` is negative or not finite.
            ShapeError: The numbers of channels differ.
            DeviceError: They are on different devices.

        Source:
            Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation" (2020).

        Example:
            >>> old, new = Moments.of(torch.tensor([[0.0], [2.0]])), Moments.of(torch.tensor([[4.0], [8.0]]))
            >>> mixed = old.mix(new, prior=2)
            >>> mixed.mean.item(), mixed.variance().item()
            (3.5, 2.5)
        """
        _check_alike([self, other], "mixed")
        if not 0 <= prior < float("inf") or (examples is not None and not 0 <= examples < float("inf")):
            raise ArgumentError(f"prior and examples must be >= 0 and finite, got prior={prior}, examples={examples}.")
        seen = other.count if examples is None else torch.full_like(other.count, examples)
        seen = torch.where(other.count > 0, seen, 0.0)
        own = torch.where(self.count > 0, prior, 0.0).to(seen.dtype)
        count = own + seen
        share = torch.where(count > 0, own / torch.where(count > 0, count, 1.0), 1.0)
        mean = other.mean + share * (self.mean - other.mean)
        biased = share * torch.nan_to_num(self.variance()) + (1 - share) * torch.nan_to_num(other.variance())
        return Moments(count, mean, biased * count)


def _check_alike(moments: list[Moments], done: str) -> None:
    if len({m.mean.shape for m in moments}) > 1:
        raise ShapeError(
            f"only Moments of as many channels can be {done}, got {[tuple(m.mean.shape) for m in moments]}."
        )
    if len({m.mean.device for m in moments}) > 1:
        raise DeviceError(
            f"only Moments on one device can be {done}, got {[str(m.mean.device) for m in moments]}. "
            "Measure on one device, or move each field with .to()."
        )


def checked_weight(weight: Tensor, x: Tensor, layout: Layout, what: str = "weight") -> Tensor:
    """Aligns a weight with `x` and refuses negative and non-finite ones.

    Under `torch.func.vmap` the values of a batched weight cannot be read, so there they are taken as they are.
    """
    if not isinstance(weight, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"{what} must be a tensor, got {type(weight).__name__}. Use torch.as_tensor.")
    if weight.device != x.device:
        raise DeviceError(f"{what} must be on the input's device {x.device}, got {weight.device}. Move it with .to().")
    if weight.is_complex():
        raise DtypeError(f"{what} must be boolean or real numbers >= 0, got {weight.dtype}.")
    aligned = align(weight.detach(), x, layout, what)
    if weight.dtype == torch.bool or torch._C._functorch.is_batchedtensor(autograd.peeled(aligned)):  # pyright: ignore
        return aligned
    fine = ((aligned >= 0) & torch.isfinite(aligned)).all()
    message = f"{what} must be >= 0 and finite everywhere; use 0 to leave a position out."
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or type(fine) is not Tensor:  # a FakeTensor
        torch._assert_async(fine, message)  # pyright: ignore
    elif not fine:
        worst = aligned[~torch.isfinite(aligned) | (aligned < 0)][0].item()
        raise WeightError(f"{message} Got {worst}.")
    return aligned
