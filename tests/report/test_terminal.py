import io

import pytest
from rich.console import Console

from steadynorm.errors import DataError
from steadynorm.report import print_report
from steadynorm.report.schema import Results


def printed(results: Results, *, width: int = 80, terminal: bool = False, **options: object) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    print_report(results, console, **options)
    return console.file.getvalue()


def test_it_fits_eighty_columns_without_colours_when_piped(results: Results) -> None:
    text = printed(results)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text
    for found in (
        "3.3× fewer steps",
        "350",
        "12.8×",
        "(10.8 to 15.2)",
        "✗ contradicted",
        "1.55 decades (1.31 to 1.79)",
    ):
        assert found in " ".join(text.split()), found


def test_a_terminal_gets_colours(results: Results) -> None:
    text = printed(results, terminal=True)
    assert "\x1b[32m✓ supported" in text
    assert "\x1b[31m✗ contradicted" in text


def test_the_path_of_the_report_is_one_unbroken_word(results: Results) -> None:
    path = "/a/very/long/" + "folder/" * 15 + "runs[bold]/report.html"
    assert f"Report: {path}\n" in printed(results, report=path)
    assert "Report:" not in printed(results)


def test_labels_are_text_and_not_markup(results: Results) -> None:
    results["arms"][1]["label"] = results["summaries"][1]["label"] = "[red]hot[/red]"
    results["claims"][0]["claim"] = "[/nonsense]"
    text = printed(results)
    assert "[red]hot[/red]" in text
    assert "[/nonsense]" in text


def test_an_interrupted_run_says_so_and_prints_no_empty_table(interrupted: Results) -> None:
    text = printed(interrupted)
    assert "Interrupted" in text
    assert "─" not in text


def test_an_arm_that_never_arrived(results: Results) -> None:
    results["summaries"][0].update(
        steps_to_target=None, steps_interval=[None, None], lr_range=None, seconds_per_step=None
    )
    text = printed(results)
    assert "not reached" in text
    assert "none" in text
    assert "(–)" not in text


def test_another_schema_is_refused(results: Results) -> None:
    results["schema"] = 99
    with pytest.raises(DataError):
        printed(results)


def test_the_default_console_is_the_standard_output(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(results)
    assert "95.2 %" in capsys.readouterr().out
