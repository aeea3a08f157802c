"""revert_: steadynorm's batch norms become torch.nn's again, or what they were converted from."""

from typing import Final, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from steadynorm.nn.base import BatchNorm
from steadynorm.nn.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from steadynorm.nn.domains import STATISTICS
from steadynorm.ops.groups import GroupLike
from steadynorm.surgery.conversion_report import ConversionReport, LayerConversion, described
from steadynorm.surgery.matching import ORIGIN, Origin, our_names
from steadynorm.surgery.sites import Only, chosen, required_model, sites_of
from steadynorm.surgery.stand_ins import FrozenBatchNorm2d, SyncedBatchNorm

__all__ = ["revert_"]

_BACK: Final[dict[type[nn.Module], type[nn.Module]]] = {
    BatchNorm1d: nn.BatchNorm1d,
    BatchNorm2d: nn.BatchNorm2d,
    BatchNorm3d: nn.BatchNorm3d,
    FrozenBatchNorm2d: nn.BatchNorm2d,
    SyncedBatchNorm: nn.SyncBatchNorm,
}


def revert_(model: nn.Module, *, only: Only = None) -> ConversionReport:
    """Turns steadynorm's batch norms into torch.nn's, in place: for TorchScript, or for tools that know torch's alone.

    The way back of `convert_`, and by the same means: a layer stays the object that it is, with its very tensors, hooks
    and flags, and changes its class. A layer that was converted becomes what it was (torchvision's frozen one, timm's
    with its activation); one that was built as ours becomes `torch.nn.BatchNorm1d`, `2d`, `3d`, or, with a process
    group, `SyncBatchNorm`. One that was frozen when converted and is `unfreeze_`-n since becomes `BatchNorm2d`.

    A layer that does what torch's cannot is left, and the report says what it is: a fused activation, freezing, ghost
    batches, renorm, domains, `masked="pass"`, `single_value`, `channel_dim`. It would compute something else from then
    on. A fused activation could live on in a subclass of torch's layer, but torch's own converters and fusers take such
    a subclass for its base and drop the activation silently, and an `nn.Sequential` in the layer's place would rename
    its entries in the state_dict: take it out where the model can say so (`layer.activation = None`, and the activation
    after it). A residual, a mask or sample weights that the model's forward hands to a layer are no part of the layer:
    torch's then refuses them with a TypeError.

    Args:
        model: Changed in place.
        only: As in `convert_`.

    Returns:
        A report with a row for each of our batch norms. Statistics that were kept in float32 beside a γ in half
        precision are γ's dtype again, which torch's layer needs.

    Raises:
        ArgumentError: `model` is no module, or `only` fits nothing.
        ModelError: The model is TorchScript.

    Example:
        >>> model = nn.Sequential(BatchNorm1d(3), BatchNorm1d(3, activation="relu"))
        >>> print(revert_(model))
        1 of 2 batch norms turned back
          1 steadynorm.BatchNorm1d -> torch.nn.BatchNorm1d
          left 1, steadynorm.BatchNorm1d (activation=relu): torch.nn has no activation=relu
        >>> type(model[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    required_model(model, "revert_")
    sites = sites_of(model, lambda module: isinstance(module, BatchNorm))
    wanted = chosen(sites, only)
    rows: list[LayerConversion] = []
    for module, (name, *also) in sites:
        layer = cast(BatchNorm, module)
        before = described(layer)
        target = _target(layer) if layer in wanted else "only= does not mean it"
        after, note = (None, target) if isinstance(target, str) else _turn_back(layer, target)
        rows.append(LayerConversion(name, before, after, note, tuple(also)))
    return ConversionReport("revert", tuple(rows))


def _origin(layer: BatchNorm) -> Origin | None:
    return vars(layer).get(ORIGIN)


def _target(layer: BatchNorm) -> type[nn.Module] | str:
    """What the layer can become, or why it can be nothing of torch's."""
    plain, origin = _BACK.get(type(layer)), _origin(layer)
    if is_parametrized(layer):
        return "it is parametrized: turn it back without its parametrization, and register that afterwards"
    if plain is None or "forward" in vars(layer):
        return "it is a subclass of steadynorm's layer, or has a forward of its own"
    if layer.entered or layer.active_domain is not None:
        return "it is inside of a context (accumulate, no_commit, functional_call, domain), which must end first"
    lacking = {name: value for name, value in layer._options.items() if name != "process_group"}  # pyright: ignore[reportPrivateUsage]
    synced = layer.process_group is not None
    if (
        origin is not None
        and synced == issubclass(origin.kind, nn.SyncBatchNorm)
        and layer.frozen == origin.frozen
        and layer.activation == origin.activation
    ):
        lacking.pop("activation", None)
        lacking.pop("frozen", None)
        plain = origin.kind
    if lacking:
        return f"torch.nn has no {', '.join(f'{name}={value}' for name, value in lacking.items())}"
    if plain is nn.SyncBatchNorm and not synced:
        return "torch.nn has no batch norm for input of any rank but SyncBatchNorm, and this layer is not synchronised"
    if synced and not issubclass(plain, nn.SyncBatchNorm):
        return nn.SyncBatchNorm
    return plain


def _turn_back(layer: BatchNorm, target: type[nn.Module]) -> tuple[str, str]:
    """Changes the layer; returns what it is now, and what else was changed."""
    state, origin, group = vars(layer), _origin(layer), layer.process_group
    again = origin if origin is not None and target is origin.kind else None
    notes = _narrowed(layer)
    for name in our_names():
        state.pop(name, None)
    state["_buffers"].pop("_rejected", None)
    state["_non_persistent_buffers_set"].discard("_rejected")
    if again is not None:
        for name in again.added:
            state.pop(name, None)
            state["_buffers"].pop(name, None)
        for name, child in again.modules.items():
            state["_modules"][name] = child.train(layer.training)
    module: nn.Module = layer
    object.__setattr__(module, "__class__", target)
    if issubclass(target, nn.SyncBatchNorm):
        state["process_group"] = _own_group(group)
    return described(module), notes


def _own_group(group: "GroupLike | None") -> "GroupLike | None":
    """As torch's layer has it: None for the world."""
    return None if group == "world" else group


def _narrowed(layer: BatchNorm) -> str:
    """torch's layer wants all of its tensors in one dtype."""
    weight = cast("Tensor | None", layer.weight)
    buffers: dict[str, Tensor | None] = vars(layer)["_buffers"]
    if weight is None or weight.itemsize >= 4:
        return ""
    wide = {name: t for name in STATISTICS[:2] if (t := buffers.get(name)) is not None and t.dtype != weight.dtype}
    buffers.update({name: tensor.to(weight.dtype) for name, tensor in wide.items()})
    return f"{' and '.join(wide)} in {str(weight.dtype).removeprefix('torch.')}" if wide else ""
