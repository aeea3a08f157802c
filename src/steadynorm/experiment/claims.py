"""The six claims made for batch norm, each with one statistic stated beforehand, and where its 95 % interval puts it.

`STATEMENTS` fixes, before anything is measured, what each claim is judged by and the smallest effect that matters; a
positive figure (or a ratio above 1) always points the claim's way. `judge` turns measurements into verdicts.

Each verdict stands for itself: with six claims there is no correction for multiplicity, since none is ever read as "at
least one of six". "Supported" asks for more than a difference from zero: the whole interval has to lie beyond the
smallest effect that matters. What that leaves as false alarms is measured, not assumed, by the null experiment
(`benchmarks/null_experiment.py`): the same comparison between two plain arms, many times over, and the share of
repeats in which a claim comes out as supported. Standardisation is not part of that error rate in the same way: it
asks whether batch norm is as good, and its null arm, which has neither remedy, must not pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from steadynorm.experiment import readings
from steadynorm.experiment.evidence import DropoutAccuracies, Evidence, verdict
from steadynorm.report.schema import Claim

__all__ = ["STATEMENTS", "DropoutAccuracies", "Evidence", "Statement", "judge", "verdict"]


@dataclass(frozen=True)
class Statement:
    """A claim and how it is judged, fixed beforehand.

    Attributes:
        id: The key of the claim in `results.json`.
        claim: What is said of batch norm.
        statistic: The one figure that judges it.
        unit: The figure's unit; "times" is judged on its logarithm.
        smallest_effect: The smallest figure that matters, in that unit.
    """

    id: str
    claim: str
    statistic: str
    unit: str
    smallest_effect: float


STATEMENTS: Final = (
    Statement(
        "gradients",
        "Steadier gradients: their size differs less from layer to layer.",
        "Spread of the gradient norms across the layers, log10(largest / smallest), at the worst of start, middle and "
        "end of training; plain minus batch norm, mean over paired seeds, both with He initialisation for their "
        "activation.",
        "decades",
        0.3,
    ),
    Statement(
        "steps",
        "The same accuracy in fewer steps.",
        "Steps to the target accuracy, plain over batch norm, on paired seeds, each at its tuned setting.",
        "times",
        1.25,
    ),
    Statement(
        "accuracy",
        "Better accuracy.",
        "Test accuracy at the last step, batch norm minus plain, mean over paired seeds, each at its tuned setting.",
        "points",
        0.5,
    ),
    Statement(
        "standardisation",
        "Features need no separate standardisation.",
        "Features multiplied by 10^U(-3, 3): test accuracy of batch norm as first layer on the raw ones minus that of "
        "the plain network on standardised ones, mean over paired seeds. The margin is what may be lost: supported if "
        "the whole interval lies above -1, contradicted if it lies below.",
        "points",
        1.0,
    ),
    Statement(
        "regularisation",
        "Less need of other regularisation.",
        "Test accuracy gained by dropout in the plain network minus that gained with batch norm, mean over paired "
        "seeds. Supported only if the plain network gains at all, contradicted only if the other one does; no material "
        "difference if neither can gain the smallest effect.",
        "points",
        0.5,
    ),
    Statement(
        "time",
        "Slower per step, yet faster to learn.",
        "Seconds to the target, plain over batch norm. Supported if a step takes more than 1.05 times as long with "
        "batch norm and the target takes at least 1.25 times fewer seconds, each with its whole interval; contradicted "
        "if either half is: at most 1.05 times as long, or at least 1.25 times as many seconds.",
        "times",
        1.25,
    ),
)
"""The six claims, in the order in which they are reported."""


def judge(evidence: Evidence) -> list[Claim]:
    """The verdict on each of the six claims, in the order of `STATEMENTS`.

    A claim whose study was not run (or not finished) is still listed, without an estimate and as "cannot tell", so that
    a reader sees what was not looked at.

    Args:
        evidence: What was measured.

    Returns:
        Six claims. `details` holds the figures of every other arm under the arm's id, and what each claim adds.

    Example:
        >>> [claim["verdict"] for claim in judge(Evidence())] == ["cannot tell"] * 6
        True
    """
    arms = {row["arm"] for row in (*evidence.ratios, *evidence.runs, *evidence.timing)}
    arms |= {*evidence.gradient_spreads, *evidence.dropout}
    others = sorted(arms - {evidence.plain, evidence.primary})
    return [_claim(statement, evidence, others) for statement in STATEMENTS]


def _claim(statement: Statement, evidence: Evidence, others: Sequence[str]) -> Claim:
    read = readings.READERS[statement.id]
    reading = read(evidence, evidence.primary, statement.smallest_effect)
    details: dict[str, Any] = {} if reading is None else dict(reading.details)
    for arm in others:
        other = read(evidence, arm, statement.smallest_effect)
        if other is not None:
            details[arm] = {
                "estimate": other.estimate,
                "interval": other.interval,
                "verdict": other.verdict,
                "explanation": other.explanation,
                **other.details,
            }
    return {
        "id": statement.id,
        "claim": statement.claim,
        "statistic": statement.statistic,
        "unit": statement.unit,
        "smallest_effect": statement.smallest_effect,
        "estimate": None if reading is None else reading.estimate,
        "interval": None if reading is None else reading.interval,
        "verdict": "cannot tell" if reading is None else reading.verdict,
        "explanation": "Not measured in this comparison." if reading is None else reading.explanation,
        "details": details,
    }
