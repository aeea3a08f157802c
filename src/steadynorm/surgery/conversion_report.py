"""What became of each batch norm of a model that was converted, or turned back."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from steadynorm.nn.base import BatchNorm

__all__ = ["ConversionReport", "LayerConversion", "described"]


def described(layer: nn.Module) -> str:
    """A layer's class as a user would write it, with what a batch norm of ours does beyond torch's."""
    kind = type(layer)
    root = "torch.nn" if kind.__module__.startswith("torch.nn.") else kind.__module__.partition(".")[0]
    if not isinstance(layer, BatchNorm):
        return f"{root}.{kind.__qualname__}"
    more = [
        *([f"activation={layer.activation}"] if layer.activation is not None else []),
        *(["frozen"] if layer.frozen else []),
        *(["synchronised"] if layer.process_group is not None else []),
    ]
    return f"{root}.{kind.__qualname__}" + (f" ({', '.join(more)})" if more else "")


@dataclass(frozen=True)
class LayerConversion:
    """What became of one batch norm.

    Attributes:
        name: Where the model has it; "" if it is the model itself.
        before: What it was.
        after: What it is now; None where it was left as it was.
        note: Why it was left, or what else changed.
        also: Its other places, if the model has it at several.
    """

    name: str
    before: str
    after: str | None
    note: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What `convert_` or `revert_` did, layer by layer.

    Attributes:
        action: Which of the two.
        layers: One row for each batch norm, in the order in which the model has them.
    """

    action: Literal["convert", "revert"]
    layers: tuple[LayerConversion, ...]

    @property
    def converted(self) -> tuple[LayerConversion, ...]:
        """The rows of the layers that were changed."""
        return tuple(row for row in self.layers if row.after is not None)

    @property
    def left(self) -> tuple[LayerConversion, ...]:
        """The rows of those left as they were; each `note` says why."""
        return tuple(row for row in self.layers if row.after is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "action": self.action,
            "converted": len(self.converted),
            "left": len(self.left),
            "layers": [
                {"name": row.name, "from": row.before, "to": row.after, "note": row.note, "also": list(row.also)}
                for row in self.layers
            ],
        }

    def __str__(self) -> str:
        if not self.layers:
            return "no batch norm to " + self.action
        done = {"convert": "converted", "revert": "turned back"}[self.action]
        lines = [f"{len(self.converted)} of {len(self.layers)} batch norms {done}"]
        kinds = Counter((row.before, row.after, row.note) for row in self.converted)
        for (before, after, note), count in kinds.items():
            lines.append(f"  {count} {before} -> {after}" + (f" ({note})" if note else ""))
        lines += [f"  left {row.name or 'the model itself'}, {row.before}: {row.note}" for row in self.left]
        return "\n".join(lines)
