"""What came of adapting a model, and the way back."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from steadynorm.shift.adapting.guards import Guard
from steadynorm.shift.adapting.mixing import Snapshot

__all__ = ["AdaptReport", "Confidence", "LayerChange", "Verdict"]

Verdict = Literal["adapted", "abstained", "retrain"]


@dataclass(frozen=True)
class LayerChange:
    """How far one layer's statistics were moved.

    Attributes:
        name: The layer's name in the model.
        share: a, the weight that the stored statistics kept.
        mean: Root mean square over the channels of (new mean - old mean) / sqrt(old variance + eps).
        largest_mean: The same of the channel that moved farthest, with its sign.
        channel: Which channel that is.
        spread: Mean over the channels of |log(new / old)| of sqrt(variance + eps).
    """

    name: str
    share: float
    mean: float
    largest_mean: float
    channel: int
    spread: float


@dataclass(frozen=True)
class Confidence:
    """What a model makes of the examples, without their labels.

    Attributes:
        entropy: Mean of -Σ p log p / log K: 0 where all predictions are sure, 1 where all classes seem alike.
        confidence: Mean probability of the predicted class.
        effective_classes: exp of the entropy of the shares of the predicted classes.
    """

    entropy: float
    confidence: float
    effective_classes: float


@dataclass(frozen=True)
class AdaptReport:
    """What `adapt_` found and did. Used as a context manager, it takes the adaptation back at the end of the block.

    Attributes:
        method: Which one.
        verdict: "adapted"; "abstained": the model is as it was; "retrain": adapting does not help enough.
        reason: Why, in a sentence.
        applied: Whether the model's statistics were changed.
        examples: How many were given.
        guards: What was checked, in the order of the checks; those after the first refusal may be missing.
        layers: How far each layer moved; where `applied` is False, how far it would have.
        before: The model's confidence in its predictions as it was; None where its outputs are no classes.
        after: The same once adapted, also where that was taken back.
        alarm: Whether the monitor given rejects the examples even with their means and variances set to those of its
            calibration; None without a monitor, or with too few examples for its test.
        notes: What was left out, and why.
    """

    method: str
    verdict: Verdict
    reason: str
    applied: bool
    examples: int
    guards: tuple[Guard, ...]
    layers: tuple[LayerChange, ...] = ()
    before: Confidence | None = None
    after: Confidence | None = None
    alarm: bool | None = None
    notes: tuple[str, ...] = ()
    _snapshot: Snapshot | None = field(default=None, repr=False, compare=False)

    def undo(self) -> None:
        """Puts the statistics (of `tent`, γ and β as well) back to what they were before this adaptation, bit for bit.

        Whatever wrote them since is undone with it. Calling it again changes nothing.
        """
        if self._snapshot is not None:
            self._snapshot.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
        for name in ("guards", "layers"):
            plain[name] = [asdict(one) for one in plain[name]]
        for name in ("before", "after"):
            plain[name] = None if plain[name] is None else asdict(plain[name])
        return plain | {"notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [f"{self.verdict} ({self.method}, {self.examples} examples): {self.reason}"]
        if self.before is not None and self.after is not None:
            lines.append(
                f"  confidence {self.before.confidence:.1%} -> {self.after.confidence:.1%}, classes as diverse "
                f"as {self.before.effective_classes:.1f} -> {self.after.effective_classes:.1f} equal ones"
            )
        for guard in self.guards:
            seen = "not available" if guard.seen is None else f"{guard.seen:.3g}"
            lines.append(f"  {'ok     ' if guard.passed else 'refused'} {guard.name}: {seen} ({guard.meaning})")
        for layer in sorted(self.layers, key=lambda one: -one.mean)[:5]:
            lines.append(
                f"  {layer.name}: means moved by {layer.mean:.2f} deviations, channel {layer.channel} the most"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
