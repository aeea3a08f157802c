"""What each claim's statistic comes to for one arm: estimate, interval, verdict, and a sentence with the figures.

Each function takes the evidence, the id of the arm to hold against the plain one, and the smallest effect that matters;
it returns None where the study was not run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from steadynorm.experiment.evidence import Evidence, ends, verdict
from steadynorm.experiment.stats import AT_LEAST, AT_MOST, Bounds, mean_interval
from steadynorm.report.schema import Ratio, TimingRow, Verdict

__all__ = ["READERS", "SLOWER", "WIDEST_SPREAD", "Reading"]

SLOWER: Final = 1.05
"""Seconds per step beyond which batch norm counts as slower: 5 %."""

WIDEST_SPREAD: Final = 12.0
"""Decades at which a spread of gradient norms is cut off: a layer whose gradient is 0, or a run that blew up, is beyond
any measure, and one such seed shall not decide a mean."""

STANDARDISED: Final = "plain, standardised"
FIRST_LAYER: Final = "batch norm as first layer, raw"
HIDDEN_LAYERS: Final = "batch norm in the hidden layers, raw"


@dataclass(frozen=True)
class Reading:
    """One claim's figure for one arm."""

    estimate: float | None
    interval: Bounds
    verdict: Verdict
    explanation: str
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


def _gradients(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    plain, other = (evidence.gradient_spreads.get(a, ()) for a in (evidence.plain, arm))
    if not plain or not other:
        return None
    differences = [_decades(p) - _decades(o) for p, o in zip(plain, other, strict=True)]
    estimate, interval = mean_interval(differences)
    details = {
        "spread_plain": mean_interval([_decades(p) for p in plain])[0],
        "spread": mean_interval([_decades(o) for o in other])[0],
        "counts": {
            a: dict(evidence.gradient_counts[a]) for a in (evidence.plain, arm) if a in evidence.gradient_counts
        },
    }
    explanation = (
        f"At its worst the gradient's spread across the layers was {details['spread_plain']:.2f} decades without and "
        f"{details['spread']:.2f} with batch norm: {estimate:+.2f} decades in favour of batch norm "
        f"({_between(interval)}, {_pairs(len(differences))})."
    )
    return Reading(estimate, interval, verdict(interval, smallest), explanation, details)


def _steps(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    row = _ratio_row(evidence, arm)
    if row is None:
        return None
    explanation = (
        f"{_steps_needed(row)}; {row['reached_plain']} and {row['reached_arm']} of {row['seeds']} seeds arrived."
    )
    outcome = verdict(_logs(row["interval"]), math.log(smallest))
    details = {"method": row["method"], "target": row["target"]}
    return Reading(row["ratio"], row["interval"], outcome, explanation, details)


def _accuracy(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    found = {(run["arm"], run["seed"]): run["test_accuracy"] for run in evidence.runs if run["purpose"] == "accuracy"}
    seeds = [seed for a, seed in found if a == evidence.plain and (arm, seed) in found]
    pairs = [(found[evidence.plain, s], found[arm, s]) for s in seeds]
    complete = [(p, o) for p, o in pairs if p is not None and o is not None]
    if not complete:
        return None
    plain, other = [100 * p for p, _ in complete], [100 * o for _, o in complete]
    estimate, interval = mean_interval([o - p for p, o in zip(plain, other, strict=True)])
    details = {
        "test_accuracy_plain": mean_interval(plain)[0],
        "test_accuracy": mean_interval(other)[0],
        "left_out": len(pairs) - len(complete),
    }
    explanation = (
        f"Test accuracy was {details['test_accuracy_plain']:.2f} % without and {details['test_accuracy']:.2f} % with "
        f"batch norm: {estimate:+.2f} points ({_between(interval)}, {_pairs(len(complete))})."
    )
    return Reading(estimate, interval, verdict(interval, smallest), explanation, details)


def _standardisation(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    """Judged for not being inferior: "no need of" means as good, to within a margin, and not better by one.

    A null difference is what the claim predicts, so the interval is held against -margin alone.
    """
    if arm != evidence.primary:  # the conditions of this study are its own, not the arms
        return None
    base, first = (evidence.standardization.get(c, ()) for c in (STANDARDISED, FIRST_LAYER))
    if not base or not first:
        return None
    estimate, interval = _points(base, first)
    low, high = ends(interval)
    outcome: Verdict = "supported" if low >= -smallest else "contradicted" if high <= -smallest else "cannot tell"
    details = {
        condition: {"difference": d, "interval": i}
        for condition, values in evidence.standardization.items()
        if condition not in (STANDARDISED, FIRST_LAYER) and values
        for d, i in [_points(base, values)]
    }
    explanation = (
        f"Batch norm as first layer on unscaled features came out {estimate:+.2f} points against the plain "
        f"network on standardised ones ({_between(interval)}, {_pairs(len(base))}; {smallest:g} point may be lost)."
        f"{_in_hidden_layers(details)}"
    )
    return Reading(estimate, interval, outcome, explanation, details)


def _in_hidden_layers(details: Mapping[str, Any]) -> str:
    found = details.get(HIDDEN_LAYERS)
    return "" if found is None else f" In the hidden layers alone: {found['difference']:+.2f} points."


def _regularisation(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    """A network needs dropout as far as it gains by it: where dropout harms, there is no need to grow or to shrink.

    So a difference of gains alone does not decide. Supported also asks that the plain network gains (its own interval
    above 0), contradicted that the batch-normalised one does; and where neither can gain the smallest effect, there is
    no material difference, however unequal the harm.
    """
    plain, other = evidence.dropout.get(evidence.plain), evidence.dropout.get(arm)
    if plain is None or other is None or not plain.without or not other.without:
        return None
    gains = [[100 * (w - wo) for wo, w in zip(a.without, a.with_dropout, strict=True)] for a in (plain, other)]
    (gain_plain, interval_plain), (gain, interval_arm) = (mean_interval(of_arm) for of_arm in gains)
    estimate, interval = mean_interval([p - o for p, o in zip(*gains, strict=True)])
    (low_plain, high_plain), (low_arm, high_arm) = ends(interval_plain), ends(interval_arm)
    outcome, need = verdict(interval, smallest), ""
    if high_plain < smallest and high_arm < smallest:
        outcome, need = "no material difference", f" At p = 0.5 neither gains {smallest:g} points by dropout."
    elif (outcome == "supported" and low_plain <= 0) or (outcome == "contradicted" and low_arm <= 0):
        outcome, need = "cannot tell", " Whether dropout is of any use here is not clear."
    details = {
        "gain_plain": gain_plain,
        "gain_plain_interval": interval_plain,
        "gain": gain,
        "gain_interval": interval_arm,
    }
    explanation = (
        f"Dropout changed test accuracy by {gain_plain:+.2f} points without and by {gain:+.2f} with batch norm: "
        f"a difference of {estimate:+.2f} points ({_between(interval)}, {_pairs(len(gains[0]))}).{need}"
    )
    return Reading(estimate, interval, outcome, explanation, details)


def _time(evidence: Evidence, arm: str, smallest: float) -> Reading | None:
    """Two halves, each with its interval: s, seconds per step (batch norm / plain), and seconds to the target, r / s.

    - Slower per step: supported if s_low > 1.05, contradicted if s_high <= 1.05, else cannot tell.
    - Faster to learn: `verdict` of log(r / s) at log 1.25, where r is the ratio of steps (plain / batch norm). Its
      interval combines those of r and s on logs by the distance of each bound from its estimate (Zou & Donner,
      Statistics in Medicine 27, 2008).

    The claim is supported if both halves are and contradicted if either is; the explanation names the half, since not
    being slower contradicts the words and is good news. Otherwise, where the seconds show no material difference, so
    does the claim; else cannot tell.
    """
    row = _ratio_row(evidence, arm)
    timing = next((t for t in evidence.timing if t["arm"] == arm), None)
    if row is None or timing is None:
        return None
    per_step, per_step_interval = timing["ratio_to_plain"], timing["ratio_interval"]
    estimate, interval = None if row["ratio"] is None else row["ratio"] / per_step, _seconds_interval(row, timing)
    slow, fast = _slower(per_step_interval), verdict(_logs(interval), math.log(smallest))
    outcome: Verdict = "cannot tell"
    if slow == fast == "supported":
        outcome = "supported"
    elif "contradicted" in (slow, fast):
        outcome = "contradicted"
    elif fast == "no material difference":
        outcome = fast
    details = {
        "seconds_per_step": {"estimate": per_step, "interval": per_step_interval, "verdict": slow},
        "seconds_to_target": {"estimate": estimate, "interval": interval, "verdict": fast},
    }
    in_seconds = "" if estimate is None else f", and {estimate:.2f} times the seconds ({_between(interval)})"
    explanation = (
        f"A step took {per_step:.2f} times as long with batch norm ({_between(per_step_interval)}; "
        f'"slower per step": {slow}). {_steps_needed(row)}{in_seconds}; "faster to learn": {fast}.'
    )
    return Reading(estimate, interval, outcome, explanation, details)


def _slower(interval: Bounds) -> Verdict:
    low, high = ends(interval)
    return "supported" if low > SLOWER else "contradicted" if high <= SLOWER else "cannot tell"


def _seconds_interval(row: Ratio, timing: TimingRow) -> Bounds:
    if row["ratio"] is None:
        return [None, None]
    (r_low, r_high), (s_low, s_high) = ends(_logs(row["interval"])), ends(_logs(timing["ratio_interval"]))
    r, s = math.log(row["ratio"]), math.log(timing["ratio_to_plain"])
    low, high = r - s - math.hypot(r - r_low, s_high - s), r - s + math.hypot(r_high - r, s - s_low)
    return [None if math.isinf(bound) else math.exp(bound) for bound in (low, high)]


def _ratio_row(evidence: Evidence, arm: str) -> Ratio | None:
    return next((row for row in evidence.ratios if row["arm"] == arm and row["init"] == "tuned"), None)


def _points(base: Sequence[float], other: Sequence[float]) -> tuple[float, Bounds]:
    return mean_interval([100 * (o - b) for b, o in zip(base, other, strict=True)])


def _decades(spread: float | None) -> float:
    return WIDEST_SPREAD if spread is None or not spread < WIDEST_SPREAD else spread


def _logs(interval: Bounds) -> Bounds:
    return [None if bound is None else math.log(bound) for bound in interval]


def _steps_needed(row: Ratio) -> str:
    if row["ratio"] is None:
        return (
            f"Too few runs of either network reached {100 * row['target']:.1f} % validation accuracy to compare "
            "their steps"
        )
    bound = f"{row['method']} " if row["method"] in (AT_LEAST, AT_MOST) else ""
    return (
        f"To {100 * row['target']:.1f} % validation accuracy the plain network needed {bound}{row['ratio']:.2f} times "
        f"the steps of batch norm ({_between(row['interval'])})"
    )


def _between(interval: Bounds) -> str:
    match interval:
        case [None, None]:
            return "no 95 % interval"
        case [low, None]:
            return f"95 % interval from {low:.2f} up"
        case [None, high]:
            return f"95 % interval up to {high:.2f}"
        case _:
            return f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"


def _pairs(n: int) -> str:
    return f"{n} paired seeds" if n > 1 else "one pair of seeds"


READERS: Final[Mapping[str, Callable[[Evidence, str, float], Reading | None]]] = {
    "gradients": _gradients,
    "steps": _steps,
    "accuracy": _accuracy,
    "standardisation": _standardisation,
    "regularisation": _regularisation,
    "time": _time,
}
"""Each claim's reading, by the id of its statement."""
