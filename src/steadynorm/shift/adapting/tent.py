"""Tent: γ and β learn to make the predictions sure, without labels."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from steadynorm.errors import DataError, ModelError
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.contexts import no_commit
from steadynorm.shift.adapting.mixing import Layers, Snapshot

__all__ = ["affine_parameters", "minimise_entropy", "prediction_entropy"]

HALF: Final = (torch.float16, torch.bfloat16)


def prediction_entropy(logits: Tensor) -> Tensor:
    """The mean over examples (and positions) of -Σ p log p, in nats, with p = softmax(logits); differentiable.

    Args:
        logits: (N, K, *).

    Example:
        >>> round(prediction_entropy(torch.zeros(3, 2)).item(), 4)
        0.6931
    """
    log_p = logits.float().log_softmax(1) if logits.dtype in HALF else logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def affine_parameters(layers: Layers) -> list[nn.Parameter]:
    """The γ and β in use of these layers, those that `steadynorm.freeze_` holds left out."""
    found: list[nn.Parameter] = []
    for _, layer in layers:
        ours = isinstance(layer, BatchNorm)
        if ours and layer.frozen_affine:
            continue
        pair = layer.affine_of(layer.active_domain) if ours else (layer.weight, layer.bias)
        found += [p for p in pair if isinstance(p, nn.Parameter)]
    return found


def minimise_entropy(
    model: nn.Module, layers: Layers, runs: Sequence[Callable[[], object]], lr: float, steps: int
) -> None:
    """Adam steps on γ and β alone, one per run and pass, each normalised by its own batch.

        γ, β <- γ, β - Adam(∇ mean entropy of the predictions)

    γ and β in half precision learn as float32 and are rounded after each step: Adam's 1e-8 is 0 in float16, and steps
    of 1e-3 are lost in bfloat16. Nothing else of the model is left changed: buffers, modes, gradients and what requires
    one come back.

    Args:
        model: In evaluation mode.
        layers: Whose γ and β learn.
        runs: The forwards, one per chunk; each returns logits (N, K, *).
        lr: Adam's learning rate.
        steps: Passes over the runs.

    Raises:
        DataError: γ or β do not stay finite.
        ModelError: There is no γ or β to learn, or the output is no tensor of logits.

    Source:
        Wang et al., "Tent: fully test-time adaptation by entropy minimization" (2021).
    """
    learnt = affine_parameters(layers)
    if not learnt:
        raise ModelError('method="tent" learns γ and β, and no batch norm of this model has any that is not frozen.')
    buffers = Snapshot(layers)
    try:
        with _learning(model, layers, learnt), torch.enable_grad():
            masters = [p.detach().float() if p.dtype in HALF else p for p in learnt]
            optimiser = torch.optim.Adam(masters, lr)
            for _ in range(steps):
                for run in runs:
                    output = run()
                    if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[1] < 2:
                        raise ModelError(
                            'method="tent" needs a model whose output is a tensor of logits (N, K, *), K >= 2.'
                        )
                    for p in learnt:
                        p.grad = None
                    prediction_entropy(output).backward()  # pyright: ignore[reportUnknownMemberType]
                    _step(optimiser, masters, learnt)
    finally:
        buffers.restore()


def _step(optimiser: torch.optim.Optimizer, masters: Sequence[Tensor], learnt: Sequence[nn.Parameter]) -> None:
    """Steps in the masters' precision, and rounds to that of γ and β."""
    for master, p in zip(masters, learnt, strict=True):
        if master is not p:
            master.grad = None if p.grad is None else p.grad.float()
    optimiser.step()  # pyright: ignore[reportUnknownMemberType]
    with torch.no_grad():
        for master, p in zip(masters, learnt, strict=True):
            p.copy_(master)
            if not bool(torch.isfinite(p).all()):
                raise DataError("γ or β became infinite or NaN; the model is left as it was. Lower lr, or use float32.")


@contextmanager
def _learning(model: nn.Module, layers: Layers, learnt: Sequence[nn.Parameter]) -> Generator[None]:
    """Only `learnt` requires gradients, and the layers normalise by their batch without remembering it."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(layer, layer.training) for _, layer in layers]
    ours = [layer for layer, _ in modes if isinstance(layer, BatchNorm)]
    for p, _, _ in before:
        p.requires_grad_(any(p is one for one in learnt)).grad = None
    for layer, _ in modes:
        layer.training = True
    try:
        with no_commit(nn.ModuleList(ours)) if ours else _nothing():
            yield
    finally:
        for layer, training in modes:
            layer.training = training
        for p, required, grad in before:
            p.requires_grad_(required).grad = grad


@contextmanager
def _nothing() -> Generator[None]:
    yield
