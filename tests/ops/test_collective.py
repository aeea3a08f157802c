"""Sums over ranks: their values and derivatives, and what is told when a rank has gone."""

import math
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ranks
from steadynorm.errors import ArgumentError
from steadynorm.ops import collective, rollcall
from steadynorm.ops.collective import differentiable_sum_over_ranks, sum_over_ranks, world_size

WHAT = "merging the batch's statistics"


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(rank, group, parts):
    given = parts[rank].clone().requires_grad_()
    total = sum_over_ranks(given, group, WHAT)
    assert not total.requires_grad
    assert torch.equal(given, parts[rank])
    assert world_size(group) == len(parts)
    return total


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_sum_is_that_of_all_ranks(world):
    parts = rand(4, 3, 5)[:world]
    for total in ranks.run(summed, world, parts):
        np.testing.assert_allclose(total.numpy(), parts.numpy().sum(0), rtol=1e-14)


def test_counts_are_exact_beyond_what_float32_holds():
    counts = torch.tensor([[2**24 + 1], [2**40 + 1], [1], [0]], dtype=torch.float64)
    assert {int(total) for total in ranks.run(summed, 4, counts)} == {2**24 + 2**40 + 3}


def transposed(rank, group):
    given = (rand(2, 3) * (rank + 1)).T
    total = sum_over_ranks(given, group, WHAT)
    assert total.shape == (3, 2)
    assert torch.equal(given, (rand(2, 3) * (rank + 1)).T)
    return total


def test_any_strides():
    for total in ranks.run(transposed, 2):
        np.testing.assert_allclose(total.numpy(), 3 * rand(2, 3).numpy().T)


def outside(rank, group):
    alone = dist.new_group([0])
    if rank == 0:
        return world_size(alone)
    with pytest.raises(ArgumentError, match="not one of the process group's ranks"):
        world_size(alone)
    return None


def test_a_process_outside_of_the_group_is_told_so():
    assert ranks.run(outside, 4)[0] == 1


# The ranks' losses are Σ a_r S³ with S = Σ x_r²; what is minimised is their sum, L = Σ A S³ with A = Σ a_r. Then
# dL/dx_r = 6 A S² x_r, and the Hessian times v is, on rank r, 6 A (S² v_r + 4 S x_r Σ x_s v_s).

CASES = (rand(4, 3, seed=1), rand(4, 3, seed=2), rand(4, 3, seed=3))


def loss(x, a, group):
    return (a * differentiable_sum_over_ranks(x * x, group) ** 3).sum()


def expected(world):
    x, a, v = (t[:world].numpy() for t in CASES)
    total, weight = (x * x).sum(0), a.sum(0)
    first = 6 * weight * total**2 * x
    second = 6 * weight * (total**2 * v + 4 * total * x * (x * v).sum(0))
    return a, (a * total**3).sum(1), first, second


def differentiated(rank, group):
    x, a, v = (t[rank].clone() for t in CASES)
    x.requires_grad_()
    (first,) = torch.autograd.grad(loss(x, a, group), x, create_graph=True)
    (second,) = torch.autograd.grad(first, x, v)
    return first.detach(), second


@pytest.mark.parametrize("world", [2, 4])
def test_derivatives_are_those_of_the_sum_of_the_losses(world):
    _, _, first, second = expected(world)
    for rank, found in enumerate(ranks.run(differentiated, world)):
        np.testing.assert_allclose(found[0].numpy(), first[rank], rtol=1e-12)
        np.testing.assert_allclose(found[1].numpy(), second[rank], rtol=1e-12)


def transformed(rank, group):
    x, a, v = (t[rank].clone() for t in CASES)

    def own(x):
        return loss(x, a, group)

    value, tangent = torch.func.jvp(own, (x,), (v,))
    per_copy = torch.func.vmap(torch.func.grad(own))(torch.stack([x, 2 * x]))
    return value, tangent, per_copy, torch.func.jvp(torch.func.grad(own), (x,), (v,))[1]


def test_torch_func_takes_it():
    a, losses, first, second = expected(2)
    x, _, v = (t[:2].numpy() for t in CASES)
    tangents = (a * 3 * (x * x).sum(0) ** 2 * (2 * x * v).sum(0)).sum(1)  # of each rank's own loss, for all ranks' v
    for rank, (value, tangent, per_copy, through) in enumerate(ranks.run(transformed, 2)):
        np.testing.assert_allclose(value.numpy(), losses[rank], rtol=1e-12)
        np.testing.assert_allclose(tangent.numpy(), tangents[rank], rtol=1e-12)
        np.testing.assert_allclose(per_copy.numpy(), [first[rank], 32 * first[rank]], rtol=1e-12)
        np.testing.assert_allclose(through.numpy(), second[rank], rtol=1e-12)


def compiled(rank, group):
    x, a, _ = (t[rank].clone() for t in CASES)
    x.requires_grad_()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(x, a, group).backward()
    return x.grad


def test_compiled_without_a_break_in_the_graph():
    _, _, first, _ = expected(2)
    for rank, grad in enumerate(ranks.run(compiled, 2)):
        np.testing.assert_allclose(grad.numpy(), first[rank], rtol=1e-12)


def compiled_with_an_empty_rank(rank, group):
    x = rand(0 if rank else 4, 3).requires_grad_()

    def centred(x):
        return x - differentiable_sum_over_ranks(x.sum(0), group) / 4

    y = torch.compile(centred, fullgraph=True, dynamic=False)(x)
    upstream = rand(*y.shape, seed=1)
    (grad,) = torch.autograd.grad(y, x, upstream)
    return y.detach(), grad, upstream


def test_the_compiler_keeps_the_sums_of_a_rank_whose_batch_is_empty():
    (y, grad, upstream), _ = ranks.run(compiled_with_an_empty_rank, 2)
    np.testing.assert_allclose(y.numpy(), rand(4, 3).numpy() - rand(4, 3).numpy().mean(0), atol=1e-14)
    np.testing.assert_allclose(grad.numpy(), upstream.numpy() - upstream.numpy().mean(0), atol=1e-14)


def late(rank, group):
    """Rank 1 joins only once rank 0 has looked twice whether the sum has failed."""
    looks = []
    store = group.get_group_store()

    def looking(group):
        looks.append(rollcall_is_called(group))
        if len(looks) == 2:
            store.set("looked", "twice")
        return looks[-1]

    rollcall_is_called, rollcall.is_called = rollcall.is_called, looking
    collective._LOOK_EVERY = timedelta(milliseconds=50)
    if rank == 1:
        store.wait(["looked"])
    total = sum_over_ranks(torch.tensor([rank + 1.0]), group, WHAT)
    assert total.item() == 3
    assert len(looks) >= 2 or rank == 1
    assert not any(looks)


def ends(rank, group, lost, how):
    """`lost` ends in the middle of things; the others go on to sum."""
    collective._LOOK_EVERY, rollcall.PATIENCE = timedelta(seconds=0.5), 5.0
    x = torch.ones(2, requires_grad=True)
    y = differentiable_sum_over_ranks(x * x, group)
    if rank == lost:
        match how:
            case "returns":
                return
            case "raises":
                raise ValueError("out of data")
            case _:
                os.kill(os.getpid(), signal.SIGKILL)
    if how == "killed in backward":
        y.sum().backward()
    elif how == "killed in a compiled step":
        torch.compile(loss, backend="aot_eager", fullgraph=True)(x, x.detach(), group).backward()
    else:
        sum_over_ranks(x, group, WHAT)


def differing(rank, group):
    rollcall.PATIENCE = 5.0
    sum_over_ranks(torch.ones(6 + 3 * rank), group, WHAT)


def answering(rank, group):
    rollcall.PATIENCE = 40.0
    assert rollcall.call(group).startswith("No rank has gone (ranks 0, 1, 2 answered)")


ENDS = {
    "one of two": (2, 1, "killed"),
    "rank 0 of two": (2, 0, "killed"),
    "one of four": (4, 2, "killed"),
    "rank 0 of four": (4, 0, "killed"),
    "in backward": (4, 3, "killed in backward"),
    "in a compiled step": (2, 1, "killed in a compiled step"),
    "an exception": (2, 1, "raises"),
    "an early end": (4, 1, "returns"),
}


@pytest.fixture(scope="module")
def outcomes():
    """All of these at once: most of the time their processes wait for one another."""
    with ThreadPoolExecutor(max_workers=len(ENDS) + 4) as pool:
        started = {name: pool.submit(ranks.launch, ends, world, *how) for name, (world, *how) in ENDS.items()}
        started["host"] = pool.submit(ranks.launch, ends, 4, 0, "killed", store_in_rank_0=True)
        started["differing"] = pool.submit(ranks.launch, differing, 2)
        started["answering"] = pool.submit(ranks.launch, answering, 3)
        started["late"] = pool.submit(ranks.launch, late, 2)
        return {name: outcome.result() for name, outcome in started.items()}


@pytest.mark.parametrize("name", ENDS)
def test_a_rank_that_ends_is_named_by_all_others(name, outcomes):
    world, lost, how = ENDS[name]
    others = [rank for rank in range(world) if rank != lost]
    for rank in others:
        outcome = outcomes[name][rank]
        assert outcome.exit_code == 1, outcome
        last = outcome.error.split("steadynorm.errors.DistributedError: ")[-1]
        assert f"Rank {lost} of {world} has gone" in last
        assert f"rank{'s' * (world > 2)} {', '.join(map(str, others))} answered" in last
    assert outcomes[name][lost].exit_code == {"raises": 1, "returns": 0}.get(how, -signal.SIGKILL)


def test_the_wait_for_answers_leaves_the_others_ended_within_a_minute():
    assert collective._LOOK_EVERY.total_seconds() + 2 * rollcall.PATIENCE < 60


def test_a_rank_that_takes_the_store_along_is_named(outcomes):
    for outcome in outcomes["host"][1:]:
        assert outcome.exit_code == 1
        assert "Rank 0 has gone, or whatever other process hosts the store" in outcome.error


def test_differing_sizes_end_with_an_error_on_all_ranks(outcomes):
    codes = [outcome.exit_code for outcome in outcomes["differing"]]
    assert None not in codes
    assert 0 not in codes
    told = [outcome.error for outcome in outcomes["differing"] if outcome.error]
    assert told
    assert all("DistributedError" in error for error in told)


@pytest.mark.parametrize("name", ["answering", "late"])
def test_nobody_is_missed_where_everybody_is_there(name, outcomes):
    assert [outcome.exit_code for outcome in outcomes[name]] == [0] * len(outcomes[name]), outcomes[name]


class Unreachable:
    """A group, and its store, whose host is cut off: questions are not answered, or end with an error."""

    def __init__(self, answer):
        self.check = lambda _keys: answer()
        self.set = lambda _key, _value: answer()

    def get_group_store(self):
        return self


def test_a_store_that_does_not_answer_keeps_nobody_waiting(monkeypatch):
    monkeypatch.setattr(rollcall, "PATIENCE", 0.05)
    forever = threading.Event()
    assert rollcall.is_called(Unreachable(forever.wait)) is None
    assert rollcall.is_called(Unreachable(lambda: math.log(-1))) is None
    forever.set()
