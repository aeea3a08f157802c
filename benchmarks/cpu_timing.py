"""Timing functions in turns, and what is worth knowing of the machine that does it."""

import gc
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from steadynorm.experiment.environment import describe

__all__ = ["busy", "commit_of_the_package", "interleaved", "machine", "percentiles"]

SAMPLE_NS = 2e6  # a sample repeats a fast call for so long
ROUNDS = (5, 50)
LOAD_PER_CORE, DRIFT = 0.3, 0.15


def interleaved(calls: Mapping[str, Callable[[], object]], seconds: float, seed: int = 0) -> dict[str, list[float]]:
    """Microseconds per call: one sample of each function a round, in a new random order every round.

    Each sample begins with a call that is not timed, which brings caches and the memory allocator into the state that
    the function itself leaves behind, whoever came before.
    """
    shuffle = random.Random(seed).shuffle
    repeats: dict[str, int] = {}
    expected = 0.0
    for name, call in calls.items():
        call()
        once = _sample(call, 1)
        repeats[name] = math.ceil(SAMPLE_NS / max(once, 1.0)) if once < SAMPLE_NS else 1
        expected += once * (repeats[name] + 1)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds * 1e9 / expected)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                found[name].append(_sample(calls[name], repeats[name]) / 1e3)
    finally:
        if collecting:
            gc.enable()
    return found


def _sample(call: Callable[[], object], repeats: int) -> float:
    call()
    begun = time.perf_counter_ns()
    for _ in range(repeats):
        call()
    return (time.perf_counter_ns() - begun) / repeats


def percentiles(samples: list[float]) -> list[float]:
    """The 20th, 50th and 80th, to four digits."""
    return [float(f"{value:.4g}") for value in np.percentile(samples, (20, 50, 80))]


def busy() -> tuple[str | None, dict[str, float]]:
    """What speaks against timing anything now (None: nothing), and the load.

    Looks at the load average of the last minute, and times the same copy twice: on an idle machine both take the same.
    """
    load = os.getloadavg()[0]
    source = torch.ones(1 << 22)
    target = torch.empty_like(source)
    medians = [percentiles(interleaved({"copy": lambda: target.copy_(source)}, 0.4)["copy"])[1] for _ in range(2)]
    drift = max(medians) / min(medians) - 1
    found = {"load_average": round(load, 2), "calibration_drift": round(drift, 3)}
    cores = os.cpu_count() or 1
    if load > LOAD_PER_CORE * cores:
        return f"the load average is {load:.2f} on {cores} cores", found
    if drift > DRIFT:
        return f"the same copy took {100 * drift:.0f} % longer once than the other time", found
    return None, found


def machine() -> dict[str, Any]:
    """Processor, caches, versions, threads, commit and date; nothing that names the machine."""
    facts = describe(1)
    return {
        "processor": facts["processor"],
        "system": facts["system"],
        "cores": os.cpu_count(),
        "caches": _caches(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "numba", "numpy")},
        },
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "commit": commit_of_the_package(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _caches() -> dict[str, str]:
    """As seen by the first core."""
    found: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit_of_the_package() -> str | None:
    """The commit that was measured, marked where files of the package differ from it."""
    here = Path(__file__).resolve().parent.parent
    try:
        head, changes = (
            subprocess.run(["git", *arguments], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
            for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "src"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} and changes" if changes else head
