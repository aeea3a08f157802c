"""One row of the GPU's benchmark: every contender is held against the truth, then all are timed in turns."""

import math
from typing import Any

import torch

from cpu_peers import Peer
from gpu_oracle import error_of
from gpu_peers import contenders, copy_of, problems
from gpu_rows import Row, bytes_moved
from gpu_timing import Call, Clock, in_rounds, quartiles

__all__ = ["measure"]

ROTATED = 4 * 50e6  # bytes of x in all sets of buffers: several times what a cache holds
MOST_SETS = 8
# A peer is timed unless it is wrong outright: the framework's own sum in long chains of float32, and round to the
# dtype between batch norm, add and ReLU.
LENIENCE = 100.0
GRAPHED = ("ours", "eager")
LARGEST_GRAPHED = 32e6  # bytes of x: beyond them no host is slower than the device
HOST_ROUNDS = 5


def measure(row: Row, clock: Clock, compiled: bool, rounds: int) -> dict[str, Any]:
    """One row. `wrong` says of ours what is not right, and `skipped` of a peer: what is wrong is not timed."""
    found: dict[str, Any] = {
        "name": row.name,
        **{key: getattr(row, key) for key in ("network", "shape", "dtype", "layout", "variant", "x_bytes")},
        "bytes_moved": bytes_moved(row),
    }
    try:
        return {**found, **_measured(row, clock, compiled, rounds)}
    except torch.OutOfMemoryError:
        clock.settle()
        return {**found, "not_timed": "it needs more memory than the device has free"}


def _measured(row: Row, clock: Clock, compiled: bool, rounds: int) -> dict[str, Any]:
    clock.settle()
    given = problems(row, clock.device, max(2, min(MOST_SETS, math.ceil(ROTATED / row.x_bytes))))
    peers, errors, skipped = contenders(given, compiled), {}, {}
    for name, bound in list(peers.items()):
        errors[name], reason = _judged(given[0], bound[0], 1.0 if name == "ours" else LENIENCE)
        if reason is not None and name == "ours":
            clock.settle()
            return {"errors": errors, "wrong": reason}
        if reason is not None:
            skipped[name] = reason
            del peers[name]
    host = in_rounds(clock.host_us, _calls(peers, "both"), HOST_ROUNDS)
    clock.ahead_us = 2 * max(quartiles(samples)[2] for samples in host.values())
    timed = {
        "forward": in_rounds(clock.device_us, _calls(peers, "forward"), rounds),
        "backward": in_rounds(lambda begin: clock.device_us(begin()), _backwards(peers), rounds),
        "both": in_rounds(clock.device_us, _calls(peers, "both"), rounds),
    }
    copy, copy_bytes = copy_of(row, clock.device)
    graphs = _graphs(peers, clock, skipped) if row.x_bytes <= LARGEST_GRAPHED else {}
    replays = in_rounds(clock.device_us, graphs, rounds)
    return {
        "errors": errors,
        "skipped": skipped,
        "copy_bytes": copy_bytes,
        "copy_us": quartiles(in_rounds(clock.device_us, {"copy": [copy]}, rounds)["copy"]),
        "times_us": {which: {who: quartiles(taken) for who, taken in who.items()} for which, who in timed.items()},
        "graph_us": {who: quartiles(taken) for who, taken in replays.items()},
        "host_us": {who: quartiles(taken) for who, taken in host.items()},
        "late": clock.late,
    }


def _judged(problem: Any, peer: Peer, allowed: float) -> tuple[float | None, str | None]:
    """How far it is from the truth (None: no number), and why it is not to be timed, if so."""
    try:
        error = error_of(problem, peer)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever a compiler or a kernel raises: the other contenders can go on
        lines = str(failure).strip().splitlines()
        return None, f"{type(failure).__name__}: {lines[0] if lines else ''}"
    if not math.isfinite(error):
        return None, "a result is no finite number, or was not written"
    shown = float(f"{error:.3g}")
    return shown, f"{shown:g} times as far from the truth as allowed" if error > allowed else None


def _calls(peers: dict[str, list[Peer]], which: str) -> dict[str, list[Call]]:
    return {name: [getattr(peer, which) for peer in bound] for name, bound in peers.items()}


def _backwards(peers: dict[str, list[Peer]]) -> dict[str, list[Any]]:
    """Calls that go forward, and then hand over the backward that is to be timed."""

    def begin(peer: Peer) -> Call:
        y = peer.forward()

        def backward() -> None:
            y.backward(peer.gradient)
            for leaf in peer.leaves:
                leaf.grad = None

        return backward

    return {name: [lambda peer=peer: begin(peer) for peer in bound] for name, bound in peers.items()}


def _graphs(peers: dict[str, list[Peer]], clock: Clock, skipped: dict[str, str]) -> dict[str, list[Call]]:
    found: dict[str, list[Call]] = {}
    for name in GRAPHED:
        if name in peers:
            try:
                found[name] = [clock.graphed(peers[name][0].both)]
            except RuntimeError as failure:
                skipped[f"{name}, graph"] = str(failure).strip().splitlines()[0]
    return found
