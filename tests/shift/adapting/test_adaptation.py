"""adapt_ writes the mix of the definition, nothing else, can be undone bit for bit, and refuses what would harm."""

import copy
import json
import math
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import steadynorm as sn
from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.moments import Moments
from steadynorm.shift.adapting.adaptation import adapt_
from steadynorm.shift.adapting.mixing import Mixer, mix, shares, stored_share
from steadynorm.shift.adapting.report import AdaptReport
from support_adapting import CLASSES, blobs, changed, mixed_labels, peaks, places, state, stream, two_layers

X = torch.randn(80, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 1.5 + 1
STATISTICS = {"1.running_mean", "1.running_var", "4.running_mean", "4.running_var"}
KINDS = pytest.mark.parametrize("kind", ["torch", "steadynorm"])


@torch.no_grad()
def expected(model: nn.Sequential, x: Tensor, keep: float) -> dict[str, Tensor]:
    """The mixed statistics from the definition, in float64, layer after layer."""
    y, found = x.double(), {}
    for name, layer in copy.deepcopy(model).double().named_children():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            var, mean = torch.var_mean(y, [d for d in range(y.dim()) if d != 1], correction=1)
            layer.running_mean.copy_(keep * layer.running_mean + (1 - keep) * mean)
            layer.running_var.copy_(keep * layer.running_var + (1 - keep) * var)
            found |= {f"{name}.running_mean": layer.running_mean, f"{name}.running_var": layer.running_var}
        y = layer(y)
    return found


# --- the mix ----------------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(
    ("options", "keep"),
    [({}, 16 / 96), ({"prior": 240}, 0.75), ({"method": "adabn"}, 0.0), ({"method": "alpha", "alpha": 0.3}, 0.7)],
)
def test_the_statistics_are_those_of_the_definition(kind: str, options: dict, keep: float):
    model = two_layers(kind)
    before, want = state(model), expected(model, X, keep)
    report = adapt_(model, X, guard=False, **options)
    assert changed(model, before) == STATISTICS
    for name, value in want.items():
        assert torch.allclose(model.get_buffer(name).double(), value, rtol=1e-5, atol=1e-6), name
    assert [layer.share for layer in report.layers] == pytest.approx([keep, keep])


def test_double_models_start_from_their_own_statistics():
    model = two_layers().double()
    want = expected(model, X, 16 / 96)
    adapt_(model, X.double(), guard=False)
    for name, value in want.items():
        assert torch.allclose(model.get_buffer(name), value, rtol=1e-9), name


def test_double_models_mix_each_chunk_with_what_was_stored_at_first():
    model, single = two_layers().double(), two_layers()
    adapt_(model, X.double(), guard=False, chunk=20)
    adapt_(single, X, guard=False, chunk=20)
    for name in STATISTICS:
        assert torch.allclose(model.get_buffer(name).float(), single.get_buffer(name), rtol=1e-4), name


def test_alpha_by_layer_leaves_the_others():
    model = two_layers()
    before = state(model)
    adapt_(model, X, "alpha", alpha={"4": 0.5}, guard=False)
    assert changed(model, before) == {"4.running_mean", "4.running_var"}


def test_several_chunks_are_pooled_not_averaged():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval()
    x = stream(mixed_labels(100), shift=2) * torch.linspace(0.5, 2, 100)[:, None]
    adapt_(model, x, "adabn", guard=False, chunk=7)
    assert torch.allclose(model[0].running_mean, x.mean(0), atol=1e-5)
    assert torch.allclose(model[0].running_var, x.var(0), rtol=1e-5)


def test_how_the_examples_are_cut_into_batches_makes_no_difference():
    results = []
    loader = DataLoader(TensorDataset(X, torch.arange(80)), batch_size=9)
    for batches in (X, X.split(13), list(X.split(1)), (b for b in X.split(40)), loader):
        model = two_layers()
        assert adapt_(model, batches, guard=False).examples == 80
        results.append(state(model))
    for found in results[1:]:
        assert all(torch.equal(found[n], t) for n, t in results[0].items())


def test_batches_of_different_shapes_go_one_by_one():
    model = nn.Sequential(nn.BatchNorm1d(3)).eval()
    parts = [torch.randn(4, 3, 5), torch.randn(6, 3, 2), torch.randn(0, 3, 2)]
    adapt_(model, parts, "adabn", guard=False, classifier=False)
    flat = torch.cat([p.transpose(1, 2).reshape(-1, 3) for p in parts])
    assert torch.allclose(model[0].running_mean, flat.mean(0), atol=1e-6)


def test_one_value_per_channel_moves_the_mean_and_leaves_the_variance():
    model = nn.Sequential(nn.BatchNorm1d(4)).eval()
    adapt_(model, torch.full((1, 4), 3.0), prior=2, guard=False, classifier=False)
    assert torch.allclose(model[0].running_mean, torch.ones(4))
    assert torch.equal(model[0].running_var, torch.ones(4))


def test_mix_in_closed_form():
    stored = Moments(torch.ones(1), torch.tensor([1.0]), torch.tensor([4.0]))
    seen = Moments.of(torch.tensor([[0.0], [2.0], [7.0]]))
    mixed = mix(stored, seen, 0.25)
    assert mixed.mean.item() == pytest.approx(0.25 * 1 + 0.75 * 3)
    assert mixed.m2.item() == pytest.approx(0.25 * 4 + 0.75 * 13)  # 13: (9 + 1 + 16) / 2
    assert stored_share(16)("", 48) == 0.25


def test_a_mask_and_channels_last_are_read_as_the_layer_reads_them():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = sn.BatchNorm1d(2, channel_dim=-1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, mask=x[..., 0] > 0)

    model, x = Masked().eval(), torch.randn(70, 5, 2)
    adapt_(model, x, "adabn", guard=False, classifier=False)
    assert torch.allclose(model.norm.running_mean, x[x[..., 0] > 0].mean(0), atol=1e-6)


def test_batches_of_any_form_with_a_forward_of_ones_own():
    x = stream(mixed_labels(128), 0.5)
    plain, dicts, nested = blobs(), blobs(), blobs()
    adapt_(plain, x)
    adapt_(dicts, [{"name": "text", "x": part} for part in x.split(64)], forward=lambda batch: dicts(batch["x"]))
    adapt_(nested, [([None, (x,)], "label")], forward=lambda batch: nested(batch[0][1][0]))
    for model in (dicts, nested):
        assert torch.allclose(model[0].running_mean, plain[0].running_mean, atol=1e-6)
    with pytest.raises(DataError, match="batch 0: a tensor somewhere"):
        adapt_(plain, [{"name": "text"}], forward=lambda batch: plain(x))


def test_other_threads_may_serve_meanwhile():
    model, x = blobs(), stream(mixed_labels(128), 0.5)
    want = blobs()
    adapt_(want, x)

    def forward(batch: Tensor) -> Tensor:
        other = threading.Thread(target=model, args=(stream(mixed_labels(64), 50),))
        other.start()
        other.join()
        return model(batch)

    adapt_(model, x, forward=forward)
    assert all(torch.equal(t, state(want)[name]) for name, t in state(model).items())


def test_a_layer_used_twice_pools_both_uses():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm).eval()
    assert len(adapt_(model, stream(mixed_labels(70)), guard=False, classifier=False).layers) == 1


def test_domains_adapt_the_one_in_use():
    model = nn.Sequential(sn.BatchNorm1d(4, domains=("photo", "sketch"))).eval()
    before = state(model)
    with sn.domain(model, "sketch"):
        adapt_(model, stream(mixed_labels(70)), classifier=False)
    assert changed(model, before) == {"0.running_mean_sketch", "0.running_var_sketch"}


# --- nothing else, and back again -------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("method", ["prior", "adabn", "tent"])
def test_undo_is_exact(kind: str, method: str):
    model = two_layers(kind)
    model[1].running_mean[0] = -0.0
    before = state(model)
    report = adapt_(model, X, method, guard=False)
    extra = {"1.weight", "1.bias", "4.weight", "4.bias"} if method == "tent" else set()
    assert changed(model, before) == STATISTICS | extra
    report.undo()
    assert changed(model, before) == set()
    report.undo()
    with adapt_(model, X, method, guard=False) as report:
        assert report.applied
        assert changed(model, before)
    assert changed(model, before) == set()


def reloaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize("method", ["prior", "tent"])
@pytest.mark.parametrize("change", [nn.Module.double, nn.Module.half, reloaded], ids=["double", "half", "assign"])
def test_undo_finds_the_tensors_that_the_model_has_by_then(method: str, change):
    model = two_layers("steadynorm")
    twin = change(copy.deepcopy(model))
    report = adapt_(model, X, method, guard=False)
    change(model)
    report.undo()
    assert changed(model, state(twin)) == set()


@KINDS
def test_modes_gradients_and_chance_come_back(kind: str):
    model = two_layers(kind).train()
    model.insert(3, nn.Dropout(0.5))
    model[0].eval()
    model[1].weight.grad = torch.ones(5)
    modes, chance = [m.training for m in model.modules()], torch.get_rng_state()
    tracked = model[1].num_batches_tracked.clone()
    adapt_(model, X, guard=False)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(chance, torch.get_rng_state())
    assert (model[1].weight.grad == 1).all()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model[1].num_batches_tracked, tracked)


@pytest.mark.parametrize("method", ["prior", "tent"])
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_exception_leaves_neither_hooks_nor_changes(method: str, fails_at: int):
    model, calls = two_layers("steadynorm").train(), []
    before = state(model)

    def forward(x: Tensor) -> Tensor:
        y = model(x)
        calls.append(len(x))
        if len(calls) == fails_at:
            raise RuntimeError("the lights went out")
        return y

    with pytest.raises(RuntimeError, match="lights"):
        adapt_(model, X, method, forward=forward, guard=False)
    assert changed(model, before) == set()
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_hooks_are_gone_afterwards():
    model = two_layers()
    adapt_(model, X, guard=False)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# --- guards -----------------------------------------------------------------------------------------------------------


def refused(report: AdaptReport) -> list[str]:
    return [guard.name for guard in report.guards if not guard.passed]


@pytest.mark.parametrize("method", ["prior", "adabn", "tent"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_an_unskewed_stream_is_adapted_to(method: str, shift: float):
    model, labels = blobs(), mixed_labels(320)
    report = adapt_(model, stream(labels, shift), method)
    assert report.verdict == "adapted", str(report)
    assert [guard.name for guard in report.guards] == ["examples", "neighbours", "classes", "order"]
    assert (model(stream(labels, shift)).argmax(1) == labels).all()


def test_a_shift_that_makes_all_predictions_one_class_is_no_skew():
    model, labels = places(), mixed_labels(256)
    x = peaks(labels, 20)
    assert (model(x).argmax(1) == 0).all()
    report = adapt_(model, x, prior=1)
    assert report.verdict == "adapted", str(report)
    assert report.before is not None
    assert report.before.effective_classes == 1.0
    assert (model(x).argmax(1) == labels).double().mean() > 0.95


def test_features_without_positions_may_be_the_class_so_a_collapse_abstains():
    x = stream(mixed_labels(256)) + torch.tensor([20.0, 0.0, 0.0, 0.0])
    assert refused(adapt_(blobs(), x)) == ["classes"]


def test_features_without_positions_are_judged_half_adapted_as_well():
    model = blobs()

    def forward(x: Tensor) -> Tensor:
        y = model(x)
        probed = (model[0].running_mean - 0.75).abs().max() > 0.01
        return torch.zeros_like(y) + torch.tensor([9.0, 0, 0, 0]) if probed else y

    assert refused(adapt_(model, stream(mixed_labels(256), 0.5), forward=forward)) == ["classes"]


@pytest.mark.parametrize("method", ["prior", "adabn", "tent", "alpha"])
@pytest.mark.parametrize("shift", [0.0, 2.0])
@pytest.mark.parametrize("flat", [True, False])
def test_one_class_abstains_and_leaves_the_model(method: str, shift: float, flat: bool):
    model, given = (blobs(), stream) if flat else (places(), peaks)
    before = state(model)
    alpha = 1.0 if method == "alpha" else None
    report = adapt_(model, given(torch.full((256,), 2), shift), method, alpha=alpha)
    assert (report.verdict, report.applied, refused(report)) == ("abstained", False, ["classes"])
    assert "skewed" in report.reason
    assert changed(model, before) == set()
    report.undo()
    assert changed(model, before) == set()


@pytest.mark.parametrize("method", ["prior", "adabn"])
def test_sorted_by_label_abstains(method: str):
    model = blobs()
    report = adapt_(model, stream(mixed_labels(256).sort().values), method)
    assert report.verdict == "abstained"
    assert "order" in refused(report)


def test_slow_drift_of_the_inputs_abstains():
    x = stream(mixed_labels(256), 0) + torch.linspace(-4, 4, 256)[:, None]
    report = adapt_(blobs(), x, classifier=False)
    assert (report.verdict, refused(report)) == ("abstained", ["neighbours"])


@pytest.mark.parametrize(("method", "n"), [("prior", 1), ("prior", 63), ("adabn", 255), ("tent", 1), ("tent", 255)])
def test_few_examples_abstain(method: str, n: int):
    model = blobs()
    before = state(model)
    report = adapt_(model, stream(mixed_labels(n)), method)
    assert (report.verdict, refused(report)) == ("abstained", ["examples"])
    assert "too few" in report.reason
    assert changed(model, before) == set()


def test_training_shares_of_the_classes_are_what_skew_is_held_against():
    shares = [0.85, 0.05, 0.05, 0.05]
    labels = torch.from_numpy(np.random.default_rng(0).choice(CLASSES, 256, p=shares))
    assert refused(adapt_(blobs(), stream(labels))) == ["classes"]
    assert adapt_(blobs(), stream(labels), class_shares=shares).verdict == "adapted"
    with pytest.raises(ArgumentError, match="3 entries"):
        adapt_(blobs(), stream(labels), class_shares=[1, 1, 1])


def test_outputs_that_are_no_classes_leave_the_class_guards_out():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    report = adapt_(model, stream(mixed_labels(64)))
    assert [guard.name for guard in report.guards] == ["examples", "neighbours"]
    assert report.before is None
    assert report.verdict == "adapted"
    assert "were not looked at" in report.notes[0]


def test_segmentation_logits_are_averaged_over_the_positions():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 1)).eval()
    report = adapt_(model, X, guard=False)
    p = model(X).double().softmax(1).mean((2, 3))
    assert report.after.confidence == pytest.approx(p.max(1).values.mean().item(), rel=1e-6)


# --- retrain ----------------------------------------------------------------------------------------------------------


def test_unsure_predictions_say_retrain_and_put_the_model_back():
    model, labels = blobs(), mixed_labels(128)
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(CLASSES))
    x = stream(labels)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.04, 60 * x.sign(), x)
    before = state(model)
    report = adapt_(model, x, prior=0.5 * 16)
    assert (report.verdict, report.applied) == ("retrain", False), str(report)
    assert "unsure" in report.reason
    assert changed(model, before) == set()


def test_predictions_that_fall_on_few_classes_say_retrain():
    model = blobs()

    def forward(x: Tensor) -> Tensor:
        y = model(x)
        adapted = model[1].running_mean.abs().max() > 0.01  # the probe leaves the second layer alone
        return y * torch.tensor([1.0, 0.0, 0.0, 0.0]) + torch.tensor([9.0, 0, 0, 0]) if adapted else y

    report = adapt_(model, stream(mixed_labels(128), 0.5), forward=forward)
    assert (report.verdict, report.applied) == ("retrain", False)
    assert "1.0 classes" in report.reason


# --- what cannot be adapted -------------------------------------------------------------------------------------------


def test_models_that_have_nothing_to_adapt():
    x = stream(mixed_labels(64))
    with pytest.raises(ModelError, match="no batch norm"):
        adapt_(nn.Sequential(nn.Linear(4, 4)), x)
    with pytest.raises(ModelError, match="track_running_stats"):
        adapt_(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), x)
    with pytest.raises(ModelError, match="frozen"):
        adapt_(sn.freeze_(nn.Sequential(sn.BatchNorm1d(4))), x)
    with pytest.raises(ModelError, match="used none"):
        adapt_(nn.Sequential(nn.BatchNorm1d(4)), x, forward=lambda batch: batch)
    with pytest.raises(ArgumentError, match="Module"):
        adapt_("model", x)


def test_frozen_and_unused_layers_stay_and_are_named():
    model = blobs()
    sn.freeze_(model[0])
    model.spare = nn.BatchNorm1d(4)
    before = state(model)
    x = stream(mixed_labels(64))
    report = adapt_(model, x, forward=lambda batch: model[2](model[1](model[0](batch))))
    assert changed(model, before) == {"1.running_mean", "1.running_var"}
    assert report.notes == (
        "0 is frozen and stays",
        "1 batch norms were not used by the forward and stay as they are",
    )


@pytest.mark.parametrize("batches", [[], torch.zeros(0, 4), [torch.zeros(0, 4)], iter(())])
def test_no_examples(batches: object):
    with pytest.raises(DataError, match="no example"):
        adapt_(blobs(), batches)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_examples_that_are_not_finite(bad: float):
    model, x = blobs(), stream(mixed_labels(64))
    x[3, 1] = bad
    before = state(model)
    with pytest.raises(DataError, match="1 of 32 examples"):
        adapt_(model, x.split(32))
    assert changed(model, before) == set()


def test_what_overflows_inside_is_not_committed():
    model = blobs()
    before = state(model)
    with pytest.raises(DataError, match="not finite"):
        adapt_(model, torch.tensor([3e38, -3e38]).repeat(32)[:, None].expand(64, 4), classifier=False, guard=False)
    assert changed(model, before) == set()


@pytest.mark.parametrize("batch", ["text", {"x": 1}, (), torch.tensor(1.0), np.zeros((3, 4))])
def test_batches_that_are_none(batch: object):
    with pytest.raises(DataError, match="batch 0"):
        adapt_(blobs(), [batch])
    with pytest.raises(ArgumentError, match="iterable"):
        adapt_(blobs(), 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "method must be"),
        ({"method": "alpha"}, "alpha goes with"),
        ({"alpha": 0.5}, "alpha goes with"),
        ({"method": "alpha", "alpha": 1.5}, r"\[0, 1\]"),
        ({"method": "alpha", "alpha": {"nowhere": 0.5}}, "nowhere"),
        ({"prior": -1}, "prior must"),
        ({"prior": math.nan}, "prior must"),
        ({"lr": 0}, "lr > 0"),
        ({"lr": math.inf}, "lr > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"chunk": 1}, "chunk >= 2"),
        ({"class_shares": [0, 0]}, "class_shares"),
        ({"method": "tent", "classifier": False}, "classifier"),
    ],
)
def test_arguments(options: dict, words: str):
    with pytest.raises(ArgumentError, match=words):
        adapt_(blobs(), stream(mixed_labels(64)), **options)


def test_tent_on_one_example_at_a_time():
    with pytest.raises(DataError, match="at least 2"):
        adapt_(blobs(), stream(mixed_labels(1)), "tent", guard=False)


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_happened():
    model, x = blobs(), stream(mixed_labels(112), 2)
    report = adapt_(model, x)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["verdict"] == "adapted"
    assert [layer["name"] for layer in plain["layers"]] == ["0", "1"]
    moved = (model[0].running_mean - 0.75) / (1.75 + 1e-5) ** 0.5
    first = report.layers[0]
    assert first.mean == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-5)
    assert first.largest_mean == pytest.approx(moved[first.channel].item(), rel=1e-5)
    spread = 0.5 * ((model[0].running_var + 1e-5) / (1.75 + 1e-5)).log().abs().mean()
    assert first.spread == pytest.approx(spread.item(), rel=1e-4)
    assert plain["before"].keys() == {"entropy", "confidence", "effective_classes"}
    text = str(report)
    assert text.startswith("adapted (prior, 112 examples)")
    assert "ok      order" in text
    assert "0: means moved by" in text
    assert "refused classes" in str(adapt_(model, x[:1].expand(70, 4)))


def test_frozen():
    report = adapt_(blobs(), stream(mixed_labels(64)))
    with pytest.raises(AttributeError):
        report.verdict = "adapted"


def test_hooks_go_when_the_block_raises():
    model = two_layers()
    with pytest.raises(KeyError), Mixer([("1", model[1])], shares(stored_share(1))).attached():
        raise KeyError
    assert not model[1]._forward_pre_hooks
