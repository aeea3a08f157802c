"""The roll call: which ranks are still there, asked when a collective has failed.

gloo tells only the neighbours of a lost rank, gives them an address instead of a rank, and lets everyone else wait on.
So whoever gets an error calls the roll at the store where the ranks met: each one that learns of it answers under its
own number, and those that have not answered after a while are the lost ones. Those that wait in a collective look
every now and then whether the roll is being called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

__all__ = ["PATIENCE", "call", "is_called"]

PATIENCE = 20.0  # seconds for everyone to answer, those included that are computing or reading data meanwhile
_PAUSE = 0.1  # seconds between two looks at the store
_CALLED = "steadynorm/roll/called"


def is_called(group: ProcessGroup) -> bool | None:
    """Whether some rank of `group` has called the roll; None where the store does not answer."""
    found: list[bool] = []
    _within(PATIENCE, lambda: found.append(group.get_group_store().check([_CALLED])))
    return found[0] if found else None


def call(group: ProcessGroup) -> str:
    """Calls the roll, or answers it, and tells in a few sentences who is there. Takes seconds; never hangs."""
    import torch.distributed as dist

    ranks, answered = dist.get_process_group_ranks(group), [dist.get_rank()]
    failure = _within(PATIENCE + 5.0, lambda: _ask(group.get_group_store(), ranks, answered))
    return _told(ranks, sorted(answered), failure)


def _ask(store: Store, ranks: list[int], answered: list[int]) -> None:
    """Answers for this rank, then adds to `answered` whoever else does."""
    until = time.monotonic() + PATIENCE
    store.set(f"{_CALLED}/{answered[0]}", "here")
    store.set(_CALLED, "")
    while len(answered) < len(ranks) and time.monotonic() < until:
        time.sleep(_PAUSE)
        answered += [rank for rank in ranks if rank not in answered and store.check([f"{_CALLED}/{rank}"])]


def _told(ranks: list[int], answered: list[int], failure: Exception | None) -> str:
    missing = [rank for rank in ranks if rank not in answered]
    if not missing:
        return (
            f"No rank has gone ({_listed(answered)} answered), so they do not call the same collectives on the same "
            "sizes: all ranks must run the same layers, with as many channels, in the same order."
        )
    # A rank that hosts the store ends its own roll first, and takes the store along: then what is known by now holds.
    if failure is not None and 0 not in answered:
        first_line = str(failure).partition("\n")[0]
        return (
            "Rank 0 has gone, or whatever other process hosts the store where the ranks meet: the store does not "
            f"answer ({first_line})."
        )
    return (
        f"{_listed(missing).capitalize()} of {len(ranks)} {'has' if len(missing) == 1 else 'have'} gone: no answer "
        f"within {PATIENCE:g} s, while {_listed(answered)} answered. What ended a rank stands in its own output."
    )


def _listed(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _within(seconds: float, work: Callable[[], None]) -> Exception | None:
    """Runs `work` for as long as that, and returns what it raised: a store whose host is cut off answers nothing."""
    raised: list[Exception] = [TimeoutError(f"no answer within {seconds:g} s")]

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            raised[:] = [error]
        else:
            raised.clear()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    return raised[0] if raised else None
