import math

import pytest
import torch
from torch import nn

from steadynorm.errors import ArgumentError, ModelError
from steadynorm.experiment.arms import AFTER, BEFORE, OWN, PLAIN, Arm, arms_for, build
from steadynorm.experiment.models import resolve
from steadynorm.report.schema import INITS

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FIRST = Arm("first", "first", "first")


def kinds(model: nn.Module) -> list[str]:
    """The leaves in order, by the name of the torch.nn class that they are or extend."""
    names = {nn.BatchNorm1d: "BN1", nn.BatchNorm2d: "BN2", nn.Linear: "Linear", nn.Conv2d: "Conv", nn.Dropout: "Drop"}
    leaves = [m for m in model.modules() if not list(m.children())]
    return [next((short for kind, short in names.items() if isinstance(m, kind)), type(m).__name__) for m in leaves]


def seeded(arm, model="sigmoid-mlp", shape=(1, 8, 8), **options):
    torch.manual_seed(3)
    return build(resolve(model), arm, shape, 10, **options)


def test_batch_norm_goes_before_each_hidden_nonlinearity_and_the_dead_biases_go():
    model = seeded(BEFORE)
    assert kinds(model) == ["Flatten", *["Linear", "BN1", "Sigmoid"] * 3, "Linear"]
    biases = [m.bias is not None for m in model.modules() if isinstance(m, nn.Linear)]
    assert biases == [False, False, False, True]
    assert [m.num_features for m in model.modules() if isinstance(m, NORMS)] == [100] * 3


def test_batch_norm_goes_after_each_hidden_nonlinearity_and_the_biases_stay():
    model = seeded(AFTER)
    assert kinds(model) == ["Flatten", *["Linear", "Sigmoid", "BN1"] * 3, "Linear"]
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Linear))


def test_convolutions_get_batch_norm_over_channels():
    model = seeded(BEFORE, "small-cnn")
    assert kinds(model) == ["Conv", "BN2", "ReLU", "MaxPool2d"] * 2 + ["Flatten", "Linear"]
    assert [m.num_features for m in model.modules() if isinstance(m, NORMS)] == [16, 32]


def test_batch_norm_as_first_layer_normalises_each_feature():
    model = seeded(FIRST)
    assert kinds(model)[:4] == ["Flatten", "BN1", "Unflatten", "Flatten"]
    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 1000
    seen = []
    model[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.train()(x)
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(1, 8, 8), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[0].var(0, correction=0), torch.ones(1, 8, 8), atol=1e-3, rtol=0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("arm", [BEFORE, AFTER, FIRST])
def test_all_arms_of_a_seed_start_from_the_same_weights(arm, init):
    plain, other = (
        [m.weight for m in seeded(a, init=init).modules() if isinstance(m, nn.Linear)] for a in (PLAIN, arm)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_the_corrected_initialisation_is_he_s():
    model = seeded(PLAIN, "relu-mlp", init="corrected")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = torch.cat([m.weight.flatten() for m in linears[1:-1]])
    # 80,000 draws: the standard error of their standard deviation is 0.25 % of it.
    assert hidden.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.01)
    assert all(not m.bias.any() for m in linears)


def test_the_critical_initialisation_keeps_the_gradient():
    # sigmoid: 1 / sqrt(E[f'^2]) = 4.7226, where the signal's gain is 1.8462 (tests/init checks both against mpmath)
    model = seeded(PLAIN, "sigmoid-mlp", init="critical")
    hidden = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)][1:-1])
    # 20,000 draws: the standard error of their standard deviation is 0.5 % of it.
    assert hidden.std().item() == pytest.approx(4.7226 / 10, rel=0.02)


def test_the_default_initialisation_is_torch_s():
    model = seeded(PLAIN)
    weight = model[3].weight
    assert weight.abs().max().item() <= 0.1  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)) with fan_in = 100
    assert weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)


def test_one_activation_module_used_twice_gets_two_batch_norms():
    act = nn.ReLU()
    shared = nn.Sequential(nn.Linear(4, 8), act, nn.Linear(8, 6), act, nn.Linear(6, 10))
    assert kinds(build(resolve(shared), BEFORE, (4,), 10)).count("BN1") == 2


def test_nested_sequentials_are_searched():
    def factory():
        return nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 10)))

    assert kinds(build(resolve(factory), AFTER, (4,), 10)) == ["Linear", "ReLU", "BN1", "Linear"]


def test_an_activation_that_follows_no_layer_gets_none():
    def factory():
        return nn.Sequential(nn.Tanh(), nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 10), nn.Softmax(1))

    with pytest.raises(ModelError, match="found no place for batch norm"):
        build(resolve(factory), BEFORE, (4,), 10)


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_forward_of_ones_own_gets_it_too():
    before = build(resolve(Custom), BEFORE, (4,), 10)
    assert [name for name, module in before.named_modules() if isinstance(module, NORMS)] == ["a.batchnorm"]
    torch.manual_seed(3)
    plain = build(resolve(Custom), PLAIN, (4,), 10)
    torch.manual_seed(3)
    after = build(resolve(Custom), AFTER, (4,), 10)
    assert all(torch.equal(one, after.get_parameter(name)) for name, one in plain.named_parameters())
    assert isinstance(after.b.input_batchnorm, nn.BatchNorm1d)


class Powers(Custom):
    def forward(self, x):
        return self.b(self.a(x) ** 2)


def test_a_model_without_a_place_names_the_way_out():
    with pytest.raises(ModelError, match=r"Write a factory f\(norm\)"):
        build(resolve(Powers), BEFORE, (4,), 10)
    with pytest.raises(ModelError, match="dropout"):
        build(resolve(Custom), PLAIN, (4,), 10, dropout=0.5)


@pytest.mark.parametrize("arm", [PLAIN, BEFORE])
def test_a_plain_network_with_batch_norm_is_refused(arm):
    def factory():
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))

    with pytest.raises(ModelError, match="already holds batch norm"):
        build(resolve(factory), arm, (4,), 10)


def own_cnn(norm):
    layers = [nn.Conv2d(1, 4, 3), *([norm(4, 2)] if norm else []), nn.ReLU(), nn.Flatten(), nn.Linear(144, 7)]
    return nn.Sequential(*layers, *([norm(7)] if norm else []), nn.ReLU(), nn.Linear(7, 10))


def test_a_factory_places_batch_norm_itself():
    assert arms_for(resolve(own_cnn), None) == (PLAIN, OWN)
    assert kinds(seeded(PLAIN, own_cnn)).count("BN1") == 0
    with_norm = kinds(seeded(OWN, own_cnn))
    assert with_norm == ["Conv", "BN2", "ReLU", "Flatten", "Linear", "BN1", "ReLU", "Linear"]


def test_a_factory_that_knows_both_places_has_all_arms():
    def factory(norm, where):
        middle = [norm(8), nn.ReLU()] if where == "before" else [nn.ReLU(), norm(8)] if norm else [nn.ReLU()]
        return nn.Sequential(nn.Linear(4, 8), *middle, nn.Linear(8, 10))

    source = resolve(factory)
    assert arms_for(source, None) == (PLAIN, BEFORE, AFTER)
    found = [kinds(build(source, arm, (4,), 10)) for arm in (PLAIN, BEFORE, AFTER)]
    assert [k[1:-1] for k in found] == [["ReLU"], ["BN1", "ReLU"], ["ReLU", "BN1"]]


def test_an_own_arm_needs_a_factory_that_places_batch_norm():
    with pytest.raises(ModelError, match="factory f"):
        seeded(OWN)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (PLAIN, ["Linear", "Sigmoid", "Drop"]),
        (BEFORE, ["Linear", "BN1", "Sigmoid", "Drop"]),
        (AFTER, ["Linear", "Sigmoid", "BN1", "Drop"]),
    ],
)
def test_dropout_comes_last_in_each_hidden_block(arm, expected):
    model = seeded(arm, dropout=0.3)
    assert kinds(model) == ["Flatten", *expected * 3, "Linear"]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_dropout_comes_after_the_factory_s_own_batch_norm():
    def factory(norm):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), *([norm(8)] if norm else []), nn.Linear(8, 10))

    assert kinds(build(resolve(factory), OWN, (4,), 10, dropout=0.5)) == ["Linear", "ReLU", "BN1", "Drop", "Linear"]


@pytest.mark.parametrize("arms", [(), (PLAIN,), (PLAIN, Arm("plain", "again")), (BEFORE, AFTER)])
def test_unusable_lists_of_arms_are_refused(arms):
    with pytest.raises(ArgumentError, match="at least two"):
        arms_for(resolve("relu-mlp"), arms)


def test_a_null_experiment_may_have_two_plain_arms():
    arms = (PLAIN, Arm("before", "plain again", None, salt=1))
    assert arms_for(resolve("relu-mlp"), arms) == arms


def test_a_factory_that_drops_the_norm_it_was_handed_is_refused():
    source = resolve(lambda norm=None: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ModelError, match="without one"):
        build(source, OWN, (1, 8, 8), 10)
