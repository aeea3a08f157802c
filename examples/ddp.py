"""Batch norm over the ranks of DistributedDataParallel, where the ranks' shares of the data are unequal.

    torchrun --nproc-per-node 2 examples/ddp.py        (or 4; or plain python examples/ddp.py, for one process)

Trains on the bundled digits, on the CPU with gloo. Rank 0 has the smallest share and runs out of data first: from then
on it takes part with empty batches. Rank 0 trains a second model beside it on all ranks' batches together, and prints
how far the two are apart: rounding errors of float64.
"""

import copy
from itertools import pairwise

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import steadynorm as sn

BATCH = 24  # of each rank, while its data last


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor, count: float) -> None:
    optimizer.zero_grad()
    (nn.functional.cross_entropy(model(x), y, reduction="sum") / count).backward()
    optimizer.step()


def main() -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    ends = [len(images) * (r * (r + 1)) // (world * (world + 1)) for r in range(world + 1)]  # rank r's share: r + 1
    shares = [torch.arange(a, b) for a, b in pairwise(ends)]
    steps = -(-max(map(len, shares)) // BATCH)

    model = nn.Sequential(nn.Linear(64, 32, bias=False), sn.BatchNorm1d(32, activation="relu"), nn.Linear(32, 10))
    model.double()
    alone = copy.deepcopy(model)
    ddp = DistributedDataParallel(sn.sync_(model))
    optimizer, optimizer_alone = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone))
    for step in range(steps):
        batches = [share[step * BATCH : (step + 1) * BATCH] for share in shares]  # empty for a rank whose data are used
        rows, everything = batches[rank], torch.cat(batches)
        # The mean over all ranks' examples: DDP averages over ranks, so the sum is divided by the mean count of a rank.
        update(ddp, optimizer, images[rows], labels[rows], len(everything) / world)
        if rank == 0:
            update(alone, optimizer_alone, images[everything], labels[everything], len(everything))

    state = torch.cat([t.flatten().double() for t in model.state_dict().values()])
    states = [torch.empty_like(state) for _ in range(world)]
    dist.all_gather(states, state)
    if rank == 0:
        single = torch.cat([t.flatten().double() for t in alone.state_dict().values()])
        accuracy = (model.eval()(images).argmax(1) == labels).double().mean()
        print(f"{world} ranks with {', '.join(str(len(share)) for share in shares)} examples, {steps} steps")
        print(f"training accuracy           {accuracy:.1%}")
        print(f"ranks differ by             {max(float((s - state).abs().max()) for s in states):.1e}")
        print(f"from one process by         {(state - single).abs().max():.1e}")
    dist.barrier()  # so that no thread of the backend is still at work when the interpreter ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
