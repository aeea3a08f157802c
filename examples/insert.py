"""Batch norm put into a plain network of twenty layers, and what it is worth there.

`sn.insert` takes a network as it was written, here with functions for nonlinearities and a loop, and puts a batch norm
before each hidden one. Both then learn digits from the same weights, for each learning rate. For a comparison with a
search for each arm, fresh seeds and intervals, hand the same class to `sn.compare`. Run it with
`python examples/insert.py`.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import steadynorm as sn


class Plain(nn.Module):
    """Twenty hidden layers of 100 ELU units, without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(64 if first else 100, 100) for first in (True, *[False] * 19))
        self.out = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = F.elu(layer(x))
        return self.out(x)


images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float() / 16


def accuracy(model: nn.Module, rate: float) -> float:
    """Of the last 597 images, after 60 steps on the first 1,200."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    order = torch.Generator().manual_seed(0)
    for _ in range(60):
        chosen = torch.randint(1200, (60,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model.eval()(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()


torch.manual_seed(0)
plain = Plain()
report = sn.insert(plain).insert_report
print(f"{len(report.inserted)} batch norms, {sum(row.bias_dropped for row in report.rows)} dead biases dropped")
print(f"the first: {report.inserted[0].norm}, a {report.inserted[0].kind}; left: {len(report.left)}")
print("rate   plain  with batch norm")
for rate in (0.01, 0.03, 0.1, 0.3):
    print(f"{rate:<5}", *(f"{accuracy(twin, rate):7.1%}" for twin in (copy.deepcopy(plain), sn.insert(plain))))
