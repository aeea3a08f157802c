"""Batch norm over the ranks of FSDP2 (`fully_shard`), in float32 and in bfloat16.

    torchrun --nproc-per-node 2 examples/fsdp2.py      (or 4; or plain python examples/fsdp2.py, for one process)

Trains on the bundled digits, on the CPU with gloo. The last rank has no data at all in the last steps, and takes part
with empty batches. The running statistics stay in float32 and are the same on all ranks, whatever FSDP computes in.
"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import steadynorm as sn

STEPS, BATCH = 40, 64  # the batch of all ranks together


def train(dtype: torch.dtype, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32, bias=False), sn.BatchNorm1d(32, activation="relu"), nn.Linear(32, 10))
    sn.sync_(model)
    mesh, policy = dist.init_device_mesh("cpu", (world,)), MixedPrecisionPolicy(param_dtype=dtype)
    fully_shard(model[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(step))
        sharing = world - 1 if world > 1 and step >= STEPS // 2 else world
        mine = rows[rank::sharing] if rank < sharing else rows[:0]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[mine]).float(), labels[mine], reduction="sum")
        (loss * world / BATCH).backward()  # FSDP averages over ranks, as DDP does
        optimizer.step()
    return model


def main() -> None:
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float()
    for dtype in (torch.float32, torch.bfloat16):
        model = train(dtype, images, labels)
        var = model[1].running_var
        of_all = [torch.empty_like(var) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, var)
        accuracy = (model.eval()(images).argmax(1) == labels).double().mean()
        if dist.get_rank() == 0:
            print(
                f"{dist.get_world_size()} ranks in {dtype}: training accuracy {accuracy:.1%}, running statistics in "
                f"{var.dtype}, ranks differ by {max(float((v - var).abs().max()) for v in of_all):.1e}"
            )
    dist.barrier()  # so that no thread of the backend is still at work when the interpreter ends
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
