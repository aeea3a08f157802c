"""What a comparison measured, as its claims are judged by, and the rule that turns an interval into a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steadynorm.experiment.stats import Bounds
from steadynorm.report.schema import FreshRun, Ratio, TimingRow, Verdict

__all__ = ["DropoutAccuracies", "Evidence", "ends", "verdict"]


@dataclass(frozen=True)
class DropoutAccuracies:
    """Test accuracies of one arm, as fractions, one per seed: without dropout, and with it on the same seeds."""

    without: Sequence[float]
    with_dropout: Sequence[float]


@dataclass(frozen=True)
class Evidence:
    """What was measured, per arm and paired by seed; a study that was not run is left empty.

    Attributes:
        ratios: Ratios of steps at the target; the rows with init "tuned" are judged.
        runs: Runs on fresh seeds; those with purpose "accuracy" are judged.
        timing: Seconds per step of each arm against plain.
        gradient_spreads: Arm -> per seed, the worst spread in decades over start, middle and end; None or infinity for
            a run that has none (diverged, or a gradient of zero).
        gradient_counts: Arm -> how many phases or runs were "vanishing", "exploding", "diverged"; reported as given.
        standardization: Condition (as in `schema.StandardizationRow`) -> test accuracy per seed, as fractions.
        dropout: Arm -> test accuracies without and with dropout.
        plain: The id of the arm that every other one is held against.
        primary: That of the arm that is judged; every other arm's figures are in the details.
    """

    ratios: Sequence[Ratio] = ()
    runs: Sequence[FreshRun] = ()
    timing: Sequence[TimingRow] = ()
    gradient_spreads: Mapping[str, Sequence[float | None]] = field(default_factory=dict[str, Sequence[float | None]])
    gradient_counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    standardization: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    dropout: Mapping[str, DropoutAccuracies] = field(default_factory=dict[str, DropoutAccuracies])
    plain: str = "plain"
    primary: str = "before"


def verdict(interval: Bounds, smallest_effect: float) -> Verdict:
    """Where an interval lies against the smallest effect m that matters.

    supported: low >= m. contradicted: high <= -m. no material difference: -m < low and high < m. Else cannot tell.
    A bound of None is open on its side, so `[low, None]` can be supported or cannot tell, nothing else.

    Args:
        interval: `[low, high]` of a figure that is positive in the claim's direction.
        smallest_effect: m > 0, in the same unit.

    Returns:
        One of the four.

    Example:
        >>> verdict([0.6, 1.4], 0.5), verdict([-0.2, 0.3], 0.5), verdict([0.2, 0.9], 0.5)
        ('supported', 'no material difference', 'cannot tell')
    """
    low, high = ends(interval)
    if low >= smallest_effect:
        return "supported"
    if high <= -smallest_effect:
        return "contradicted"
    if low > -smallest_effect and high < smallest_effect:
        return "no material difference"
    return "cannot tell"


def ends(interval: Bounds) -> tuple[float, float]:
    """The bounds as floats; an open side is infinite."""
    low, high = interval
    return -math.inf if low is None else low, math.inf if high is None else high
