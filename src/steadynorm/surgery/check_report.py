"""What `check` found: torch's layers and ours on one model, side by side, and what follows from it."""

import math
from dataclasses import dataclass
from typing import Any

from steadynorm.surgery.conversion_report import ConversionReport
from steadynorm.surgery.fold_report import FoldReport
from steadynorm.surgery.fuse_report import FuseReport

__all__ = ["CheckReport", "Side"]


@dataclass(frozen=True)
class Side:
    """One version of the model.

    Attributes:
        name: "torch", "steadynorm" (after `convert_`) or "fused" (after `fuse`).
        errors: Against the model in float64, by quantity; see `check`. None where there was nothing to compare.
        seconds: The median time of a training step; None where it was not measured.
        ratio: The median, over rounds, of that time by torch's; None for torch's own.
        memory: Bytes kept for backward; on CUDA the peak of a step.
    """

    name: str
    errors: dict[str, float | None]
    seconds: float | None = None
    ratio: float | None = None
    memory: int | None = None

    @property
    def error(self) -> float | None:
        """The largest of the errors; NaN if one of them is."""
        known = [error for error in self.errors.values() if error is not None]
        return math.nan if any(e != e for e in known) else max(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; what is not finite, as a word."""
        errors = {name: e if e is None or math.isfinite(e) else str(e) for name, e in self.errors.items()}
        return {
            "name": self.name,
            "errors": errors,
            "seconds": self.seconds,
            "ratio": self.ratio,
            "memory": self.memory,
        }


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        model: The model's class.
        batch_norms: How many the model has.
        conversion: What `convert_` does to it; None where it could not be tried.
        fused: What `fuse` does; likewise.
        folded: What `fold` does; likewise.
        sides: The versions that were run: none without an example.
        reasons: What stands in the way of switching, in words; empty if nothing does.
        notes: What else is worth knowing.
        place: Device, dtype and number of threads.
    """

    model: str
    batch_norms: int
    conversion: ConversionReport | None
    fused: FuseReport | None
    folded: FoldReport | None
    sides: tuple[Side, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    place: str

    @property
    def safe(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.reasons

    @property
    def verdict(self) -> str:
        """One line: safe to switch, or what stands in the way."""
        if self.reasons:
            return f"what stands in the way: {'; '.join(self.reasons)}"
        if not self.batch_norms:
            return "nothing to switch: the model has no batch norm"
        ratio = next(side.ratio for side in self.sides if side.name == "steadynorm")
        errors = "no error is larger than twice torch's" if self.sides[0].errors else "the results are torch's"
        time = "" if ratio is None else f", a training step takes {ratio:.2f} times as long"
        return f"safe to switch: {self._converted()}, {errors}{time}"

    def _converted(self) -> str:
        every, converts = self.batch_norms, self.conversion is not None and self.conversion.converted
        if not converts:
            return "all batch norms are steadynorm's already"
        return "its batch norm converts" if every == 1 else f"all {every} batch norms convert"

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "safe": self.safe,
            "reasons": list(self.reasons),
            "notes": list(self.notes),
            "batch_norms": self.batch_norms,
            "place": self.place,
            "sides": [side.to_dict() for side in self.sides],
            "convert": None if self.conversion is None else self.conversion.to_dict(),
            "fuse": None if self.fused is None else self.fused.to_dict(),
            "fold": None if self.folded is None else self.folded.to_dict(),
        }

    def __str__(self) -> str:
        from steadynorm.report.checking import check_text

        return check_text(self.to_dict())
