import json
from dataclasses import replace

import pytest

from steadynorm.errors import ArgumentError, DataError, SteadynormError
from steadynorm.experiment import runner as runner_module
from steadynorm.experiment.arms import AFTER, BEFORE, PLAIN, Arm
from steadynorm.experiment.progress import Progress
from steadynorm.experiment.runner import LOG_NAME, Runner, available_cores, run_key
from steadynorm.experiment.train import RunSpec

SPEC = RunSpec(PLAIN, "default", 0.3, seed=0, steps=12, batch_size=12)
SPECS = [replace(SPEC, arm=arm, seed=seed, probes=True) for arm in (PLAIN, BEFORE, AFTER) for seed in (1, 2)]


def runner(problem, jobs=1, folder=None):
    return Runner(problem, jobs, folder, Progress(False))


@pytest.fixture
def no_training(monkeypatch):
    def refuse(spec, problem):
        raise AssertionError(f"trained {spec} again")

    monkeypatch.setattr(runner_module, "train", refuse)


def test_the_number_of_workers_changes_no_number(problem):
    assert runner(problem, 1).run(SPECS) == runner(problem, 2).run(SPECS)


def test_results_come_in_the_order_of_the_specs(problem):
    serial = runner(problem)
    assert serial.run(SPECS) == [serial.run([spec])[0] for spec in SPECS]


def test_no_run_is_made_twice(problem, monkeypatch):
    made = []
    true_train = runner_module.train
    monkeypatch.setattr(runner_module, "train", lambda spec, problem: made.append(spec) or true_train(spec, problem))
    one = runner(problem)
    one.run([SPEC, SPEC])
    one.run([SPEC, replace(SPEC, arm=Arm("other name", "other label"))])
    assert made == [SPEC]


def test_finished_runs_are_read_back(problem, tmp_path, monkeypatch):
    runs = runner(problem, folder=tmp_path).run(SPECS)
    monkeypatch.setattr(runner_module, "train", None)
    assert runner(problem, folder=tmp_path).run(SPECS) == runs


def test_an_interruption_keeps_what_was_finished(problem, tmp_path, monkeypatch):
    true_train = runner_module.train
    left = iter([True, True, True])

    def interrupted(spec, problem):
        if not next(left, False):
            raise KeyboardInterrupt
        return true_train(spec, problem)

    monkeypatch.setattr(runner_module, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(problem, folder=tmp_path).run(SPECS)
    assert len((tmp_path / LOG_NAME).read_text().splitlines()) == 3
    left = iter([True, True, True])
    assert len(runner(problem, folder=tmp_path).run(SPECS)) == 6


def test_a_line_cut_short_is_done_again(problem, tmp_path):
    runs = runner(problem, folder=tmp_path).run(SPECS[:2])
    log = tmp_path / LOG_NAME
    log.write_text(log.read_text()[:-40])
    assert runner(problem, folder=tmp_path).run(SPECS[:2]) == runs
    lines = log.read_text().splitlines()
    assert len(lines) == 2
    assert all("key" in json.loads(line) for line in lines)


@pytest.mark.parametrize("line", ["no json", "3", '{"key": "a"}', '{"key": "a", "run": {"curve": [], "odd": 1}}'])
def test_a_damaged_log_is_an_error(problem, tmp_path, line):
    (tmp_path / LOG_NAME).write_text(line + "\n")
    with pytest.raises(DataError, match="line 1 is not a finished run"):
        runner(problem, folder=tmp_path)


@pytest.mark.usefixtures("no_training")
def test_another_spec_or_problem_is_another_run(problem):
    changes = [{"lr": 0.1}, {"seed": 9}, {"test": True}, {"dropout": 0.1}, {"scaling": "wild"}, {"optimizer": "adam"}]
    specs = [SPEC, *(replace(SPEC, **change) for change in changes), replace(SPEC, arm=BEFORE)]
    keys = {run_key(spec, problem) for spec in specs}
    keys |= {run_key(spec, replace(problem, fingerprint="another")) for spec in specs}
    assert len(keys) == 2 * len(specs)


def test_progress_counts_runs(problem):
    bar = Progress(False)
    bar.foresee({"first": 4, "second": 10})
    bar.stage("first")
    Runner(problem, 1, None, bar).run(SPECS[:3])
    assert bar.counts == (3, 13)


def test_a_killed_worker_is_one_clear_error(problem, monkeypatch):
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    def killed(**_):
        def run(tasks):
            raise TerminatedWorkerError("SIGKILL")

        return run

    monkeypatch.setattr(joblib, "Parallel", killed)
    with pytest.raises(SteadynormError, match="fewer --jobs"):
        runner(problem, jobs=2).run(SPECS)


def test_jobs_must_be_positive(problem):
    with pytest.raises(ArgumentError, match="jobs must be at least 1"):
        runner(problem, jobs=0)
    assert available_cores() >= 1
