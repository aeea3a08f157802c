"""freeze_ and unfreeze_: layers that stay as they are, whatever is done to the model around them."""

import copy
import io
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
from support import assert_close, central_differences, normalized, stats, wide

pytestmark = pytest.mark.xdist_group("ranks")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(dtype)


def settled(channels: int = 3, dtype: torch.dtype = torch.float64, **options) -> sn.BatchNorm1d:
    """A layer whose statistics, γ and β are those of no fresh layer, nor of any batch below."""
    layer = sn.BatchNorm1d(channels, dtype=dtype, **options)
    by_channel = torch.arange(1.0, channels + 1)
    with torch.no_grad():
        layer.running_mean.copy_(by_channel / 4)
        layer.running_var.copy_(by_channel * 1.5)
        layer.num_batches_tracked.fill_(7)
        if layer.affine:
            layer.weight.copy_(by_channel - 1.5)
            layer.bias.copy_(by_channel / 8)
    return layer


def affine_map(layer: sn.BatchNorm1d, x, **options) -> np.ndarray:
    """f(γ (x - μ) / sqrt(σ² + ε) + β) with the running statistics, from the definition."""
    gamma, beta = (None if t is None else wide(t) for t in (layer.weight, layer.bias))
    return normalized(x, wide(layer.running_mean), wide(layer.running_var), gamma, beta, **options)


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*layer.state_dict().items(), *layer.named_buffers())}


def assert_same(layer: nn.Module, before: dict[str, Tensor]):
    assert {name for name, t in snapshot(layer).items() if not torch.equal(t, before[name])} == set()


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


def through_a_file(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # our own bytes, of a moment ago


def assigned(layer: nn.Module) -> nn.Module:
    with_gradients = {name: t.clone() for name, t in layer.state_dict(keep_vars=True).items()}
    with_gradients["weight"] = nn.Parameter(layer.weight.detach().clone())
    layer.load_state_dict(with_gradients, assign=True)
    return layer


SURVIVED = {
    "train": lambda layer: layer.train(),
    "eval, train": lambda layer: layer.eval().train(),
    "requires_grad_ of a parent": lambda layer: nn.Sequential(layer).requires_grad_(True)[0],
    "deepcopy": lambda layer: copy.deepcopy(nn.Sequential(layer))[0].requires_grad_(True),
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)).requires_grad_(True),
    "torch.save of the module": through_a_file,
    "load_state_dict": lambda layer: layer.load_state_dict(layer.state_dict()) and layer,
    "load_state_dict(assign=True)": assigned,
    "to and back": lambda layer: layer.float().double().requires_grad_(True),
}


class TestSurvives:
    @pytest.mark.parametrize("how", SURVIVED)
    def test_neither_statistics_nor_parameters_move_after(self, how):
        layer = SURVIVED[how](sn.freeze_(settled()))
        assert layer.frozen
        model = nn.Sequential(nn.Linear(4, 3, dtype=torch.float64), layer).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        before, first = snapshot(layer), model[0].weight.detach().clone()
        for seed in range(2):
            optimiser.zero_grad(set_to_none=False)
            model(draw(5, 4, seed=seed)).square().mean().backward()
            assert layer.weight.grad is None
            assert layer.bias.grad is None
            optimiser.step()
        assert_same(layer, before)
        assert not torch.equal(model[0].weight, first), "the rest goes on learning"

    def test_loading_into_a_frozen_layer_changes_its_numbers_and_not_its_being_frozen(self):
        layer, other = sn.freeze_(sn.BatchNorm1d(3, dtype=torch.float64)), settled()
        assert layer.load_state_dict(other.state_dict()).missing_keys == []
        assert_close(layer.requires_grad_(True)(draw(5, 3)), affine_map(other, draw(5, 3)), "output")
        assert layer.num_batches_tracked.item() == 7

    def test_a_copys_unfreeze_leaves_the_original_frozen(self):
        layer = sn.freeze_(settled())
        twin = sn.unfreeze_(copy.deepcopy(layer))
        assert (layer.frozen, layer.weight.requires_grad) == (True, False)
        assert (twin.frozen, twin.weight.requires_grad) == (False, True)

    def test_the_state_dict_says_nothing_of_it_and_loads_into_torchs_layer(self):
        layer, plain = sn.freeze_(settled()), nn.BatchNorm1d(3, dtype=torch.float64)
        assert list(layer.state_dict()) == list(plain.state_dict())
        plain.load_state_dict(layer.state_dict(), strict=True)
        assert_close(plain.eval()(draw(4, 3)), affine_map(layer, draw(4, 3)), "output")
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        fresh = settled()
        fresh.load_state_dict(torch.load(file, weights_only=True))
        assert not fresh.frozen, "a new model is frozen anew"

    def test_an_optimiser_that_still_has_its_gradient_leaves_it_alone(self):
        layer = settled()
        optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        layer(draw(5, 3)).backward(draw(5, 3, seed=1))
        optimiser.step()  # now there is momentum, too
        sn.freeze_(layer)
        before = snapshot(layer)
        optimiser.zero_grad(set_to_none=False)
        layer.requires_grad_(True)
        layer(draw(5, 3).requires_grad_()).backward(draw(5, 3, seed=1))
        optimiser.step()
        assert_same(layer, before)


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


def kept_for_backward(layer: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """The tensors of the size of `x` that are saved on the way from x to y."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, **options)
    return [t for t in kept if t.numel() >= x.numel()]


class TestMemory:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_backward_keeps_nothing_of_the_inputs_size(self, dtype):
        x = draw(8, 3, 16, dtype=dtype).requires_grad_()
        torchs = nn.BatchNorm1d(3, dtype=dtype).eval().requires_grad_(False)
        assert kept_for_backward(torchs, x), "the measurement sees what torch.nn keeps"
        layer = sn.freeze_(settled(dtype=dtype))
        assert kept_for_backward(layer, x) == []
        assert kept_for_backward(layer, x, residual=draw(8, 3, 16, seed=1, dtype=dtype)) == []
        assert kept_for_backward(layer, x, mask=torch.ones(8, 16, dtype=torch.bool)) == []

    def test_a_fused_activation_keeps_one_tensor(self):
        x = draw(8, 3, 16).requires_grad_()
        assert len(kept_for_backward(sn.freeze_(settled(activation="relu")), x)) == 1


class TestWritesNothing:
    """A batch that is not finite would be counted and warned about (an error in these tests) if anything looked."""

    BAD = torch.tensor([[float("inf"), 1.0, 2.0], [0.0, float("nan"), 1.0]], dtype=torch.float64)

    def run(self, how: str, layer: sn.BatchNorm1d):
        match how:
            case "forward":
                layer(self.BAD)
            case "accumulate":
                with sn.accumulate(layer):
                    layer(self.BAD)
                    layer(draw(5, 3))
            case "no_commit":
                with sn.no_commit(layer):
                    layer(self.BAD)
            case "functional_call":
                _, new = sn.functional_call(layer, {}, draw(5, 3))
                assert all(torch.equal(t, dict(layer.named_buffers())[name]) for name, t in new.items())
            case "vmap":  # which a layer that commits refuses
                x = draw(2, 5, 3)
                assert_close(torch.func.vmap(layer)(x)[1], affine_map(layer, x[1]), "output")
            case "checkpoint":
                y = checkpoint(layer, draw(5, 3).requires_grad_(), use_reentrant=False)
                y.backward(draw(5, 3, seed=1))
            case "compile":
                torch._dynamo.reset()
                compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
                assert_close(compiled(draw(5, 3)), affine_map(layer, draw(5, 3)), "output")

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize(
        "how", ["forward", "accumulate", "no_commit", "functional_call", "vmap", "checkpoint", "compile"]
    )
    def test_in_no_regime(self, how, momentum):
        layer = sn.freeze_(settled(momentum=momentum))
        before = snapshot(layer)
        self.run(how, layer)
        assert_same(layer, before)
        assert layer.rejected_batches == 0


class TestOverRanks:
    def test_a_frozen_synced_layer_waits_for_nobody(self):
        y, nothing = ranks.run(one_rank_alone, 2)
        assert nothing is None
        assert_close(y, affine_map(settled(), draw(5, 3)), "output")

    def test_ddp_does_without_the_frozen_parameters(self):
        first, second = ranks.run(in_ddp, 2)
        expected = settled(4).state_dict()
        for trained in (first, second):
            for name, t in expected.items():
                assert torch.equal(trained[f"module.1.{name}"], t), name
        assert torch.equal(first["module.0.weight"], second["module.0.weight"])
        assert not torch.equal(first["module.0.weight"], backbone()[0].weight)


def one_rank_alone(rank, group):
    layer = sn.freeze_(sn.sync_(settled(), group)).train()
    if rank == 1:
        return None
    y = layer(draw(5, 3).requires_grad_())
    y.backward(draw(5, 3, seed=1))
    return y.detach()


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), settled(4, torch.float32), nn.Linear(4, 2)).double()


def in_ddp(rank, group):
    model = sn.freeze_(backbone().requires_grad_(True))
    wrapped = DistributedDataParallel(model, process_group=group)
    optimiser = torch.optim.SGD(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):  # a reducer that waits for a gradient in vain says so in the next step
        optimiser.zero_grad()
        wrapped(draw(4 + rank, 3, seed=10 * rank + step)).square().mean().backward()
        optimiser.step()
    return wrapped.state_dict()


def test_a_second_head_for_the_digits(capsys):
    """What the example shows: without `freeze_` the first head, untouched, loses what it knew."""
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "frozen_backbone.py"))
    before, thawed, _, frozen, learnt = map(float, re.findall(r"([\d.]+)%", capsys.readouterr().out))
    assert before == frozen > 99
    assert thawed < 90
    assert learnt > 80


def test_update_bn_measures_the_others_and_leaves_a_frozen_layer_as_it_is():
    model = nn.Sequential(sn.BatchNorm1d(2), nn.Linear(2, 2), sn.BatchNorm1d(2))
    model[0].running_mean.fill_(5.0)
    sn.freeze_(model[0])
    torch.optim.swa_utils.update_bn([torch.randn(8, 2)], model)
    assert model[0].running_mean.tolist() == [5, 5]
    assert (model[0].num_batches_tracked.item(), model[2].num_batches_tracked.item()) == (0, 1)
    model[0].reset_parameters()
    assert model[0].running_mean.tolist() == [5, 5]
    sn.unfreeze_(model).apply(lambda m: isinstance(m, sn.BatchNorm1d) and m.reset_running_stats())
    assert model[0].running_mean.tolist() == [0, 0]
