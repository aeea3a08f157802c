"""Statistics over ranks with higher derivatives, checkpoints, accumulation, the compiler and low precision."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import ranks
import steadynorm as sn
from support import assert_close, batch_norm, stats
from support_sync import layer_of, part, rand

pytestmark = pytest.mark.xdist_group("ranks")


def definition(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """In plain operations, so that autograd can differentiate it as often as it likes."""
    centred = x - x.mean((0, 2), keepdim=True)
    invstd = (centred.square().mean((0, 2), keepdim=True) + 1e-5).rsqrt()
    return centred * invstd * gamma[:, None] + beta[:, None]


UNEQUAL = (4, 0, 1, 2)


def penalised(rank, group):
    """Of a loss with the norm of x's gradient in it: the gradients of x, γ and β."""
    x = part({"x": rand(7, 3, 2)}, UNEQUAL, rank)["x"].requires_grad_()
    upstream = part({"u": rand(7, 3, 2, seed=1)}, UNEQUAL, rank)["u"]
    layer = layer_of(x, process_group=group)
    y = layer(x).tanh()
    (dx,) = grad(y, x, upstream, create_graph=True)
    return grad(dx.square().sum(), [x, layer.weight])


def test_double_backward_is_that_of_the_whole_batch():
    x, layer = rand(7, 3, 2).requires_grad_(), layer_of(rand(7, 3, 2))
    (dx,) = grad(definition(x, layer.weight, layer.bias).tanh(), x, rand(7, 3, 2, seed=1), create_graph=True)
    expected = grad(dx.square().sum(), [x, layer.weight])
    results = ranks.run(penalised, 4)
    assert_close(torch.cat([of_x for of_x, _ in results]), expected[0], "gradient")
    assert_close(torch.stack([of_gamma for _, of_gamma in results]).sum(0), expected[1], "gradient")


def checkpointed(rank, group, use_reentrant):
    x = part({"x": rand(7, 3, 2)}, UNEQUAL, rank)["x"].requires_grad_()
    layer = layer_of(x, process_group=group)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(part({"u": rand(7, 3, 2, seed=1)}, UNEQUAL, rank)["u"])
    return x.grad, layer.running_mean, layer.num_batches_tracked.item()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_merges_again_and_commits_once(use_reentrant):
    x, layer = rand(7, 3, 2).requires_grad_(), layer_of(rand(7, 3, 2))
    (expected,) = grad(definition(x, layer.weight, layer.bias), x, rand(7, 3, 2, seed=1))
    results = ranks.run(checkpointed, 4, use_reentrant)
    assert_close(torch.cat([dx for dx, _, _ in results]), expected, "gradient")
    for _, mean, tracked in results:
        assert_close(mean, 0.9 * layer.running_mean.numpy() + 0.1 * stats(x).mean, "statistic")
        assert tracked == 1


def accumulated(rank, group):
    layer = layer_of(rand(7, 3, 2), process_group=group, momentum=1.0)
    with sn.accumulate(layer):
        for seed in range(2):
            layer(part({"x": rand(7, 3, 2, seed=seed)}, UNEQUAL, rank)["x"])
    return layer.running_var, layer.num_batches_tracked.item()


def test_accumulating_over_micro_batches_and_ranks():
    everything = torch.cat([rand(7, 3, 2), rand(7, 3, 2, seed=1)])
    for variance, tracked in ranks.run(accumulated, 4):
        assert_close(variance, stats(everything).unbiased, "variance")
        assert tracked == 1


def compiled(rank, group, backend, sizes, world):
    torch._dynamo.reset()
    x = part({"x": rand(sum(sizes), 3, 2)}, sizes, rank)["x"].requires_grad_()
    layer = layer_of(x, process_group="world" if world else group, activation="silu")
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    (dx,) = grad(y, x, part({"u": rand(sum(sizes), 3, 2, seed=1)}, sizes, rank)["u"])
    return y.detach(), dx, layer.running_mean, layer.running_var


@pytest.mark.parametrize(
    ("backend", "sizes", "world"),
    [("aot_eager", UNEQUAL, True), ("aot_eager", (4, 3), False), ("inductor", (4, 0), False)],
)
def test_compiled_without_a_break_in_the_graph(backend, sizes, world):
    x, layer = rand(sum(sizes), 3, 2).requires_grad_(), layer_of(rand(7, 3, 2))
    expected = nn.functional.silu(definition(x, layer.weight, layer.bias))
    (dx,) = grad(expected, x, rand(sum(sizes), 3, 2, seed=1))
    results = ranks.run(compiled, len(sizes), backend, sizes, world)
    assert_close(torch.cat([y for y, *_ in results]), expected, "output")
    assert_close(torch.cat([found for _, found, *_ in results]), dx, "gradient")
    for *_, mean, variance in results:
        assert_close(mean, 0.9 * layer.running_mean.numpy() + 0.1 * stats(x).mean, "statistic")
        assert_close(variance, 0.9 * 2.25 + 0.1 * stats(x).unbiased, "variance")


def in_low_precision(rank, group, how):
    layer = layer_of(rand(8, 3, dtype=torch.float32), process_group=group)
    if how == "bfloat16()":
        layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        x = rand(8, 3, dtype=layer.weight.dtype).split((7, 1))[rank] @ torch.eye(3, dtype=layer.weight.dtype)
        y = layer(x)
    return x, y.detach(), layer.state_dict()


@pytest.mark.parametrize("how", ["autocast", "bfloat16()"])
def test_low_precision_leaves_the_running_statistics_in_float32(how):
    results = ranks.run(in_low_precision, 2, how)
    x, y = (torch.cat([result[i] for result in results]) for i in range(2))
    assert x.dtype == y.dtype == torch.bfloat16
    before = layer_of(x.float())
    for *_, state in results:
        mean, variance = state["running_mean"], state["running_var"]
        assert mean.dtype == variance.dtype == torch.float32
        assert_close(mean, 0.9 * before.running_mean.double().numpy() + 0.1 * stats(x).mean, "statistic")
        assert_close(variance, 0.9 * 2.25 + 0.1 * stats(x).unbiased, "variance")
        assert_close(y, batch_norm(x, state["weight"], state["bias"]), "output")
