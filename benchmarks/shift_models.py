"""The two networks that the covariate shift benchmarks watch and adapt, trained once and kept as safetensors.

    python benchmarks/shift_models.py    # train what is missing (minutes on one core), print the checks
    python benchmarks/shift_models.py --cache FOLDER

MNIST: 60,000 training images, t10k held out. CIFAR-10: 10,000 of its training images, 2,000 of its test images held
out. Both are small convolutional networks with steadynorm's batch norms and fused ReLUs. That they are not undertrained
shows where their running statistics are measured anew over the whole training set: the accuracy gains at most a point.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import steadynorm as sn
from steadynorm.experiment.data import load

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
CACHE = Path(tempfile.gettempdir()) / "steadynorm-shift-models"
WIDTHS = {"mnist": (1, (16, 32, 64)), "cifar10": (3, (24, 48, 48, 96, 96))}
EPOCHS = {"mnist": 4, "cifar10": 20}
RATES = {"mnist": 0.1, "cifar10": 0.15}
MODELS = tuple(WIDTHS)
BATCH = 64
Examples = tuple[Tensor, Tensor]


class Trained(NamedTuple):
    """A model in evaluation mode with its data: x (N, C, H, W) float32 in [0, 1], y (N,) int64."""

    model: nn.Module
    train: Examples
    held_out: Examples


def network(name: str) -> nn.Sequential:
    """Convolutions of 3 x 3 with batch norm and ReLU, a pooling where the width grows, the mean over positions last."""
    before, widths = WIDTHS[name]
    parts: list[nn.Module] = []
    for place, width in enumerate(widths):
        if place and width > before:
            parts.append(nn.MaxPool2d(2))
        parts += [nn.Conv2d(before, width, 3, padding=1, bias=False), sn.BatchNorm2d(width, activation="relu")]
        before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def trained(name: str, data: Path = DATA, cache: Path = CACHE) -> Trained:
    """One of `MODELS`, trained now or read from the cache, and its data."""
    train, held_out = examples(name, data)
    file = cache / f"{name}.safetensors"
    model = network(name)
    if file.exists():
        model.load_state_dict(load_file(file))
    else:
        torch.manual_seed(0)
        model = network(name)
        fit(model, train, EPOCHS[name], RATES[name], augmented if name == "cifar10" else None)
        cache.mkdir(parents=True, exist_ok=True)
        aside = cache / f"{name}.{os.getpid()}.part"
        save_file(model.state_dict(), aside)
        aside.replace(file)
    return Trained(model.eval(), train, held_out)


def examples(name: str, data: Path = DATA) -> tuple[Examples, Examples]:
    """The training and the held-out examples."""
    found = load(data / name)
    if found.test is None:
        raise SystemExit(f"{data / name}: a test set is required: a folder train/ and a folder test/, or t10k- files.")
    return (found.x, found.y), found.test


def fit(
    model: nn.Module, train: Examples, epochs: int, rate: float, change: Callable[[Tensor], Tensor] | None = None
) -> None:
    """SGD with momentum 0.9, Nesterov, weight decay 5e-4 and one cycle of the learning rate."""
    x, y = train
    optimiser = torch.optim.SGD(model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps, pct_start=0.2)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            loss = cross_entropy(model(x[batch] if change is None else change(x[batch])), y[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / (len(x) // BATCH):.3f}", flush=True)


def augmented(x: Tensor) -> Tensor:
    """Each image mirrored by chance and moved by up to 4 pixels."""
    mirrored = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
    wide = nn.functional.pad(mirrored, (4, 4, 4, 4), mode="reflect")
    down, right = torch.randint(0, 9, (2, len(x), 1))
    height, width = x.shape[2:]
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    return (
        wide[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right predictions, in the mode that the model is in."""
    right = sum(
        int((model(part).argmax(1) == want).sum()) for part, want in zip(x.split(500), y.split(500), strict=True)
    )
    return right / len(x)


def remeasured(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose running statistics are those of all of `x`: the merged Moments of its batches."""
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, sn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad(), sn.accumulate(model):
        for part in x[torch.randperm(len(x))].split(500):
            model(part)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing and prints the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in MODELS:
        model, train, held_out = trained(name, options.data, options.cache)
        plain, again = accuracy(model, *held_out), accuracy(remeasured(model, train[0]), *held_out)
        print(
            f"{name}: held-out accuracy {plain:.2%}, with statistics measured anew {again:.2%} ({again - plain:+.2%})"
        )


if __name__ == "__main__":
    main()
