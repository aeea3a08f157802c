"""How far each layer and channel has moved from what its running statistics say, with or without a calibration."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steadynorm.moments import Moments
from steadynorm.nn.watched import BatchNormLayer, ExampleMoments, running_statistics

__all__ = ["ChannelShift", "ChannelSums", "LayerShift", "layer_shift", "symmetric_kl"]

_LEAST_SD = 1e-3


class ChannelSums(NamedTuple):
    """What was seen of a layer's input, in the units the layer normalises by: (x - μ) / √(σ² + eps). Mergeable.

    Attributes:
        means: Moments of the per-example means; their count is the number of examples, not of pixels.
        within: (C,), the sum over the examples of each one's own biased variance.
    """

    means: Moments
    within: Tensor

    @classmethod
    def of(cls, seen: ExampleMoments, layer: BatchNormLayer) -> "ChannelSums":
        """Measures examples, leaving out those that are not finite."""
        running_mean, running_var = (t.detach().to("cpu", torch.float64) for t in running_statistics(layer))
        variance = running_var + layer.eps
        standard = (seen.mean.to("cpu", torch.float64) - running_mean) / variance.sqrt()
        within = torch.zeros_like(standard) if seen.var is None else seen.var.to("cpu", torch.float64) / variance
        finite = torch.isfinite(standard).all(1) & torch.isfinite(within).all(1)
        return cls(Moments.of(standard[finite]), within[finite].sum(0))

    def merge(self, other: "ChannelSums") -> "ChannelSums":
        """Those of both sets of examples together."""
        return ChannelSums(self.means.merge(other.means), self.within + other.within)

    def variance(self) -> Tensor:
        """(C,), the biased variance of all values, each example weighing the same: between the examples and within."""
        return self.means.variance() + self.within / self.means.count


@dataclass(frozen=True)
class ChannelShift:
    """How far one channel has moved.

    Attributes:
        channel: Its index.
        kl: Symmetric Kullback-Leibler divergence between the stored and the seen Gaussian, in nats; 0 for no shift.
        mean: Seen mean less stored mean, in stored standard deviations.
        spread: Seen over stored standard deviation.
        standard_error: Of `mean`, from the spread between examples (an image counts once, however many pixels it has).
        moved: Seen mean less the calibration's, in standard deviations of the per-example mean from example to example
            in the calibration; None without one.
    """

    channel: int
    kl: float
    mean: float
    spread: float
    standard_error: float
    moved: float | None


@dataclass(frozen=True)
class LayerShift:
    """How far one layer has moved.

    Attributes:
        name: The layer's name in the model.
        examples: How many recent examples that is about.
        kl: Mean over the channels of their symmetric divergence, in nats.
        moved: Root mean square over the channels of their `moved`; about 1/√examples where nothing has; None without
            a calibration.
        channels: Those that moved most, in that order.
    """

    name: str
    examples: int
    kl: float
    moved: float | None
    channels: tuple[ChannelShift, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return asdict(self)


def symmetric_kl(mean: Tensor, variance: Tensor) -> Tensor:
    """Between N(mean, variance) and N(0, 1): both directions added, also known as Jeffreys' divergence.

        ½ (v + 1/v - 2) + ½ m² (1 + 1/v)

    Source:
        Jeffreys, "An invariant form for the prior probability in estimation problems" (1946).

    Example:
        >>> symmetric_kl(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 4.0]))
        tensor([0.0000, 1.0000, 1.1250])
    """
    return 0.5 * (variance + 1 / variance - 2) + 0.5 * mean.square() * (1 + 1 / variance)


def layer_shift(
    name: str,
    sums: ChannelSums,
    layer: BatchNormLayer,
    reference: tuple[Tensor, Tensor] | None = None,
    top: int = 8,
) -> LayerShift:
    """Ranks the channels of a layer.

    Args:
        name: The layer's name.
        sums: What was seen, at least one example.
        layer: For its eps, which is part of what it normalises by, hence of both variances.
        reference: Mean and (biased) standard deviation of the per-example mean over the calibration, (C,) each.
        top: How many channels are listed.
    """
    running_var = running_statistics(layer)[1].detach().to("cpu", torch.float64)
    mean, variance = sums.means.mean, sums.variance() + layer.eps / (running_var + layer.eps)
    kl = symmetric_kl(mean, variance)
    error = (sums.means.variance() / sums.means.count).sqrt()
    moved = None if reference is None else (mean - reference[0]) / reference[1].clamp(min=_LEAST_SD)
    order = torch.argsort(kl if moved is None else moved.abs(), descending=True)[:top].tolist()
    channels = tuple(
        ChannelShift(
            channel=c,
            kl=float(kl[c]),
            mean=float(mean[c]),
            spread=float(variance[c].sqrt()),
            standard_error=float(error[c]),
            moved=None if moved is None else float(moved[c]),
        )
        for c in order
    )
    overall = None if moved is None else float(moved.square().mean().sqrt())
    return LayerShift(name, int(sums.means.count[0]), float(kl.mean()), overall, channels)
