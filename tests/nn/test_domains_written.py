"""When the statistics of a domain are written: in contexts, transforms, compiled steps and checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import steadynorm as sn
from steadynorm.errors import ArgumentError
from support import assert_close, batch_norm, central_differences, stats, wide
from support_domains import DOMAINS, assert_running, assert_untouched, draw, layer_of, moved, noise


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
