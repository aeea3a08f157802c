"""What the monitor's hooks cost a forward, within their budget and without one."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.experiment.stats import mean_interval
from steadynorm.shift.watching.monitor import Monitor

PAIRS = 60


def cost(model: nn.Module, x: Tensor, size: int, seconds: float) -> dict[str, Any]:
    """CPU time of forwards with the hooks over those without: mean over pairs of blocks, and its 95 % interval."""
    row: dict[str, Any] = {"batch_size": size}
    bares: list[float] = []
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]  # a file may be sorted by class
    batch = x[torch.arange(size) % len(x)]

    def block(repeats: int) -> float:
        entered = time.thread_time()
        for _ in range(repeats):
            model(batch)
        return (time.thread_time() - entered) / repeats

    with torch.inference_mode():
        for label, budget in (("budget 3 %", 0.03), ("everything", None)):
            monitor = Monitor(model, budget=budget, clock=time.thread_time).calibrate(x[:1000].split(250))
            block(3)
            repeats = max(1, int(seconds / 2 / PAIRS / max(block(3), 1e-6)))
            ratios: list[float] = []
            for turn in range(PAIRS):
                bare = block(repeats) if turn % 2 else None
                with monitor:
                    block(2)  # attaching tries the hook on an empty module, which leaves the caches cold
                    watched = block(repeats)
                bares.append(block(repeats) if bare is None else bare)
                ratios.append(watched / bares[-1] - 1)
            state, (mean, interval) = (
                monitor.state(),
                mean_interval(ratios),
            )  # a median would miss the rare looks
            row[label] = {"cost": mean, "interval": interval, "median": float(np.median(ratios)), "account": state.cost}
            row[label] |= {"observed": state.observed / state.batches, "tests": state.tests, "failures": state.failures}
    row["forward_ms"] = float(np.median(bares)) * 1e3
    print(row, flush=True)
    return row
