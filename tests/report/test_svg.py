import math
import re
from xml.etree import ElementTree as ET

import pytest

from steadynorm.report.schema import Claim, Results
from steadynorm.report.svg import Line, interval_svg, line_chart_svg


def claim(**changes: object) -> Claim:
    base = {"id": "accuracy", "unit": "points", "smallest_effect": 0.5, "estimate": 0.9, "interval": [0.2, 1.6]}
    return {**base, **changes}


def drawn(text: str) -> dict[str, ET.Element]:
    return {element.get("class", element.tag): element for element in ET.fromstring(text).iter()}


def number(element: ET.Element, name: str) -> float:
    return float(element.attrib[name])


def test_places_on_the_picture_are_linear_in_the_figures() -> None:
    parts = drawn(interval_svg(claim()))
    null, zone = number(parts["null"], "x1"), parts["zone"]
    unit = number(zone, "width")  # the zone is 1 point wide: from -0.5 to 0.5
    assert number(zone, "x") == pytest.approx(null - 0.5 * unit, abs=0.2)
    assert number(parts["point"], "cx") == pytest.approx(null + 0.9 * unit, abs=0.2)
    assert number(parts["range"], "x1") == pytest.approx(null + 0.2 * unit, abs=0.2)
    assert number(parts["range"], "x2") == pytest.approx(null + 1.6 * unit, abs=0.2)


def test_ratios_are_drawn_on_their_logarithm() -> None:
    parts = drawn(interval_svg(claim(unit="times", smallest_effect=1.25, estimate=5.0, interval=[2.5, 10.0])))
    low, high = number(parts["range"], "x1"), number(parts["range"], "x2")
    assert number(parts["point"], "cx") == pytest.approx((low + high) / 2, abs=0.2)
    assert (number(parts["point"], "cx") - number(parts["null"], "x1")) / (high - low) == pytest.approx(
        math.log(5) / math.log(4), abs=0.01
    )
    texts = [e.text for e in ET.fromstring(interval_svg(claim(unit="times", smallest_effect=1.25))).iter("text")]
    assert texts == ["0.8×", "1.25×"]


def test_an_open_end_has_an_arrow_and_a_closed_one_has_none() -> None:
    for interval, arrows in (([1.0, 2.0], 0), ([1.0, None], 1), ([None, 2.0], 1), ([None, None], 2), (None, 2)):
        assert interval_svg(claim(interval=interval)).count("<path") == arrows


def test_a_claim_that_nothing_is_lost_has_a_margin_and_no_zone() -> None:
    parts = drawn(interval_svg(claim(id="standardisation", smallest_effect=1.0, estimate=0.1, interval=[-0.6, 0.8])))
    assert "zone" not in parts
    margin, null, point = number(parts["margin"], "x1"), number(parts["null"], "x1"), number(parts["point"], "cx")
    assert (point - null) / (null - margin) == pytest.approx(0.1, abs=0.01)


def test_edges_too_close_for_two_numbers_share_one() -> None:
    def texts(one: Claim) -> list[str | None]:
        return [element.text for element in ET.fromstring(interval_svg(one)).iter("text")]

    assert texts(claim(estimate=20.0, interval=[-5.0, 45.0])) == ["±0.5"]
    assert texts(claim(unit="times", smallest_effect=1.25, estimate=200.0, interval=[90.0, 400.0])) == ["0.8× to 1.25×"]
    assert texts(claim()) == ["−0.5", "0.5"]


def test_no_estimate_no_picture() -> None:
    assert interval_svg(claim(estimate=None)) == ""
    assert interval_svg(claim(unit="times", estimate=0.0)) == ""


def test_every_claim_of_the_results_stays_inside_its_picture(results: Results) -> None:
    for one in results["claims"]:
        text = interval_svg(one)
        for name in ("x", "x1", "x2", "cx"):
            assert all(0 <= float(v) <= 300 for v in re.findall(rf' {name}="([^"]+)"', text)), one["id"]


def test_a_line_chart_puts_values_where_they_belong() -> None:
    lines = [Line("a<b", "#123456", [0, 1, 10, 100], [0.9, 0.0, 0.5, 1.0])]
    root = ET.fromstring(line_chart_svg(lines, x_title="steps", y_title="accuracy", level=0.5))
    path = next(e for e in root.iter("path") if e.get("stroke") == "#123456").attrib["d"]
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path) if p.strip()]
    assert len(points) == 3  # step 0 has no place on a logarithmic axis
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    level = next(e for e in root.iter("path") if e.get("stroke-dasharray")).attrib["d"]
    assert float(level.split()[1]) == pytest.approx(y1)
    assert "a<b" in root.attrib["aria-label"]


def test_a_single_point_is_no_division_by_zero() -> None:
    ET.fromstring(line_chart_svg([Line("a", "red", [10], [0.5])], x_title="x", y_title="y"))
