"""Batches of two, eight of them a step: what each remedy does for the network in use.

    python examples/small_batches.py

Trains a small network on the bundled digits (a few seconds) with pairs drawn at random, and with pairs of one class.
Prints the test accuracy of each way. The figures to rely on are those of docs/guides/small-batches.md.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

import steadynorm as sn
from steadynorm.experiment.data import load
from steadynorm.experiment.split import Split, split

STEPS = 80
RENORM = sn.Renorm(warmup=32, ramp=128)  # 5 % and 20 % of the batches that this training will commit
WAYS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm1d(64, momentum=0.01),
    "accumulate": lambda: sn.BatchNorm1d(64),
    "renorm": lambda: sn.BatchNorm1d(64, momentum=0.01, renorm=RENORM),
    "all 16 at once": lambda: sn.BatchNorm1d(64),
}


def accuracy(way: str, parts: Split, one_class: bool) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64, bias=False), WAYS[way](), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(STEPS):
        rows = torch.randint(len(parts.y_train), (8, 2))
        if one_class:  # the second of each pair: any other of the first one's class
            rows[:, 1] = (parts.y_train == parts.y_train[rows[:, :1]]).double().multinomial(1)[:, 0]
        optimizer.zero_grad()
        with sn.accumulate(model) if way == "accumulate" else contextlib.nullcontext():
            for part in rows.view(1, 16) if way == "all 16 at once" else rows:
                loss = nn.functional.cross_entropy(model(parts.x_train[part]), parts.y_train[part])
                (loss * len(part) / 16).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model.eval()(parts.x_test).argmax(1) == parts.y_test).double().mean())


def main() -> None:
    parts = split(load("digits"), seed=0)
    print(f"{'':16}{'random pairs':>14}{'pairs of one class':>20}")
    for way in WAYS:
        print(f"{way:16}{accuracy(way, parts, False):14.1%}{accuracy(way, parts, True):20.1%}")


if __name__ == "__main__":
    main()
