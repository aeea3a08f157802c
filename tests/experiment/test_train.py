import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from steadynorm.experiment import train as train_module
from steadynorm.experiment.arms import BEFORE, PLAIN, Arm
from steadynorm.experiment.models import resolve
from steadynorm.experiment.problem import Problem
from steadynorm.experiment.train import Batches, Run, RunSpec, Step, _Divergence, accuracy, train, train_model

SPEC = RunSpec(PLAIN, "default", 0.3, seed=5, steps=40, batch_size=12)


def zeros(input_shape, classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    return model


def softmax_regression(x, y, lr, steps):
    """Gradient descent on the mean cross-entropy in float64, from zero weights, by its textbook gradient."""
    w, b, hot = np.zeros((x.shape[1], 3)), np.zeros(3), np.eye(3)[y]
    for _ in range(steps):
        z = x @ w + b
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        w, b = w - lr * x.T @ (p - hot) / len(x), b - lr * (p - hot).mean(0)
    return w, b


def test_full_batch_training_is_gradient_descent(blobs):
    problem = Problem.of(blobs, resolve(zeros))
    parts = problem.split(5)
    x, y = parts.x_train.flatten(1).double().numpy(), parts.y_train.numpy()
    # A batch larger than the training part is the training part, so the order plays no role.
    run, model = train_model(replace(SPEC, batch_size=1000, steps=50, test=True), problem)
    w, b = softmax_regression(x, y, 0.3, 50)
    np.testing.assert_allclose(model[1].weight.detach().numpy().T, w, atol=2e-6)
    np.testing.assert_allclose(model[1].bias.detach().numpy(), b, atol=2e-6)

    def share_right(images, labels):
        return float(((images.flatten(1).double().numpy() @ w + b).argmax(1) == labels.numpy()).mean())

    assert run.train_accuracy == pytest.approx(share_right(parts.x_train, parts.y_train), abs=1e-12)
    assert run.test_accuracy == pytest.approx(share_right(parts.x_test, parts.y_test), abs=1e-12)
    assert run.curve[-1] == pytest.approx(share_right(parts.x_val, parts.y_val), abs=1e-12)


def test_adam_moves_each_weight_by_the_learning_rate_at_first():
    # The bias-corrected first step of Adam is lr * sign(gradient).
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    Step(model, "adam", 0.01)(torch.tensor([[1.0, -2.0]]), torch.tensor([0]))
    expected = torch.tensor([[0.01, -0.01], [-0.01, 0.01]])
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-7, rtol=0)


def test_the_same_spec_gives_the_same_run(problem):
    spec = replace(SPEC, arm=BEFORE, dropout=0.2, probes=True, test=True)
    assert train(spec, problem) == train(spec, problem)


@pytest.mark.parametrize("change", [{"seed": 6}, {"lr": 0.2}, {"init": "corrected"}, {"batch_size": 13}])
def test_another_spec_gives_another_run(problem, change):
    assert train(SPEC, problem).curve != train(replace(SPEC, **change), problem).curve


def test_a_salt_changes_order_and_initialisation(problem):
    first, again = (train_model(replace(SPEC, steps=1, arm=Arm("x", "x", None, salt)), problem)[1] for salt in (0, 1))
    assert not torch.equal(first[1].weight, again[1].weight)


def test_the_name_of_an_arm_changes_nothing(problem):
    assert train(replace(SPEC, arm=Arm("other", "other")), problem) == train(SPEC, problem)


def test_all_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_batches(problem, monkeypatch):
    seen = {}

    class Watched(Step):
        def __call__(self, x, y):
            seen.setdefault(arm.id, []).append(x)
            return super().__call__(x, y)

    monkeypatch.setattr(train_module, "Step", Watched)
    weights = {}
    for arm in (PLAIN, BEFORE):
        model = train_model(replace(SPEC, arm=arm, lr=1e-30, dropout=0.2), problem)[1]
        weights[arm.id] = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert all(torch.equal(a, b) for a, b in zip(seen["plain"], seen["before"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights["plain"], weights["before"], strict=True))
    assert len(seen["plain"]) == 40


def test_training_leaves_random_state_and_threads_as_they_were(problem):
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train(replace(SPEC, dropout=0.5), problem)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_the_test_part_is_read_only_when_asked_for(problem):
    assert train(SPEC, problem).test_accuracy is None
    assert train(replace(SPEC, test=True), problem).test_accuracy is not None


def test_probes_and_the_test_part_do_not_change_the_training(problem):
    spec = replace(SPEC, arm=BEFORE)
    assert train(spec, problem).curve == train(replace(spec, probes=True, test=True), problem).curve


@pytest.mark.parametrize(("steps", "every", "evaluations"), [(40, 1, 40), (400, 1, 400), (2000, 5, 400), (999, 3, 333)])
def test_evaluations_are_spread_over_the_run(steps, every, evaluations, blobs):
    spec = replace(SPEC, steps=steps)
    assert spec.eval_every == every
    if steps <= 400:
        assert len(train(spec, Problem.of(blobs, resolve(zeros))).curve) == evaluations
    else:
        assert steps // every == evaluations


def test_the_final_accuracy_is_the_mean_of_the_last_tenth(problem):
    run = train(SPEC, problem)
    assert run.final_accuracy == pytest.approx(np.mean(run.curve[36:]), abs=1e-12)
    assert run.best_accuracy == max(run.curve)


def test_a_diverging_run_stops_and_says_when(problem):
    run = train(replace(SPEC, lr=1e30, steps=400), problem)
    assert run.diverged_at is not None
    assert run.diverged_at < 30
    assert len(run.curve) < 30


def test_a_batch_normalised_run_that_diverges_does_so_without_a_warning(problem):
    """Its layers refuse to remember what is not finite and would say so at each; warnings are errors in these tests."""
    run = train(replace(SPEC, arm=BEFORE, lr=1e30, steps=400), problem)
    assert run.diverged_at is not None


def test_a_loss_that_is_not_finite_counts_at_once():
    watch = _Divergence(10)
    assert [watch(loss) for loss in (2.3, math.inf)] == [False, True]
    assert _Divergence(10)(math.nan)


def test_a_high_loss_must_persist():
    limit = 10 * math.log(10)
    watch = _Divergence(10)
    assert not any(watch(limit + 1 if step else 2.3) for step in range(20))
    assert not watch(limit - 1)
    assert [watch(limit + 1) for _ in range(20)] == [False] * 19 + [True]


def test_a_network_that_starts_badly_gets_its_chance():
    watch = _Divergence(10)
    assert not any(watch(loss) for loss in np.linspace(500, 100, 200))


def test_batches_are_full_and_cover_every_epoch():
    batches = Batches(10, 4, torch.Generator().manual_seed(0))
    drawn = [next(batches) for _ in range(10)]
    assert all(len(rows) == 4 for rows in drawn)
    rows = torch.cat(drawn).tolist()
    assert all(sorted(rows[epoch * 10 : epoch * 10 + 10]) == list(range(10)) for epoch in range(4))
    assert rows[:10] != rows[10:20]


def test_accuracy_looks_at_the_evaluation_mode_and_puts_the_mode_back():
    model = nn.Sequential(nn.Dropout(1.0), nn.Identity()).train()
    scores = torch.eye(4)
    assert accuracy(model, scores, torch.tensor([0, 1, 2, 0]), chunk=3) == 0.75
    assert model.training


def test_arriving_takes_the_mean_of_three_evaluations():
    run = Run((0.5, 0.9, 0.7, 0.8, 0.9, 1.0), 1.0, 1.0, 1.0)
    assert run.steps_to(0.8, eval_every=5) == 20  # (0.9 + 0.7 + 0.8) / 3 at the fourth
    assert run.steps_to(0.95, eval_every=5) is None


def test_a_run_survives_json(problem):
    run = train(replace(SPEC, arm=BEFORE, probes=True, test=True), problem)
    assert Run.from_json(json.loads(json.dumps(run.as_json()))) == run
