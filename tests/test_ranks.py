"""The harness for tests of several processes: what it tells when something goes wrong in one of them."""

import os
import signal
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import ranks


class Found(NamedTuple):
    rank: int
    total: torch.Tensor


def fine(rank, group, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total, group=group)
    return Found(rank, total)


def raising(rank, group):
    if rank == 1:
        raise ValueError("only here")
    dist.barrier(group)  # for ever, without rank 1


def dying(rank, group):
    os.kill(os.getpid(), signal.SIGKILL)


def unpicklable(rank, group):
    return lambda: rank


def ending(rank, group):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        raise ValueError("only here")


def lasting(rank, group):
    if rank == 1:
        signal.pause()


def test_results_come_in_the_order_of_the_ranks():
    found = ranks.run(fine, 3, 10)
    assert [(one.rank, one.total.item()) for one in found] == [(0, 33), (1, 33), (2, 33)]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (raising, "rank 1 of 4: Traceback(.|\n)*ValueError: only here(.|\n)*rank 0 of 4: still running"),
        (dying, "rank 3 of 4: its process died"),
        (unpicklable, "rank 0 of 4: Traceback(.|\n)*unpicklable"),
    ],
)
def test_a_failure_names_the_rank_and_the_pool_recovers(body, told, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.2)
    with pytest.raises(ranks.RankError, match=told):
        ranks.run(body, 4)
    assert ranks.run(fine, 1, 5)[0].total.item() == 5


def test_a_body_that_does_not_end_is_stopped(monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 1.0)
    with pytest.raises(ranks.RankError, match="rank 1 of 2: still running, stopped"):
        ranks.run(lasting, 2)


def test_fresh_processes_tell_how_they_ended():
    first, second, third = ranks.launch(ending, 3)
    assert (first.exit_code, first.error) == (0, None)
    assert (second.exit_code, second.error) == (-signal.SIGKILL, None)
    assert third.exit_code == 1
    assert "ValueError: only here" in third.error


def test_a_fresh_process_that_does_not_end_is_stopped():
    assert ranks.launch(lasting, 2, timeout=1.0)[1].exit_code is None
