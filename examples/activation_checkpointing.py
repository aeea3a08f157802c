"""Activation checkpointing runs a forward twice; the running statistics should see it once.

    python examples/activation_checkpointing.py

Trains a small network on the bundled digits for 20 steps in float64 (a few seconds): without a checkpoint and with both
kinds of it. Prints how often each batch norm was updated and how far its running variance ends from that without one,
for `torch.nn`'s layer and for this package's.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.checkpoint import checkpoint

import steadynorm as sn

STEPS, BATCH = 20, 64


def trained(norm: type[nn.BatchNorm2d], mode: str) -> list[nn.BatchNorm2d]:
    """The batch norms of a network after its training."""
    torch.manual_seed(0)
    stages = [
        nn.Sequential(
            nn.Conv2d(a, b, 3, stride=2, padding=1), norm(b), nn.ReLU(), nn.Conv2d(b, b, 1), norm(b), nn.ReLU()
        )
        for a, b in ((1, 8), (8, 16))
    ]
    head = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model = nn.Sequential(*stages, head).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        hidden = x[rows].requires_grad_()  # a reentrant checkpoint wants an input that needs a gradient
        for stage in stages:
            hidden = stage(hidden) if mode == "none" else checkpoint(stage, hidden, use_reentrant=mode == "reentrant")
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(hidden), y[rows]).backward()
        optimizer.step()
    return [module for module in model.modules() if isinstance(module, norm)]


def main() -> None:
    print(f"{STEPS} training steps, {'checkpoint':13}  updates  largest error of a running variance")
    for norm in (nn.BatchNorm2d, sn.BatchNorm2d):
        truth = trained(norm, "none")
        for mode in ("reentrant", "non-reentrant"):
            layers = trained(norm, mode)
            off = max(
                float((a.running_var / b.running_var - 1).abs().max()) for a, b in zip(layers, truth, strict=True)
            )
            package = norm.__module__.partition(".nn")[0]
            print(f"{package:17} {mode:14} {int(layers[0].num_batches_tracked):8}  {off:.1%}")


if __name__ == "__main__":
    main()
