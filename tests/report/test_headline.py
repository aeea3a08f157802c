import pytest

from steadynorm.report.headline import headline, headline_ratio
from steadynorm.report.schema import Results


def with_ratio(results: Results, **changes: object) -> Results:
    row = headline_ratio(results)
    assert row is not None
    row.update(changes)
    return results


def test_fewer_steps(results: Results) -> None:
    assert headline(with_ratio(results, ratio=3.31, interval=[2.74, 3.94])) == (
        "Batch norm before the nonlinearity reached 95.2 % validation accuracy in 3.3× fewer steps "
        "(95 % interval 2.7 to 3.9)."
    )


def test_more_steps_turns_the_ratio_and_its_interval_over(results: Results) -> None:
    assert headline(with_ratio(results, ratio=0.5, interval=[0.4, 0.8])) == (
        "Batch norm before the nonlinearity needed 2.0× more steps to reach 95.2 % validation accuracy "
        "(95 % interval 1.2 to 2.5)."
    )


@pytest.mark.parametrize("interval", [[0.9, 1.4], [1.0, 1.4], [0.7, 1.0]])
def test_an_interval_that_holds_one_is_no_finding(results: Results, interval: list[float]) -> None:
    text = headline(with_ratio(results, ratio=1.1, interval=interval))
    assert "No difference in the steps" in text


def test_at_least(results: Results) -> None:
    text = headline(
        with_ratio(results, ratio=6.0, interval=[4.2, None], method="at least", reached_plain=2, reached_arm=10)
    )
    assert text == (
        "Batch norm before the nonlinearity reached 95.2 % validation accuracy in at least 6.0× fewer steps "
        "(95 % interval 4.2 or more): 10 of 10 against 2 of 10 runs arrived."
    )


def test_at_least_without_an_interval_says_why(results: Results) -> None:
    text = headline(with_ratio(results, ratio=7.1, interval=[None, None], method="at least", reached_plain=0))
    assert "at least 7.1× fewer steps (too few runs for an interval): 10 of 10 against 0 of 10" in text


def test_at_most_never_speaks_of_fewer_steps(results: Results) -> None:
    text = headline(with_ratio(results, ratio=1.5, interval=[None, 2.0], method="at most", reached_arm=3))
    assert "at most 1.5× the steps of batch norm before the nonlinearity" in text
    assert "3 of 10 against 10 of 10 runs arrived" in text
    assert "fewer" not in text


def test_no_ratio(results: Results, interrupted: Results) -> None:
    assert "too few runs reached" in headline(with_ratio(results, ratio=None, interval=[None, None], method="none"))
    assert "stopped before" in headline(interrupted)


def test_the_arm_is_the_one_named_beforehand_even_where_another_did_better(results: Results) -> None:
    for row in results["ratios"]:
        if row["arm"] == "after":
            row["ratio"], row["interval"] = 50.0, [40.0, 60.0]
    results["ratios"].reverse()
    assert headline(results).startswith("Batch norm before")


def test_without_that_arm_the_first_other_one_speaks(results: Results) -> None:
    results["ratios"] = [row for row in results["ratios"] if row["arm"] == "after"]
    assert headline(results).startswith("Batch norm after the nonlinearity reached")


def test_only_the_tuned_ratio_is_headline_material(results: Results) -> None:
    results["ratios"] = [row for row in results["ratios"] if row["init"] != "tuned"]
    assert headline_ratio(results) is None
