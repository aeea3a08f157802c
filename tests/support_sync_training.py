"""Training on digits, in one process and over ranks: shared by the tests of it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

import steadynorm as sn

STEPS, BATCH = 50, 32


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)


class Definition(nn.BatchNorm2d):
    """Batch norm as it is written down, for one process; the state_dict of torch.nn's layer."""

    def forward(self, input: Tensor) -> Tensor:
        axes = [d for d in range(input.dim()) if d != 1]
        rows = (-1, *(1,) * (input.dim() - 2))
        if not self.training:
            mean, variance = self.running_mean, self.running_var
        else:
            mean, variance = input.mean(axes), input.var(axes, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(input.var(axes, correction=1), self.momentum)
                self.num_batches_tracked += 1
        centred = (input - mean.view(rows)) / (variance + self.eps).sqrt().view(rows)
        return centred * self.weight.view(rows) + self.bias.view(rows)


NORMS = {
    "steadynorm": (sn.BatchNorm1d, sn.BatchNorm2d),
    "torch.nn": (nn.BatchNorm1d, nn.BatchNorm2d),
    "definition": (Definition, Definition),
}


def network(norms: str = "steadynorm", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    flat, images = NORMS[norms]
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, bias=False), images(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False), images(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 16), flat(16), nn.ReLU(), nn.Linear(16, 10),
    ).to(dtype)  # fmt: skip


Batches = list[tuple[Tensor, Tensor]]


@cache
def batches() -> Batches:
    """Made here and handed to the ranks, which need not all import what reads them."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: STEPS * BATCH]
    return [(images[rows], labels[rows]) for rows in order.split(BATCH)]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """This part's share of the mean over the whole batch."""
    return nn.functional.cross_entropy(model(x), y, reduction="sum") / BATCH


def wrapped(model: nn.Module, wrapper: str | None, group: Any, **options: Any) -> nn.Module:
    if wrapper == "DDP":
        return DistributedDataParallel(model, process_group=group, **options)
    if wrapper == "FSDP2":
        from torch.distributed.fsdp import fully_shard  # slow to import: not for the sake of the other bodies

        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in (model[4], model[8]):  # two norms with a shard of their own, and the rest together
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model
