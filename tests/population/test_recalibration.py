"""recalibrate_ against float64 population statistics from the definition; what it leaves alone, and how it fails."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import steadynorm as sn
from steadynorm.errors import (
    ArgumentError,
    DataError,
    ModelError,
    RejectedBatchWarning,
    SteadynormWarning,
)
from support_population import bits, check, expected, images, network, norms, same

ORDERS = ("joint", "sequential")
KINDS = ("ours", "torch")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_population(kind, order):
    model, batches = network(kind), images(70).split(32)  # 32, 32, 6
    wanted = expected(copy.deepcopy(model), batches, order)
    report = sn.recalibrate_(model, [(b, torch.zeros(len(b))) for b in batches], order=order)
    check(model, wanted)
    assert (report.examples, report.batches, report.passes, report.ranks) == (
        70,
        3,
        3 if order == "sequential" else 1,
        1,
    )
    assert [one.name for one in report.layers] == list(wanted)
    assert [m.num_batches_tracked.item() for m in norms(model).values()] == [3, 3, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_statistics_do_not_depend_on_the_batches(kind):
    models = [network(kind), network(kind)]
    for model, size in zip(models, (64, 7), strict=True):
        sn.recalibrate_(model, images(64).split(size), order="sequential")
    for a, b in zip(norms(models[0]).values(), norms(models[1]).values(), strict=True):
        torch.testing.assert_close(a.running_var, b.running_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean_costs_no_digits(kind):
    layer = (sn.BatchNorm1d if kind == "ours" else nn.BatchNorm1d)(2)
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)) + 4096
    sn.recalibrate_(layer, x.split(9))
    np.testing.assert_allclose(layer.running_var.numpy(), x.double().numpy().var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_is_as_before(kind, order):
    model = network(kind).train()
    model[3].eval()
    model.register_buffer("other", torch.tensor([float("nan")]))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before, chance = bits(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images(20)), 8, shuffle=True)
    sn.recalibrate_(model, loader, order=order)
    after = bits(model)
    changed = {
        n
        for n, t in before.items()
        if isinstance(t, torch.Tensor) and t.detach().numpy().tobytes() != after[n].detach().numpy().tobytes()
    }
    assert changed == {f"{n}.{b}" for n in norms(model) for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert all(after[n] == v for n, v in before.items() if not isinstance(v, torch.Tensor))
    assert torch.equal(chance, torch.get_rng_state())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_interruption_leaves_the_model_as_it_was(kind, order, stop):
    model, served = network(kind), [0]

    class Loader:
        def __iter__(self):
            for batch in images(30).split(10):
                served[0] += 1
                if served[0] == (2 if order == "joint" else 8):  # within the last layer's pass
                    raise stop("enough")
                yield batch

    before = bits(model)
    with pytest.raises(stop, match="enough"):
        sn.recalibrate_(model, Loader(), order=order)
    assert same(before, bits(model))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    model.train()(images(10))
    assert [m.num_batches_tracked.item() for m in norms(model).values()] == [1, 1, 1]  # commits as ever


def test_masks_and_weights_count():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = sn.BatchNorm1d(2)

        def forward(self, x, mask, weight):
            return self.bn(x, mask=mask, sample_weight=weight)

    model = Masked()
    rng = np.random.default_rng(0)
    x, mask, weight = rng.normal(3, 2, (50, 2, 7)).astype("float32"), rng.random((50, 7)) < 0.6, rng.integers(1, 4, 50)
    given = [torch.from_numpy(t) for t in (x, mask, weight.astype("float32"))]
    sn.recalibrate_(
        model,
        [
            dict(zip(("x", "mask", "weight"), part, strict=True))
            for part in zip(*(t.split(8) for t in given), strict=True)
        ],
    )
    rows = np.repeat(x, weight, 0).transpose(0, 2, 1)[np.repeat(mask, weight, 0)].astype("float64")
    np.testing.assert_allclose(model.bn.running_mean.numpy(), rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.bn.running_var.numpy(), rows.var(0, ddof=1), rtol=1e-6)


def test_frozen_and_untracked_layers_are_left_alone():
    model = nn.Sequential(
        nn.Linear(3, 4), sn.freeze_(sn.BatchNorm1d(4)), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4)
    )
    report = sn.recalibrate_(model, images(20)[:, :, 0, 0].split(6))
    assert [one.name for one in report.layers] == ["3"]
    assert model[1].running_var.tolist() == [1] * 4
    assert "1 layers frozen" in str(report)
    assert "1 layers without running statistics" in str(report)
    with pytest.raises(ModelError, match="1 frozen"):
        sn.recalibrate_(model[1], images(4)[:, :, 0, 0])


def test_the_domain_in_use_is_measured():
    layer = sn.BatchNorm1d(1, domains=("photo", "sketch"))
    x = torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
    with sn.domain(layer, "sketch"):
        report = sn.recalibrate_(layer, x.split(4))
    assert layer.running("sketch").mean.item() == 10
    assert layer.running("photo").mean.item() == 0
    assert report.layers[0].domain == "sketch"
    assert "(sketch)" in str(report)
    with pytest.raises(ArgumentError, match="sketch"):
        sn.recalibrate_(layer, x.split(4))


def test_sync_batch_norm_runs_without_ranks():
    layer = nn.SyncBatchNorm(3)
    x = images(20)[:, :, 0, 0]
    report = sn.recalibrate_(layer, x.split(6))
    np.testing.assert_allclose(layer.running_mean.numpy(), x.double().numpy().mean(0), rtol=1e-6)
    assert "synchronised in training" in str(report)


def test_options_of_training_are_put_back():
    layer = sn.BatchNorm1d(3, renorm=sn.Renorm(), process_group="world", ghost_batch_size=4)
    x = images(20)[:, :, 0, 0]
    sn.recalibrate_(layer, x.split(6))
    assert layer.renorm is not None
    assert layer.process_group == "world"
    assert layer.single_value == "error"
    np.testing.assert_allclose(layer.running_var.numpy(), x.double().numpy().var(0, ddof=1), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_last_batch_of_one_example_counts(kind):
    layer = (sn.BatchNorm1d if kind == "ours" else nn.BatchNorm1d)(1)
    x = torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0], [-4.0]])
    report = sn.recalibrate_(layer, x.split(3))
    assert layer.running_mean.item() == 8
    assert "single values" in str(report)


def test_a_layer_called_twice_is_measured_on_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.last = sn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.last(self.bn(x) + self.bn(x + 2))

    x = images(20)[:, :, 0, 0]
    for order in ORDERS:
        model = Twice()
        report = sn.recalibrate_(model, x.split(6), order=order)
        both = np.concatenate([x.double().numpy(), x.double().numpy() + 2])
        np.testing.assert_allclose(model.bn.running_var.numpy(), both.var(0, ddof=1), rtol=1e-6)
        assert "more than once" in str(report)
        assert model.last.num_batches_tracked == 4


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(wrap):
    model, plain, batches = wrap(network()), network(), images(30).split(8)
    sn.recalibrate_(model, batches)
    sn.recalibrate_(plain, batches)
    for a, b in zip(norms(model).values(), norms(plain).values(), strict=True):
        assert torch.equal(a.running_var, b.running_var)


def test_averaged_weights_are_no_cause_for_a_warning_afterwards():
    model, live = AveragedModel(network()), network(seed=1)
    for _ in range(20):
        model.update_parameters(live)
    sn.recalibrate_(model, images(30).split(8), order="sequential")
    model.eval()(images(4))


def test_batches_limits_and_a_short_loader_is_said():
    model, batches = network(), images(30).split(10)
    drawn = []
    report = sn.recalibrate_(model, (drawn.append(1) or b for b in batches), batches=2)
    assert (report.batches, len(drawn), report.notes) == (2, 2, ())
    with pytest.warns(SteadynormWarning, match="2 fewer than asked for of 5"):
        report = sn.recalibrate_(model, batches, batches=5)
    assert "ran short: 3 batches" in report.notes[0]
    assert report.batches == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_is_not_finite_is_left_out_and_said(kind):
    model, batches = network(kind), [*images(30).split(10)]
    broken = batches[1].clone()
    broken[0, 0, 0, 0] = float("nan")
    plain = network(kind)
    with pytest.warns(RejectedBatchWarning, match="1 of 3 batches were not finite"):
        sn.recalibrate_(model, [batches[0], broken, batches[2]])
    sn.recalibrate_(plain, [batches[0], batches[2]])
    for a, b in zip(norms(model).values(), norms(plain).values(), strict=True):
        torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-6, atol=0)


def test_a_warning_turned_into_an_error_leaves_the_model_as_it_was():
    model = network()
    before = bits(model)
    with pytest.raises(SteadynormWarning):  # as this project's tests have it
        sn.recalibrate_(model, images(8).split(4), batches=7)
    assert same(before, bits(model))


@pytest.mark.parametrize(
    ("give", "error", "message"),
    [
        (lambda m: sn.recalibrate_(m, [], order="joint"), DataError, "no batch"),
        (lambda m: sn.recalibrate_(m, [images(0)]), DataError, "no batch"),
        (lambda m: sn.recalibrate_(m, [images(4)], order="both"), ArgumentError, "order"),
        (lambda m: sn.recalibrate_(m, [images(4)], batches=0), ArgumentError, "batches"),
        (lambda m: sn.recalibrate_(m, 7), ArgumentError, "iterable"),
        (lambda m: sn.recalibrate_(m, iter([images(4)]), order="sequential"), ArgumentError, "iterator"),
        (lambda m: sn.recalibrate_(m, [images(4)], forward=3), ArgumentError, "forward"),
        (lambda m: sn.recalibrate_(m, [images(4)], forward=lambda b: b), DataError, "run on any batch"),
        (lambda m: sn.recalibrate_(m, [images(4) * float("nan")]), DataError, "fewer than two finite"),
        (lambda m: sn.recalibrate_(m, [images(4) * 1e38]), DataError, "too large|fewer than two"),
        (lambda m: sn.recalibrate_(nn.Linear(2, 2), []), ModelError, "has none"),
        (lambda m: sn.recalibrate_("model", []), ArgumentError, "Module"),
        (lambda m: sn.recalibrate_(nn.LazyBatchNorm1d(), []), ModelError, "no size"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(give, error, message):
    model = network()
    before = bits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RejectedBatchWarning)
        with pytest.raises(error, match=message):
            give(model)
    assert same(before, bits(model))


def test_a_loader_that_changes_between_passes_is_refused():
    model = network()
    before, left = bits(model), [3, 2, 2]

    class Loader:
        def __iter__(self):
            return iter(images(30).split(10)[: left.pop(0)])

    with pytest.raises(DataError, match="pass 2 had 20 in 2"):
        sn.recalibrate_(model, Loader(), order="sequential")
    assert same(before, bits(model))


def test_layers_that_are_not_always_called_are_measured_where_they_are():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.odd(self.first(x)) if len(x) == 6 else self.first(x)

    x = images(20)[:, :, 0, 0]
    model = Sometimes()
    report = sn.recalibrate_(model, [x[:7], x[7:13], x[13:]], order="sequential")
    assert (model.first.num_batches_tracked, model.odd.num_batches_tracked, model.never.num_batches_tracked) == (
        3,
        1,
        0,
    )
    y = (x.double() - model.first.running_mean) / (model.first.running_var + 1e-5).sqrt()
    np.testing.assert_allclose(model.odd.running_var.numpy(), y[7:13].numpy().var(0, ddof=1), rtol=1e-5)
    assert "1 layers not run by any batch, and left as they were: never" in report.notes[0]


def test_report_in_plain_types_and_in_standard_units():
    layer = sn.BatchNorm1d(1, eps=0.0)
    report = sn.recalibrate_(layer, torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]]))
    (change,) = report.to_dict()["layers"]
    deviation = 55.2**0.5
    assert change["mean"] == pytest.approx(10 / deviation)
    assert change["largest_mean"] == pytest.approx(10 / deviation)
    assert change["spread"] == pytest.approx(np.log(deviation))
    assert change["positions"] == 6
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False)) == report.to_dict()
    assert "factor of 7.43" in str(report)


def test_parametrized_and_half_precision_layers_and_those_with_a_forward_of_their_own():
    class Own(nn.BatchNorm1d):
        def forward(self, input):
            return super().forward(input).relu()

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    x = images(40)[:, :, 0, 0]
    model = nn.Sequential(Own(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Doubled())
    sn.recalibrate_(model, [x])
    first = np.maximum((x.double().numpy() - x.double().numpy().mean(0)) / np.sqrt(x.double().numpy().var(0) + 1e-5), 0)
    np.testing.assert_allclose(model[1].running_var.numpy(), first.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(model[2].running_var.numpy(), [4 * 40 / 39] * 3, rtol=1e-4)

    halves = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    sn.recalibrate_(halves, x.bfloat16().split(8))
    assert halves[0].running_mean.dtype == torch.bfloat16
    wanted = x.bfloat16().double().numpy().mean(0)
    np.testing.assert_allclose(halves[0].running_mean.float().numpy(), wanted, rtol=2**-8)


def test_a_sequential_pass_ends_at_its_layer_and_reports_what_changed_in_all():
    model, runs = network(), [0]
    for layer in norms(model).values():
        layer.num_batches_tracked.fill_(40)
    model[-1].register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    before = copy.deepcopy(model)
    report = sn.recalibrate_(model, images(30).split(10), order="sequential")
    assert runs == [3]  # in the first pass alone
    for one in report.layers:
        old, new = norms(before)[one.name], norms(model)[one.name]
        moved = (new.running_mean - old.running_mean) / (new.running_var + old.eps).sqrt()
        assert one.mean == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
        assert new.num_batches_tracked == 3
