"""freeze_ and unfreeze_: the affine map that a layer becomes, for which layers, and with which parameters."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import steadynorm as sn
from steadynorm.errors import ArgumentError, ModelError
from support import assert_close, central_differences, normalized, stats, wide
from support_freezing import affine_map, assert_same, draw, settled, snapshot


class TestAffineMap:
    @pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (1, 3), (0, 3)], ids=str)
    def test_training_computes_it_for_any_batch_of_one_and_none_included(self, shape):
        layer = sn.freeze_(settled()).train()
        before, x, g = snapshot(layer), draw(*shape).requires_grad_(), draw(*shape, seed=1)
        y = layer(x)
        assert_close(y, affine_map(layer, x), "output")
        y.backward(g)
        assert_close(x.grad, central_differences(lambda v: (affine_map(layer, v) * wide(g)).sum(), x), "gradient")
        assert layer.weight.grad is None
        assert_same(layer, before)

    def test_with_activation_and_residual(self):
        layer = sn.freeze_(settled(activation="silu"))
        x, residual, g = draw(4, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_(), draw(4, 3, seed=2)
        y = layer(x, residual=residual)

        def expected(x, residual):
            return affine_map(layer, x, residual=residual, activation=lambda z: z / (1 + np.exp(-z)))

        assert_close(y, expected(x, residual), "output")
        y.backward(g)
        of_x = central_differences(lambda v: (expected(v, residual) * wide(g)).sum(), x)
        of_residual = central_differences(lambda v: (expected(x, v) * wide(g)).sum(), residual)
        assert_close(x.grad, of_x, "gradient")
        assert_close(residual.grad, of_residual, "gradient")

    @pytest.mark.parametrize("masked", ["zero", "pass"])
    def test_with_a_mask_and_weights_that_no_longer_matter(self, masked):
        layer, mask = sn.freeze_(settled(masked=masked)), torch.arange(8).reshape(2, 4) % 3 > 0
        kept, g = mask[:, None], draw(2, 3, 4, seed=1)
        x = draw(2, 3, 4).masked_fill(~kept, float("nan")).requires_grad_()
        y = layer(x, mask=mask, sample_weight=torch.tensor([1.0, 5.0]))
        expected = affine_map(layer, x.nan_to_num(0))
        passed = x if masked == "pass" else torch.zeros_like(x)
        assert_close(y, np.where(kept, expected, wide(passed)), "output")
        y.backward(g)
        slope = wide(layer.weight) / np.sqrt(wide(layer.running_var) + 1e-5)
        through = wide(g) if masked == "pass" else 0
        assert_close(x.grad, np.where(kept, wide(g) * slope[:, None], through), "gradient")

    @pytest.mark.parametrize("options", [{"renorm": sn.Renorm(warmup=0, ramp=0)}, {"ghost_batch_size": 2}], ids=str)
    def test_what_corrects_or_splits_a_batch_has_nothing_left_to_do(self, options):
        layer = sn.freeze_(settled(**options))
        before = snapshot(layer)
        assert_close(layer(draw(5, 3)), affine_map(layer, draw(5, 3)), "output")
        assert_same(layer, before)

    def test_each_domain_is_frozen_at_its_own_statistics(self):
        layer = sn.BatchNorm1d(3, momentum=1.0, dtype=torch.float64, domains=("photo", "sketch"))
        batches = {"photo": draw(6, 3), "sketch": draw(6, 3, seed=1) * 3}
        for name, x in batches.items():
            with sn.domain(layer, name):
                layer(x)
        sn.freeze_(layer)
        before, x = snapshot(layer), draw(4, 3, seed=2)
        for name, seen in batches.items():
            with sn.domain(layer, name):
                assert_close(layer(x), normalized(x, stats(seen).mean, stats(seen).unbiased), "output")
        assert_same(layer, before)
        with pytest.raises(ArgumentError, match="'photo', 'sketch'"):
            layer(x)

    def test_second_derivatives_pass_through(self):
        layer = sn.freeze_(settled(activation="silu"))
        assert torch.autograd.gradgradcheck(layer, draw(2, 3).requires_grad_())

    @pytest.mark.parametrize("affine", [True, False])
    def test_it_stays_frozen_in_evaluation_and_back(self, affine):
        layer = sn.freeze_(settled(), affine=affine)
        y = layer(draw(4, 3))
        assert torch.equal(layer.eval()(draw(4, 3)), y)
        assert torch.equal(layer.train()(draw(4, 3)), y)


class TestAffineOption:
    def test_false_lets_weight_and_bias_learn(self):
        layer = sn.freeze_(settled(), affine=False)
        x, g, before = draw(5, 3), draw(5, 3, seed=1), snapshot(layer)
        layer(x).backward(g)
        z = normalized(x, wide(layer.running_mean), wide(layer.running_var))
        assert_close(layer.weight.grad, (wide(g) * z).sum(0), "gradient")
        assert_close(layer.bias.grad, wide(g).sum(0), "gradient")
        assert_same(layer, before)

    def test_what_a_mask_hides_does_not_reach_the_gradients_of_those_that_learn(self):
        layer, mask, g = sn.freeze_(settled(), affine=False), torch.tensor([True, False, True]), draw(3, 3, seed=1)
        x = draw(3, 3).masked_fill(~mask[:, None], float("nan"))
        layer(x, mask=mask).backward(g)
        z = normalized(x[mask], wide(layer.running_mean), wide(layer.running_var))
        assert_close(layer.weight.grad, (wide(g[mask]) * z).sum(0), "gradient")
        assert_close(layer.bias.grad, wide(g[mask]).sum(0), "gradient")

    def test_false_after_true_gives_them_back(self):
        layer = settled()
        layer.bias.requires_grad_(False)
        sn.freeze_(sn.freeze_(layer), affine=False)
        assert (layer.frozen, layer.frozen_affine) == (True, False)
        assert [p.requires_grad for p in layer.parameters()] == [True, False]
        layer(draw(5, 3)).backward(draw(5, 3, seed=1))
        assert layer.weight.grad is not None

    def test_true_after_false_freezes_them_as_well(self):
        layer = sn.freeze_(sn.freeze_(settled(), affine=False))
        layer.requires_grad_(True)
        assert not layer(draw(5, 3)).requires_grad

    def test_unfreeze_restores_the_flags_of_before_the_first_freeze(self):
        layer = settled()
        layer.bias.requires_grad_(False)
        sn.freeze_(layer).requires_grad_(True)
        sn.freeze_(layer)
        assert [p.requires_grad for p in layer.parameters()] == [False, False]
        assert sn.unfreeze_(layer) is layer
        assert [p.requires_grad for p in layer.parameters()] == [True, False]
        assert (layer.frozen, layer.frozen_affine) == (False, False)
        layer(draw(5, 3))
        assert layer.num_batches_tracked.item() == 8

    def test_unfreeze_leaves_a_layer_that_was_not_frozen_as_it_is(self):
        layer = settled()
        layer.weight.requires_grad_(False)
        sn.unfreeze_(layer)
        assert not layer.weight.requires_grad

    def test_a_layer_without_parameters(self):
        layer = sn.freeze_(settled(affine=False))
        assert_close(layer(draw(4, 3)), affine_map(layer, draw(4, 3)), "output")
        sn.unfreeze_(layer)


class TestWhichLayers:
    def test_those_of_the_model_that_is_given_and_no_others(self):
        model = nn.Sequential(nn.Sequential(settled(), nn.ReLU()), settled())
        assert sn.freeze_(model[0]) is model[0]
        model.train()(draw(5, 3))
        assert [layer.num_batches_tracked.item() for layer in (model[0][0], model[1])] == [7, 8]
        assert "frozen=True" in repr(model[0][0])
        assert "frozen" not in repr(model[1])

    def test_a_layer_without_running_statistics_is_refused_before_any_is_frozen(self):
        model = nn.Sequential(settled(), sn.BatchNorm1d(3, track_running_stats=False))
        with pytest.raises(ModelError, match=r"no running statistics to be frozen at.*track_running_stats=True"):
            sn.freeze_(model)
        assert not model[0].frozen
        assert model[0].weight.requires_grad

    @pytest.mark.parametrize("function", [sn.freeze_, sn.unfreeze_])
    def test_a_model_without_our_layers_is_refused(self, function):
        with pytest.raises(ModelError, match=r"1 of torch\.nn"):
            function(nn.Sequential(nn.BatchNorm1d(3)))


def test_a_second_head_for_the_digits(capsys):
    """What the example shows: without `freeze_` the first head, untouched, loses what it knew."""
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "frozen_backbone.py"))
    before, thawed, _, frozen, learnt = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert before == frozen > 99
    assert thawed < 90
    assert learnt > 80
