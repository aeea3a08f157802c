import torch
from torch import nn

from steadynorm.experiment.models import resolve
from steadynorm.experiment.problem import Problem, derived_seed


def test_seeds_for_different_purposes_differ():
    seeds = {derived_seed(*parts) for parts in [(0, "a"), (0, "b"), (1, "a"), (0, 1, "a"), ("01", "a")]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_wild_features_are_each_multiplied_by_their_own_factor(problem):
    tame, wild = problem.split(4), problem.split(4, "wild")
    factors = wild.x_train / tame.x_train
    spread = factors.flatten(1).amax(0) / factors.flatten(1).amin(0)
    torch.testing.assert_close(spread, torch.ones(5), atol=1e-5, rtol=0)
    each = factors[0].flatten()
    assert len(set(each.tolist())) == 5
    assert bool(((each >= 1e-3 * 0.999) & (each <= 1e3 * 1.001)).all())
    torch.testing.assert_close(wild.x_test / tame.x_test, factors[0].expand_as(wild.x_test))
    assert torch.equal(wild.y_test, tame.y_test)


def test_factors_are_log_uniform_over_seeds(problem):
    logs = torch.cat(
        [
            (problem.split(seed, "wild").x_train[0] / problem.split(seed).x_train[0]).log10().flatten()
            for seed in range(60)
        ]
    )
    # 300 draws of U(-3, 3): mean 0 with standard error 0.1, standard deviation sqrt(3) with one of about 0.05.
    assert abs(logs.mean().item()) < 0.4
    assert abs(logs.std().item() - 3**0.5) < 0.2


def test_a_table_s_wild_features_start_from_the_raw_ones(table, tiny_model):
    wild = Problem.of(table, resolve(tiny_model)).split(2, "wild")
    raw = {tuple(row) for row in table.x.tolist()}
    factor = None
    for row in raw:
        candidate = wild.x_train[0] / torch.tensor(row)
        scaled = {tuple(round(v, 3) for v in (wild.x_train[k] / candidate).tolist()) for k in range(5)}
        if scaled <= {tuple(round(v, 3) for v in r) for r in raw}:
            factor = candidate
    assert factor is not None, "no factors turn the wild training examples back into raw ones"


def test_standardised_wild_features_have_mean_zero_and_variance_one(problem):
    x = problem.split(1, "wild, standardised").x_train.double()
    torch.testing.assert_close(x.mean(0), torch.zeros(1, 1, 5, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(1, 1, 5, dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_fingerprint_tells_networks_apart(blobs):
    def of(width):
        return Problem.of(
            blobs, resolve(lambda: nn.Sequential(nn.Flatten(), nn.Linear(5, width), nn.Linear(width, 3)))
        ).fingerprint

    assert of(3) == of(3) != of(4)


def test_splits_do_not_depend_on_what_was_asked_before(problem):
    wanted = problem.split(0).x_train.clone()
    for seed in range(1, 8):
        problem.split(seed)
    assert torch.equal(problem.split(0).x_train, wanted)


def _factory(place):
    def build(norm=None):
        layers = [nn.Flatten(), nn.Linear(5, 8), *([norm(8)] if norm and place == 0 else []), nn.ReLU()]
        return nn.Sequential(*layers, *([norm(8)] if norm and place == 1 else []), nn.Linear(8, 3))

    return build


def test_a_network_that_changes_where_its_name_and_form_do_not_is_another_problem(blobs):
    """Resuming finished runs of the one for the other would report a network that was never trained."""
    one, same, other = (Problem.of(blobs, resolve(_factory(place))) for place in (0, 0, 1))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint
