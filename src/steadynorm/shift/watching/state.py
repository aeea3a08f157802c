"""What a monitor knows at one moment, in plain types for a metrics system."""

from dataclasses import asdict, dataclass
from typing import Any

from steadynorm.shift.watching.drift import LayerShift

__all__ = ["MonitorState"]


@dataclass(frozen=True)
class MonitorState:
    """A snapshot.

    Attributes:
        alarm: Whether there was an alarm since the last reset.
        alarm_batch: At which served batch; None without an alarm.
        evidence: M of the Shiryaev-Roberts procedure; an alarm is raised where it reaches `mean_run`.
        mean_run: Clean batches until a false alarm, on average or more.
        calibrated: Whether alarms are possible at all.
        batches: Served in evaluation mode since the last reset.
        observed: How many of them were looked at.
        examples: How many examples were.
        tests: Pools tested.
        cost: Time spent on looking, as a share of the time of the forwards themselves.
        not_finite: Examples left out because what a layer saw of them was not finite.
        failures: Exceptions that were caught, so that they did not reach the serving path.
        errors: The first few of them.
        notes: What cannot be watched, and why.
        layers: How far each layer moved over the recent examples, the farthest first.
    """

    alarm: bool
    alarm_batch: int | None
    evidence: float
    mean_run: float
    calibrated: bool
    batches: int
    observed: int
    examples: int
    tests: int
    cost: float
    not_finite: int
    failures: int
    errors: tuple[str, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerShift, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; a figure that is not defined is None."""
        return asdict(self)

    def __str__(self) -> str:
        if self.alarm:
            verdict = f"alarm at batch {self.alarm_batch}"
        else:
            verdict = "no alarm" if self.calibrated else "not calibrated: no alarms, distances only"
        lines = [
            f"{verdict}; evidence {self.evidence:.3g} of {self.mean_run:g}",
            f"{self.batches} batches served, {self.observed} observed, {self.tests} tests, cost {self.cost:.1%}",
        ]
        for layer in self.layers[:5]:
            far = f"{layer.kl:.3g} nats" if layer.moved is None else f"{layer.moved:.2f} deviations"
            lines.append(f"  {layer.name}: {far}, channels {', '.join(str(c.channel) for c in layer.channels[:5])}")
        return "\n".join(lines + [f"  error: {e}" for e in self.errors] + [f"  note: {n}" for n in self.notes])
