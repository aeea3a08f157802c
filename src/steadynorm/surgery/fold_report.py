"""What `fold` did with each batch norm of a model, and why."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FoldReport", "FoldedLayer"]


@dataclass(frozen=True)
class FoldedLayer:
    """One batch norm.

    Attributes:
        name: Its name in the model.
        folded: Whether it has gone.
        into: The layers that took it over, by name; empty where it was left.
        how: In words, how it was folded or why it was left.
    """

    name: str
    folded: bool
    into: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did.

    Attributes:
        layers: Each batch norm of the model, in the model's order.
        untraced: Parts of the model whose forward could not be read, with the reason; what they hold was looked at part
            by part.
        error: max |folded - original| / max |original| over the verified examples; None where none were given.
        bound: What the error had to stay below; None where no examples were given.
    """

    layers: tuple[FoldedLayer, ...]
    untraced: tuple[tuple[str, str], ...] = ()
    error: float | None = None
    bound: float | None = None

    @property
    def folded(self) -> int:
        """How many batch norms have gone."""
        return sum(layer.folded for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        layers = [asdict(layer) | {"into": list(layer.into)} for layer in self.layers]
        untraced = [{"name": name, "why": why} for name, why in self.untraced]
        return {"layers": layers, "untraced": untraced, "error": self.error, "bound": self.bound, "folded": self.folded}

    def __str__(self) -> str:
        lines = [f"{self.folded} of {len(self.layers)} batch norms folded"]
        if self.error is not None:
            lines[0] += f"; largest error {self.error:.2g} of the output's scale (bound {self.bound:.0e})"
        lines += [
            f"  {'folded' if one.folded else 'left  '} {one.name or 'the model'}: {one.how}" for one in self.layers
        ]
        left = [one.name for one in self.layers if not one.folded]
        lines += [
            f"  could not be traced: {name or 'the model'} ({why})"
            for name, why in self.untraced
            if any(one.startswith(f"{name}." if name else "") for one in left)
        ]
        return "\n".join(lines)
