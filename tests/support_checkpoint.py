"""Models, checkpoints of every kind, and what a checkpoint may not change: shared by the tests of checkpointing."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import steadynorm as sn
from support import Array, Stats, assert_close, batch_norm, stats, wide

X, UPSTREAM = (torch.randn(8, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) + s for s in (1, 2))
RENORM = sn.Renorm(r_max=2.0, d_max=1.0, warmup=0, ramp=0)
Run = Callable[[nn.Module, Tensor], Tensor]


def block(**options) -> nn.Sequential:
    """Linear, BN, tanh, Linear, BN, with the same numbers at every call."""
    norms = [sn.BatchNorm1d(3, dtype=torch.float64, **options) for _ in range(2)]
    linears = [nn.Linear(3, 3, dtype=torch.float64) for _ in range(2)]
    model = nn.Sequential(linears[0], norms[0], nn.Tanh(), linears[1], norms[1])
    for seed, parameter in enumerate(model.parameters()):
        nn.init.trunc_normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return model


def measured(model: nn.Sequential, x: Tensor) -> list[Stats]:
    """What the two layers of `block` measure, from the definition."""

    def linear(layer: nn.Linear, value: Array) -> Array:
        return value @ wide(layer.weight).T + wide(layer.bias)

    first = linear(model[0], wide(x))
    hidden = np.tanh(batch_norm(first, model[1].weight, model[1].bias))
    return [stats(first), stats(linear(model[3], hidden))]


def assert_committed_once(model: nn.Sequential, *batches: Tensor) -> None:
    """Both layers remember each of the batches once, in this order, and nothing else."""
    seen = [measured(model, x) for x in batches]
    for layer, each in zip((model[1], model[4]), zip(*seen, strict=True), strict=True):
        mean, variance = np.zeros(3), np.ones(3)
        for one in each:
            mean, variance = 0.9 * mean + 0.1 * one.mean, 0.9 * variance + 0.1 * one.unbiased
        assert_close(layer.running_mean, mean, "statistic")
        assert_close(layer.running_var, variance, "variance")
        assert layer.num_batches_tracked.item() == len(batches)


def assert_as_without(model: nn.Module, plain: nn.Module) -> None:
    """Buffers and gradients are to the last bit those of the model that ran without a checkpoint."""
    for (name, found), wanted in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, wanted), name
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), name
        assert wanted.grad is None or torch.equal(found.grad, wanted.grad), name


def _everything(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def _matmuls(context, op, *args, **kwargs) -> CheckpointPolicy:
    wanted = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def _nothing(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def selective(model: nn.Module, x: Tensor, policy: Callable) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


def nested(model: nn.Module, x: Tensor, outer: bool, inner: bool) -> Tensor:
    """A checkpoint of checkpoints: the innermost part runs three times."""

    def deepest(x: Tensor) -> Tensor:
        return checkpoint(model[1], x, use_reentrant=inner)

    def middle(x: Tensor) -> Tensor:
        return model[4](model[3](checkpoint(lambda x: model[2](deepest(model[0](x))), x, use_reentrant=inner)))

    return checkpoint(middle, x, use_reentrant=outer)


MODES: dict[str, Run] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "nested": partial(nested, outer=False, inner=False),
    "nested reentrant": partial(nested, outer=True, inner=True),
    "nested mixed": partial(nested, outer=False, inner=True),
    "selective, all saved": partial(selective, policy=_everything),
    "selective, matmuls saved": partial(selective, policy=_matmuls),
    "selective, none saved": partial(selective, policy=_nothing),
    "sequential": lambda model, x: checkpoint_sequential(model, 3, x, use_reentrant=False),
}
OPTIONS = {
    "plain": {},
    "ghost": {"ghost_batch_size": 3},  # chunks of 3, 3 and 2
    "renorm": {"renorm": RENORM},
    "cumulative": {"momentum": None},
    "renorm of ghosts": {"renorm": RENORM, "ghost_batch_size": 4, "activation": "relu"},
}


def train(model: nn.Module, run: Run, steps: int = 3) -> list[Tensor]:
    """The gradients of x in a few steps, from the second on with running statistics that have been moved."""
    found = []
    for step in range(steps):
        x = (X * (step + 1)).requires_grad_()
        run(model, x).backward(UPSTREAM)
        found.append(x.grad)
    return found
