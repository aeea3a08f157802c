"""Domains: running statistics, and by option γ and β, of their own for data of several kinds."""

import contextlib
import copy
import pickle
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support import assert_close, batch_norm, central_differences, normalized, stats, wide

pytestmark = pytest.mark.xdist_group("ranks")

DOMAINS = ("photo", "sketch")
RECIPES = {"photo": (2.0, 1.0), "sketch": (-5.0, 0.25)}  # what the data of each domain look like: mean, deviation


def draw(domain: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    mean, deviation = RECIPES[domain]
    return (mean + deviation * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def noise(*shape: int, seed: int = 99) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_of(channels: int = 3, **options) -> sn.BatchNorm1d:
    return sn.BatchNorm1d(channels, domains=DOMAINS, **options)


def moved(mean, variance, batch, momentum):
    """The running mean and (unbiased) variance after a commit, from the definition."""
    return mean + momentum * (batch.mean - mean), variance + momentum * (batch.unbiased - variance)


def assert_running(layer: sn.BatchNorm1d, domain: str, mean, variance, batches: int):
    running = layer.running(domain)
    assert_close(running.mean, mean, "statistic")
    assert_close(running.var, variance, "variance")
    assert running.num_batches_tracked.item() == batches


def assert_untouched(layer: sn.BatchNorm1d, domain: str):
    assert_running(layer, domain, np.zeros(layer.num_features), np.ones(layer.num_features), 0)


class TestStatistics:
    @pytest.mark.parametrize("momentum", [0.2, None])
    def test_each_domain_is_a_layer_of_its_own_in_training_and_evaluation(self, momentum):
        layer = layer_of(momentum=momentum, activation="relu")
        expected = {name: (np.zeros(3), np.ones(3), 0) for name in DOMAINS}
        for seed, name in enumerate(("photo", "sketch", "photo", "sketch", "sketch")):
            x = draw(name, 5 + seed, 3, seed=seed)
            with sn.domain(layer, name):
                y = layer(x)
            assert_close(y, np.maximum(batch_norm(x), 0), "output")
            mean, variance, k = expected[name]
            share = 1 / (k + 1) if momentum is None else momentum
            expected[name] = (*moved(mean, variance, stats(x), share), k + 1)
        layer.eval()
        x = draw("photo", 4, 3, seed=9)
        for name in DOMAINS:
            assert_running(layer, name, *expected[name])
            with sn.domain(layer, name):
                assert_close(layer(x), np.maximum(normalized(x, *expected[name][:2]), 0), "output")

    def test_with_masks_and_sample_weights(self):
        layer = layer_of(momentum=1.0)
        mask, weight = torch.arange(20).reshape(5, 4) % 3 > 0, torch.arange(1.0, 6.0)
        x = draw("sketch", 5, 3, 4).masked_fill(~mask[:, None], float("nan"))
        with sn.domain(layer, "sketch"):
            y = layer(x, mask=mask, sample_weight=weight)
        x = x.nan_to_num(0)
        assert_close(y, batch_norm(x, mask=mask, sample_weight=weight), "output")
        batch = stats(x, weight=mask * weight[:, None])
        assert_running(layer, "sketch", batch.mean, batch.unbiased, 1)
        assert_untouched(layer, "photo")

    def test_with_ghost_batches(self):
        layer, x = layer_of(momentum=1.0, ghost_batch_size=4), draw("sketch", 10, 3)
        with sn.domain(layer, "sketch"):
            y = layer(x)
        assert_close(y, np.concatenate([batch_norm(part) for part in x.split(4)]), "output")
        assert_running(layer, "sketch", stats(x).mean, stats(x).unbiased, 1)

    def test_with_renorm_each_domain_has_its_own_schedule_and_is_corrected_towards_its_own_statistics(self):
        renorm = sn.Renorm(r_max=1.5, d_max=0.5, warmup=1, ramp=0)
        layer = layer_of(momentum=0.5, renorm=renorm)
        first, second = draw("photo", 6, 3), draw("photo", 6, 3, seed=1) * 1.2
        with sn.domain(layer, "photo"):
            layer(first)
        with sn.domain(layer, "sketch"):  # the first of its domain: still in its warmup
            assert_close(layer(second), batch_norm(second), "output")
        mean, variance = moved(0, 1, stats(first), 0.5)
        batch = stats(second)
        sigma_batch, sigma = np.sqrt(batch.biased + 1e-5), np.sqrt(variance + 1e-5)
        r, d = np.clip(sigma_batch / sigma, 1 / 1.5, 1.5), np.clip((batch.mean - mean) / sigma, -0.5, 0.5)
        assert not np.allclose(r, 1)
        assert not np.allclose(d, 0)
        with sn.domain(layer, "photo"):
            assert_close(layer(second), batch_norm(second) * r + d, "output")

    def test_evaluation_writes_nothing(self):
        layer = layer_of().eval()
        with sn.domain(layer, "sketch"):
            layer(draw("sketch", 5, 3))
        for name in DOMAINS:
            assert_untouched(layer, name)


class TestWhenTheyAreWritten:
    def test_accumulate_commits_once_for_each_domain_that_was_seen(self):
        layer = sn.BatchNorm1d(3, momentum=0.5, domains=(*DOMAINS, "clipart"))
        parts = {name: draw(name, 9, 3) for name in DOMAINS}
        with sn.accumulate(layer):
            for name, sizes in (("photo", 0), ("sketch", 0), ("photo", 1), ("sketch", 1)):
                with sn.domain(layer, name):
                    layer(parts[name].split([3, 6])[sizes])
            assert_untouched(layer, "photo")
        for name in DOMAINS:
            assert_running(layer, name, *moved(0, 1, stats(parts[name]), 0.5), 1)
        assert_untouched(layer, "clipart")

    def test_no_commit_writes_to_none(self):
        layer = layer_of()
        with sn.no_commit(layer):
            for name in DOMAINS:
                with sn.domain(layer, name):
                    assert_close(layer(draw(name, 5, 3)), batch_norm(draw(name, 5, 3)), "output")
        for name in DOMAINS:
            assert_untouched(layer, name)

    def test_functional_call_returns_what_the_domain_would_remember(self):
        layer, x = layer_of(momentum=0.5), draw("sketch", 5, 3)
        with sn.domain(layer, "sketch"):
            _, new = sn.functional_call(layer, {}, x)
        mean, variance = moved(0, 1, stats(x), 0.5)
        assert_close(new["running_mean_sketch"], mean, "statistic")
        assert_close(new["running_var_sketch"], variance, "variance")
        assert (new["num_batches_tracked_sketch"].item(), new["num_batches_tracked"].item()) == (1, 0)
        assert new["running_mean"].tolist() == [0, 0, 0]
        for name in DOMAINS:
            assert_untouched(layer, name)

    def test_a_compiled_model_follows_the_domain(self):
        torch._dynamo.reset()
        layer = layer_of(momentum=0.5)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        expected = dict.fromkeys(DOMAINS, (0, 1, 0))
        for seed, name in enumerate(("photo", "sketch", "photo")):
            x = draw(name, 5, 3, seed=seed)
            with sn.domain(layer, name):
                assert_close(compiled(x), batch_norm(x), "output")
            expected[name] = (*moved(*expected[name][:2], stats(x), 0.5), expected[name][2] + 1)
        for name in DOMAINS:
            assert_running(layer, name, *expected[name])

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpoints_second_forward_may_run_outside(self, use_reentrant):
        layer, x = layer_of(momentum=0.5, dtype=torch.float64), draw("sketch", 4, 3, dtype=torch.float64)
        x.requires_grad_()
        with sn.domain(layer, "sketch"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        y.backward(g := noise(4, 3))
        assert_close(x.grad, central_differences(lambda v: (batch_norm(v) * wide(g)).sum(), x), "gradient")
        assert_running(layer, "sketch", *moved(0, 1, stats(x), 0.5), 1)
        assert_untouched(layer, "photo")

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("needs", ["domain_affine", "renorm", "frozen", "eval"])
    def test_where_it_needs_its_domain_backward_says_to_come_inside(self, needs, use_reentrant):
        layer = layer_of(domain_affine=needs == "domain_affine", renorm=sn.Renorm() if needs == "renorm" else None)
        if needs == "frozen":
            sn.freeze_(layer)
        layer.train(needs != "eval")
        x = draw("sketch", 4, 3).requires_grad_()
        with sn.domain(layer, "sketch"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
        with pytest.raises(ArgumentError, match=r"'photo', 'sketch'.*backward belongs inside"):
            y.backward(torch.ones_like(y))
        with sn.domain(layer, "sketch"):
            y = checkpoint(layer, x, use_reentrant=use_reentrant)
            y.backward(torch.ones_like(y))
        assert x.grad is not None


class TestOverRanks:
    def test_two_ranks_in_one_domain_are_one_process_on_their_batches(self):
        for sizes in ((4, 2), (6, 0)):
            found = ranks.run(synced, 2, sizes)
            x, g = draw("sketch", 6, 2, dtype=torch.float64), noise(6, 2)
            assert_close(torch.cat([y for y, _, _ in found]), batch_norm(x), "output")
            slope = central_differences(lambda v, g=g: (batch_norm(v) * wide(g)).sum(), x)
            assert_close(torch.cat([dx for _, dx, _ in found]), slope, "gradient")
            for _, _, state in found:
                assert_close(state["running_mean_sketch"], stats(x).mean, "statistic")
                assert_close(state["running_var_sketch"], stats(x).unbiased, "variance")
                assert (state["running_mean"].tolist(), state["running_var"].tolist()) == ([0, 0], [1, 1])

    def test_ddp_trains_the_parameters_of_the_domains_in_turn(self):
        first, second = ranks.run(in_ddp, 2)
        for name, t in first.items():
            if "running" not in name:
                assert torch.equal(t, second[name]), name
        assert not torch.equal(first["module.weight"], torch.ones(3))
        assert not torch.equal(first["module.weight"], first["module.weight_sketch"])


def in_ddp(rank, group):
    layer = layer_of(domain_affine=True)
    wrapped = DistributedDataParallel(layer, process_group=group, find_unused_parameters=True)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step, name in enumerate(("photo", "sketch", "photo")):
        optimiser.zero_grad()
        with sn.domain(wrapped, name):
            wrapped(draw(name, 4, 3, seed=2 * step + rank)).backward(noise(4, 3, seed=step + rank).float())
        optimiser.step()
    return wrapped.state_dict()


def synced(rank, group, sizes):
    layer = sn.sync_(layer_of(2, momentum=1.0, dtype=torch.float64), group)
    x = draw("sketch", 6, 2, dtype=torch.float64).split(sizes)[rank].clone().requires_grad_()
    with sn.domain(layer, "sketch"):
        y = layer(x)
    y.backward(noise(6, 2).split(sizes)[rank])
    return y.detach(), x.grad, layer.state_dict()


class TestAffine:
    def test_without_the_option_all_domains_share_weight_and_bias(self):
        layer = layer_of()
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]

    def test_gradients_reach_the_parameters_of_the_domain_alone(self):
        layer, x, g = layer_of(domain_affine=True, dtype=torch.float64), draw("sketch", 5, 3).double(), noise(5, 3)
        with torch.no_grad():
            layer.weight_sketch.copy_(torch.tensor([2.0, -1.0, 0.5]))
            layer.bias_sketch.copy_(torch.tensor([1.0, 0.0, 3.0]))
        with sn.domain(layer, "sketch"):
            y = layer(x)
        z = batch_norm(x)
        assert_close(y, z * wide(layer.weight_sketch) + wide(layer.bias_sketch), "output")
        y.backward(g)
        assert_close(layer.weight_sketch.grad, (wide(g) * z).sum(0), "gradient")
        assert_close(layer.bias_sketch.grad, wide(g).sum(0), "gradient")
        assert layer.weight.grad is None
        assert layer.bias.grad is None

    def test_an_optimiser_sees_all_and_moves_those_that_were_used(self):
        layer = layer_of(domain_affine=True)
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
        assert sum(len(group["params"]) for group in optimiser.param_groups) == 4
        with sn.domain(layer, "photo"):
            layer(draw("photo", 5, 3)).backward(noise(5, 3).float())
        optimiser.step()
        assert not torch.equal(layer.weight, torch.ones(3))
        assert torch.equal(layer.weight_sketch, torch.ones(3))

    def test_without_a_bias_no_domain_has_one(self):
        layer = layer_of(domain_affine=True, bias=False)
        assert [name for name, _ in layer.named_parameters()] == ["weight", "weight_sketch"]
        with sn.domain(layer, "sketch"):
            assert_close(layer(draw("sketch", 5, 3)), batch_norm(draw("sketch", 5, 3)), "output")

    @pytest.mark.parametrize("options", [{"affine": False, "domains": DOMAINS}, {"domains": None}])
    def test_needs_parameters_and_domains(self, options):
        with pytest.raises(ArgumentError, match="domain_affine=True needs affine=True and domains"):
            sn.BatchNorm1d(3, domain_affine=True, **options)


class TestNames:
    @pytest.mark.parametrize(
        "names",
        [(), "photo", ("photo", "photo"), ("a.b",), ("a b",), ("a-b",), ("",), (1, 2), (None,),
         {"photo"}],  # a set's order changes from process to process, and the first domain is special
        ids=repr,
    )  # fmt: skip
    def test_those_that_cannot_be_part_of_a_buffers_name_are_refused(self, names):
        with pytest.raises(ArgumentError, match=r"domains must be a tuple or list of different names.*got"):
            sn.BatchNorm1d(3, domains=names)

    def test_a_list_and_names_with_digits_will_do(self):
        assert sn.BatchNorm1d(3, domains=["2019", "site_b"]).domains == ("2019", "site_b")

    def test_they_need_running_statistics(self):
        with pytest.raises(ArgumentError, match="domains needs track_running_stats=True"):
            layer_of(track_running_stats=False)

    def test_the_layer_shows_them(self):
        assert "domains=('photo', 'sketch'), domain_affine=True" in repr(layer_of(domain_affine=True))


class TestContext:
    def test_an_unknown_domain_lists_the_known_ones_and_changes_nothing(self):
        model = nn.Sequential(layer_of(), sn.BatchNorm1d(3, domains=("photo", "clipart")))
        unknown = pytest.raises(ArgumentError, match=r"unknown domain 'sketch'.*knows 'photo', 'clipart'")
        with unknown, sn.domain(model, "sketch"):
            pytest.fail("not entered")
        assert [layer.active_domain for layer in model] == [None, None]

    @pytest.mark.parametrize("training", [True, False])
    def test_outside_the_layer_lists_them_too(self, training):
        with pytest.raises(ArgumentError, match=r"for the domains 'photo', 'sketch'. Say which one.*with steadynorm"):
            layer_of().train(training)(draw("photo", 4, 3))

    def test_outside_a_compiled_layer_refuses_too(self):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Say which one"):
            torch.compile(layer_of(), fullgraph=True, backend="eager")(draw("photo", 4, 3))

    def test_blocks_nest_and_an_exception_leaves_them_as_they_were(self):
        layer, seen = layer_of(), []
        with sn.domain(layer, "photo"):
            with contextlib.suppress(RuntimeError), sn.domain(layer, "sketch"):
                seen.append(layer.active_domain)
                raise RuntimeError
            seen.append(layer.active_domain)
        assert seen == ["sketch", "photo"]
        assert layer.active_domain is None

    def test_layers_with_different_domains_are_named_part_by_part(self):
        stem = sn.BatchNorm1d(3, momentum=1.0, domains=("day", "night"))
        plain, head = sn.BatchNorm1d(3, momentum=1.0), layer_of(momentum=1.0)
        model, x = nn.Sequential(stem, plain, head), draw("photo", 5, 3)
        with sn.domain(model[0], "night"), sn.domain(head, "photo"):
            model(x)
        assert_running(stem, "night", stats(x).mean, stats(x).unbiased, 1)
        assert plain.num_batches_tracked.item() == head.num_batches_tracked.item() == 1
        assert_untouched(stem, "day")
        assert_untouched(head, "sketch")

    @pytest.mark.parametrize(
        ("model", "message"),
        [(sn.BatchNorm1d(3), "no batch norm of this model has domains"), (nn.BatchNorm1d(3), "1 of torch.nn")],
    )
    def test_a_model_without_domains_is_told_so(self, model, message):
        with pytest.raises(ModelError, match=message), sn.domain(model, "photo"):
            pytest.fail("not entered")


def trained(**options) -> sn.BatchNorm1d:
    """A layer whose domains differ in everything they have."""
    layer = layer_of(momentum=0.5, **options)
    for seed, name in enumerate(("photo", "sketch", "sketch")):
        with sn.domain(layer, name):
            layer(draw(name, 5, 3, seed=seed))
    with torch.no_grad():
        for value, parameter in enumerate(layer.parameters(), start=2):
            parameter.fill_(value)
    return layer


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
    @pytest.mark.parametrize("inside", [True, False])
    def test_a_copy_has_all_domains_and_is_in_none_of_them(self, copied, inside):
        layer = trained(domain_affine=True)
        with sn.domain(layer, "sketch") if inside else contextlib.nullcontext():
            twin = copied(layer)
        assert layer.active_domain is None
        with pytest.raises(ArgumentError, match="Say which one"):
            twin(draw("photo", 4, 3))
        x = draw("photo", 4, 3)
        for name in DOMAINS:
            mean, variance = layer.running(name)[:2]
            gamma, beta = (t.detach() for t in layer.affine_of(name))
            with sn.domain(twin.eval(), name):
                assert_close(twin(x), normalized(x, wide(mean), wide(variance), gamma, beta), "output")
        with sn.domain(twin.train(), "sketch"):
            twin(x)
        assert layer.running("sketch").num_batches_tracked.item() == 2

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_buffers_of_all_domains_stay_float32_in_half_precision(self, dtype):
        layer = trained(domain_affine=True)
        before = {name: t.clone() for name, t in layer.state_dict().items()}
        layer.to(dtype)
        for name, t in layer.state_dict().items():
            if "running" in name:
                assert t.dtype == torch.float32
                assert torch.equal(t, before[name]), f"{name} went through {dtype}"
            elif t.is_floating_point():
                assert t.dtype == dtype

    def test_reset_reaches_all_domains(self):
        layer = trained(domain_affine=True)
        layer.reset_running_stats()
        for name in DOMAINS:
            assert_untouched(layer, name)
        assert layer.weight_sketch.tolist() == [4, 4, 4], "statistics alone were asked for"
        layer = trained(domain_affine=True)
        layer.reset_parameters()
        for name in DOMAINS:
            assert_untouched(layer, name)
            assert [t.tolist() for t in layer.affine_of(name)] == [[1] * 3, [0] * 3]

    def test_built_on_meta_and_brought_to_life(self):
        layer = layer_of(domain_affine=True, device="meta")
        assert all(t.is_meta for t in layer.state_dict().values())
        layer.to_empty(device="cpu").reset_parameters()
        for name in DOMAINS:
            assert_untouched(layer, name)
            assert [t.tolist() for t in layer.affine_of(name)] == [[1] * 3, [0] * 3]
        assert layer.rejected_batches == 0


def test_two_scanners_of_digits(capsys):
    """What the example shows: one set of statistics describes neither of two worlds."""
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "domains.py"))
    shared, separate = (
        list(map(float, re.findall(r"([\d.]+)%", part))) for part in capsys.readouterr().out.split("each")
    )
    assert max(shared) < 85
    assert min(separate) > 95


def test_a_parametrized_weight_is_used_in_every_domain():
    class Times3(nn.Module):
        def forward(self, weight):
            return 3 * weight

    layer = sn.BatchNorm1d(2, domains=("a", "b"), domain_affine=True)
    nn.utils.parametrize.register_parametrization(layer, "weight_b", Times3())
    x = torch.randn(8, 2)
    with sn.domain(layer, "b"):
        assert_close(layer(x), 3 * batch_norm(x), "output")
