"""The one sentence that answers the question: how many fewer steps, and how sure is that?"""

from steadynorm.report.schema import Ratio, Results
from steadynorm.report.wording import BOUNDS, MISSING, arm_labels, percent, ratio_interval, times

__all__ = ["headline", "headline_ratio"]


def headline_ratio(results: Results) -> Ratio | None:
    """The ratio that the headline speaks of: the arm named beforehand, never the one that came out best.

    That is batch norm before the nonlinearity, as in the 2015 paper, or else the first arm that is not the plain one,
    each arm at its better initialisation.
    """
    tuned = [row for row in results["ratios"] if row["init"] == "tuned"]
    return next((row for row in tuned if row["arm"] == "before"), tuned[0] if tuned else None)


def headline(results: Results) -> str:
    """Say in one sentence what the comparison found about speed.

    Args:
        results: what `sn.compare` measured.

    Returns:
        A sentence with the ratio of steps and its 95 % interval, or why there is none. Where the interval holds 1 it
        says that no difference could be told, and where it lies below 1 that batch norm needed more steps.
    """
    row = headline_ratio(results)
    if row is None:
        return "The comparison stopped before the number of steps could be compared."
    who, target = arm_labels(results)[row["arm"]], f"{percent(row['target'])} validation accuracy"
    ratio, (low, high) = row["ratio"], row["interval"]
    if ratio is None:
        return f"{who} against the plain network: too few runs reached {target} to compare their steps."
    found = ratio_interval(row["interval"])
    interval = f"95 % interval {found}" if found != MISSING else "too few runs for an interval"
    bound = row["method"] in BOUNDS
    if bound or low is None or high is None:
        arrived = (
            f"{row['reached_arm']} of {row['seeds']} against {row['reached_plain']} of {row['seeds']} runs arrived"
        )
        if row["method"] == "at least" and ratio > 1:
            return f"{who} reached {target} in at least {times(ratio)} fewer steps ({interval}): {arrived}."
        needed = f"{row['method'] if bound else 'about'} {times(ratio)} the steps of {who[:1].lower()}{who[1:]}"
        return f"To reach {target} the plain network needed {needed} ({interval}): {arrived}."
    if low <= 1 <= high:
        return (
            f"No difference in the steps to {target} could be told: the plain network needed {times(ratio)} those of "
            f"{who[:1].lower()}{who[1:]} ({interval})."
        )
    if low > 1:
        return f"{who} reached {target} in {times(ratio)} fewer steps ({interval})."
    more = f"{times(1 / ratio)} more steps to reach {target}"
    return f"{who} needed {more} (95 % interval {ratio_interval([1 / high, 1 / low])})."
