"""convert_: a model's batch norms become steadynorm's, where they are."""

from collections.abc import Sequence
from typing import Any, Final, TypedDict, Unpack, cast

from torch import nn

from steadynorm.errors import ArgumentError
from steadynorm.nn.base import BatchNorm, SingleValue
from steadynorm.nn.batchnorm import BatchNorm1d
from steadynorm.nn.domains import STATISTICS
from steadynorm.nn.renorm import Renorm
from steadynorm.ops.groups import GroupLike
from steadynorm.surgery.conversion_report import ConversionReport, LayerConversion, described
from steadynorm.surgery.matching import FUSED, LAZY, ORIGIN, PLAIN, Match, Origin, is_batch_norm, match
from steadynorm.surgery.sites import Only, chosen, required_model, sites_of

__all__ = ["Options", "convert_"]


class Options(TypedDict, total=False):
    """The options of the layers that make sense for a model that was built without them; see `BatchNorm1d`."""

    momentum: float | None
    single_value: SingleValue
    ghost_batch_size: int | None
    renorm: Renorm | None
    domains: Sequence[str] | None
    domain_affine: bool
    process_group: "GroupLike | None"


_ELSEWHERE: Final = {
    "activation": "the model applies its own after the layer",
    "masked": "the model hands no mask to the layer",
    "channel_dim": "torch.nn's layers have their channels in dimension 1",
    "eps": "it would change what the model computes; set it on the layers afterwards",
    **dict.fromkeys(
        ("num_features", "affine", "bias", "track_running_stats", "device", "dtype"), "the layers keep their tensors"
    ),
}


def convert_(model: nn.Module, *, only: Only = None, **options: Unpack[Options]) -> ConversionReport:
    """Turns a model's batch norms into steadynorm's, in place; the model computes and learns what it did.

        y = f(γ (x - μ) / sqrt(σ² + ε) + β)       before and after, with the same γ, β, μ, σ²: the very same tensors

    A layer stays the object that it is and changes its class, as torch's lazy layers do. So whatever refers to it or to
    its tensors goes on: optimisers made before and their state, hooks of every kind and their handles, flags and modes,
    devices and dtypes, modules that are used in several places, lists of layers kept beside the model, wrappers such
    as DistributedDataParallel. It also works where the model itself is a batch norm. The state_dict keeps its keys. A
    `torch.compile`d model compiles anew.

    | what there is | what it becomes |
    | --- | --- |
    | torch.nn's `BatchNorm1d`, `2d`, `3d`, and subclasses with only a constructor of their own | ours of that name |
    | `SyncBatchNorm` | a layer for input of any rank over the same process group; `"world"` where it had none |
    | lazy ones | the same once they have their tensors; left before |
    | torchvision's `FrozenBatchNorm2d`, by name and four buffers | frozen as by `sn.freeze_`, γ and β still buffers |
    | timm's `BatchNormAct2d` and its kin, by name | one with the activation fused; `act` and `drop` are put aside |

    The last two are known by name, so their forward is tried out on random numbers first. Left as they are, with the
    reason in the report: other subclasses with methods of their own, parametrized layers, layers in TorchScript, an
    activation that none of ours is, hooks on `act` or `drop`, running statistics that do not agree with
    `track_running_stats`, a momentum outside of [0, 1], layers that `only` does not mean.

    Two things do change. Running statistics in half precision are kept in float32 from here on, in new buffers. And
    bad batches: one that is not finite is not committed, one value per channel raises a `SingleValueError`, which is
    the ValueError that torch raises.

    Args:
        model: Changed in place.
        only: Which layers: a predicate `(name, module) -> bool`, or a name or a list of names, with `*` and `?` if
            wanted, of batch norms or of modules that hold them. All by default.
        **options: For all layers that are converted, frozen ones excepted: `momentum`, `single_value`,
            `ghost_batch_size`, `renorm`, `domains`, `domain_affine` (new parameters, which an optimiser made before
            does not know), `process_group`; see `sn.BatchNorm1d`. Where one does not fit a layer, that layer is left.

    Returns:
        A report with a row for each batch norm. If there is none it has no rows.

    Raises:
        ArgumentError: `model` is no module, `only` fits nothing, or an option is unknown or out of range; then nothing
            was changed.
        ModelError: The model is TorchScript.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> weight = model[1].weight
        >>> print(convert_(model))
        1 of 1 batch norms converted
          1 torch.nn.BatchNorm2d -> steadynorm.BatchNorm2d
        >>> model[1].weight is weight
        True
    """
    required_model(model, "convert_")
    _check(options)
    sites = sites_of(model, is_batch_norm)
    wanted = chosen(sites, only)
    rows: list[LayerConversion] = []
    for layer, (name, *also) in sites:
        before = described(layer)
        plan = match(layer) if layer in wanted else "only= does not mean it"
        if not isinstance(plan, str):
            plan = _become(layer, plan, options)
        after, note = (None, plan) if isinstance(plan, str) else (described(layer), plan.note)
        rows.append(LayerConversion(name, before, after, note, tuple(also)))
    return ConversionReport("convert", tuple(rows))


def _check(options: Options) -> None:
    known = Options.__annotations__
    unknown = [name for name in options if name not in known]
    if unknown:
        why = _ELSEWHERE.get(unknown[0])
        raise ArgumentError(
            f"convert_ takes the options {', '.join(known)}; got {unknown[0]!r}" + (f": {why}." if why else ".")
        )
    given: dict[str, Any] = dict(options)
    BatchNorm1d(1, device="meta", **given)


def _become(layer: nn.Module, plan: Match, options: Options) -> Match | str:
    """Changes the layer, and returns the plan with what else was changed; or why it was left after all."""
    given: dict[str, Any] = {} if plan.frozen else dict(options)
    arguments: dict[str, Any] = {**plan.arguments, "process_group": plan.group, **given}
    try:
        template = plan.target(**arguments, activation=plan.activation, device="meta")
    except ArgumentError as error:
        return str(error)
    kind, state = type(layer), vars(layer)
    added = {name for name in plan.arguments if name not in state}
    narrow = [n for n in STATISTICS[:2] if (t := state["_buffers"].get(n)) is not None and t.itemsize < 4]
    if isinstance(layer, LAZY):
        _settle(layer)
    try:
        object.__setattr__(layer, "__class__", plan.target)
    except TypeError as error:
        return f"its class cannot be changed ({error})"
    ours = cast(BatchNorm, layer)
    state.pop("process_group", None)  # SyncBatchNorm's attribute, a property of ours
    state.update({name: value for name, value in vars(template).items() if name not in vars(nn.Module())})
    children = state["_modules"]
    aside = {name: children.pop(name) for name in FUSED if plan.fused and name in children}
    if plan.frozen:
        state.update(frozen=True, frozen_affine=True)
        if STATISTICS[2] not in state["_buffers"]:
            added.add(STATISTICS[2])
            state["_buffers"][STATISTICS[2]] = None
    if kind not in PLAIN:
        state[ORIGIN] = Origin(kind, aside, plan.activation, tuple(sorted(added)), plan.frozen)
    device = None if ours.running_mean is None else ours.running_mean.device
    ours._init_state(template.domains, template.domain_affine, device)  # pyright: ignore[reportPrivateUsage]
    notes = [plan.note] if plan.note else []
    notes += [f"{' and '.join(narrow)} in float32 from here on"] if narrow else []
    return plan._replace(note="; ".join(notes))


def _settle(layer: nn.Module) -> None:
    """Ends a lazy layer's laziness, as torch does in its first forward."""
    state = vars(layer)
    for name in ("_initialize_hook", "_load_hook"):
        handle = state.pop(name, None)
        if handle is not None:
            handle.remove()
