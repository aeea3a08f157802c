"""A diagnosis is ranked, becomes plain data and is shown: as text, a Rich table, a page and a notebook's fragment."""

import io
import json

import pytest
from rich.console import Console

from steadynorm.errors import ArgumentError, DataError
from steadynorm.population.findings import Diagnosis, Finding

EVIL = "<script>alert(1)</script>[bold]"


def finding(severity: str, layer: str = "bn", kind: str = "kind", weight: float = 0.0, **evidence: object) -> Finding:
    return Finding(kind, severity, layer, f"Found {EVIL}.", evidence, "Do this.", weight)


def test_order_is_by_severity_then_weight_then_as_given():
    found = [finding("note", "a"), finding("error", "b"), finding("warning", "c"), finding("error", "d", weight=1.0)]
    found.append(finding("error", "e"))
    diagnosis = Diagnosis.ranked("net", 5, found)
    assert [f.layer for f in diagnosis.findings] == ["d", "b", "e", "c", "a"]
    assert diagnosis.worst == "error"
    assert [len(diagnosis.at_least(s)) for s in ("error", "warning", "note")] == [3, 4, 5]
    assert Diagnosis.ranked("net", 5, []).worst is None


def test_severities_are_three():
    with pytest.raises(ArgumentError, match="severity"):
        finding("fatal")
    with pytest.raises(ArgumentError, match="severity"):
        Diagnosis.ranked("net", 1, []).at_least("fatal")


def test_plain_data_is_json_even_of_nan():
    figures = {"loss": float("inf"), "accuracy": None}
    diagnosis = Diagnosis.ranked("net", 1, [finding("note", x=float("nan"), y=2, z=0.5)], figures)
    plain = json.loads(json.dumps(diagnosis.to_dict(), allow_nan=False))
    assert plain["findings"][0]["evidence"] == {"x": "nan", "y": 2, "z": 0.5}
    assert plain["figures"] == {"loss": "inf", "accuracy": None}
    assert "weight" not in plain["findings"][0]


def test_shown_with_layers_of_one_kind_together(tmp_path):
    found = [finding("error", f"layer{i}", first_channel=7) for i in range(4)]
    diagnosis = Diagnosis.ranked(EVIL, 4, found, {"loss_running": 0.25})
    text = str(diagnosis)
    assert text.count("Do this.") == 1
    assert "and 3 more" in text
    assert "4 errors" in text
    assert "Measured: loss running 0.25" in text
    assert max(map(len, text.splitlines())) <= 100
    out = io.StringIO()
    Console(file=out, width=100).print(diagnosis)
    assert "layer0" in out.getvalue()
    page = diagnosis.to_html(tmp_path / "sub" / "page.html").read_text()
    for shown in (page, diagnosis._repr_html_()):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert "layer0" in shown
    assert "layer3" in page
    assert "first channel 7" in page
    assert "and 3 more" in diagnosis._repr_html_()
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["page.html"]


def test_nothing_found_is_said(tmp_path):
    diagnosis = Diagnosis.ranked("net", 1, [])
    assert str(diagnosis) == "net, 1 batch norm: nothing found."
    assert "nothing found" in diagnosis.to_html(tmp_path / "page.html").read_text()
    assert "<table>" not in diagnosis._repr_html_()


def test_a_page_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        Diagnosis.ranked("net", 1, []).to_html(tmp_path / "file" / "page.html")
