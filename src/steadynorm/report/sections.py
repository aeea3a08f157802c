"""The story that the page tells, section by section, in the order in which a reader asks."""

from collections.abc import Callable
from dataclasses import dataclass

from steadynorm.report import charts, tables
from steadynorm.report.charts import Chart
from steadynorm.report.headline import headline_ratio
from steadynorm.report.schema import Results
from steadynorm.report.tables import Table
from steadynorm.report.wording import arm_labels, number, percent, rate_range, ratio_figure

__all__ = ["Section", "sections"]


@dataclass(frozen=True)
class Section:
    """A heading, a few words, charts, and the tables behind them; `missing` where the data were not measured."""

    id: str
    title: str
    lead: str = ""
    charts: tuple[Chart, ...] = ()
    caption: str = ""
    tables: tuple[Table, ...] = ()
    missing: bool = False

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the charts show, which a legend has to tell apart."""
        traces = (trace for chart in self.charts for trace in chart.spec["data"])
        return tuple(dict.fromkeys(trace["legendgroup"] for trace in traces if "legendgroup" in trace))


def sections(results: Results) -> list[Section]:
    """Tell the results as sections; one whose data are empty is kept, marked as missing, so that the page can say so.

    Args:
        results: what `sn.compare` measured.

    Returns:
        The sections after the headline and the tiles; the page draws the claims (id "claims") in its own way.
    """
    return [build(results) for build in _STORY]


def _section(
    ident: str, title: str, lead: str, drawn: list[Chart] | Chart | None, caption: str, *shown: Table
) -> Section:
    panels = tuple(drawn) if isinstance(drawn, list) else () if drawn is None else (drawn,)
    kept = tuple(table for table in shown if table.rows)
    return Section(ident, title, lead, panels, caption, kept, missing=not panels and not kept)


def _accuracy(results: Results) -> Section:
    target = results["target"]
    aim = f"The target is {percent(target)}: {results['target_source']}. " if target is not None else ""
    return _section(
        "accuracy",
        "Accuracy against steps",
        f"{aim}A run reaches it with the first three evaluations in a row whose mean is at least that high.",
        charts.accuracy_chart(results),
        "Validation accuracy on fresh seeds, each arm at its own best setting: the median, and the band from the 10th "
        "to the 90th percentile. A marker shows where the median run of an arm arrives.",
        tables.curves(results),
    )


def _claims(results: Results) -> Section:
    return _section(
        "claims",
        "The claims, one by one",
        "Each claim has one statistic and a smallest effect that matters, both stated before measuring. The verdict "
        "follows from where the whole 95 % interval lies: outside the shaded zone on the claim's side (supported), on "
        "the other side (contradicted), inside it (no material difference), or across its edge (cannot tell). Where "
        "the claim is that nothing is lost, the interval has to lie to the right of the dashed margin instead.",
        None,
        "",
        tables.claims(results),
    )


def _ratios(results: Results) -> Section:
    row = headline_ratio(results)
    by_init = {r["init"]: r for r in results["ratios"] if row is not None and r["arm"] == row["arm"]}
    lead = "Initialisation is a tuned setting here, because a handicapped plain network flatters batch norm."
    if {"default", "corrected"} <= set(by_init):
        lead += (
            f" With the framework's default initialisation in both arms the ratio is "
            f"{ratio_figure(by_init['default'])}; with the gain-corrected one, {ratio_figure(by_init['corrected'])}."
        )
    if "critical" in by_init:
        lead += (
            " With the critical one, whose gain keeps the gradient's size rather than the signal's, it is "
            f"{ratio_figure(by_init['critical'])}."
        )
    found = (charts.ratio_chart(results), charts.ratio_curve_chart(results))
    return _section(
        "ratios",
        "How much of it is the initialisation?",
        lead,
        [chart for chart in found if chart is not None],
        "Steps of the plain network over steps with batch norm on paired seeds, with 95 % intervals: at the target for "
        "each way of initialising, and over a range of targets. An open triangle means “at least” (pointing up) or "
        "“at most”: too few runs arrived to say more.",
        tables.ratios(results),
        tables.ratios(results, curve=True),
    )


_RANGES = "Lowest and highest learning rate at which no tuning run diverged and the median reached the target:"


def _sensitivity(results: Results) -> Section:
    labels = arm_labels(results)
    ranges = [f"{labels[row['arm']]}: {rate_range(row['lr_range'])}" for row in results["summaries"]]
    lead = f"{_RANGES} {'; '.join(ranges)}." if ranges else ""
    return _section(
        "learning-rates",
        "Sensitivity to the learning rate",
        lead,
        charts.sensitivity_chart(results),
        "Median validation accuracy over the tuning seeds, for every learning rate and initialisation tried (dotted: "
        "default, solid: corrected, dashed: critical). A cross marks a setting at which a run diverged.",
        tables.tuning(results),
    )


def _gradients(results: Results) -> Section:
    labels = arm_labels(results)
    starts = [
        f"{labels[row['arm']]} {number(row['spread_decades'], 2)} decades ({row['verdict']})"
        for row in results["gradients"]
        if row["phase"] == "start"
    ]
    lead = f"From the largest to the smallest layer at the start: {', '.join(starts)}." if starts else ""
    return _section(
        "gradients",
        "Gradients, layer by layer",
        lead,
        charts.gradient_charts(results),
        "RMS of the loss gradient at each layer's pre-activation, median over seeds, all panels on one scale. A level "
        "line means that every layer learns at a comparable pace.",
        tables.gradients(results),
    )


def _drift(results: Results) -> Section:
    labels = arm_labels(results)
    moved = [f"{labels[row['arm']]} {number(row['drift'], 2)}" for row in results["drift"]]
    lead = (
        f"Mean distance of the median from where it ends, in widths of the final band: {', '.join(moved)}."
        if moved
        else ""
    )
    return _section(
        "drift",
        "What the last hidden layer sees while it learns",
        lead,
        charts.drift_charts(results),
        "Inputs of the last hidden nonlinearity over training: the median, and the band from the 15th to the 85th "
        "percentile, on one scale.",
        tables.drift(results),
    )


def _batch_sizes(results: Results) -> Section:
    return _section(
        "batch-sizes",
        "The effect of the batch size",
        "Batch norm measures its statistics on the batch, so small batches make them noisy.",
        charts.batch_size_chart(results),
        "Final validation accuracy with 95 % intervals. Learning rate and number of steps stay what they were tuned to "
        "at the comparison's own batch size: this is what happens to each network if nothing else is changed.",
        tables.batch_sizes(results),
    )


def _regularization(results: Results) -> Section:
    return _section(
        "regularisation",
        "With and without dropout",
        "A wide gap between train and test accuracy means overfitting; a remedy is worth it if test accuracy rises.",
        charts.regularization_chart(results),
        "Test accuracy (filled) and train accuracy (open), joined by their gap.",
        tables.regularization(results),
    )


def _standardization(results: Results) -> Section:
    return _section(
        "standardisation",
        "Badly scaled features",
        "Every feature is multiplied by 10 to a power drawn evenly from −3 to 3: what does each remedy make of that?",
        charts.standardization_chart(results),
        "Test accuracy with 95 % intervals.",
        tables.standardization(results),
    )


def _timing(results: Results) -> Section:
    return _section(
        "timing",
        "The price of a step",
        "Measured in a serial pass of its own, one thread, with the arms interleaved.",
        charts.timing_chart(results),
        "Median time per training step, with the 20th and 80th percentile.",
        tables.timing(results),
    )


_STORY: tuple[Callable[[Results], Section], ...] = (
    _accuracy,
    _claims,
    _ratios,
    _sensitivity,
    _gradients,
    _drift,
    _batch_sizes,
    _regularization,
    _standardization,
    _timing,
)
