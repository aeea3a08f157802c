"""A model as it was: its buffers bit for bit, the modes of its modules, and the state of chance."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

__all__ = ["Buffers", "evaluating"]


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


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in evaluation mode, run eagerly; each module's own mode and torch's generators come back in the end.

    Compiled parts run uncompiled within: a compiled graph does not call hooks that were added after it was made.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    compiled = any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in modules)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    eagerly = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    with torch.random.fork_rng(devices=sorted(devices)), eagerly:
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for module, training in modes:
                module.training = training
