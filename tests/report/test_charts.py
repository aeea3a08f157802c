import json
import math
import re
from typing import Any

import plotly.graph_objects as go
import pytest

from steadynorm.report import charts
from steadynorm.report.charts.base import Chart, error_bars, folded, log_axis
from steadynorm.report.schema import Results
from steadynorm.report.sections import sections


def all_charts(results: Results) -> list[Chart]:
    return [chart for section in sections(results) for chart in section.charts]


def coloured(value: Any) -> Any:
    """Colour names of the style sheet replaced by a colour, as the page's script does."""
    if isinstance(value, dict):
        return {key: coloured(item) for key, item in value.items()}
    if isinstance(value, list):
        return [coloured(item) for item in value]
    return "rgba(1,2,3,0.5)" if isinstance(value, str) and re.fullmatch(r"--[a-z0-9-]+(@[\d.]+)?", value) else value


def traces(chart: Chart | None, **wanted: Any) -> list[dict[str, Any]]:
    assert chart is not None
    return [t for t in chart.spec["data"] if all(t.get(key) == value for key, value in wanted.items())]


def test_plotly_knows_every_property_of_every_figure(results: Results) -> None:
    found = all_charts(results)
    assert len(found) == 14
    for chart in found:
        spec = json.loads(json.dumps(chart.spec, allow_nan=False))
        go.Figure(coloured(spec))  # raises on a name or a value that Plotly does not know
        assert chart.description
        assert spec["data"]
    assert len({chart.id for chart in found}) == len(found)


def test_plotly_would_refuse_a_misspelt_property(results: Results) -> None:
    spec = coloured(all_charts(results)[0].spec)
    spec["data"][0]["fillcolour"] = "red"
    with pytest.raises(ValueError, match="fillcolour"):
        go.Figure(spec)


def test_accuracy_lines_are_the_medians_and_bands_the_percentiles(results: Results) -> None:
    results["curves"][0]["steps"][0] = 0  # no place on a logarithmic axis
    chart = charts.accuracy_chart(results)
    curve = results["curves"][0]
    assert (curve["arm"], curve["purpose"]) == ("plain", "speed")
    band, line = traces(chart, legendgroup="plain", meta="speed")[:2]
    assert line["x"] == curve["steps"][1:]
    assert line["y"] == curve["p50"][1:]
    assert band["x"] == curve["steps"][1:] + curve["steps"][:0:-1]
    assert band["y"] == curve["p10"][1:] + curve["p90"][:0:-1]


def test_layers_are_counted_in_whole_numbers(results: Results) -> None:
    assert charts.gradient_charts(results)[0].spec["layout"]["xaxis"]["dtick"] == 4  # of 20 layers
    for row in results["gradients"]:
        row["layers"], row["norms"] = row["layers"][:3], row["norms"][:3]
    assert charts.gradient_charts(results)[0].spec["layout"]["xaxis"]["dtick"] == 1


def test_a_marker_shows_where_each_arm_arrives(results: Results) -> None:
    results["summaries"][2]["steps_to_target"] = None
    markers = traces(charts.accuracy_chart(results), mode="markers")
    assert [(m["x"], m["y"]) for m in markers] == [([350.0], [0.952]), ([105.0], [0.952])]


def test_without_a_target_there_is_no_line(results: Results) -> None:
    results["target"] = None
    chart = charts.accuracy_chart(results)
    assert chart is not None
    assert "shapes" not in chart.spec["layout"]
    assert not traces(chart, mode="markers")


def test_the_switch_between_the_axes_names_both_ranges(results: Results) -> None:
    chart = charts.accuracy_chart(results)
    assert chart is not None
    purposes, axes = chart.switches
    assert [value for _, value in purposes.options] == ["speed", "accuracy"]
    logarithmic, linear = (value for _, value in axes.options)
    assert linear == {"xaxis.type": "linear", "xaxis.range": [0, 4000], "xaxis.tickmode": "auto"}
    low, high = logarithmic["xaxis.range"]
    assert low < math.log10(5) < math.log10(4000) < high


def test_ratios_keep_their_intervals(results: Results) -> None:
    (before, _) = traces(charts.ratio_chart(results))
    assert before["x"] == [3.3, 12.8, 3.3]
    row = results["ratios"][1]
    assert before["x"][1] + before["error_x"]["array"][1] == pytest.approx(row["interval"][1])
    assert before["x"][1] - before["error_x"]["arrayminus"][1] == pytest.approx(row["interval"][0])


def test_rows_of_two_arms_do_not_cover_each_other(results: Results) -> None:
    before, after = traces(charts.ratio_chart(results))
    assert not set(before["y"]) & set(after["y"])
    assert [round(y) for y in before["y"]] == [round(y) for y in after["y"]] == [0, 1, 2]


def test_open_ends_have_no_bar() -> None:
    bars = error_bars([2.0, 3.0], [[None, 4.0], [1.0, None]], "--accent")
    assert bars["array"] == [2.0, 0]
    assert bars["arrayminus"] == [0, 2.0]


def test_a_bound_is_an_open_triangle_outside_the_band(results: Results) -> None:
    chart = charts.ratio_curve_chart(results)
    line = traces(chart, legendgroup="after", mode="lines+markers")[0]
    band = traces(chart, legendgroup="after", mode="lines")[0]
    assert line["marker"]["symbol"][-1] == "triangle-up-open"
    assert line["marker"]["symbol"].count("triangle-up-open") == 1
    assert max(band["x"]) < max(line["x"])


def test_diverged_settings_are_crosses(results: Results) -> None:
    chart = charts.sensitivity_chart(results)
    for trace in traces(chart, legendgroup="plain"):
        crosses = {x for x, s in zip(trace["x"], trace["marker"]["symbol"], strict=True) if s == "x-thin-open"}
        init = trace["meta"]
        wanted = {r["lr"] for r in results["tuning"] if r["arm"] == "plain" and r["init"] == init and r["diverged"]}
        assert crosses == wanted != set()


def test_gradient_panels_share_one_scale_and_skip_zeros(results: Results) -> None:
    results["gradients"][0]["norms"][3] = 0.0
    panels = charts.gradient_charts(results)
    assert [panel.id for panel in panels] == ["gradients-start", "gradients-middle", "gradients-end"]
    assert len({tuple(panel.spec["layout"]["yaxis"]["range"]) for panel in panels}) == 1
    assert panels[0].spec["data"][0]["y"][3] is None


def test_drift_panels_share_one_scale(results: Results) -> None:
    ranges = {tuple(panel.spec["layout"]["yaxis"]["range"]) for panel in charts.drift_charts(results)}
    assert len(ranges) == 1
    low, high = ranges.pop()
    assert low < min(min(row["p15"]) for row in results["drift"])
    assert high > max(max(row["p85"]) for row in results["drift"])


def test_train_and_test_accuracy_are_joined_in_one_row(results: Results) -> None:
    row = results["regularization"][1]
    trace = traces(charts.regularization_chart(results))[1]
    assert trace["x"] == [row["test_accuracy"], row["train_accuracy"]]
    assert trace["y"][0] == trace["y"][1] == 1


def test_timing_is_in_milliseconds(results: Results) -> None:
    trace = traces(charts.timing_chart(results))[0]
    assert trace["x"] == [pytest.approx(0.41)]
    assert trace["error_x"]["array"] == [pytest.approx(0.05)]
    assert trace["error_x"]["arrayminus"] == [pytest.approx(0.02)]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1.0, 12.0], ["1×", "2×", "5×", "10×"]),
        ([5, 4000], ["10×", "30×", "100×", "300×", "1,000×", "3,000×"]),
        ([1e-7, 1.0], ["10<sup>−7</sup>×", "10<sup>−5</sup>×", "0.001×", "0.1×"]),
        ([3e-6, 9e-6], ["3×10<sup>−6</sup>×", "4×10<sup>−6</sup>×", "5×10<sup>−6</sup>×", "7×10<sup>−6</sup>×"]),
        ([3.0, 3.0], ["3×"]),
        ([1e-30, 1.0], None),
    ],
)
def test_a_log_axis_has_a_few_round_ticks_within_its_range(values: list[float], ticks: list[str] | None) -> None:
    axis = log_axis("", values, suffix="×")
    low, high = axis["range"]
    assert low < math.log10(min(values)) <= math.log10(max(values)) < high
    assert 1 <= len(axis["tickvals"]) <= 6
    assert all(low <= math.log10(tick) <= high for tick in axis["tickvals"])
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])
    if ticks is not None:
        assert axis["ticktext"] == ticks


def test_labels_cannot_bring_markup_of_their_own(results: Results) -> None:
    for arm in results["arms"]:
        arm["label"] = f"<b>{arm['label']}</b><a href='x'>"
    results["gradients"][0]["layers"][0] = "<i>layer</i>"
    for chart in all_charts(results):
        text = json.dumps(chart.spec)
        assert not re.search(r"<(b|a|i)[ >]", text), chart.id
    assert folded("a <b> c") == "a &lt;b&gt; c"


def test_arms_beyond_the_palette_come_round_to_it(results: Results) -> None:
    results["arms"] += [{"id": f"arm{i}", "label": f"Arm {i}", "parameters": 1} for i in range(5)]
    results["timing"] += [{**results["timing"][0], "arm": f"arm{i}"} for i in range(5)]
    colours = [trace["marker"]["color"] for trace in traces(charts.timing_chart(results))]
    assert colours == [f"--arm-{i % 6}" for i in range(8)]


def test_nothing_measured_nothing_drawn(interrupted: Results) -> None:
    assert all_charts(interrupted) == []
    assert all(section.missing for section in sections(interrupted))
