"""A frozen backbone stays frozen: a new head on old features, without losing what the old head knew.

A network learns the digits 0 to 4. Then a second head on the same backbone learns 5 to 9, from a scanner that writes
dark on bright. `requires_grad_(False)` keeps the backbone's weights, but its batch norms go on remembering what they
see, in spite of a careful `.eval()`: the next `model.train()` undoes that. `sn.freeze_` is not undone.

Run it with: python examples/frozen_backbone.py
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import steadynorm as sn

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
old, new = labels < 5, labels >= 5


def fit(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        model.train()  # as every training loop does
        batch = torch.randint(len(x), (32,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


def block(width: int) -> list[nn.Module]:
    return [nn.Linear(width, 64), sn.BatchNorm1d(64, activation="relu")]


first, second = (images[old], labels[old]), (1 - images[new], labels[new] - 5)
pretrained, old_head = nn.Sequential(*block(64), *block(64)), nn.Linear(64, 5)
fit(nn.Sequential(pretrained, old_head), *first, steps=200)
print(f"digits 0 to 4 before:            {accuracy(nn.Sequential(pretrained, old_head), *first):.1%} right")

for way in ("requires_grad_(False), eval()", "sn.freeze_"):
    backbone, new_head = copy.deepcopy(pretrained).requires_grad_(False).eval(), nn.Linear(64, 5)
    if way == "sn.freeze_":
        sn.freeze_(backbone)
    fit(nn.Sequential(backbone, new_head), *second, steps=200)
    kept, learnt = (
        accuracy(nn.Sequential(backbone, head), *data) for head, data in ((old_head, first), (new_head, second))
    )
    print(f"{way + ':':32} {kept:.1%} right; digits 5 to 9: {learnt:.1%}")
