"""torch.func in train mode: an ensemble of networks with batch norm, trained in one go by `vmap` of `grad`.

    python examples/functional_transforms.py

Trains eight small networks on the bundled digits at once (a few seconds). Parameters and buffers are stacked, and
`sn.functional_call` hands the running statistics of each member from one step to the next. Prints the test accuracy of
the members and of their average.
"""

import copy
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import grad, stack_module_state, vmap

import steadynorm as sn

MEMBERS, STEPS, BATCH, RATE = 8, 150, 64, 0.2
State = dict[str, Tensor]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32, bias=False), sn.BatchNorm1d(32, activation="relu"),
        nn.Linear(32, 32, bias=False), sn.BatchNorm1d(32, activation="relu"),
        nn.Linear(32, 10),
    )  # fmt: skip


def loss(model: nn.Module, parameters: State, buffers: State, x: Tensor, y: Tensor) -> tuple[Tensor, State]:
    output, buffers = sn.functional_call(model, (parameters, buffers), x)
    return nn.functional.cross_entropy(output, y), buffers


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    members = [network() for _ in range(MEMBERS)]
    parameters, buffers = stack_module_state(members)
    shell = copy.deepcopy(members[0])  # says what to compute; its own numbers are never used nor changed
    step = vmap(grad(partial(loss, shell), has_aux=True))
    for _ in range(STEPS):
        rows = torch.randint(1297, (MEMBERS, BATCH))  # to each member its own batch
        gradients, buffers = step(parameters, buffers, x[rows], y[rows])
        parameters = {name: p - RATE * gradients[name] for name, p in parameters.items()}

    shell.eval()
    answers, _ = vmap(partial(sn.functional_call, shell), in_dims=((0, 0), None))((parameters, buffers), x[1297:])
    right = (answers.argmax(2) == y[1297:]).float().mean(1)
    print(f"{MEMBERS} members, {STEPS} steps, {buffers['1.num_batches_tracked'].tolist()} batches remembered")
    print(f"members    {right.min():.1%} to {right.max():.1%}")
    print(f"ensemble   {(answers.softmax(2).mean(0).argmax(1) == y[1297:]).float().mean():.1%}")


if __name__ == "__main__":
    main()
