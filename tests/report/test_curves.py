from steadynorm.report.curves import chosen_curves, curve_groups
from steadynorm.report.schema import Curve, Results


def settings(curves: list[Curve]) -> list[tuple[str, str, float]]:
    return [(curve["arm"], curve["init"], curve["lr"]) for curve in curves]


def with_default_initialisation(results: Results) -> Results:
    """Every arm measured for speed at the default initialisation too, ahead of its best setting in the list."""
    speed = [curve for curve in results["curves"] if curve["purpose"] == "speed"]
    results["curves"] = [{**curve, "init": "default", "lr": 0.01} for curve in speed] + results["curves"]
    return results


def test_the_chosen_curve_is_that_of_the_chosen_setting(results: Results) -> None:
    with_default_initialisation(results)
    assert settings(chosen_curves(results, "speed")) == [
        ("plain", "corrected", 0.9999),
        ("before", "corrected", 3.1623),
        ("after", "corrected", 3.1623),
    ]
    assert settings(chosen_curves(results, "accuracy"))[0] == ("plain", "corrected", 0.3162)


def test_without_a_choice_the_first_curve_stands_in(results: Results) -> None:
    with_default_initialisation(results)
    results["summaries"] = []
    assert {init for _, init, _ in settings(chosen_curves(results, "speed"))} == {"default"}


def test_another_initialisation_is_a_group_of_its_own(results: Results) -> None:
    assert list(curve_groups(results)) == ["speed", "accuracy"]
    groups = curve_groups(with_default_initialisation(results))
    assert list(groups) == ["speed", "accuracy", "speed, default initialisation"]
    assert settings(groups["speed, default initialisation"]) == [
        (arm, "default", 0.01) for arm in ("plain", "before", "after")
    ]


def test_an_arm_whose_best_is_that_initialisation_belongs_to_the_group_too(results: Results) -> None:
    with_default_initialisation(results)
    summary = results["summaries"][1]
    summary["choice_speed"] = {**summary["choice_speed"], "init": "default", "lr": 0.01}
    groups = curve_groups(results)
    assert [arm for arm, _, _ in settings(groups["speed, default initialisation"])] == ["plain", "before", "after"]
    assert settings(groups["speed"])[1] == ("before", "default", 0.01)


def test_curves_without_a_step_are_no_curves(results: Results) -> None:
    for curve in results["curves"]:
        curve["steps"] = [0]
    assert curve_groups(results) == {}
