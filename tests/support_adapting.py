"""A model, a stream and a classifier that the adaptation's tests share."""

import torch
from torch import Tensor, nn

import steadynorm as sn

CLASSES = 4


def two_layers(kind: str = "torch") -> nn.Sequential:
    """(N, 3, 4, 4) -> (N, 4) logits, with two batch norms whose running statistics are not the initial ones."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if kind == "torch" else sn.BatchNorm2d
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 6, 1), norm(6), nn.Flatten(), nn.Linear(24, CLASSES)
    )
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, 3, 4, 4))
    return model.eval()


def blobs() -> nn.Sequential:
    """A classifier (N, 4) -> (N, 4) that is right about `stream`: two batch norms, then the largest input wins."""
    first, second = sn.BatchNorm1d(CLASSES), nn.BatchNorm1d(CLASSES)
    last = nn.Linear(CLASSES, CLASSES, bias=False)
    with torch.no_grad():
        last.weight.copy_(5 * torch.eye(CLASSES))
    for layer, mean, var in ((first, 0.75, 1.75), (second, 0.0, 1.0)):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.fill_(mean)
        layer.running_var.fill_(var)
    return nn.Sequential(first, second, last).eval()


def stream(labels: Tensor, shift: float = 0.0, seed: int = 0) -> Tensor:
    """One input of `blobs` for each label: 3 at the label's place, noise of deviation 0.25 ** 0.5, all moved."""
    noise = torch.randn(len(labels), CLASSES, generator=torch.Generator().manual_seed(seed))
    return 3.0 * nn.functional.one_hot(labels, CLASSES) + 0.3 * noise + shift


def places() -> nn.Sequential:
    """A classifier (N, 1, 4) -> (N, 4) that is right about `peaks`, and answers 0 where the input is too bright."""
    norms = [nn.BatchNorm1d(1), sn.BatchNorm1d(1)]
    last = nn.Linear(CLASSES, CLASSES, bias=False)
    with torch.no_grad():
        last.weight.copy_(5 * torch.eye(CLASSES))
        last.weight[0] += 2
        for layer, mean, var in zip(norms, (0.75, 0.0), (1.7775, 1.0), strict=True):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.fill_(mean)
            layer.running_var.fill_(var)
    return nn.Sequential(norms[0], norms[1], nn.Flatten(), last).eval()


def peaks(labels: Tensor, shift: float = 0.0, seed: int = 0) -> Tensor:
    """One input of `places` for each label: the class is the place of a peak, which no channel's statistics see."""
    return stream(labels, shift, seed).unsqueeze(1)


def mixed_labels(n: int, seed: int = 0) -> Tensor:
    """Labels drawn independently, all classes alike."""
    return torch.randint(0, CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, those that are not saved included."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """The names of those that differ in a single bit."""
    now = state(model)
    return {n for n, t in now.items() if t.numpy().tobytes() != before[n].numpy().tobytes()}
