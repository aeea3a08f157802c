"""Time on a device: events around what is queued there, over buffers that take turns, with an empty cache."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "in_rounds", "machine", "quartiles"]

SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host queues all of a call: no gaps are timed
Call = Callable[[], object]


class Clock(Protocol):
    """Times one call."""

    device: str

    def device_us(self, call: Call) -> float:
        """Microseconds on the device."""
        ...

    def host_us(self, call: Call) -> float:
        """Microseconds until the host is free again."""
        ...


class DeviceClock:
    """CUDA's events. Before each call the cache is flushed, and the device kept busy until all of it is queued."""

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flushed = torch.empty(4 * cache // 4, dtype=torch.int32, device="cuda")

    def device_us(self, call: Call) -> float:
        """Microseconds on the device."""
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)
        begun.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        return begun.elapsed_time(ended) * 1e3

    def host_us(self, call: Call) -> float:
        """Microseconds until the host is free again: what limits small shapes."""
        torch.cuda.synchronize()
        begun = time.perf_counter_ns()
        call()
        taken = (time.perf_counter_ns() - begun) / 1e3
        torch.cuda.synchronize()
        return taken


def in_rounds(measure: Callable[[Call], float], calls: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, list]:
    """Samples of each contender, one a round, in a new random order every round; its buffers take turns.

    Args:
        measure: Of a clock.
        calls: Of each contender, the same call on different buffers.
        rounds: How many, after two that are not counted: compilers and allocators settle in those.
    """
    shuffle = random.Random(0).shuffle
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(rounds + 2):
        shuffle(order)
        for name in order:
            taken = measure(calls[name][i % len(calls[name])])
            if i >= 2:
                found[name].append(taken)
    return found


def quartiles(samples: Sequence[float]) -> list[float]:
    """The first, the median and the third, to four digits."""
    cuts = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return [float(f"{value:.4g}") for value in cuts]


def machine() -> dict[str, Any]:
    """The card and the versions; nothing that names the machine."""
    from importlib.metadata import version

    from cpu_timing import commit_of_the_package

    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cache_mib": round(card.L2_cache_size / 2**20, 1),
        "multiprocessors": card.multi_processor_count,
        "versions": {
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "commit": commit_of_the_package(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
