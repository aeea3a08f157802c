"""Which layers a batch norm can go into or come from, and what speaks against touching one."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from steadynorm.nn.base import BatchNorm
from steadynorm.surgery.normed import Normed

__all__ = ["FOLDABLE", "has_matrix", "hooked", "is_batchnorm", "is_foldable", "obstacle"]

FOLDABLE: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
"""The layers that can take over a batch norm."""

_NORM_FORWARDS = (TorchBatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it computes what torch's or steadynorm's batch norms do: a subclass may compute something else."""
    return isinstance(module, TorchBatchNorm) and type(module).forward in _NORM_FORWARDS


def is_foldable(module: nn.Module) -> bool:
    """Whether it computes what those layers do, on its input or on what a batch norm of its own makes of it."""
    if isinstance(module, Normed):
        return True
    for kind in FOLDABLE:
        if isinstance(module, kind):
            same = type(module).forward is kind.forward
            return same and (kind is nn.Linear or type(module)._conv_forward is kind._conv_forward)  # pyright: ignore
    return False


def has_matrix(module: nn.Module, recurse: bool = True) -> bool:
    """Whether it has weights of two axes or more, as what mixes channels has."""
    return any(is_lazy(one) or one.dim() >= 2 for one in module.parameters(recurse))


def obstacle(module: nn.Module) -> str | None:
    """Why a layer's weights are not to be touched; None where they may be."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # pyright: ignore
        return "is not initialised: run a batch first"
    if parametrize.is_parametrized(module):
        return "is parametrised: remove the parametrization first"
    if module._forward_pre_hooks or module._forward_hooks:  # pyright: ignore[reportPrivateUsage]
        return "has forward hooks (as weight_norm and spectral_norm leave them)"
    if module.__dict__.get("qconfig") is not None:
        return "is prepared for quantisation"
    weight = getattr(module, "weight", None)
    if weight is not None and not weight.is_floating_point():
        return f"has weights of {weight.dtype}"
    return None


def hooked(module: nn.Module) -> bool:
    """Whether it has hooks of its own, of any kind."""
    return any("hooks" in name and value for name, value in vars(module).items())
