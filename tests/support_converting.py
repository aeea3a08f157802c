"""Small models with batch norms of every kind, and batch norm by its definition to hold their conversions against."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it: four buffers, one affine map."""

    def __init__(self, features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((features,), value))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        w, b, m, v = (t[:, None, None] for t in (self.weight, self.bias, self.running_mean, self.running_var))
        scale = w * (v + self.eps).rsqrt()
        return x * scale + (b - m * scale)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(self, features: int, act: nn.Module):
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class DetrFrozenBatchNorm2d(FrozenBatchNorm2d):
    """As transformers has it: ε is written in forward, and is no attribute."""

    def __init__(self, features: int):
        super().__init__(features)
        del self.eps

    def forward(self, x):
        w, b, m, v = (t[:, None, None] for t in (self.weight, self.bias, self.running_mean, self.running_var))
        return w * (x - m) / (v + 1e-5).sqrt() + b


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm has it: drop and activation within the layer."""

    def __init__(self, features: int, act: nn.Module, drop: nn.Module | None = None, **options):
        super().__init__(features, **options)
        self.drop, self.act = drop or nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Renamed(nn.BatchNorm2d):
    """A subclass that only has other defaults."""

    def __init__(self, features: int):
        super().__init__(features, eps=1e-3, momentum=0.01)


class Doubled(nn.BatchNorm2d):
    """A subclass that computes something of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class ByDefinition(nn.Module):
    """Batch norm in elementary operations, with the tensors of the layer whose place it takes."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.eps, self.momentum = getattr(layer, "eps", 1e-5), getattr(layer, "momentum", 0.1)
        self.frozen = "Frozen" in type(layer).__name__
        self.act = getattr(layer, "act", nn.Identity())
        for name in ("weight", "bias"):
            setattr(self, name, getattr(layer, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name, None))

    def forward(self, x):
        axes = [axis for axis in range(x.dim()) if axis != 1]
        view = [1, -1, *[1] * (x.dim() - 2)]
        mean = x.sum(axes) / (x.numel() / x.shape[1])
        m2 = (x - mean.view(view)).square().sum(axes)
        n = x.numel() / x.shape[1]
        if self.frozen or (not self.training and self.running_mean is not None):
            mean, var = self.running_mean, self.running_var
        else:
            var = m2 / n
            if self.training and self.running_mean is not None:
                self._remember(mean.detach(), m2.detach() / (n - 1))
        y = (x - mean.view(view)) / (var.view(view) + self.eps) ** 0.5
        y = y if self.weight is None else y * self.weight.view(view)
        return self.act(y if self.bias is None else y + self.bias.view(view))

    def _remember(self, mean: Tensor, unbiased: Tensor):
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.copy_((1 - share) * self.running_mean + share * mean)
        self.running_var.copy_((1 - share) * self.running_var + share * unbiased)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, momentum=None)
        self.short = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x)))))
        return torch.tanh(y + self.short(x))


class Shared(nn.Module):
    """One batch norm at three places, one of them in a plain list that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.first = nn.BatchNorm2d(3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Tanh(), self.first)])
        self.beside = [self.first]

    def forward(self, x):
        return self.beside[0](self.conv(self.blocks[0](self.first(x))))


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: int
    memory_format: torch.memory_format = torch.contiguous_format


def _nested():
    inner = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()))})
    return nn.Sequential(inner["a"], nn.Conv2d(4, 5, 1), Renamed(5))


def _lazy():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.LazyBatchNorm1d())
    model(torch.zeros(2, 3, 5))
    return model


CASES = {
    "residual": Case(Residual, (4, 3, 5, 5), 3),
    "channels_last": Case(Residual, (4, 3, 5, 5), 3, torch.channels_last),
    "shared": Case(Shared, (4, 3, 5, 5), 1),
    "nested": Case(_nested, (4, 3, 5, 5), 2),
    "features": Case(lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh()), (7, 3), 1),
    "1d": Case(lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4, affine=False)), (5, 3, 6), 1),
    "lazy": Case(_lazy, (5, 3, 6), 1),
    "3d": Case(lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4, bias=False)), (3, 3, 4, 3, 4), 1),
    "untracked": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (4, 3, 5, 5), 1
    ),
    "sync": Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.Tanh()), (4, 3, 5, 5), 1),
    "sync of features": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), (9, 3), 1),
    "frozen": Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Tanh()), (4, 3, 5, 5), 1),
    "frozen without eps": Case(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), DetrFrozenBatchNorm2d(4)), (4, 3, 5, 5), 1),
    "frozen with activation": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNormAct2d(4, nn.ELU(0.7))), (4, 3, 5, 5), 1
    ),
    "with activation": Case(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 1), BatchNormAct2d(4, nn.LeakyReLU(0.2), momentum=0.3), BatchNormAct2d(4, nn.Identity())
        ),
        (4, 3, 5, 5),
        2,
    ),
}


def built(name: str) -> nn.Module:
    """The case's model in float64, with other numbers than the default ones everywhere."""
    case = CASES[name]
    return stirred(case.build()).to(torch.float64).to(memory_format=case.memory_format)


def stirred(model: nn.Module) -> nn.Module:
    """With random affine weights and running statistics: the default ones hide errors."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm) or "BatchNorm" in type(module).__name__:
                tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
                for tensor in tensors.values():
                    if tensor.is_floating_point():
                        tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
    return model


def inputs(name: str, seed: int = 0) -> Tensor:
    case = CASES[name]
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    return x.to(memory_format=case.memory_format)


def by_definition(model: nn.Module) -> nn.Module:
    """A copy in which every batch norm is its definition."""
    model = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if "BatchNorm" in type(child).__name__ or isinstance(child, _BatchNorm):
                parent._modules[name] = made.setdefault(child, ByDefinition(child).train(child.training))
        if isinstance(parent, Shared):
            parent.beside = [parent.first]
    return model


class Step(NamedTuple):
    """What one forward, and in training one step of SGD, leaves behind."""

    y: Tensor
    grads: dict[str, Tensor]
    state: dict[str, Tensor]


def step(model: nn.Module, x: Tensor, training: bool, optimizer: torch.optim.Optimizer | None = None) -> Step:
    """A forward and, with a random upstream gradient, a backward and a step of SGD."""
    model.train(training)
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    # The same numbers in every precision, which torch would draw otherwise.
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, momentum=0.9)
    optimizer.zero_grad()
    y.backward(upstream)
    leaves = {"input": x, **dict(model.named_parameters())}
    grads = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    if training:
        optimizer.step()
    return Step(y.detach(), grads, {name: t.clone() for name, t in model.state_dict().items()})


def assert_same(got: Step, expected: Step, tolerance: float = 1e-9):
    """To 1e-9 of each tensor's norm; where an exact value is 0 (the bias before a batch norm), of the largest one's."""
    assert got.y.shape == expected.y.shape
    near(got.y, expected.y, tolerance)
    assert set(got.grads) == set(expected.grads)
    scale = max(g.norm().item() for g in expected.grads.values())
    for name, grad in expected.grads.items():
        near(got.grads[name], grad, tolerance, least=1e-3 * scale, what=name)
    for name, tensor in expected.state.items():
        near(got.state[name].double(), tensor.double(), tolerance, least=1e-4 * scale, what=name)


def near(got: Tensor, expected: Tensor, tolerance: float, least: float = 0.0, what: str = "output"):
    error, norm = (got - expected).norm().item(), max(expected.norm().item(), least)
    assert error <= tolerance * norm, f"{what}: off by {error:.3g} where the norm is {norm:.3g}"


def in_single(model: nn.Module, x: Tensor, change: Callable[[nn.Module], nn.Module]) -> tuple[list[float], list[float]]:
    """How far a changed model in float32 is from the definition in float64, and how far the unchanged one is.

    Returns:
        For each the errors of a training step's output and of its whole gradient, relative to their norms.
    """
    single = copy.deepcopy(model).float()

    def seeded(one: nn.Module, x: Tensor) -> Step:
        torch.manual_seed(3)  # some drop paths at random
        return step(one, x, True)

    exact = seeded(by_definition(model), x)

    def errors(one: nn.Module) -> list[float]:
        got = seeded(one, x.float())
        grads = [torch.cat([g[name].double().flatten() for name in exact.grads]) for g in (got.grads, exact.grads)]
        pairs = [(got.y.double(), exact.y), (grads[0], grads[1])]
        return [((a - b).norm() / b.norm()).item() for a, b in pairs]

    return errors(change(copy.deepcopy(single))), errors(single)
