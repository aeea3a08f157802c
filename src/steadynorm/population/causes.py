"""Names what a measured gap is due to: findings with the figures behind them."""

from collections.abc import Callable, Iterator
from typing import Final

from steadynorm.population.findings import Finding, Severity, Value
from steadynorm.population.gap import Difference, Gap, LayerGap

__all__ = ["figures", "from_gap"]

_MANY: Final = 0.05
"""Accuracy lost that makes a finding an error."""
_BIMODAL: Final = 5.0
"""Ashman's D of two groups: halves of a Gaussian have 2.65, of a uniform distribution 3.46."""
_PADDED: Final = 0.3
_ORDERED: Final = 2.0
_MOVED: Final = 0.5
"""Deviations, root mean square over a layer's channels."""
_BATCHES: Final = (
    "Use larger batches, steadynorm.sync_(model) over ranks, Renorm, or freeze the statistics (steadynorm.freeze_) and "
    "train on."
)


def figures(gap: Gap) -> dict[str, Value]:
    """The losses and accuracies under each set of statistics."""
    found: dict[str, Value] = {"examples": gap.batches.examples}
    for name, losses in (
        ("running", gap.running),
        ("population", gap.population),
        ("batch", gap.own_batch),
        ("shuffled_batch", gap.shuffled),
        ("reference", gap.reference),
    ):
        if losses is not None:
            found[f"loss_{name}"] = losses.mean
            found[f"accuracy_{name}"] = losses.accuracy
    if gap.running is not None and gap.population is not None:
        won = Difference.between(gap.running, gap.population)
        found["recalibrating_wins_loss"] = won.loss
        found["recalibrating_wins_accuracy"] = won.accuracy
    return found


def from_gap(gap: Gap) -> list[Finding]:
    """All findings that need data."""
    return [finding for rule in _RULES for finding in rule(gap)]


def _refused(gap: Gap) -> Iterator[Finding]:
    if gap.batches.refused:
        yield Finding(
            "non-finite batch",
            "error",
            "",
            f"{gap.batches.bad_examples} examples in {len(gap.batches.refused)} batches hold NaN or infinite values.",
            {"batches": len(gap.batches.refused), "first_batch": gap.batches.refused[0],
             "examples": gap.batches.bad_examples},
            "Remove or repair them: in train mode one such batch spoils the running statistics of torch.nn's layers "
            "for good. All other findings are without these batches.",
            2.5,
        )  # fmt: skip


def _unjudged(gap: Gap) -> Iterator[Finding]:
    """Without a loss, what the statistics cost is unknown; how far they are off is not."""
    yield Finding(
        "no loss",
        "note",
        "",
        "No loss could be measured: the batches have no targets that cross-entropy takes.",
        {"examples": gap.batches.examples},
        "Pass loss=lambda output, targets: ... and batches of (inputs, targets), or a dict with an entry labels.",
    )
    off = [row for row in gap.layers if row.mean_shift > max(_MOVED, 4 * row.by_chance) or _apart(row.variance_ratio)]
    if off:
        worst = off[0]  # what lies behind it is off by what it hands on
        yield Finding(
            "stale statistics",
            "warning",
            worst.name,
            f"The running means of {worst.name} are {worst.mean_shift:.2g} deviations from those of this data, the "
            f"variances {worst.variance_ratio:.2g} times theirs; what that costs was not measured.",
            _of(worst),
            "If this is training data, measure them anew: steadynorm.recalibrate_(model, loader).",
        )


def _apart(ratio: float) -> bool:
    return not 1 / 3 < ratio < 3


def _statistics(gap: Gap) -> Iterator[Finding]:
    if gap.running is None or gap.population is None:
        yield from _unjudged(gap)
        return
    lost = Difference.between(gap.running, gap.population)
    if not lost.material:
        return
    worst = max(gap.layers, key=lambda layer: layer.costs or 0.0)
    severity = _severity(lost, gap)
    kind, what, remedy = _why(gap)
    said = f"Evaluation loses {lost.loss:.3g} of loss" + (
        "" if lost.accuracy is None else f" and {100 * lost.accuracy:.1f} points of accuracy"
    )
    evidence: dict[str, Value] = {
        "loss_running": gap.running.mean,
        "loss_population": gap.population.mean,
        "accuracy_running": gap.running.accuracy,
        "accuracy_population": gap.population.accuracy,
        "standard_errors": lost.deviations,
        **_of(worst),
    }
    yield Finding(
        kind, severity, worst.name, f"{said} to its running statistics, most at {worst.name}: {what}", evidence, remedy,
        1.2,
    )  # fmt: skip


def _moved(gap: Gap) -> Iterator[Finding]:
    """Data that is another than the reference, where other statistics would not repair what that costs."""
    apart = gap.apart
    if apart is None or apart.mean_shift <= max(_MOVED, 4 * 2**0.5 * apart.by_chance):
        return
    if (
        gap.running is not None
        and gap.population is not None
        and Difference.between(gap.running, gap.population).material
    ):
        return  # said with what it costs
    yield Finding(
        "augmentation differs" if gap.augmented else "data shift",
        "warning",
        apart.name,
        f"What reaches {apart.name} is on average {apart.mean_shift:.2g} deviations from the reference data's.",
        {"mean_shift": apart.mean_shift, "mean_shift_by_chance": 2**0.5 * apart.by_chance,
         "variance_ratio": apart.variance_ratio},
        "Look for what changed (steadynorm shift). Statistics of this data would win little: the weights, too, were "
        "trained for the other.",
        0.7,
    )  # fmt: skip


def _severity(lost: Difference, gap: Gap) -> Severity:
    much = (lost.accuracy or 0.0) >= _MANY or (gap.population is not None and lost.loss > gap.population.mean)
    return "error" if lost.material and much else "warning"


def _of(layer: LayerGap) -> dict[str, Value]:
    return {
        "layer_costs": layer.costs,
        "layer_wins": layer.wins,
        "mean_shift": layer.mean_shift,
        "mean_shift_by_chance": layer.by_chance,
        "variance_ratio": layer.variance_ratio,
    }


def _why(gap: Gap) -> tuple[str, str, str]:
    """The name, the reason and the remedy of running statistics that do not fit the data."""
    if gap.running is not None and gap.dropping is not None and gap.population is not None:
        nearer = abs(gap.dropping.mean - gap.running.mean) < 0.3 * abs(gap.running.mean - gap.population.mean)
        if nearer:
            return (
                "dropout before batch norm",
                "they are those of the data with dropout active, whose variance evaluation does not have.",
                "Move dropout behind the last batch norm, or measure the statistics without it: "
                "steadynorm.recalibrate_(model, loader) on training data.",
            )
    if gap.running is not None and gap.reference is not None and gap.population is not None:
        fits = abs(gap.reference.mean - gap.running.mean) < 0.3 * abs(gap.running.mean - gap.population.mean)
        if fits and gap.augmented:
            return (
                "augmentation differs",
                "they fit the reference data, which is augmented at random, and not this data.",
                "Measure them on training data with the transforms of evaluation: steadynorm.recalibrate_(model, "
                "loader).",
            )
        if fits:
            return (
                "data shift",
                "they fit the reference data, and this data is another.",
                "Look for what changed (steadynorm shift; a forgotten or doubled normalisation is the usual cause). If "
                "the change is there to stay, adapt: steadynorm.shift.adapt_, or train on such data.",
            )
    return (
        "stale statistics",
        "they are not those of this data"
        + (" nor of the reference data." if gap.reference is not None else
           " (give reference=training data to tell stale statistics from shifted data)."),
        "Measure them anew over training data: steadynorm.recalibrate_(model, loader).",
    )  # fmt: skip


def _batch(gap: Gap) -> Iterator[Finding]:
    if gap.population is not None and gap.own_batch is not None:
        lost = Difference.between(gap.own_batch, gap.population)
        size = gap.batches.kept[0].size
        mixed = None if gap.shuffled is None or gap.order is None else _mixed(gap)
        if lost.material and mixed is not False:
            # Some noise is a part of batch norm at any size. It is too much where it costs more than all else does.
            serious = lost.loss > abs(gap.population.mean) or (lost.accuracy or 0.0) >= _MANY
            yield Finding(
                "small batches",
                "warning" if serious else "note",
                "",
                f"Under statistics of batches of {size} the loss is {gap.own_batch.mean:.3g}, under those of all the "
                f"data {gap.population.mean:.3g}"
                + (": the batches are too small to say what the data is like." if serious else "."),
                {"batch_size": size, "loss_batch": gap.own_batch.mean, "loss_population": gap.population.mean,
                 "accuracy_batch": gap.own_batch.accuracy, "accuracy_population": gap.population.accuracy,
                 "standard_errors": lost.deviations, "mean_noise": size**-0.5},
                _BATCHES,
                0.8,
            )  # fmt: skip
    if gap.single:
        yield Finding(
            "batch of one",
            "note",
            "",
            f"{gap.single} batches have one value per channel: training on them is an error.",
            {"batches": gap.single},
            "Use drop_last=True in the loader of training data.",
        )


def _mixed(gap: Gap) -> bool | None:
    """Whether batches of the same size in random order lose as much, too."""
    if gap.population is None or gap.shuffled is None or gap.own_batch is None:
        return None
    return gap.shuffled.mean - gap.population.mean > 0.5 * (gap.own_batch.mean - gap.population.mean)


def _order(gap: Gap) -> Iterator[Finding]:
    order = gap.order
    if order is None or order.ratio < _ORDERED or order.p > 1 / 200:
        return
    evidence: dict[str, Value] = {"ratio": order.ratio, "p": order.p, "batch_size": gap.batches.kept[0].size}
    if gap.own_batch is not None and gap.shuffled is not None:
        evidence |= {"loss_batch": gap.own_batch.mean, "loss_shuffled": gap.shuffled.mean}
    yield Finding(
        "order of the data",
        "warning",
        gap.layers[0].name,
        f"The means of the batches vary {order.ratio:.1f} times as much as those of random batches would: examples "
        "that follow each other are alike.",
        evidence,
        "Shuffle the training data (shuffle=True). In evaluation alone the order does no harm.",
        0.9,
    )


def _domains(gap: Gap) -> Iterator[Finding]:
    split = gap.split
    if split is None or split.separation < _BIMODAL or split.share < 0.05:
        return
    evidence: dict[str, Value] = {"separation": split.separation, "share": split.share}
    helps = ""
    if gap.by_domain is not None and gap.population is not None:
        evidence |= {"loss_together": gap.population.mean, "loss_apart": gap.by_domain.mean,
                     "accuracy_together": gap.population.accuracy,
                     "accuracy_apart": gap.by_domain.accuracy}  # fmt: skip
        if gap.by_domain.mean < gap.population.mean:
            helps = f" With their own statistics the loss is {gap.by_domain.mean:.3g}, not {gap.population.mean:.3g}."
    # Running statistics that follow how many of either kind the last batches held are a symptom of it.
    lost = None if gap.running is None or gap.population is None else Difference.between(gap.running, gap.population)
    # Two kinds that cost nothing may be the classes.
    severity: Severity = "note" if lost is None or not lost.material else _severity(lost, gap)
    yield Finding(
        "several domains",
        severity,
        gap.layers[0].name,
        f"The examples are of two kinds, {split.separation:.1f} deviations apart, the smaller with {split.share:.0%}: "
        f"one mean and variance describe neither.{helps}",
        evidence,
        "If the kinds are known, give each its own statistics (domains= of the layers, `with steadynorm.domain(...)`) "
        "and train so; otherwise bring both to one scale, and mix them in each batch.",
        1.3,
    )


def _padding(gap: Gap) -> Iterator[Finding]:
    if gap.padded >= _PADDED:
        yield Finding(
            "padding",
            "warning",
            gap.layers[0].name,
            f"{gap.padded:.0%} of the positions are constant at the end of each example: padding is measured as data.",
            {"share": gap.padded, "examples": gap.batches.examples},
            "Give the layers the mask of real positions (mask= of steadynorm's layers), then measure anew: "
            "steadynorm.recalibrate_(model, loader).",
            0.95,
        )


_RULES: Final[tuple[Callable[[Gap], Iterator[Finding]], ...]] = (
    *(_refused, _statistics, _moved, _batch, _order, _domains, _padding),
)
