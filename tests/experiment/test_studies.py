import math
from statistics import median

import numpy as np
import pytest

from steadynorm.experiment import rows, studies
from steadynorm.experiment.arms import AFTER, BEFORE, PLAIN, Arm
from steadynorm.experiment.lab import Lab, measure, tune
from steadynorm.experiment.progress import Progress
from steadynorm.experiment.runner import Runner
from steadynorm.experiment.search import INITS
from steadynorm.experiment.timing import ROUNDS, seconds_per_step
from steadynorm.experiment.train import Run, RunSpec


class Spy(Runner):
    """Keeps every spec that it was asked for."""

    def __init__(self, problem):
        super().__init__(problem, 1, None, Progress(False))
        self.asked: list[RunSpec] = []

    def run(self, specs):
        self.asked += specs
        return super().run(specs)


@pytest.fixture(scope="module")
def lab(problem):
    base = RunSpec(PLAIN, "default", 1.0, 0, steps=15, batch_size=12)
    return Lab(Spy(problem), (PLAIN, BEFORE, AFTER), base, *Lab.seeds(2, 3))


@pytest.fixture(scope="module")
def measured(lab):
    tuning, target = tune(lab, None)
    return measure(lab, tuning, target)


def test_tuning_and_fresh_seeds_have_none_in_common():
    for few_or_many in (3, 3000):
        tuning, fresh = Lab.seeds(few_or_many, 100)
        assert len({*tuning, *fresh}) == few_or_many + 100
    here, elsewhere = Lab.seeds(100, 100), Lab.seeds(100, 100, 5000)
    assert len({*here[0], *here[1], *elsewhere[0], *elsewhere[1]}) == 400


def test_the_target_is_99_percent_of_the_plain_network_s_own(lab, measured):
    plain = [row for row in measured.tuning.rows(measured.target) if row["arm"] == "plain"]
    best = max(median(row["accuracies"]) for row in plain)
    assert measured.target == pytest.approx(0.99 * best, abs=1e-12)
    assert tune(lab, 0.625)[1] == 0.625


def test_settings_are_chosen_on_tuning_seeds_and_measured_on_fresh_ones(lab, measured):
    tuned = {spec.seed for spec in lab.runner.asked if not spec.test and spec.seed < 1000}
    assert tuned == {0, 1}
    assert all(len(runs) == 3 for runs in measured.runs.values())
    assert not any(spec.test for spec in lab.runner.asked if spec.seed in lab.tuning_seeds)


def test_each_arm_has_a_fastest_setting_for_each_initialisation(measured):
    for arm in ("plain", "before", "after"):
        assert all(measured.speed[arm, init].init == init for init in INITS)
        assert measured.speed[arm, "tuned"] in [measured.speed[arm, init] for init in INITS]


def test_fresh_runs_are_paired_by_seed_and_tested_only_for_accuracy(lab, measured):
    found = rows.fresh_runs(lab, measured)
    for arm in ("plain", "before", "after"):
        of_arm = [row for row in found if row["arm"] == arm and row["purpose"] == "accuracy"]
        assert [row["seed"] for row in of_arm] == [1000, 1001, 1002]
        assert all(row["test_accuracy"] is not None for row in of_arm)
    assert all(row["test_accuracy"] is None for row in found if row["purpose"] == "speed")


def test_curves_are_pointwise_percentiles(lab, measured):
    row = rows.curves(lab, measured)[0]
    table = np.array([run.curve for run in measured.runs[measured.accuracy["plain"]]])
    assert row["steps"] == list(range(1, 16))
    np.testing.assert_allclose(row["p50"], np.median(table, 0))
    np.testing.assert_allclose(row["p90"], np.percentile(table, 90, 0))


def test_the_curve_of_a_diverged_run_goes_on_where_it_ended():
    assert rows._padded(Run((0.4, 0.5), 0.1, 0.5, 0.1, diverged_at=3), 4) == [0.4, 0.5, 0.1, 0.1]


def test_ratios_are_those_of_the_paired_steps(lab, measured):
    found = {(row["arm"], row["init"]): row for row in rows.ratios(lab, measured)}
    assert set(found) == {(arm, init) for arm in ("before", "after") for init in ("tuned", *INITS)}
    for (arm, init), row in found.items():
        plain, other = (rows.steps_of(measured.runs[measured.speed[a, init]], row["target"], 1) for a in ("plain", arm))
        assert (row["reached_plain"], row["reached_arm"]) == tuple(
            sum(n is not None for n in steps) for steps in (plain, other)
        )
        if None not in plain + other:
            logs = [math.log(p / o) for p, o in zip(plain, other, strict=True)]
            assert row["ratio"] == pytest.approx(math.exp(sum(logs) / 3))


def test_the_ratio_curve_rises_through_targets(lab, measured):
    targets = [row["target"] for row in rows.ratio_curve(lab, measured) if row["arm"] == "before"]
    assert targets == sorted(targets)
    assert targets[0] < measured.target <= targets[-1]


def test_a_summary_gathers_an_arm_s_figures(lab, measured):
    timing = [{"arm": "before", "seconds_per_step": 0.5}]
    plain, before, _ = rows.summaries(lab, measured, timing)
    runs = measured.runs[measured.accuracy["before"]]
    assert before["test_accuracy"] == pytest.approx(np.mean([run.test_accuracy for run in runs]))
    assert before["final_accuracy"] == pytest.approx(np.mean([run.final_accuracy for run in runs]))
    assert before["best_accuracy"] == pytest.approx(np.mean([max(run.curve) for run in runs]))
    assert plain["seconds_per_step"] is None
    steps = before["steps_to_target"]
    assert before["seconds_to_target"] == (None if steps is None else pytest.approx(0.5 * steps))


def test_gradients_are_compared_with_he_initialisation_in_every_arm(lab, measured):
    lab.runner.asked.clear()
    runs = studies.gradients(lab, measured)
    assert {spec.init for spec in lab.runner.asked} == {"corrected"}
    assert all(spec.probes for spec in lab.runner.asked)
    found = studies.gradient_rows(runs)
    assert [(row["arm"], row["phase"]) for row in found] == [
        (arm, phase) for arm in ("plain", "before", "after") for phase in ("start", "middle", "end")
    ]
    row = found[1]
    norms = np.array([run.gradients["middle"]["norms"] for run in runs["plain"]])
    np.testing.assert_allclose(row["norms"], np.median(norms, 0))
    assert row["spread_decades"] == pytest.approx(np.median(np.log10(norms.max(1) / norms.min(1))))
    spreads, counts = studies.gradient_evidence(runs)
    worst = [
        max(abs(math.log10(r["norms"][0] / r["norms"][1])) for r in run.gradients.values()) for run in runs["plain"]
    ]
    assert spreads["plain"] == pytest.approx(worst)
    assert counts["plain"]["phases"] == 9


def probed(norms, **fields):
    records = {phase: {"step": 1, "layers": ["a", "b"], "norms": norms} for phase in ("start", "middle", "end")}
    return Run((0.1,), 0.1, 0.1, 0.1, gradients=records, **fields)


def test_gradients_that_vanish_explode_or_end_are_counted():
    start_only = {"start": probed([1.0, 1.0]).gradients["start"]}
    runs = [
        probed([0.01, 1.0]),
        probed([math.inf, 1.0]),
        probed([0.0, 1.0]),
        Run((), 0.1, 0.1, 0.1, diverged_at=5, gradients=start_only),
    ]
    spreads, counts = studies.gradient_evidence({"x": runs})
    assert spreads["x"] == [pytest.approx(2.0), None, None, None]
    assert counts["x"] == {"phases": 10, "vanishing": 6, "exploding": 3, "diverged": 1}
    found = studies.gradient_rows({"x": [probed([math.inf, 1.0])]})
    assert all(math.isfinite(norm) for row in found for norm in row["norms"])
    assert found[0]["verdict"] == "exploding"
    assert studies.gradient_rows({"x": [probed([])]}) == []


def test_drift_is_that_of_the_middle_seed(lab, measured):
    found = {row["arm"]: row for row in studies.drift(lab, measured)}
    for arm in ("plain", "before", "after"):
        drifts = [run.drift["drift"] for run in measured.runs[measured.accuracy[arm]]]
        assert found[arm]["drift"] == sorted(drifts)[1]


def test_batch_sizes_go_both_ways(lab, measured):
    found = studies.batch_sizes(lab, measured)
    assert [row["batch_size"] for row in found if row["arm"] == "before"] == [2, 3, 12, 48]
    same = next(row for row in found if row["arm"] == "before" and row["batch_size"] == 12)
    runs = measured.runs[measured.accuracy["before"]]
    assert same["final_accuracy"] == pytest.approx(np.mean([run.final_accuracy for run in runs]))


def test_dropout_is_tuned_on_validation_and_compared_on_the_same_seeds(lab, measured):
    lab.runner.asked.clear()
    found, evidence = studies.regularization(lab, measured)
    tuning = [spec for spec in lab.runner.asked if spec.seed in lab.tuning_seeds]
    assert not any(spec.test for spec in tuning)
    assert len({(spec.arm, spec.lr) for spec in tuning}) == 9
    assert {spec.dropout for spec in lab.runner.asked} == {0.5}
    assert [(row["arm"], row["dropout"]) for row in found] == [
        (arm, p) for arm in ("plain", "before", "after") for p in (0.0, 0.5)
    ]
    for row in found:
        side = evidence[row["arm"]].with_dropout if row["dropout"] else evidence[row["arm"]].without
        assert len(side) == 3
        assert row["test_accuracy"] == pytest.approx(np.mean(side))
        assert row["gap"] == pytest.approx(row["train_accuracy"] - row["test_accuracy"])


def test_every_remedy_for_wild_features_gets_the_same_search(lab, measured):
    lab.runner.asked.clear()
    found, evidence = studies.standardization(lab, measured)
    assert (
        [row["condition"] for row in found]
        == list(evidence)
        == [
            "plain, raw",
            "plain, standardised",
            "batch norm in the hidden layers, raw",
            "batch norm as first layer, raw",
        ]
    )
    tuning = [spec for spec in lab.runner.asked if spec.seed in lab.tuning_seeds]
    start = {0.01, 0.03162, 0.1, 0.3162, 1.0}
    cases = {(spec.arm.where, spec.scaling, spec.init) for spec in tuning}
    plain, normed = measured.accuracy["plain"].init, measured.accuracy["before"].init
    assert cases == {
        (None, "wild", plain),
        (None, "wild, standardised", plain),
        ("before", "wild", normed),
        ("first", "wild", plain),  # its hidden layers are the plain network's
    }
    for where, scaling, init in cases:
        of_case = [s.lr for s in tuning if (s.arm.where, s.scaling, s.init) == (where, scaling, init)]
        assert start <= set(of_case)
    for row in found:
        assert row["test_accuracy"] == pytest.approx(np.mean(evidence[row["condition"]]))


def test_a_null_experiment_has_no_remedy_at_all(problem):
    base = RunSpec(PLAIN, "default", 1.0, 0, steps=10, batch_size=12)
    null = Lab(Spy(problem), (PLAIN, Arm("before", "plain again", None, 1)), base, *Lab.seeds(1, 2))
    studies.standardization(null, measure(null, *tune(null, None)))
    assert {spec.arm.where for spec in null.runner.asked} == {None}


def test_seconds_are_ratios_within_rounds(lab, measured, monkeypatch):
    # A clock by which a step of the n-th arm takes n seconds, and every round twice as long as the one before.
    from steadynorm.experiment import timing

    def measure_by_hand(lab, measured):
        return {arm.id: [(n + 1) * 1.1**turn for turn in range(ROUNDS)] for n, arm in enumerate(lab.arms)}

    true_rows = seconds_per_step(lab, measured)
    assert all(row["seconds_per_step"] > 0 and row["p20"] <= row["seconds_per_step"] <= row["p80"] for row in true_rows)
    monkeypatch.setattr(timing, "_measure", measure_by_hand)
    found = seconds_per_step(lab, measured)
    assert [row["ratio_to_plain"] for row in found] == pytest.approx([1.0, 2.0, 3.0])
    assert found[2]["ratio_interval"] == pytest.approx([3.0, 3.0])
    assert found[0]["seconds_per_step"] == pytest.approx(np.median([1.1**turn for turn in range(ROUNDS)]))
