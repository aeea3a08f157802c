import pytest

from steadynorm.errors import DataError
from steadynorm.report import notebook_html
from steadynorm.report.schema import Results


def test_the_fragment_is_light_and_has_no_script(results: Results) -> None:
    text = notebook_html(results)
    assert len(text) < 20_000
    for banned in ("<script", "<style", "http", "<html", "javascript:"):
        assert banned not in text.lower(), banned
    assert text.count("<svg") == 1
    for found in ("3.3× fewer steps", "350", "1.55 decades", "contradicted"):
        assert found in text


def test_names_are_escaped(results: Results) -> None:
    evil = "<img src=x onerror=alert(1)>"
    results["arms"][0]["label"] = results["summaries"][0]["label"] = evil
    results["claims"][0]["claim"] = evil
    text = notebook_html(results)
    assert "<img" not in text
    assert text.count("&lt;img src=x") >= 4  # legend, picture, arms, claims


def test_tables_have_scopes_and_keep_only_the_columns_asked_for(results: Results) -> None:
    text = notebook_html(results)
    assert text.count('<th scope="col"') == 8
    assert text.count('<th scope="row"') == 9
    assert "298 to 402" in text  # of two columns called "95 % interval", that of the steps
    assert "95.5 to 96.5" not in text


def test_accuracy_curves_stand_in_where_there_are_none_for_speed(results: Results) -> None:
    results["curves"] = [curve for curve in results["curves"] if curve["purpose"] == "accuracy"]
    assert notebook_html(results).count('stroke-width="2"') == 3


def test_interrupted(interrupted: Results) -> None:
    text = notebook_html(interrupted)
    assert "Interrupted" in text
    assert "<svg" not in text
    assert "<table" not in text


def test_another_schema_is_refused(results: Results) -> None:
    results["schema"] = 0
    with pytest.raises(DataError):
        notebook_html(results)
