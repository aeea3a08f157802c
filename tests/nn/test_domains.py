"""Domains: running statistics, and by option γ and β, of their own for data of several kinds."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError
from support import assert_close, batch_norm, central_differences, normalized, stats, wide
from support_domains import DOMAINS, assert_running, assert_untouched, draw, layer_of, moved, noise

pytestmark = pytest.mark.xdist_group("ranks")


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
