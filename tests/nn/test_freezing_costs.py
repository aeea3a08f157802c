"""What a frozen layer does not do: keep inputs for backward, write to its buffers, wait for other ranks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ranks
import steadynorm as sn
from support import assert_close
from support_freezing import affine_map, assert_same, draw, settled, snapshot

pytestmark = pytest.mark.xdist_group("ranks")


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
