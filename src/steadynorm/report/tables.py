"""Every figure of the results as a plain table: the text behind each chart, and what the terminal prints."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steadynorm.report.schema import Choice, Results
from steadynorm.report.wording import (
    accuracy_interval,
    arm_labels,
    bracketed,
    claim_figure,
    count,
    duration,
    interval,
    number,
    percent,
    rate,
    ratio_figure,
    ratio_interval,
    smallest_effect,
)

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first column names the row, and `numeric` columns align to the right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Build a table from column names, of which those with a leading ">" hold figures."""
    numeric = frozenset(i for i, name in enumerate(columns) if name.startswith(">"))
    return Table(caption, tuple(name.removeprefix(">") for name in columns), tuple(tuple(row) for row in rows), numeric)


def _setting(choice: Choice) -> str:
    return f"rate {rate(choice['lr'])}, {choice['init']} init."


def summaries(results: Results) -> Table:
    """Each arm in one row."""
    return _table(
        "The arms, measured on fresh seeds",
        ("Arm", ">Steps to target", ">95 % interval", ">Reached", ">Test accuracy", ">95 % interval",
         "Setting for speed", "Setting for accuracy", ">Time per step", ">Time to target"),
        (
            (
                arm_labels(results)[row["arm"]],
                count(row["steps_to_target"]) if row["steps_to_target"] is not None else "not reached",
                interval(row["steps_interval"], decimals=0),
                f"{row['reached']}/{row['seeds']}",
                percent(row["test_accuracy"]),
                accuracy_interval(row["test_interval"]),
                _setting(row["choice_speed"]),
                _setting(row["choice_accuracy"]),
                duration(row["seconds_per_step"]),
                duration(row["seconds_to_target"]),
            )
            for row in results["summaries"]
        ),
    )  # fmt: skip


def claims(results: Results) -> Table:
    """Each claim with its statistic, figure and verdict."""
    return _table(
        "The claims made for batch norm, with the statistic stated beforehand",
        ("Claim", "Statistic", ">Matters from", ">Measured (95 % interval)", "Verdict"),
        ((c["claim"], c["statistic"], smallest_effect(c), claim_figure(c), c["verdict"]) for c in results["claims"]),
    )


def curves(results: Results, points: int = 12) -> Table:
    """The accuracy curves at about `points` steps each."""
    labels = arm_labels(results)
    return _table(
        "Validation accuracy against steps: median and the 10th to 90th percentile over seeds",
        ("Arm", "Tuned for", "Initialisation", ">Step", ">Median", ">10th to 90th percentile"),
        (
            (
                labels[curve["arm"]],
                curve["purpose"],
                curve["init"],
                count(curve["steps"][i]),
                percent(curve["p50"][i]),
                accuracy_interval([curve["p10"][i], curve["p90"][i]]),
            )
            for curve in results["curves"]
            for i in _spread(len(curve["steps"]), points)
        ),
    )


def ratios(results: Results, *, curve: bool = False) -> Table:
    """Ratios of steps at the target, or over the curve of targets."""
    labels = arm_labels(results)
    return _table(
        "Steps of the plain network over steps with batch norm" + (", for a range of targets" if curve else ""),
        ("Arm", "Initialisation", ">Target", ">Ratio (95 % interval)", ">Reached, plain", ">Reached, arm", "Method"),
        (
            (
                labels[row["arm"]],
                row["init"],
                percent(row["target"]),
                ratio_figure(row),
                f"{row['reached_plain']}/{row['seeds']}",
                f"{row['reached_arm']}/{row['seeds']}",
                row["method"],
            )
            for row in (results["ratio_curve"] if curve else results["ratios"])
        ),
    )


def tuning(results: Results) -> Table:
    """Every setting that was tried."""
    labels = arm_labels(results)
    return _table(
        "Every setting tried, over the tuning seeds",
        ("Arm", "Initialisation", ">Learning rate", ">Median accuracy", ">Diverged", "Trains"),
        (
            (
                labels[row["arm"]],
                row["init"],
                rate(row["lr"]),
                percent(row["accuracy"]),
                f"{row['diverged']}/{len(row['accuracies'])}",
                "yes" if row["trains"] else "no",
            )
            for row in sorted(results["tuning"], key=lambda r: (list(labels).index(r["arm"]), r["init"], r["lr"]))
        ),
    )


def gradients(results: Results) -> Table:
    """Gradient norms of the first, middle and last layer of each arm and phase."""
    labels = arm_labels(results)
    return _table(
        "RMS gradient at each layer's pre-activation, median over seeds",
        ("Arm", "Phase", ">Step", ">First layer", ">Middle layer", ">Last layer", ">Spread (decades)", "Verdict"),
        (
            (
                labels[row["arm"]],
                row["phase"],
                count(row["step"]),
                number(row["norms"][0]),
                number(row["norms"][len(row["norms"]) // 2]),
                number(row["norms"][-1]),
                number(row["spread_decades"]),
                row["verdict"],
            )
            for row in results["gradients"]
        ),
    )


def drift(results: Results) -> Table:
    """Percentiles of the last hidden layer's inputs at the start and the end of training."""
    labels = arm_labels(results)

    def triple(row: dict[str, list[float]], i: int) -> str:
        return " / ".join(number(row[p][i], 2) for p in ("p15", "p50", "p85"))

    rows: list[tuple[str, ...]] = []
    for row in results["drift"]:
        percentiles = {"p15": row["p15"], "p50": row["p50"], "p85": row["p85"]}
        rows.append((labels[row["arm"]], triple(percentiles, 0), triple(percentiles, -1), number(row["drift"], 2)))
    return _table(
        "What enters the last hidden nonlinearity: 15th / 50th / 85th percentile",
        ("Arm", ">First step", ">Last step", ">Drift of the median"),
        rows,
    )


def batch_sizes(results: Results) -> Table:
    """Accuracy and steps for each batch size."""
    labels = arm_labels(results)
    return _table(
        "The effect of the batch size",
        ("Arm", ">Batch size", ">Learning rate", ">Accuracy", ">95 % interval", ">Steps to target"),
        (
            (
                labels[row["arm"]],
                count(row["batch_size"]),
                rate(row["lr"]),
                percent(row["final_accuracy"]),
                accuracy_interval(row["interval"]),
                count(row["steps_to_target"]),
            )
            for row in results["batch_sizes"]
        ),
    )


def regularization(results: Results) -> Table:
    """Train and test accuracy with and without dropout."""
    labels = arm_labels(results)
    return _table(
        "Train and test accuracy with and without dropout",
        ("Arm", ">Dropout", ">Learning rate", ">Train", ">Test", ">95 % interval", ">Gap (points)"),
        (
            (
                labels[row["arm"]],
                number(row["dropout"]),
                rate(row["lr"]),
                percent(row["train_accuracy"]),
                percent(row["test_accuracy"]),
                accuracy_interval(row["test_interval"]),
                f"{100 * row['gap']:.1f}".replace("-", "−"),
            )
            for row in results["regularization"]
        ),
    )


def standardization(results: Results) -> Table:
    """What each remedy makes of badly scaled features."""
    return _table(
        "Test accuracy with every feature multiplied by 10 to a power drawn from −3 to 3",
        ("Condition", "Initialisation", ">Learning rate", ">Test accuracy", ">95 % interval"),
        (
            (
                row["condition"],
                row["init"],
                rate(row["lr"]),
                percent(row["test_accuracy"]),
                accuracy_interval(row["interval"]),
            )
            for row in results["standardization"]
        ),
    )


def timing(results: Results) -> Table:
    """Time per training step."""
    labels = arm_labels(results)
    return _table(
        "Time per training step, one thread, arms interleaved",
        ("Arm", ">Median", ">20th percentile", ">80th percentile", ">Times plain (95 % interval)"),
        (
            (
                labels[row["arm"]],
                duration(row["seconds_per_step"]),
                duration(row["p20"]),
                duration(row["p80"]),
                f"{number(row['ratio_to_plain'])}×{bracketed(ratio_interval(row['ratio_interval']))}",
            )
            for row in results["timing"]
        ),
    )


def _spread(length: int, points: int) -> list[int]:
    """About `points` indices over `length`, the first and the last among them."""
    if length <= points:
        return list(range(length))
    return sorted({round(i * (length - 1) / (points - 1)) for i in range(points)})
