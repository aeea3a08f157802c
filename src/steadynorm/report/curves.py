"""Which accuracy curves belong together in one picture."""

from collections.abc import Iterator

from steadynorm.report.schema import Curve, Results

__all__ = ["chosen_curves", "curve_groups"]


def chosen_curves(results: Results, purpose: str) -> list[Curve]:
    """The curve of each arm at the setting that tuning chose for a purpose; without a choice, its first curve.

    Args:
        results: what `sn.compare` measured.
        purpose: "speed" or "accuracy".
    """
    chosen = {
        row["arm"]: row["choice_speed" if purpose == "speed" else "choice_accuracy"] for row in results["summaries"]
    }
    found: dict[str, Curve] = {}
    for curve in results["curves"]:
        if curve["purpose"] != purpose or not any(step > 0 for step in curve["steps"]):
            continue
        choice = chosen.get(curve["arm"])
        wanted = choice is not None and (curve["init"], curve["lr"]) == (choice["init"], choice["lr"])
        if wanted or curve["arm"] not in found:
            found[curve["arm"]] = curve
    return list(found.values())


def curve_groups(results: Results) -> dict[str, list[Curve]]:
    """Named groups of curves, one curve per arm in each, in the order in which they are worth a look.

    "speed" and "accuracy" are each arm at its best. Where an arm was also measured at another initialisation than its
    best one, a group shows all arms at that one, since that is where the plain network is handicapped or is not.
    """
    return dict(_groups(results))


def _groups(results: Results) -> Iterator[tuple[str, list[Curve]]]:
    best = chosen_curves(results, "speed")
    for name, curves in (("speed", best), ("accuracy", chosen_curves(results, "accuracy"))):
        if curves:
            yield name, curves
    speed = [curve for curve in results["curves"] if curve["purpose"] == "speed" and any(curve["steps"])]
    for init in dict.fromkeys(curve["init"] for curve in speed if curve not in best):
        yield f"speed, {init} initialisation", [curve for curve in speed if curve["init"] == init]
