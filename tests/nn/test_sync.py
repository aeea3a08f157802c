"""Statistics over ranks: values, derivatives, what travels, over which ranks, and what becomes of copies.

The oracle is one process with the ranks' batches concatenated, from the definition in extended precision.
"""

import copy
import io
import pickle
import warnings
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import ranks
import steadynorm as sn
from steadynorm.errors import ArgumentError, ConversionWarning, ModelError, SteadynormWarning
from steadynorm.ops.collective import sum_over_ranks
from steadynorm.ops.merging import merged
from steadynorm.ops.reference import Statistics
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, stats

pytestmark = pytest.mark.xdist_group("ranks")

Batch = dict[str, Tensor]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1).to(dtype)


def layer_of(x: Tensor, **options: Any) -> sn.BatchNorm1d:
    """A layer for x, with γ, β and running statistics away from where they start."""
    layer = sn.BatchNorm1d(x.shape[1], dtype=x.dtype, **options)
    with torch.no_grad():
        for seed, t in enumerate((layer.weight, layer.bias, layer.running_mean)):
            t.copy_(rand(len(t), seed=50 + seed))
        layer.running_var.fill_(2.25)
    return layer


def part(batch: Batch, sizes: tuple[int, ...], rank: int) -> Batch:
    return {name: t.split(sizes)[rank].clone() for name, t in batch.items()}


SIZES = {  # examples on each rank, and the size of one
    "two ranks": ((5, 3), (3, 2)),
    "one value on each": ((1, 1), (3,)),  # no rank could normalise alone
    "one rank empty": ((4, 0), (3, 2)),
    "four ranks": ((3, 1, 0, 4), (3, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {},
    "weights": {},
    "masks and weights": {},
    "activation and residual": {"activation": "silu"},
    "cumulative average": {"momentum": None},
}


def batch_for(what: str, sizes: tuple[int, ...], example: tuple[int, ...], seed: int, dtype: torch.dtype) -> Batch:
    n = sum(sizes)
    batch = {"x": rand(n, *example, seed=seed, dtype=dtype), "upstream": rand(n, *example, seed=seed + 1, dtype=dtype)}
    if "masks" in what:
        batch["mask"] = rand(n, *example[1:], seed=seed + 2) > 0
    if "weights" in what:
        batch["sample_weight"] = 1 + rand(n, seed=seed + 3).abs()
    if "residual" in what:
        batch["residual"] = rand(n, *example, seed=seed + 4, dtype=dtype)
    return batch


def two_steps(rank: int, group: Any, sizes: tuple[int, ...], options: dict[str, Any], batches: list[Batch]):
    """The first forward with its derivatives, and the running statistics after both."""
    layer = layer_of(batches[0]["x"], process_group=group, **options)
    mine, later = (part(batch, sizes, rank) for batch in batches)
    upstream, x = mine.pop("upstream"), mine.pop("x").requires_grad_()
    inputs = [x, layer.weight, layer.bias]
    if "residual" in mine:
        inputs.append(mine["residual"].requires_grad_())
    y = layer(x, **mine)
    found = grad(y, inputs, upstream)
    del later["upstream"]
    layer(later.pop("x"), **later)
    return y.detach(), found, (layer.running_mean, layer.running_var, layer.num_batches_tracked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("name", SIZES)
def test_it_is_one_batch_whatever_the_ranks_sizes(name, what, dtype):
    sizes, example = SIZES[name]
    options, batches = OPTIONS[what], [batch_for(what, sizes, example, seed, dtype) for seed in (0, 10)]
    results = ranks.run(two_steps, len(sizes), sizes, options, batches)

    whole, like = batches[0], layer_of(batches[0]["x"])
    at = {"x": whole["x"], "gamma": like.weight, "beta": like.bias}
    at |= {"residual": whole["residual"]} if "residual" in whole else {}
    at = {name: t.detach().double().numpy() for name, t in at.items()}
    definition = {name: whole[name].numpy() for name in ("mask", "sample_weight") if name in whole}
    if "activation" in options:
        definition["activation"] = ACTIVATIONS[options["activation"]]

    def forward(x, gamma, beta, residual=None):
        return batch_norm(x, gamma, beta, residual=residual, **definition)

    def loss(name, value):
        return (forward(**at | {name: value}) * whole["upstream"].double().numpy()).sum()

    assert_close(torch.cat([y for y, _, _ in results]), forward(**at), "output")
    for i, name in enumerate(at):
        parts = [found[i] for _, found, _ in results]
        together = torch.stack(parts).sum(0) if name in ("gamma", "beta") else torch.cat(parts)  # a parameter's: summed
        assert_close(together, central_differences(partial(loss, name), at[name]), "gradient")

    expected, tracked = [like.running_mean.double().numpy(), like.running_var.double().numpy()], 0
    for batch in batches:
        weight = batch.get("sample_weight")
        if "mask" in batch:
            weight = batch["mask"] * (1 if weight is None else weight.view(-1, *(1,) * (batch["mask"].dim() - 1)))
        seen = stats(batch["x"], weight=weight)
        if seen.count[0] >= 2:  # or there is no unbiased variance to be remembered
            tracked += 1
            share = 1 / tracked if "momentum" in options else 0.1
            expected = [(1 - share) * e + share * s for e, s in zip(expected, (seen.mean, seen.unbiased), strict=True)]
    for *_, (mean, variance, counter) in results:
        assert_close(mean, expected[0], "statistic")
        assert_close(variance, expected[1], "variance")
        assert counter.item() == tracked
        assert torch.equal(mean, results[0][2][0])  # to the bit: ranks never drift apart
        assert torch.equal(variance, results[0][2][1])


def one_value(rank, group, sizes):
    layer = layer_of(rand(1, 3), process_group=group)
    x = part({"x": rand(1, 3)}, sizes, rank)["x"].requires_grad_()
    y = layer(x)
    (dx,) = grad(y, x, rand(*y.shape, seed=1))
    return y.detach(), layer.bias.detach(), dx, layer.num_batches_tracked.item()


def test_one_value_in_all_has_no_variance_and_is_not_remembered():
    (y, beta, dx, _), _ = results = ranks.run(one_value, 2, (1, 0))
    assert_close(y, beta[None], "output")
    assert dx.abs().max() < 1e-12
    assert [tracked for *_, tracked in results] == [0, 0]


def nothing(rank, group):
    torch._dynamo.reset()
    x = rand(2, 3).requires_grad_()
    layer = layer_of(x, process_group=group)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, mask=torch.zeros(2, dtype=torch.bool))
    (dx,) = grad(y, x, rand(2, 3, seed=1))
    zero, mean = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    merge = torch.compile(lambda mean: sn.Moments(zero, mean, zero).all_reduce(group).mean, backend="aot_eager")
    (d_mean,) = grad(merge(mean), mean, zero + 1)
    return sn.Moments.of(rand(0, 3)).all_reduce(group), y, dx, d_mean, layer.num_batches_tracked


def test_nothing_on_any_rank_is_nothing_and_no_nan():
    for found in ranks.run(nothing, 2):
        empty, *others = found
        assert all((t == 0).all() for t in (*empty, *others))


# Large counts

COUNTS = (2**24 + 1, 2**40 + 1, 1, 0)
MEANS = (3.0, -1.0, 2.0, 0.0)
M2 = (float(2**25), float(2**41), 0.0, 0.0)


def counted(rank, group):
    one = torch.ones(1, dtype=torch.float64)
    own = (COUNTS[rank] * one, MEANS[rank] * one, M2[rank] * one)
    weight = torch.tensor([float(COUNTS[rank])], dtype=torch.float64)
    _, weighed = sn.functional.batch_norm_with_moments(
        MEANS[rank] * one[:, None], sample_weight=weight, process_group=group
    )
    total = partial(sum_over_ranks, group=group, what="counting")
    return sn.Moments(*own).all_reduce(group), merged(Statistics(*own), total), weighed.count


def test_counts_are_exact_beyond_what_float32_holds():
    n = sum(COUNTS)
    mean = sum(Fraction(c) * Fraction(m) for c, m in zip(COUNTS, MEANS, strict=True)) / n
    apart = sum(c * (Fraction(m) - mean) ** 2 for c, m in zip(COUNTS, MEANS, strict=True))
    m2 = sum(map(Fraction, M2)) + apart
    assert float(torch.tensor(COUNTS, dtype=torch.float32).sum()) != n  # or this would show nothing
    for moments, statistics, weighed in ranks.run(counted, 4):
        for found in (moments, statistics):
            assert int(found.count) == n
            assert found.mean.item() == pytest.approx(float(mean), rel=1e-14)
            assert found.m2.item() == pytest.approx(float(m2), rel=1e-14)
        assert int(weighed) == n


# What travels


def collectives(rank, group):
    """How many collectives of any kind each of these costs, in forward and in backward."""
    torch._dynamo.reset()
    so_far = group._get_backend(torch.device("cpu"))._get_sequence_number_for_group  # counted by the backend itself
    x = rand(4 - 3 * rank, 3, 2)
    plain, ghost = layer_of(x, process_group=group), layer_of(x, process_group=group, ghost_batch_size=1)
    frozen = sn.freeze_(layer_of(x, process_group=group), affine=False)
    compiled = torch.compile(layer_of(x, process_group=group), fullgraph=True, backend="aot_eager")

    def cost(layer, x, **given):
        before = so_far()
        y = layer(x, **given)
        between = so_far()
        if y.requires_grad:
            y.backward(torch.ones_like(y))
        return between - before, so_far() - between

    def wanted():
        return x.clone().requires_grad_()

    with torch.no_grad():
        unrecorded = cost(plain, x)
    return {
        "training": cost(plain, wanted()),
        "with masks, weights and a residual": cost(
            plain, wanted(), mask=x[:, 0] > 0, sample_weight=x[:, 0].abs(), residual=x
        ),
        "no gradient of x": cost(plain, x),
        "no_grad": unrecorded,
        "ghost chunks": cost(ghost, wanted()),
        "compiled": cost(compiled, wanted()),
        "compiled, no gradient of x": cost(compiled, x),
        "frozen": cost(frozen, wanted()),
        "evaluation": cost(plain.eval(), wanted()),
    }


def test_two_collectives_forward_one_backward_none_in_evaluation():
    for found in ranks.run(collectives, 2):
        assert found == {
            "training": (2, 1),
            "with masks, weights and a residual": (2, 1),
            "no gradient of x": (2, 0),
            "no_grad": (2, 0),
            "ghost chunks": (2, 0),  # for what is remembered alone
            "compiled": (2, 1),
            "compiled, no gradient of x": (2, 0),
            "frozen": (0, 0),
            "evaluation": (0, 0),
        }


# Which ranks


def halves(rank, group):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = sn.sync_(layer_of(rand(2, 3)), pairs[rank // 2])
    with pytest.raises(ArgumentError, match=r"a ProcessGroup that this rank is a member of"):
        sn.sync_(layer, pairs[1 - rank // 2])
    with pytest.raises(ArgumentError, match="unsynced there"):
        sn.BatchNorm1d(3, process_group=pairs[1 - rank // 2])
    assert layer.process_group is pairs[rank // 2]
    return layer(rand(1 + rank, 3, seed=rank)).detach(), layer.weight.detach(), layer.bias.detach()


def test_a_group_may_be_a_part_of_the_world_and_others_are_told_so():
    results = ranks.run(halves, 4)
    for pair in ((0, 1), (2, 3)):
        x = torch.cat([rand(1 + rank, 3, seed=rank) for rank in pair])
        _, gamma, beta = results[0]
        assert_close(torch.cat([results[rank][0] for rank in pair]), batch_norm(x, gamma, beta), "output")


def with_the_world(rank, group, layer):
    return layer(rand(4, 3)[rank : rank + 1]).detach()


def test_the_world_is_looked_up_when_it_is_needed():
    """Built here, where torch.distributed is not initialised: alone it is a plain layer, on ranks a synced one."""
    assert not dist.is_initialized()
    layer, x = layer_of(rand(4, 3), process_group="world"), rand(4, 3)
    assert torch.equal(copy.deepcopy(layer)(x), layer_of(x)(x))
    y = torch.cat(ranks.run(with_the_world, 4, layer))
    assert_close(y, batch_norm(x, layer.weight, layer.bias), "output")


def alone(rank, group):
    x, upstream = rand(4, 3).requires_grad_(), rand(4, 3, seed=1)
    results = []
    for one in (None, group):
        layer = layer_of(x, process_group=one)
        y = layer(x)
        results.append((y, *grad(y, [x, layer.weight], upstream), layer.running_mean, layer.running_var))
    with pytest.raises(sn.errors.SingleValueError):
        layer(x[:1])
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_group_of_one_is_no_group():
    assert ranks.run(alone, 1) == [True]


# Higher derivatives, checkpoints, accumulation, the compiler, autocast


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


# Copies


def copied(rank, group):
    layer = sn.BatchNorm1d(3, process_group=group)
    assert copy.deepcopy(layer).process_group is group
    with pytest.warns(SteadynormWarning, match=r"over the ranks \[0, 1\].*sync_"):
        assert pickle.loads(pickle.dumps(layer)).process_group is None
    file = io.BytesIO()
    torch.save(nn.Sequential(layer), file)
    file.seek(0)
    with pytest.warns(SteadynormWarning, match="sync_"):
        assert torch.load(file, weights_only=False)[0].process_group is None
    for world in ("world", dist.group.WORLD):
        assert pickle.loads(pickle.dumps(sn.BatchNorm1d(3, process_group=world))).process_group == "world"
    assert layer.state_dict().keys() == nn.BatchNorm1d(3).state_dict().keys()


def test_copies_share_the_group_and_pickles_keep_the_world_alone():
    ranks.run(copied, 2)


# Whole models


def test_sync_sets_every_layer_and_keeps_its_options():
    model = nn.Sequential(sn.BatchNorm1d(3, activation="relu"), nn.Sequential(sn.BatchNorm2d(3, ghost_batch_size=2)))
    layers = [model[0], model[1][0]]
    assert sn.sync_(model) is model
    assert [layer.process_group for layer in layers] == ["world", "world"]
    assert [model[0], model[1][0]] == layers
    assert "activation=relu" in repr(layers[0])
    assert "process_group='world'" in repr(layers[1])
    assert sn.sync_(model, None) is model
    assert [layer.process_group for layer in layers] == [None, None]


@pytest.mark.parametrize("group", ["all", 3, [0, 1]])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(ArgumentError, match=r'process_group must be a ProcessGroup.*"world" or None'):
        sn.sync_(sn.BatchNorm1d(3), group)


def test_layers_of_torch_that_are_left_over_are_named():
    model = nn.Sequential(sn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.SyncBatchNorm(3))
    with pytest.warns(SteadynormWarning, match=r"1 batch norms of torch.nn .*unsynchronised: 1\."):
        sn.sync_(model)
    with pytest.raises(ModelError, match="sync_"):
        sn.sync_(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


@pytest.mark.parametrize(
    ("options", "lost"),
    [({"activation": "relu"}, "activation"), ({"channel_dim": -1, "masked": "pass"}, "channel_dim, masked")],
)
def test_torchs_conversion_warns_of_what_it_drops(options, lost):
    model = nn.Sequential(nn.Linear(3, 3), sn.BatchNorm1d(3, process_group="world", **options))
    with pytest.warns(ConversionWarning, match=rf"convert_sync_batchnorm drops {lost} of .*steadynorm.sync_"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


def test_torchs_conversion_warns_that_it_thaws_a_frozen_layer():
    with pytest.warns(ConversionWarning, match="drops frozen"):
        nn.SyncBatchNorm.convert_sync_batchnorm(sn.freeze_(nn.Sequential(sn.BatchNorm1d(3))))


def test_torchs_conversion_of_a_plain_layer_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(sn.BatchNorm1d(3)))
    assert type(converted[0]) is nn.SyncBatchNorm
