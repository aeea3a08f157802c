"""Time on a device: events around what is queued there, over buffers that take turns, with an empty cache."""

import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Clock", "DeviceClock", "in_rounds", "machine", "quartiles"]

CYCLES_PER_US = 2000  # more than any card's clock: to sleep so many cycles takes at least so long
MOST_AHEAD_US = 20_000
Call = Callable[[], object]


class Clock(Protocol):
    """Times one call."""

    device: str
    ahead_us: float
    late: int

    def device_us(self, call: Call) -> float:
        """Microseconds on the device."""
        ...

    def host_us(self, call: Call) -> float:
        """Microseconds until the host is free again."""
        ...

    def graphed(self, call: Call) -> Call:
        """The same work, captured once: a replay costs the host next to nothing."""
        ...

    def settle(self) -> None:
        """Waits for what is queued, and hands back memory that nothing holds; raises where the device has failed."""
        ...


class DeviceClock:
    """CUDA's events. Before each call the cache is flushed, and the device kept busy until all of it is queued.

    Attributes:
        ahead_us: How long it is kept busy: longer than the host needs, or the gaps between kernels are timed too.
        late: How many samples of those taken since `settle` have such gaps, for the host was not done by then.
    """

    device = "cuda"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flushed = torch.empty(4 * cache // 4, dtype=torch.int32, device="cuda")
        self.ahead_us = 1000.0
        self.late = 0

    def device_us(self, call: Call) -> float:
        """Microseconds on the device."""
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flushed.zero_()
        if self.ahead_us:
            torch.cuda._sleep(int(min(self.ahead_us, MOST_AHEAD_US) * CYCLES_PER_US))
        begun.record()
        call()
        ended.record()
        self.late += begun.query()
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

    def graphed(self, call: Call) -> Call:
        """The same work, captured once: a replay costs the host next to nothing."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def settle(self) -> None:
        """Waits for what is queued, and hands back memory that nothing holds; raises where the device has failed."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self.late = 0


def in_rounds(measure: Callable[[Any], float], calls: Mapping[str, Sequence[Any]], rounds: int) -> dict[str, list]:
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
    import triton

    from cpu_timing import commit_of_the_package

    card = torch.cuda.get_device_properties(0)
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "cache_mib": round(card.L2_cache_size / 2**20, 1),
        "multiprocessors": card.multi_processor_count,
        "versions": {
            "driver": driver(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "commit": commit_of_the_package(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def driver() -> str | None:
    """The driver's version, where its tool is there to be asked."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(asked, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.strip() or None
