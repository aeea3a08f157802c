"""A shift report shows itself: as text, as JSON, as a page in a browser, in a notebook."""

import json
from pathlib import Path

import numpy as np
import pytest

import steadynorm as sn
from support_browser import chromium

EVIL = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def report():
    rng = np.random.default_rng(0)
    n = 800
    before = {
        EVIL: rng.normal(size=n),
        "town": rng.choice(["Rome", "Oslo", EVIL], n),
        "when": np.datetime64("2024-01-01") + np.arange(n),
        "gone": np.full(n, np.nan),
    }
    after = before | {EVIL: rng.normal(1, 1, n), "town": rng.choice(["Rome", "Bonn", EVIL], n), "new": np.zeros(n)}
    return sn.shift.compare(before, after, classifier_rows=300)


def test_json_is_strict_and_complete(report):
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert (data["schema"], data["kind"], data["verdict"]) == (1, "covariate shift", "shifted")
    assert [feature["name"] for feature in data["features"]] == [feature.name for feature in report.features]
    assert {"verdict", "reason", "effects", "distances", "q", "new", "vanished", "facts"} <= set(data["features"][0])
    assert data["domain"]["auc"] > 0.5
    assert data["schema_changes"]["only_current"] == ["new"]
    assert "not yet a lost accuracy" in data["caveat"]


def test_text_fits_and_names_what_moved(report):
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("Shifted: ")
    assert "Only the current data has: new." in text
    assert "Domain classifier: AUC" in text


def test_a_notebook_s_fragment_is_escaped(report):
    fragment = report._repr_html_()
    assert "<img" not in fragment
    assert "<script" not in fragment
    assert "&lt;img" in fragment


class TestPage:
    def test_it_is_escaped_and_loads_nothing(self, report, tmp_path):
        path = report.write_html(tmp_path / "deep" / "shift.html")
        page = path.read_text(encoding="utf-8")
        assert "<img" not in page
        assert "<script" not in page
        assert "default-src 'none'" in page
        assert [file.name for file in path.parent.iterdir()] == ["shift.html"]

    @pytest.mark.browser
    @pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
    def test_it_draws_in_a_browser(self, report, tmp_path, width, dark):
        path = report.write_html(tmp_path / "shift.html")
        with chromium() as browser, browser.open(Path(path), width=width, height=900, dark=dark) as page:
            assert page.complaints() == []
            assert page.requests() == [path.resolve().as_uri()]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            pictures = page.evaluate(
                "[...document.querySelectorAll('.picture svg')].map(s => s.getBoundingClientRect().width * "
                "s.querySelectorAll('path, rect, line').length)"
            )
            assert len(pictures) >= 6
            assert min(pictures) > 0
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
