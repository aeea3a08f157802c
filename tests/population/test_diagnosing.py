"""Networks with one planted defect each, on real digits: right kind and layer come first; healthy ones are quiet."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.nn.watched import bn_layers
from steadynorm.population.findings import Diagnosis
from support_diagnosis import batches, cnn, digits, mlp, train, trained


@pytest.fixture(scope="module")
def healthy() -> nn.Module:
    return trained(mlp, 0)


def fresh(model: nn.Module) -> nn.Module:
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def named(found: Diagnosis) -> tuple[str, str]:
    return found.findings[0].kind, found.findings[0].layer


def of_layer(change: Callable[[nn.BatchNorm1d], object]) -> Callable[[nn.Module], object]:
    return lambda model: change(model.get_submodule("5"))


def set_(tensor: torch.Tensor, at: object, value: float) -> None:
    with torch.no_grad():
        tensor[at] = value


PLANTED = {
    "non-finite statistics": of_layer(lambda bn: set_(bn.running_mean, 3, float("nan"))),
    "negative variance": of_layer(lambda bn: set_(bn.running_var, 3, -0.2)),
    "zero variance": of_layer(lambda bn: set_(bn.running_var, 3, 0.0)),
    "exploded variance": of_layer(lambda bn: set_(bn.running_var, 3, 1e12)),
    "never updated": of_layer(lambda bn: bn.reset_running_stats()),
    "non-finite weights": of_layer(lambda bn: set_(bn.weight, 3, float("inf"))),
    "dead channels": of_layer(lambda bn: set_(bn.weight, slice(0, 8), 1e-6)),
    "eps comparable to variance": of_layer(lambda bn: setattr(bn, "eps", 10.0)),
    "half-precision buffers": of_layer(lambda bn: bn._buffers.update(running_var=bn.running_var.half())),
    "momentum not converged": of_layer(lambda bn: bn.num_batches_tracked.fill_(5)),
    "momentum 0": of_layer(lambda bn: setattr(bn, "momentum", 0.0)),
    "large momentum": of_layer(lambda bn: setattr(bn, "momentum", 0.99)),
    "cumulative average": of_layer(lambda bn: setattr(bn, "momentum", None)),
    "count lost": of_layer(lambda bn: bn.num_batches_tracked.zero_()),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_defect_of_the_weights_is_named_with_its_layer(healthy, kind):
    model = fresh(healthy)
    PLANTED[kind](model)
    assert named(sn.diagnose(model)) == (kind, "5")


def test_a_defect_of_the_weights_comes_before_its_symptoms_in_the_data(healthy):
    x, y = digits()
    for kind in ("negative variance", "exploded variance", "never updated"):
        model = fresh(healthy)
        PLANTED[kind](model)
        assert named(sn.diagnose(model, batches(x[1200:], y[1200:]))) == (kind, "5")


@pytest.mark.parametrize("build", [mlp, cnn])
@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_network_has_nothing_above_a_note(build, seed):
    model = trained(build, seed)
    x, y = digits()
    assert sn.diagnose(model, batches(x[1200:], y[1200:])).at_least("warning") == ()


def test_a_healthy_network_with_all_options(healthy):
    x, y = digits()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in healthy.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in healthy.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
    )
    found = sn.diagnose(
        healthy, batches(x[1200:], y[1200:]), reference=batches(x[:1200], y[:1200]), optimizer=optimizer
    )
    assert found.at_least("warning") == ()
    before = found.figures
    assert abs(before["recalibrating_wins_loss"]) < 0.02


@pytest.mark.parametrize("layer", ["2", "5"])
def test_stale_statistics_are_put_down_to_their_layer(healthy, layer):
    model, (x, y) = fresh(healthy), digits()
    norm = model.get_submodule(layer)
    with torch.no_grad():
        norm.running_mean += 2 * norm.running_var.sqrt()
        norm.running_var *= 4
    found = sn.diagnose(model, batches(x[:1200], y[:1200]))
    assert named(found) == ("stale statistics", layer)
    evidence = found.findings[0].evidence
    assert evidence["mean_shift"] == pytest.approx(2, rel=0.2)
    assert evidence["variance_ratio"] == pytest.approx(4, rel=0.2)
    assert found.figures["accuracy_population"] > 0.97
    assert found.figures["accuracy_running"] < found.figures["accuracy_population"] - 0.05


def test_stale_by_weights_that_moved_on(healthy):
    model, (x, y) = fresh(healthy), digits()
    with torch.no_grad():
        model.get_submodule("1").weight *= 3  # as averaged weights beside the buffers of others
    assert named(sn.diagnose(model, batches(x[:1200], y[:1200]))) == ("stale statistics", "2")


def test_small_batches(healthy):
    x, y = digits()
    found = sn.diagnose(healthy, batches(x[:600], y[:600], 3))
    assert [f.kind for f in found.at_least("warning")] == ["small batches"]
    assert found.findings[0].evidence["batch_size"] == 3
    assert found.findings[0].evidence["loss_batch"] == found.figures["loss_batch"] > found.figures["loss_population"]


def test_order_of_the_data(healthy):
    x, y = digits()
    order = y.argsort()
    found = sn.diagnose(healthy, batches(x[order], y[order]))
    assert named(found) == ("order of the data", "2")
    assert "small batches" not in {f.kind for f in found.findings}


def test_several_domains(healthy):
    x, y = digits()
    mixed = torch.where((torch.arange(len(x)) % 3 == 0)[:, None, None, None], 6 - 5 * x, x)
    torch.manual_seed(0)
    found = sn.diagnose(healthy_on(mixed, y), batches(mixed[1200:], y[1200:]))
    assert named(found) == ("several domains", "2")
    assert found.findings[0].evidence["share"] == pytest.approx(1 / 3, abs=0.02)


def healthy_on(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    return train(mlp(), x[:1200], y[:1200], seed=0)


def test_padding():
    x, y = digits()
    rows = torch.nn.functional.pad(x.reshape(-1, 8, 8) + 0.1, (0, 8))  # sequences of 8 columns, padded to 16
    model = nn.Sequential(nn.Conv1d(8, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    torch.manual_seed(0)
    train(model, rows[:1200], y[:1200], seed=0, steps=60)
    found = sn.diagnose(model, batches(rows[1200:], y[1200:]))
    assert named(found) == ("padding", "1")
    assert found.findings[0].evidence["share"] == pytest.approx(0.5, abs=0.03)


def test_dropout_before_batch_norm():
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Dropout(0.8), nn.BatchNorm1d(96)),
        *(nn.Linear(96, 96, bias=False), nn.ReLU(), nn.Dropout(0.8), nn.BatchNorm1d(96), nn.Linear(96, 10)),
    )
    train(model, x[:1200], y[:1200], seed=0, steps=300)
    found = sn.diagnose(model, batches(x[:1200], y[:1200]))
    assert named(found) == ("dropout before batch norm", "4")
    assert (
        found.findings[0].evidence["variance_ratio"] > 2
    )  # Var of x/q · Bernoulli(q): (Var + (1 - q) μ²) / q, q = 0.2


def test_data_shift_is_told_from_stale_statistics(healthy):
    x, y = digits()
    shifted = batches(3 * x[1200:] + 1, y[1200:])  # normalised twice, say
    assert named(sn.diagnose(healthy, shifted))[0] == "stale statistics"
    found = sn.diagnose(healthy, shifted, reference=batches(x[:1200], y[:1200]))
    assert found.findings[0].kind == "data shift"
    assert found.figures["loss_reference"] == pytest.approx(found.figures["loss_running"], rel=0.3)


def test_a_shift_that_no_statistics_repair(healthy):
    x, y = digits()
    found = sn.diagnose(healthy, [1 - a for a, _ in batches(x[1200:], y[1200:])], reference=batches(x[:1200], y[:1200]))
    assert found.findings[0].kind == "data shift"
    assert found.findings[0].evidence["mean_shift"] > 0.5
    assert sn.diagnose(healthy, [x[1200:]], reference=[x[:1200]]).at_least("warning") == ()


class Augmented:
    """A loader whose images are brightened at random, others each time."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.data, self.generator = batches(x, y), torch.Generator().manual_seed(1)

    def __iter__(self):
        for x, y in self.data:
            yield 3 * x + 2 * torch.rand(len(x), 1, 1, 1, generator=self.generator), y


def test_augmentation_that_differs():
    x, y = digits()
    model = trained(mlp, 0)
    loader = Augmented(x[:1200], y[:1200])
    with torch.no_grad():  # the statistics of training with it
        model.train()
        for _ in range(4):
            for inputs, _targets in loader:
                model(inputs)
    found = sn.diagnose(model.eval(), batches(x[:1200], y[:1200]), reference=loader)
    assert found.findings[0].kind == "augmentation differs"


def test_non_finite_batches(healthy):
    x, y = digits()
    spoilt = x[:640].clone()
    spoilt[130, 0, 0, 0] = float("inf")
    found = sn.diagnose(healthy, batches(spoilt, y[:640]))
    assert named(found) == ("non-finite batch", "")
    assert found.findings[0].evidence["first_batch"] == 2
    assert len(found.at_least("warning")) == 1


def test_a_last_batch_of_one(healthy):
    x, y = digits()
    found = sn.diagnose(healthy, [*batches(x[:256], y[:256]), (x[256:257], y[256:257])])
    assert "batch of one" in {f.kind for f in found.findings}


def test_biases_by_trace_and_by_order():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv, self.other = nn.BatchNorm2d(4), nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
            self.seen = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = x
            return self.bn(self.conv(x))

    class Untraceable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x) if x.sum() > 0 else x

    model = Branch()
    found = {f.kind: f for f in sn.diagnose(model).findings}
    assert found["bias before batch norm"].evidence == {"bias_of": "conv", "parameters": 4}
    assert model.seen is None
    found = {f.kind: f for f in sn.diagnose(Untraceable()).findings}
    assert found["bias before batch norm"].layer == "body.1"


def test_weight_decay_and_sync(healthy):
    optimizer = torch.optim.SGD(healthy.parameters(), 0.1, weight_decay=1e-4)
    found = sn.diagnose(healthy, optimizer=optimizer)
    assert named(found) == ("weight decay on batch norm", "2")
    assert found.findings[0].evidence == {"weight_decay": 1e-4, "parameters": 96}
    assert named(sn.diagnose(healthy, expect_sync=True)) == ("sync absent", "2")
    ours = mlp(sn.BatchNorm1d)
    ours.load_state_dict(healthy.state_dict())
    assert named(sn.diagnose(ours, expect_sync=True)) == ("sync absent", "2")
    synced = sn.sync_(ours)
    assert sn.diagnose(synced, expect_sync=True).at_least("warning") == ()


def test_the_model_is_left_as_it_was(healthy):
    model, (x, y) = fresh(healthy).train(), digits()
    model.get_submodule("2").eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        model.get_submodule("5").running_var.mul_(9)
        before["5.running_var"].mul_(9)
    sn.diagnose(model, batches(x[:256], y[:256]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert [m.training for m in model.modules()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError, match="the forward failed on a batch of 64: RuntimeError"):
        sn.diagnose(model, batches(x[:256, :, :4], y[:256]))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_own_loss_and_forward_and_inputs_alone(healthy):
    x, y = digits()
    as_dicts = [{"pixels": a, "labels": b} for a, b in batches(x[:256], y[:256])]
    found = sn.diagnose(healthy, as_dicts, forward=lambda batch: healthy(batch["pixels"]))
    assert found.figures["accuracy_running"] > 0.9  # labels by their name
    found = sn.diagnose(healthy, [x[:64], x[64:128]])
    assert found.figures == {"examples": 128}
    assert "no loss" in [finding.kind for finding in found.findings]
    assert found.worst == "note"
    onehot = [(a, nn.functional.one_hot(b, 10).float()) for a, b in batches(x[:256], y[:256])]
    found = sn.diagnose(healthy, onehot, loss=lambda out, y: nn.functional.mse_loss(out.softmax(1), y))
    assert found.figures["loss_running"] < 0.02
    assert found.figures["accuracy_running"] is None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("model",), ArgumentError, "got str"),
        ((nn.Linear(2, 2),), ModelError, "has none"),
        ((nn.BatchNorm1d(2), 3), ArgumentError, "got int"),
        ((nn.BatchNorm1d(2), []), DataError, "no batch"),
        ((nn.BatchNorm1d(2), ["a"]), DataError, "no tensor"),
    ],
)
def test_bad_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        sn.diagnose(*arguments)


def test_more_bad_arguments():
    layer = nn.BatchNorm1d(2)
    with pytest.raises(ArgumentError, match="give both"):
        sn.diagnose(layer, reference=[torch.ones(3, 2)])
    with pytest.raises(ArgumentError, match="at least 2"):
        sn.diagnose(layer, [torch.ones(3, 2)], examples=1)
    with pytest.raises(ArgumentError, match=r"torch\.optim"):
        sn.diagnose(layer, optimizer="sgd")
    with pytest.raises(DataError, match="reference data"):
        sn.diagnose(layer, [torch.ones(3, 2)], reference=[torch.full((3, 2), torch.nan)])
    with pytest.raises(ModelError, match="none of the model's batch norms"):
        sn.diagnose(layer, [torch.ones(3, 2)], forward=lambda batch: batch)


def test_a_layer_that_runs_twice_is_measured_over_both(capsys):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.bn, self.last = nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.bn(self.first(x.flatten(1)))
            return self.last(self.bn(h.relu()))

    x, y = digits()
    torch.manual_seed(0)
    model = Twice()
    found = sn.diagnose(model, batches(x[:256], y[:256]), progress=True)
    assert found.findings[0].kind == "never updated"
    from steadynorm.nn.watched import bn_layers
    from steadynorm.population.examples import read_batches
    from steadynorm.population.swapping import Swapper, left_alone

    layers, kept = bn_layers(model), read_batches(batches(x[:256], y[:256]), model, 256).kept
    with left_alone(model):
        mean, var = Swapper(model, layers, None, None).population(kept)["bn"]
    inputs = model.first(x[:256].flatten(1)).detach().double()
    new = (inputs / (1 + model.bn.eps) ** 0.5).relu()  # by mean 0 and variance 1, what it held while it was measured
    both = torch.cat([inputs, new])
    torch.testing.assert_close(mean, both.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var, both.var(0), rtol=1e-5, atol=1e-6)


def test_stale_statistics_are_said_without_a_loss_too(healthy):
    x, _ = digits()
    stale = copy.deepcopy(healthy)
    first = bn_layers(stale)[0]
    first[1].running_mean += 5 * first[1].running_var.sqrt()
    found = sn.diagnose(stale, [x[:256], x[256:512]])
    worst = found.findings[0]
    assert (worst.kind, worst.severity, worst.layer) == ("stale statistics", "warning", first[0])


def test_nothing_of_the_model_is_touched_in_training_mode_either():
    """Tracing runs the forward, which may count, draw and note things down; hooks are the user's own."""

    class Busy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.register_buffer("steps", torch.zeros(()))
            self.notes: list[object] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            self.notes.append(type(x))
            return self.norm(self.lin(x)) + torch.rand(())

    model, seen = Busy(), []
    model.lin.register_forward_hook(lambda *_: seen.append(1))
    data = [torch.randn(32, 4)] * 3
    before, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    sn.diagnose(model)
    assert (model.notes, seen) == ([], [])
    sn.diagnose(model, data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_a_mask_at_the_first_layer():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = sn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x, mask=x[:, 0] > -1)

    assert "padding" not in [f.kind for f in sn.diagnose(Masked(), [torch.randn(32, 3, 5)] * 3).findings]


def test_a_branch_that_the_first_batch_leaves_out_is_measured():
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.a(self.b(x) if len(x) == 64 else x))

    model = Optional()
    data = [torch.randn(size, 4) for size in (32, 64, 32, 64)]
    sn.recalibrate_(model, data, order="sequential")
    model.b.running_mean += 5
    found = sn.diagnose(model, data)
    assert next(f.layer for f in found.findings if f.kind == "stale statistics") == "b"


def test_a_loss_that_is_infinite_either_way_tells_nothing(healthy):
    x, y = digits()

    def loss(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        each = nn.functional.cross_entropy(output, y, reduction="none")
        each[0] = torch.inf
        return each

    assert "stale statistics" not in [
        f.kind for f in sn.diagnose(healthy, batches(x[:512], y[:512]), loss=loss).findings
    ]


def test_a_compiled_model_is_run_uncompiled(healthy):
    x, y = digits()
    plain = sn.diagnose(healthy, batches(x[:256], y[:256]))
    compiled = sn.diagnose(torch.compile(healthy, fullgraph=True), batches(x[:256], y[:256]))
    assert compiled.figures == plain.figures


def test_two_kinds_that_are_the_classes_are_no_complaint():
    torch.manual_seed(0)
    y = torch.arange(640) % 2
    x = torch.randn(640, 4) + 12 * y[:, None] * torch.tensor([1.0, 0, 0, 0])
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(60):
        for a, b in zip(x.split(64), y.split(64), strict=True):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(a), b).backward()
            optimiser.step()
    found = sn.diagnose(model, list(zip(x.split(64), y.split(64), strict=True)))
    assert ("several domains", "note") in [(f.kind, f.severity) for f in found.findings]
    assert found.worst == "note"
