"""Seconds per training step: a separate pass, one network after the other on one thread, the arms taking turns."""

import time
from typing import Final

import torch

from steadynorm.experiment.arms import build
from steadynorm.experiment.lab import Lab, Measured
from steadynorm.experiment.stats import median_interval
from steadynorm.experiment.train import Batches, Step, single_thread
from steadynorm.report.schema import TimingRow

__all__ = ["seconds_per_step"]

ROUNDS: Final = 40
STEPS_PER_ROUND: Final = 10
WARM_UP: Final = 20


def seconds_per_step(lab: Lab, measured: Measured) -> list[TimingRow]:
    """Times each arm's training step at its speed setting.

    In each round every arm takes a few steps, a different one first each time, so that whatever slows the machine down
    hits all of them; ratios are taken within rounds. Their interval is that of the median (order statistics).
    """
    with single_thread(), torch.random.fork_rng(devices=[]):
        seconds = _measure(lab, measured)
    rows: list[TimingRow] = []
    plain = seconds[lab.plain.id]
    for arm in lab.arms:
        own = torch.tensor(seconds[arm.id], dtype=torch.float64)
        p20, p50, p80 = own.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        ratio, interval = median_interval([a / b for a, b in zip(seconds[arm.id], plain, strict=True)])
        row: TimingRow = {
            "arm": arm.id,
            "seconds_per_step": p50,
            "p20": p20,
            "p80": p80,
            "ratio_to_plain": ratio,
            "ratio_interval": interval,
        }
        rows.append(row)
    return rows


def _measure(lab: Lab, measured: Measured) -> dict[str, list[float]]:
    problem = lab.runner.problem
    parts = problem.split(lab.tuning_seeds[0])
    batches = Batches(len(parts.y_train), lab.base.batch_size, torch.Generator().manual_seed(0))
    rows = [next(batches) for _ in range(STEPS_PER_ROUND)]
    steps: dict[str, Step] = {}
    for arm in lab.arms:
        torch.manual_seed(0)
        setting = measured.speed[arm.id, "tuned"]
        model = build(problem.source, arm, problem.input_shape, problem.classes, init=setting.init).train()
        steps[arm.id] = Step(model, lab.base.optimizer, setting.lr)
        for number in range(WARM_UP):
            steps[arm.id](parts.x_train[rows[number % len(rows)]], parts.y_train[rows[number % len(rows)]])
    seconds: dict[str, list[float]] = {arm.id: [] for arm in lab.arms}
    for turn in range(ROUNDS):
        for position in range(len(lab.arms)):
            arm = lab.arms[(turn + position) % len(lab.arms)]
            begun = time.perf_counter()
            for chosen in rows:
                steps[arm.id](parts.x_train[chosen], parts.y_train[chosen])
            seconds[arm.id].append((time.perf_counter() - begun) / STEPS_PER_ROUND)
    return seconds
