"""Ranks that end before the others: without data left, killed, or by a mistake of their own."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

import ranks
import steadynorm as sn
from steadynorm.ops import collective, rollcall
from support_sync_training import Batches, batches, loss_of, network, wrapped

pytestmark = pytest.mark.xdist_group("ranks")

# A rank without data left


def early_end(rank: int, group: Any, batches: Batches) -> tuple[int, str]:
    model = wrapped(sn.sync_(network(), group), "DDP", group)
    steps = 0
    try:
        with model.join(throw_on_early_termination=True):
            for x, y in batches[: 2 + rank]:
                loss_of(model, x, y).backward()
                steps += 1
    except RuntimeError as error:
        return steps, str(error)
    return steps, ""


def test_ddps_join_with_throw_on_early_termination_ends_all_ranks_at_once():
    (ended, first), (went_on, second) = ranks.run(early_end, 2, batches()[:3])
    assert (ended, went_on) == (2, 2)
    assert "exhausted" in first
    assert "exhausted" in second


# A rank that is lost


def loses(rank: int, group: Any, batches: Batches, lost: int, where: str, wrapper: str | None) -> None:
    """Three steps of training; in the second one a rank ends between two layers, or on the way back."""
    collective._LOOK_EVERY, rollcall.PATIENCE = timedelta(seconds=0.5), 3.0
    model = wrapped(sn.sync_(network(), group), wrapper, group)
    layers = model.module if wrapper == "DDP" else model
    step = 0

    def end(*_: Any) -> None:
        if step == 1 and rank == lost:
            if where == "raises":
                raise ValueError("a mistake of this rank alone")
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "backward":  # between the second norm and the first
        layers[2].register_full_backward_pre_hook(end)
    else:  # between the first norm and the second
        layers[3].register_forward_pre_hook(end)
    for x, y in batches:
        loss_of(model, x[rank::2], y[rank::2]).backward()
        step += 1


LOST = {
    "in forward": (2, 1, "forward", None),
    "rank 0 in forward": (2, 0, "forward", None),
    "in forward, of four": (4, 2, "forward", None),
    "in backward": (2, 1, "backward", None),
    "in backward, of four": (4, 1, "backward", None),
    "by an exception": (2, 1, "raises", None),
    "under DDP, in forward": (2, 1, "forward", "DDP"),
    "under DDP, in backward": (2, 1, "backward", "DDP"),
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[ranks.Outcome]]:
    """All of them at once: most of the time their processes wait for one another."""
    data = batches()[:3]
    with ThreadPoolExecutor(len(LOST)) as pool:
        started = {name: pool.submit(ranks.launch, loses, world, data, *how) for name, (world, *how) in LOST.items()}
        return {name: outcome.result() for name, outcome in started.items()}


@pytest.mark.parametrize("name", LOST)
def test_a_rank_lost_in_mid_step_ends_the_others_with_its_name(name, outcomes):
    world, lost, where, _ = LOST[name]
    for rank, outcome in enumerate(outcomes[name]):
        if rank == lost:
            assert outcome.exit_code == (1 if where == "raises" else -signal.SIGKILL), outcome
        else:
            assert outcome.exit_code == 1, outcome
            last = outcome.error.split("steadynorm.errors.DistributedError: ")[-1]
            assert f"Rank {lost} of {world} has gone" in last
            assert ("summing the batch's gradients" in last) == (where == "backward")
