"""A model as it was: its buffers bit for bit, the modes of its modules, and the state of chance."""

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from steadynorm.nn.examining import examining

__all__ = ["Buffers", "evaluating", "uncompiled"]


class Buffers:
    """All buffers of a model as they are now, to be put back: the very same tensors with the very same bits."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, tensor, None if tensor is None else tensor.detach().clone())
            for module in model.modules()
            for name, tensor in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
        ]

    def restore(self) -> None:
        """Puts them back."""
        with torch.no_grad():
            for module, name, tensor, before in self._kept:
                if tensor is not None and before is not None:
                    tensor.copy_(before)
                module._buffers[name] = tensor  # pyright: ignore[reportPrivateUsage]


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Within it, compiled parts run eagerly: a compiled graph does not call hooks that were added after it was made."""
    compiled = (hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if any(compiled) else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode, run eagerly and out of service: no monitor counts its forwards.

    Each module's own mode and torch's generators come back in the end.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with examining(), torch.random.fork_rng(devices=sorted(devices)), uncompiled(model):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
