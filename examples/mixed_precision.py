"""bfloat16 and a small momentum: the running statistics arrive here, and stall in torch.nn.

The same network is trained in bfloat16 with `torch.nn`'s batch norm and with this package's. `.bfloat16()` narrows
torch's running statistics too: an update of 0.4 % of the way is then often less than the last digit of what it is
added to, and is lost. Here they stay in float32.

Run it with: python examples/mixed_precision.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import steadynorm as sn

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1297], order[1297:]


def network(layer: type[nn.BatchNorm1d]) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        layer(64, momentum=0.004), nn.Linear(64, 64), layer(64, momentum=0.004), nn.ReLU(), nn.Linear(64, 10)
    )


for name, layer in (("torch.nn", nn.BatchNorm1d), ("steadynorm", sn.BatchNorm1d)):
    model = network(layer).bfloat16()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(800):
        batch = train[torch.randint(len(train), (64,))]
        loss = nn.functional.cross_entropy(model(images[batch].bfloat16()).float(), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        right = (model(images[test].bfloat16()).argmax(1) == labels[test]).float().mean()
    remembered = model[0].running_mean
    off = (remembered.double() - images[train].double().mean(0)).abs().max()
    print(f"{name:11} {remembered.dtype!s:16} means off by up to {off:.2f}, test accuracy {right:.1%}")
