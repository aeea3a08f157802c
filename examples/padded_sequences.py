"""Padded sequences: the same network with torch.nn's batch norm, and with one that is told what is padding.

Digits are read row by row, cut to 5 to 8 rows and padded as recycled memory would pad them: with large leftovers. Run
it with `python examples/padded_sequences.py`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import steadynorm as sn


class Rows(nn.Module):
    """A small network for each row, and the mean over the rows that are real."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.rows, self.norm, self.classes = nn.Conv1d(16, 32, 1, bias=False), norm, nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        y = self.rows(x)
        y = self.norm(y, mask=real) if isinstance(self.norm, sn.BatchNorm1d) else self.norm(y)
        y = torch.where(real[:, None], y.relu(), 0)
        return self.classes(y.sum(2) / real.sum(1, keepdim=True))


def padded(images: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 16, longest) and its mask: each row's 8 pixels and its number, for the first 5 to 8 rows."""
    rows = torch.cat([images.transpose(1, 2), torch.eye(8).expand(len(images), 8, 8)], 1)
    real = torch.arange(longest) < torch.randint(5, 9, (len(images), 1))
    x = 300 * torch.randn(len(images), 16, longest)
    x[:, :, :8] = torch.where(real[:, None, :8], rows, x[:, :, :8])
    return x, real


images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float().reshape(-1, 8, 8) / 16

for name, norm in (("torch.nn, padding counted", nn.BatchNorm1d(32)), ("steadynorm with a mask", sn.BatchNorm1d(32))):
    torch.manual_seed(0)
    model = Rows(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(200):
        chosen = torch.randint(0, 1200, (64,))
        x, real = padded(images[chosen], longest=int(torch.randint(8, 25, ())))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x, real), labels[chosen]).backward()
        optimizer.step()
    x, real = padded(images[1200:], longest=8)
    with torch.no_grad():
        accuracy = (model.eval()(x, real).argmax(1) == labels[1200:]).float().mean().item()
    print(f"{name:26} running deviation {norm.running_var.sqrt().mean().item():8.2f}, test accuracy {accuracy:.1%}")
