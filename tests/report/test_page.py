"""The page in a real browser: that the charts draw, the console is clean, and nothing runs off a phone's side."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steadynorm.report import write_html
from steadynorm.report.schema import Results
from support_browser import chromium, load

CHARTS = 14

pytestmark = pytest.mark.browser

DRAWN = """
[...document.querySelectorAll('.chart')].map(chart => ({
  id: chart.id,
  plot: chart.classList.contains('js-plotly-plot'),
  canvases: chart.querySelectorAll('svg.main-svg').length,
  marks: [...chart.querySelectorAll('.scatterlayer .trace path')].filter(p => p.getAttribute('d')?.length > 4).length,
  width: chart.querySelector('svg.main-svg')?.getBoundingClientRect().width,
  room: chart.parentElement.getBoundingClientRect().width,
  colour: chart._fullLayout?.font.color,
}))
"""
# Resolves once every chart wears the colour of the current theme; false where that has not come after 600 frames.
THEMED = """
new Promise(done => {
  let frames = 0;
  const look = () => {
    const wanted = getComputedStyle(document.documentElement).getPropertyValue('--muted').trim();
    const all = [...document.querySelectorAll('.chart')].every(c => c._fullLayout?.font.color === wanted);
    if (all || ++frames > 600) done(all); else requestAnimationFrame(look);
  };
  look();
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as process:
        yield process


@pytest.fixture(scope="module")
def report(_whole: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_html(_whole, tmp_path_factory.mktemp("page") / "report.html")


def check(page: Any, width: int) -> None:
    drawn = page.evaluate(DRAWN)
    assert len(drawn) == CHARTS
    for chart in drawn:
        assert chart["plot"], chart
        assert chart["canvases"] >= 1, chart
        assert chart["marks"] >= 1, chart
        assert 0 < chart["width"] <= chart["room"] + 1, chart
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints() == []


@pytest.mark.parametrize(("width", "height", "dark"), [(1200, 900, False), (390, 844, True)])
def test_the_charts_draw_in_both_themes_without_a_word_from_the_console(
    browser: Any, report: Path, width: int, height: int, dark: bool
) -> None:
    with browser.open(report, width=width, height=height, dark=dark) as page:
        assert page.drawn()
        assert page.evaluate(THEMED)
        check(page, width)
        page.theme(dark=not dark)
        assert page.evaluate(THEMED)
        check(page, width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        check(page, width)
        assert page.requests() == [report.resolve().as_uri()]


def test_the_buttons_change_the_axis_the_settings_and_the_arms(browser: Any, report: Path) -> None:
    shown = """(() => {
      const chart = document.getElementById('chart-accuracy');
      const lines = chart._fullData.filter(t => t.visible === true && t.fill === 'none' && t.mode === 'lines');
      return [chart._fullLayout.xaxis.type, lines.length, lines[0].meta];
    })()"""

    def press(where: str, text: str) -> None:
        buttons = f"[...document.querySelectorAll('#accuracy {where} button')]"
        page.evaluate(f"{buttons}.find(button => button.textContent.includes('{text}')).click()")

    with browser.open(report, width=1200, height=900) as page:
        assert page.drawn()
        assert page.evaluate(shown) == ["log", 3, "speed"]
        press(".switch", "linear")
        assert page.evaluate(shown) == ["linear", 3, "speed"]
        press(".switch", "accuracy")
        assert page.evaluate(shown) == ["linear", 3, "accuracy"]
        press(".legend", "Plain")
        assert page.evaluate(shown) == ["linear", 2, "accuracy"]
        page.theme(dark=True)  # a change of theme keeps what was chosen
        assert page.evaluate(THEMED)
        assert page.evaluate(shown) == ["linear", 2, "accuracy"]
        press(".legend", "Plain")
        press(".switch", "logarithmic")
        assert page.evaluate(shown) == ["log", 3, "accuracy"]
        assert page.complaints() == []


def test_the_check_notices_a_complaint_and_a_request(browser: Any, tmp_path: Path) -> None:
    page_file = tmp_path / "bad.html"
    page_file.write_text(
        '<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        '<div style="width:900px">wide</div><img src="missing.png"><script>nonsense()</script>',
        encoding="utf-8",
    )
    with browser.open(page_file, width=390, height=844) as page:
        assert any("nonsense is not defined" in text for text in page.complaints())
        assert any("missing.png" in address for address in page.requests())
        assert page.evaluate("document.documentElement.scrollWidth") > 390


def test_an_interrupted_report_opens_cleanly(browser: Any, interrupted: Results, tmp_path: Path) -> None:
    with browser.open(write_html(interrupted, tmp_path / "report.html"), width=390, height=844) as page:
        assert page.complaints() == []
        assert page.evaluate("document.querySelector('.notice').textContent").startswith("Interrupted.")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_picture_for_the_readme(browser: Any, report: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = load("readme_picture")
    picture.take(browser, report, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size < picture.LIMIT
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width == picture.WIDTH
        assert image.height > 1000
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50
