"""Two scanners, one network: running statistics of their own for each.

Half of the digits come from a scanner that writes dark on bright. Every batch is of one scanner, as it is where sites,
cameras or tasks take turns. One set of running statistics is then an average of two worlds and describes neither, so
that the network is good in training mode and bad in evaluation; with `domains=` each world has its own.

Run it with: python examples/domains.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import steadynorm as sn

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1297], order[1297:]
SCANNERS = {"bright on dark": images, "dark on bright": 1 - images}
NAMES = {"bright on dark": "bright", "dark on bright": "dark"}


def network(domains: tuple[str, ...] | None) -> nn.Sequential:
    hidden = [nn.Linear(64, 64), sn.BatchNorm1d(64, activation="relu", domains=domains)]
    return nn.Sequential(
        *hidden, nn.Linear(64, 64), sn.BatchNorm1d(64, activation="relu", domains=domains), nn.Linear(64, 10)
    )


def forward(model: nn.Sequential, x: Tensor, scanner: str, separate: bool) -> Tensor:
    if not separate:
        return model(x)
    with sn.domain(model, NAMES[scanner]):
        return model(x)


for separate in (False, True):
    torch.manual_seed(1)
    model = network(tuple(NAMES.values()) if separate else None)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(150):
        for scanner, seen in SCANNERS.items():
            batch = train[torch.randint(len(train), (64,))]
            loss = nn.functional.cross_entropy(forward(model, seen[batch], scanner, separate), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    print("statistics for each scanner" if separate else "one set of statistics")
    for scanner, seen in SCANNERS.items():
        with torch.no_grad():
            right = forward(model, seen[test], scanner, separate).argmax(1) == labels[test]
        print(f"    {scanner}: {right.float().mean():.1%} of the test images right")
