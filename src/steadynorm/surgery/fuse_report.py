"""What `fuse` did with each batch norm of a model, and why."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from steadynorm.surgery.conversion_report import ConversionReport

__all__ = ["FuseReport", "FusedLayer"]


@dataclass(frozen=True)
class FusedLayer:
    """One batch norm.

    Attributes:
        name: Its name in the model.
        fused: Whether it does now what followed it.
        activation: Which activation it applies; "" for none.
        residual: Whether it adds the block's other branch before that.
        where: The module whose forward was rewritten for it; None where only the activation's module was exchanged.
        how: In words, what was done or why nothing was.
    """

    name: str
    fused: bool
    activation: str
    residual: bool
    where: str | None
    how: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did.

    Attributes:
        layers: Each batch norm of the model, in the model's order.
        untraced: Parts of the model whose forward could not be read, with the reason; what they hold was looked at part
            by part.
        conversion: What `convert_` did before.
    """

    layers: tuple[FusedLayer, ...]
    untraced: tuple[tuple[str, str], ...]
    conversion: ConversionReport

    @property
    def fused(self) -> int:
        """How many batch norms do what followed them."""
        return sum(layer.fused for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "fused": self.fused,
            "layers": [asdict(layer) for layer in self.layers],
            "untraced": [{"name": name, "why": why} for name, why in self.untraced],
            "conversion": self.conversion.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{self.fused} of {len(self.layers)} batch norms fused"]
        kinds = Counter((one.activation, one.residual) for one in self.layers if one.fused)
        for (activation, add), number in kinds.items():
            lines.append(
                f"  {number} with {' and '.join([*(['the sum'] if add else []), *filter(None, [activation])])}"
            )
        lines += [f"  left {one.name or 'the model'}: {one.how}" for one in self.layers if not one.fused]
        lines += [f"  could not be traced: {name or 'the model'} ({why})" for name, why in self.untraced]
        return "\n".join(lines)
