import copy
import json

import pytest
import torch

from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.experiment import Arm, Comparison, compare, pipeline
from steadynorm.experiment.arms import AFTER, PLAIN
from steadynorm.experiment.runner import LOG_NAME
from steadynorm.experiment.saved import load_model
from steadynorm.experiment.split import split

SMALL = {"seeds": 2, "tuning_seeds": 1, "steps": 10, "batch_size": 12, "jobs": 1, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, table, tiny_model):
    where = tmp_path_factory.mktemp("compare")
    compare(table, tiny_model, out=where, **SMALL)
    return where


@pytest.fixture(scope="module")
def results(folder):
    return Comparison.load(folder).results


BRIEF = {**SMALL, "studies": ("gradients", "batch_size")}


@pytest.fixture(scope="module")
def brief(table, tiny_model):
    """Without the longer studies, in memory alone."""
    return compare(table, tiny_model, **BRIEF).results


def without_seconds(results):
    kept = copy.deepcopy(results)
    kept["timing"] = kept["saved_model"] = None
    kept["claims"] = [claim for claim in kept["claims"] if claim["id"] != "time"]
    for row in kept["summaries"]:
        row["seconds_per_step"] = row["seconds_to_target"] = None
    return kept


def test_every_section_is_filled(results):
    assert results["status"] == "complete"
    assert [arm["id"] for arm in results["arms"]] == ["plain", "before", "after"]
    empty = [name for name, section in results.items() if section in ([], {}, None)]
    assert empty == []
    assert [claim["id"] for claim in results["claims"]] == [
        "gradients",
        "steps",
        "accuracy",
        "standardisation",
        "regularisation",
        "time",
    ]


def test_the_same_seeds_give_the_same_numbers(results, brief):
    sections = ("target", "tuning", "choices", "curves", "runs", "ratios", "ratio_curve", "gradients", "batch_sizes")
    for section in sections:
        assert results[section] == brief[section], section


def test_files_are_written(folder):
    assert {path.name for path in folder.iterdir()} == {"results.json", "report.html", "best_model", LOG_NAME}
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_best_normalised_model_reloads_to_its_accuracy_one_example_at_a_time(folder, results, table, tiny_model):
    model = load_model(folder / results["saved_model"], tiny_model)
    record = json.loads((folder / "best_model" / "model.json").read_text())
    assert any(isinstance(m, torch.nn.BatchNorm1d) for m in model.modules())
    parts = split(table, record["seed"])
    right = sum(int(model(x[None]).argmax()) == int(y) for x, y in zip(parts.x_test, parts.y_test, strict=True)) / len(
        parts.y_test
    )
    measured = [
        row["test_accuracy"]
        for row in results["runs"]
        if (row["arm"], row["seed"], row["purpose"]) == (record["arm"], record["seed"], "accuracy")
    ]
    assert measured == [right]


def test_an_interrupted_comparison_keeps_what_it_has_and_goes_on(table, tiny_model, tmp_path, monkeypatch, brief):
    def ctrl_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.studies, "batch_sizes", ctrl_c)
        partial = compare(table, tiny_model, out=tmp_path, **BRIEF)
    assert partial.results["status"] == "interrupted"
    assert Comparison.load(tmp_path).results["gradients"]
    assert partial.results["batch_sizes"] == []
    done = len((tmp_path / LOG_NAME).read_text().splitlines())
    assert done > 50
    resumed = compare(table, tiny_model, out=tmp_path, **BRIEF)
    assert without_seconds(resumed.results) == without_seconds(brief)
    keys = [json.loads(line)["key"] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert len(keys) == len(set(keys)) > done


@pytest.mark.parametrize("calls", [0, 1])
def test_an_early_interruption_leaves_a_readable_file(table, tiny_model, tmp_path, monkeypatch, calls):
    name = ("tune", "measure")[calls]

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, name, ctrl_c)
    compare(table, tiny_model, out=tmp_path, **SMALL)
    assert Comparison.load(tmp_path).results["status"] == "interrupted"


def test_studies_can_be_left_out(table, tiny_model):
    found = compare(table, tiny_model, studies=("drift",), **SMALL).results
    assert found["drift"]
    assert found["gradients"] == found["timing"] == found["standardization"] == found["batch_sizes"] == []


def test_another_first_seed_is_another_sample(table, tiny_model, brief):
    found = compare(table, tiny_model, first_seed=10_000, studies=(), **SMALL).results
    seeds = [{row["seed"] for row in results["runs"]} for results in (found, brief)]
    assert seeds == [{11_000, 11_001}, {1000, 1001}]
    assert [row["accuracies"] for row in found["tuning"]] != [row["accuracies"] for row in brief["tuning"]]


def test_a_given_target_is_used(table, tiny_model):
    found = compare(table, tiny_model, target=0.5, studies=(), **SMALL).results
    assert found["target"] == 0.5
    assert {row["target"] for row in found["ratios"]} == {0.5}


def test_arms_can_be_chosen(table, tiny_model):
    found = compare(table, tiny_model, arms=(PLAIN, AFTER), studies=(), **SMALL).results
    assert [row["arm"] for row in found["summaries"]] == ["plain", "after"]


class NoModules(torch.nn.Module):
    """A network of the user's own: activations are functions, batch norm is where it says."""

    def __init__(self, norm):
        super().__init__()
        self.a, self.b = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        self.norm = norm(6) if norm else torch.nn.Identity()

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x))))


def test_a_factory_of_the_user_s_own_is_compared_as_far_as_it_can_be(table):
    studies = ("gradients", "drift", "dropout")
    found = compare(table, NoModules, **{**SMALL, "studies": studies}).results
    assert [arm["id"] for arm in found["arms"]] == ["plain", "norm"]
    assert found["gradients"]
    assert found["drift"] == found["regularization"] == []
    assert [claim["verdict"] for claim in found["claims"] if claim["id"] == "regularisation"] == ["cannot tell"]


def test_two_plain_arms_differ_by_chance_alone(table, tiny_model):
    again = Arm("before", "plain again", None, salt=1)
    found = compare(table, tiny_model, arms=(PLAIN, again), studies=("gradients",), **SMALL).results
    assert {arm["parameters"] for arm in found["arms"]} == {36 + 42 + 21}
    first, second = ([row for row in found["runs"] if row["arm"] == arm] for arm in ("plain", "before"))
    assert [r["seed"] for r in first[:2]] == [r["seed"] for r in second[:2]]


def test_a_comparison_can_be_saved_loaded_and_shown(results, tmp_path):
    comparison = Comparison(results)
    comparison.save(tmp_path / "new")
    loaded = Comparison.load(tmp_path / "new")
    assert loaded.results == results
    assert "complete" in str(loaded)
    assert "<" in loaded._repr_html_()


def test_files_that_are_no_results_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        Comparison.load(tmp_path)
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(DataError, match="does not hold"):
        Comparison.load(tmp_path)
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(DataError):
        Comparison.load(tmp_path)


def test_bad_arguments_are_errors_before_anything_is_written(table, tiny_model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArgumentError, match="steps"):
        compare(table, tiny_model, out=out, **{**SMALL, "steps": 1})
    with pytest.raises(ModelError, match="on a batch of shape"):
        compare(table, torch.nn.Sequential(torch.nn.Linear(9, 4), torch.nn.ReLU()), out=out, **SMALL)
    with pytest.raises(DataError):
        compare("no/such/file.csv", tiny_model, out=out, **SMALL)
    assert not out.exists()


def test_a_folder_that_cannot_be_made_is_an_error(table, tiny_model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        compare(table, tiny_model, out=tmp_path / "file", **SMALL)
