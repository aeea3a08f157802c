"""What recalibrating has changed, in units that say whether it matters."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from steadynorm.moments import Moments
from steadynorm.ops.commit import Running

__all__ = ["LayerChange", "RecalibrateReport", "change_of"]


@dataclass(frozen=True)
class LayerChange:
    """How far one layer's running statistics moved.

    Attributes:
        name: The layer's name in the model.
        domain: The domain that was measured; None where the layer has none.
        positions: How many positions (or how much weight) a channel's new statistics are made of, over all ranks.
        mean: Root mean square over the channels of (new mean - old mean) / sqrt(new variance + eps).
        largest_mean: The same of the channel that moved farthest, with its sign.
        channel: Which channel that is.
        spread: Mean over the channels of |log(new / old)| of sqrt(variance + eps): 0.69 is a factor of 2.
    """

    name: str
    domain: str | None
    positions: float
    mean: float
    largest_mean: float
    channel: int
    spread: float


@dataclass(frozen=True)
class RecalibrateReport:
    """What `recalibrate_` measured and changed.

    Attributes:
        order: "joint" or "sequential".
        passes: How often the data was run through.
        batches: How many batches one pass had, over all ranks.
        examples: How many examples one pass had (the lengths of the batches' first tensors), over all ranks.
        ranks: How many processes took part.
        layers: How far each layer moved, in the order of the model.
        notes: What was left out, and what was decided.
    """

    order: str
    passes: int
    batches: int
    examples: int
    ranks: int
    layers: tuple[LayerChange, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; None for what is not finite."""
        plain = asdict(self)
        plain["layers"] = [{k: _plain(v) for k, v in asdict(one).items()} for one in self.layers]
        return plain | {"notes": list(self.notes)}

    def __str__(self) -> str:
        ranks = f" on {self.ranks} ranks" if self.ranks > 1 else ""
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        lines = [
            f"recalibrated {len(self.layers)} layers ({self.order}, {passes}) on {self.examples:,} examples in "
            f"{self.batches:,} batches{ranks}"
        ]
        for one in sorted(self.layers, key=lambda change: -max(change.mean, change.spread))[:5]:
            domain = f" ({one.domain})" if one.domain else ""
            lines.append(
                f"  {one.name or 'the layer'}{domain}: means moved by {one.mean:.2f} deviations, channel "
                f"{one.channel} the most; deviations changed by a factor of {2.718281828459045**one.spread:.2f}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def change_of(name: str, domain: str | None, old: Running, new: Moments, eps: float) -> LayerChange:
    """The change from the running statistics `old` to the population's, `new`."""
    mean, var = (_wide(t) for t in old[:2])
    new_mean, new_var = _wide(new.mean), _wide(new.variance(unbiased=True))
    moved = (new_mean - mean) / (new_var + eps).sqrt()
    spread = 0.5 * ((new_var + eps) / (var + eps)).log().abs()
    most = int(moved.abs().argmax())
    return LayerChange(
        name, domain, float(new.count.max()), moved.square().mean().sqrt().item(), moved[most].item(), most,
        spread.mean().item(),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and value - value != 0 else value


def _wide(t: Tensor) -> Tensor:
    return t.detach().cpu().double()
