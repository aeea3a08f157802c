"""Ghost batches: one large batch, normalised in chunks of 16, and remembered as the large batch that it is.

Trains digits with batches of 64 images in 4 noisy views each: whole, in ghost batches, and by a loop over torch.nn's
layer, which commits every chunk's own variance although a chunk holds 4 images only. Run it with
`python examples/ghost_batches.py`.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import steadynorm as sn


class ChunkByChunk(nn.BatchNorm1d):
    """What one writes without the option."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.split(16 if self.training else len(x))
        return torch.cat([super(ChunkByChunk, self).forward(chunk) for chunk in chunks])


images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
images = images.float() / 16
arms = {
    "whole batches": lambda: sn.BatchNorm1d(64),
    "ghost batches": lambda: sn.BatchNorm1d(64, ghost_batch_size=16),
    "a loop": lambda: ChunkByChunk(64),
}

for name, norm in arms.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), norm(), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for _ in range(150):
        chosen = torch.randint(0, 1200, (64,)).repeat_interleave(4)
        views = images[chosen] + 0.1 * torch.randn(256, 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(views), labels[chosen]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        truth = model[0](images[:1200] + 0.1 * torch.randn(1200, 64)).var(0)
        ratio = (model[1].running_var / truth).mean().item()
        accuracy = (model(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()
    print(f"{name:14} running variance / true one {ratio:.2f}, test accuracy {accuracy:.1%}")
