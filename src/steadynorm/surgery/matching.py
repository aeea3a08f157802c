"""Which modules are batch norms, which layer of ours can take the place of each, and if none, why."""

from functools import cache
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from steadynorm.activations import NAMES, Activation, resolve
from steadynorm.errors import UnknownActivationError
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.ops.groups import GroupLike
from steadynorm.surgery.layers import hooked
from steadynorm.surgery.probing import objection
from steadynorm.surgery.stand_ins import FrozenBatchNorm2d, SyncedBatchNorm

__all__ = ["FUSED", "ORIGIN", "Match", "Origin", "is_batch_norm", "match", "our_names", "own_names"]

PLAIN: Final[dict[type[nn.Module], type[BatchNorm]]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncedBatchNorm,
    nn.LazyBatchNorm1d: BatchNorm1d,
    nn.LazyBatchNorm2d: BatchNorm2d,
    nn.LazyBatchNorm3d: BatchNorm3d,
}
LAZY: Final = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
FUSED: Final = ("drop", "act")
"""The children of timm's layers that a fused layer has no use for."""
ORIGIN: Final = "_converted_from"
"""The attribute under which a converted layer holds its `Origin`."""
_ACTIVATED: Final = ("BatchNormAct2d", "SyncBatchNormAct")
_FROZEN: Final = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
_TENSORS: Final = ("weight", "bias", "running_mean", "running_var")
# What a subclass may define and still compute, load and save what torch's class does.
_HARMLESS: Final = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__init__", "__annotations__"),
    *("__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__", "__abstractmethods__"),
    *("_abc_impl", "__repr__", "extra_repr", "__constants__"),
}


class Origin(NamedTuple):
    """What a converted layer was, where that was no class of torch.nn.

    Attributes:
        kind: Its class.
        modules: The children that it had and that the layer of ours does not need.
        activation: What these applied.
        added: The attributes that it did not have.
        frozen: Whether it was frozen by being of that class.
    """

    kind: type[nn.Module]
    modules: dict[str, nn.Module]
    activation: Activation | None
    added: tuple[str, ...]
    frozen: bool


class Match(NamedTuple):
    """The layer of ours that can take a module's place.

    Attributes:
        target: Its class.
        arguments: Of its constructor, as far as torch.nn has them.
        activation: What the module applies after its affine map.
        group: The ranks that it is synchronised over.
        fused: Whether it has children of the names in `FUSED`, which the layer of ours does without.
        frozen: Whether it never uses a batch's statistics.
        note: What else will have changed.
    """

    target: type[BatchNorm]
    arguments: dict[str, Any]
    activation: Activation | None = None
    group: "GroupLike | None" = None
    fused: bool = False
    frozen: bool = False
    note: str = ""


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm: torch's or a subclass, ours, a frozen one by its name, or one in TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(module, "original_name", ""))
    return isinstance(module, TorchBatchNorm) or _looks_frozen(module)


def own_names(kind: type[nn.Module], base: type[nn.Module]) -> set[str]:
    """The methods and attributes that a class has and `base` does not, as far as they may change what it does."""
    added = [one for one in kind.__mro__ if one not in base.__mro__]
    return {name for one in added for name in vars(one)} - _HARMLESS


@cache
def our_names() -> frozenset[str]:
    """The attributes of a layer of ours that torch's does not have."""
    built = set(vars(BatchNorm1d(1, device="meta"))) - set(vars(nn.BatchNorm1d(1, device="meta")))
    set_later = ("remember", "active_domain", "entered", "domains_entered", "frozen", "frozen_affine", "shortcut")
    return frozenset({*built, *set_later, "unfrozen_grad", ORIGIN})


def match(layer: nn.Module) -> Match | str:
    """What can take the layer's place, or the reason why nothing can."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is TorchScript: convert the model before torch.jit.script or torch.jit.trace"
    if isinstance(layer, BatchNorm):
        return "it is steadynorm's already"
    if is_parametrized(layer):
        return "it is parametrized: convert it first, or without its parametrization, and register that afterwards"
    if "forward" in vars(layer):
        return "its forward was replaced, on this one layer"
    taken = sorted((set(vars(layer)) & our_names()) - {"process_group"})
    if taken:
        return f"it has an attribute that means something else in steadynorm's layers: {', '.join(taken)}"
    if _looks_frozen(layer):
        return _match_frozen(layer)
    return _match_torch(cast(TorchBatchNorm, layer))


def _match_torch(layer: TorchBatchNorm) -> Match | str:
    kind = type(layer)
    base = next((one for one in kind.__mro__ if one in PLAIN), None)
    activated = kind.__name__ in _ACTIVATED and base in (nn.BatchNorm2d, nn.SyncBatchNorm)
    if base is None or (own_names(kind, base) and not activated):
        own = sorted(own_names(kind, base or TorchBatchNorm))
        return f"it is a subclass that does something of its own: {', '.join(own[:5])}{', ...' if own[5:] else ''}"
    held = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    if any(is_lazy(tensor) for tensor in held):
        return "it is lazy and has no tensors yet: run one forward, then convert"
    features = _features(layer) or layer.num_features
    problem = _problem_of_tensors(layer)
    if problem or not features:
        return problem or "it is lazy and does not know its number of channels yet: run one forward, then convert"
    if layer.momentum is not None and not 0 <= layer.momentum <= 1:
        return f"its momentum {layer.momentum:g} is not in [0, 1]"
    activation = _activation_of(layer) if activated else None
    if isinstance(activation, str):
        return activation
    changed = objection(layer, layer.eps, layer.momentum, activation, frozen=False) if activated else None
    if changed:
        return changed
    arguments = {name: getattr(layer, name) for name in ("eps", "momentum", "affine", "track_running_stats")}
    group = None
    if isinstance(layer, nn.SyncBatchNorm):
        group = "world" if layer.process_group is None else layer.process_group
    notes = [f"num_features was {layer.num_features}, its tensors have {features}"]
    note = notes[0] if features != layer.num_features and not isinstance(layer, LAZY) else ""
    return Match(PLAIN[base], {"num_features": features, **arguments}, activation, group, fused=activated, note=note)


def _problem_of_tensors(layer: TorchBatchNorm) -> str | None:
    """What torch's forward makes of unusual tensors, and ours would make otherwise."""
    for name in _TENSORS:
        if name not in vars(layer)["_parameters"] and name not in vars(layer)["_buffers"]:
            return f"its {name} is neither a parameter nor a buffer"
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    lengths = {tuple(t.shape) for t in (layer.weight, layer.bias, mean, var) if isinstance(t, Tensor)}  # pyright: ignore[reportUnnecessaryIsInstance]
    if len(lengths) > 1:
        return f"its tensors differ in shape: {', '.join(map(str, sorted(lengths)))}"
    if (mean is None) != (var is None) or (mean is not None) != layer.track_running_stats:
        return "its running statistics and its track_running_stats do not agree, as where one was changed afterwards"
    if layer.momentum is None and mean is not None and count is None:
        return "momentum=None needs num_batches_tracked, which was taken out"
    return None


def _features(layer: nn.Module) -> int | None:
    """The length of the tensors, which counts where `num_features` was left behind (a pruned layer)."""
    lengths = [len(t) for name in _TENSORS if isinstance(t := getattr(layer, name, None), Tensor) and t.dim() == 1]
    return lengths[0] if lengths else None


def _activation_of(layer: nn.Module) -> Activation | str | None:
    """What a timm-style layer applies, or why that cannot be fused."""
    children = dict(layer.named_children())
    strange = sorted(set(children) - set(FUSED))
    if strange:
        return f"it has children that are not known here: {', '.join(strange)}"
    watched = [name for name, child in children.items() if hooked(child)]
    if watched:
        return f"its {watched[0]} has hooks, which a fused activation would not call"
    if type(children.get("drop", nn.Identity())) is not nn.Identity:
        return f"its drop ({type(children['drop']).__name__}) comes between the affine map and the activation"
    act = children.get("act")
    try:
        return resolve(act)
    except UnknownActivationError:
        name = type(act).__name__.lower()
        if name in NAMES and not (act and act.state_dict()):  # others' modules of these names: they are tried out
            return Activation(name)
        return f"its activation ({type(children['act']).__name__}) is none that a layer of ours can apply"


def _looks_frozen(module: nn.Module) -> bool:
    buffers = vars(module).get("_buffers", {})
    return type(module).__name__.endswith(_FROZEN) and all(isinstance(buffers.get(name), Tensor) for name in _TENSORS)


def _match_frozen(layer: nn.Module) -> Match | str:
    features = _features(layer)
    lengths = {tuple(getattr(layer, name).shape) for name in _TENSORS}
    if features is None or len(lengths) > 1 or any(True for _ in layer.parameters(recurse=False)):
        return "its tensors are not those of a frozen batch norm: four buffers of one length and no parameters"
    activation = _activation_of(layer)
    if isinstance(activation, str):
        return activation
    eps = getattr(layer, "eps", 1e-5)
    changed = objection(layer, eps, 0.1, activation, frozen=True)
    if changed:
        return changed
    arguments = {"num_features": features, "eps": eps, "momentum": 0.1, "affine": True, "track_running_stats": True}
    return Match(FrozenBatchNorm2d, arguments, activation, fused=True, frozen=True)
