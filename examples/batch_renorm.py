"""Batch renorm: training on micro-batches of one class each, which plain batch norm cannot use.

Every step takes 8 micro-batches of 4 digits of a kind. By its own statistics such a batch looks like any other, so that
plain batch norm trains a network that evaluation does not run; renorm trains the one that it does. Run it with
`python examples/batch_renorm.py`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import steadynorm as sn

STEPS, MICRO_BATCHES = 120, 8

images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
by_class = [torch.arange(1200)[labels[:1200] == digit] for digit in range(10)]


def four_of_a_kind(digit: int) -> torch.Tensor:
    """Four random training examples of one class."""
    return by_class[digit][torch.randint(len(by_class[digit]), (4,))]


batches = STEPS * MICRO_BATCHES
arms = {"plain": None, "renorm": sn.Renorm(r_max=3, d_max=5, warmup=batches // 20, ramp=batches // 5)}

for name, renorm in arms.items():
    torch.manual_seed(0)
    norm = sn.BatchNorm1d(64, momentum=0.02, renorm=renorm)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), norm, nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for digit in torch.randperm(10)[:MICRO_BATCHES].tolist():
            batch = four_of_a_kind(digit)
            (nn.functional.cross_entropy(model(images[batch]), labels[batch]) / MICRO_BATCHES).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()
    print(f"{name:7} test accuracy {accuracy:.1%}")
