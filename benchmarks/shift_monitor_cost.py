"""What the monitor's hooks cost a forward, within their budget and without one."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.experiment.stats import median_interval
from steadynorm.shift.watching.monitor import Monitor

PAIRS = 60


def cost(model: nn.Module, x: Tensor, size: int, seconds: float) -> dict[str, Any]:
    """CPU time of forwards with the hooks over those without: median of pairs of blocks, and its 95 % interval."""
    row: dict[str, Any] = {"batch_size": size}
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
                bare = block(repeats) if turn % 2 else 0.0
                with monitor:
                    block(2)  # attaching tries the hook on an empty module, which leaves the caches cold
                    watched = block(repeats)
                ratios.append(watched / (bare or block(repeats)) - 1)
            state, (middle, interval) = monitor.state(), median_interval(ratios)
            row[label] = {"cost": middle, "interval": interval, "mean": float(np.mean(ratios)), "account": state.cost}
            row[label] |= {"observed": state.observed / state.batches, "tests": state.tests, "failures": state.failures}
    row["forward_ms"] = block(10) * 1e3
    print(row, flush=True)
    return row
