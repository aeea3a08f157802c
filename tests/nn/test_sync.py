"""Statistics over ranks: values, derivatives, large counts, and what travels.

The oracle is one process with the ranks' batches concatenated, from the definition in extended precision.
"""

from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import grad

import ranks
import steadynorm as sn
from steadynorm.ops.collective import sum_over_ranks
from steadynorm.ops.merging import merged
from steadynorm.ops.reference import Statistics
from support import ACTIVATIONS, assert_close, batch_norm, central_differences, stats
from support_sync import Batch, layer_of, part, rand

pytestmark = pytest.mark.xdist_group("ranks")

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
