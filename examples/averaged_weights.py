"""An exponential moving average of the weights, with running statistics that belong to it, and without.

    python examples/averaged_weights.py

Prints test accuracies on the bundled digits. The average of the parameters alone also warns.
"""

import copy
import warnings

import torch
from torch import nn

import steadynorm as sn
from steadynorm.experiment.data import load
from steadynorm.experiment.split import split


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), sn.BatchNorm2d(8, activation="relu"),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), sn.BatchNorm2d(16, activation="relu"),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    return float((model.eval()(x).argmax(1) == y).double().mean())


def main() -> None:
    torch.manual_seed(0)
    parts = split(load("digits"), seed=0)
    model = network()
    ema, parameters_alone = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(600):
        rows = torch.randint(len(parts.x_train), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(parts.x_train[rows]), parts.y_train[rows]).backward()
        optimizer.step()

        decay = min(0.99, (1 + step) / (10 + step))  # a young average forgets the first weights sooner
        sn.average_(ema, model, decay)
        with torch.no_grad():  # what many loops do: the buffers stay what they were at the start
            for average, live in zip(parameters_alone.parameters(), model.parameters(), strict=True):
                average.lerp_(live, 1 - decay)

    test = parts.x_test, parts.y_test
    print(f"the network itself                {accuracy(model, *test):.1%}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        print(f"average of the parameters alone   {accuracy(parameters_alone, *test):.1%}", end="   ")
    print("and a warning:", ", ".join(sorted({w.category.__name__ for w in said})))
    print(f"average by sn.average_            {accuracy(ema, *test):.1%}")


if __name__ == "__main__":
    main()
