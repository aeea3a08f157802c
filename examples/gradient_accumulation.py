"""Gradient accumulation: what a batch norm remembers of one large batch that arrives in small parts.

    python examples/gradient_accumulation.py

Trains a small network on the bundled digits (a few seconds), 64 images a step in 16 micro-batches of 4. Prints how far
the running variances end from those of the training set, and the test accuracy: committed by each micro-batch, as
`torch.nn` does, and by `sn.accumulate`. Both normalise by 4 images while training, which is what limits the accuracy.
"""

from contextlib import nullcontext

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import steadynorm as sn

STEPS, BATCH, MICRO = 150, 64, 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 64, bias=False), sn.BatchNorm1d(64, activation="relu"),
        nn.Linear(64, 64, bias=False), sn.BatchNorm1d(64, activation="relu"),
        nn.Linear(64, 10),
    )  # fmt: skip


@torch.no_grad()
def distance(model: nn.Sequential, x: Tensor) -> float:
    """|log(running variance / the training set's)| of the first layer, averaged over its channels."""
    true = sn.Moments.of(model[0](x)).variance(unbiased=True)
    return float((model[1].running_var / true).log().abs().mean())


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, test = slice(0, 1297), slice(1297, None)
    for name, around_a_step in (("each micro-batch", lambda model: nullcontext()), ("sn.accumulate", sn.accumulate)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(STEPS):
            rows = torch.randint(1297, (BATCH,))
            optimizer.zero_grad()
            with around_a_step(model):
                for part in rows.split(MICRO):
                    loss = nn.functional.cross_entropy(model(x[part]), y[part])
                    (loss * len(part) / BATCH).backward()
            optimizer.step()
        accuracy = (model.eval()(x[test]).argmax(1) == y[test]).float().mean()
        print(
            f"committed by {name:17} {int(model[1].num_batches_tracked):5} commits, variances off by "
            f"{distance(model, x[train]):.2f}, test accuracy {accuracy:.1%}"
        )


if __name__ == "__main__":
    main()
