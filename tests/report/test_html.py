import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from steadynorm.errors import DataError
from steadynorm.report import html, write_html
from steadynorm.report.schema import Results

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Outline(HTMLParser):
    """Every element with its attributes, the text of each heading, and whether all that was opened was closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline(_whole: Results) -> Outline:
    return Outline(html.render_html(_whole))


def test_the_page_is_well_formed_and_headed(outline: Outline) -> None:
    assert outline.open == []
    assert len(outline.named("h1")) == 1
    for heading in ("Accuracy against steps", "The claims, one by one", "How it was done", "Limits"):
        assert heading in outline.headings
    assert outline.named("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.named("meta")


def test_nothing_is_loaded_from_anywhere(outline: Outline) -> None:
    for tag, attributes in outline.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            if tag == "link" and attributes.get("rel") == "icon":
                assert attributes["href"] == "data:,"
            else:
                assert name not in attributes, (tag, attributes)
    policy = next(m["content"] for m in outline.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|self", policy)
    css = (Path(html.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    assert "url(" not in css
    assert "@import" not in css


def test_tables_have_captions_and_scopes_and_charts_have_words(outline: Outline) -> None:
    assert len(outline.named("caption")) == len(outline.named("table")) == 12
    assert {cell.get("scope") for cell in outline.named("th")} == {"col", "row"}
    charts = [e for e in outline.named("div") if e.get("class") == "chart"]
    assert len(charts) == 14
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)
    assert len(outline.named("details")) >= 9


def test_hostile_names_stay_text(results: Results) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
    results["arms"][1]["label"] = results["summaries"][1]["label"] = evil
    results["gradients"][0]["layers"][0] = evil
    results["data"]["name"] = results["model"]["name"] = results["model"]["description"] = evil
    results["settings"]["data"] = evil
    results["environment"][evil] = evil
    results["claims"][0]["claim"] = results["claims"][0]["explanation"] = results["claims"][0]["statistic"] = evil
    results["standardization"][0]["condition"] = evil
    results["target_source"] = results["version"] = evil
    page = html.render_html(results)
    found = Outline(page)
    assert len(found.named("script")) == 3  # the figures, the library, and the few lines that draw them
    assert not found.named("img")
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert evil in "".join(found.text)


def test_the_data_are_told_in_one_sentence(outline: Outline) -> None:
    said = " ".join("".join(outline.text).split())
    assert (
        "3 hidden layers of 100 sigmoid units; 1,077 training, 360 validation and 360 test examples of 10 classes; "
        "10 fresh seeds, paired across arms." in said
    )


def test_a_verdict_is_a_word_and_not_only_a_colour(outline: Outline) -> None:
    said = "".join(outline.text)
    for verdict in ("supported", "contradicted", "no material difference", "cannot tell"):
        assert verdict in said


def test_a_full_report_has_nothing_missing(outline: Outline) -> None:
    assert "Not in this report" not in outline.headings
    assert "Interrupted" not in "".join(outline.text)


def test_an_interrupted_report_says_so_and_carries_no_library(interrupted: Results) -> None:
    page = html.render_html(interrupted)
    found = Outline(page)
    said = "".join(found.text)
    assert "Interrupted." in said
    assert "These parts were not reached before the interruption: Accuracy against steps; The claims" in said
    assert "Not in this report" in found.headings
    assert "Accuracy against steps" not in found.headings
    assert len(page) < 30_000


def test_a_study_left_out_is_named(results: Results) -> None:
    results["batch_sizes"], results["timing"] = [], []
    said = "".join(Outline(html.render_html(results)).text)
    assert "These parts were not measured: The effect of the batch size; The price of a step." in said


def test_a_winner_at_the_edge_of_the_search_is_a_stated_limit(results: Results) -> None:
    said = "".join(Outline(html.render_html(results)).text)
    assert said.count("lay at the edge of the widest search") == 2
    for choice in results["choices"]:
        choice["at_edge"] = False
    assert "at the edge" not in "".join(Outline(html.render_html(results)).text)


def test_an_arm_that_never_arrived(results: Results) -> None:
    results["summaries"][0].update(
        steps_to_target=None, steps_interval=[None, None], lr_range=None, seconds_per_step=None, seconds_to_target=None
    )
    said = "".join(Outline(html.render_html(results)).text)
    assert "not reached" in said
    assert "none of those tried" in said
    assert "(–)" not in said


def test_missing_ends_and_figures_are_drawn_around(results: Results) -> None:
    for row in results["ratios"]:
        row.update(ratio=None, interval=[None, None], method="none")
    for row in (*results["batch_sizes"], *results["standardization"]):
        row["interval"] = [None, None]
    for claim in results["claims"]:
        claim.update(estimate=None, interval=None, verdict="cannot tell")
    for row in results["summaries"]:
        row["test_interval"] = [None, None]
    assert "too few runs" in html.render_html(results)


def test_the_file_appears_whole_and_alone(results: Results, tmp_path: Path) -> None:
    target = write_html(results, tmp_path / "new" / "folder" / "report.html")
    assert target.read_text(encoding="utf-8") == html.render_html(results)
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


def test_a_failure_leaves_the_old_page_and_no_remains(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old", encoding="utf-8")

    def full_disk(self: Path, *_: Any, **__: Any) -> int:
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_html(results, target)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_another_schema_is_refused_before_anything_is_written(results: Results, tmp_path: Path) -> None:
    results["schema"] = 7
    with pytest.raises(DataError):
        write_html(results, tmp_path / "sub" / "report.html")
    assert not (tmp_path / "sub").exists()
