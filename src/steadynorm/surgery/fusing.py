"""`fuse`: a model whose batch norms do the activation behind them, and the sum between, as one op."""

import copy
from collections import defaultdict
from typing import NamedTuple, Protocol, cast

from torch import fx, nn

from steadynorm.activations import Activation, resolve
from steadynorm.errors import UnknownActivationError
from steadynorm.nn.base import BatchNorm
from steadynorm.surgery.absorbed import Absorbed
from steadynorm.surgery.conversion_report import ConversionReport
from steadynorm.surgery.converting import convert_
from steadynorm.surgery.fuse_report import FusedLayer, FuseReport
from steadynorm.surgery.layers import hooked
from steadynorm.surgery.matching import is_batch_norm
from steadynorm.surgery.pairing import Pair, pair_at
from steadynorm.surgery.patterns import Left, View
from steadynorm.surgery.reading import Reading, Root
from steadynorm.surgery.rewriting import LeftOne, become, rewritten
from steadynorm.surgery.sites import Only, chosen, copied, replace, required_model, sites_of

__all__ = ["FusedModel", "fuse"]


class FusedModel(Protocol):
    """What `fuse` adds to the model it returns."""

    fuse_report: FuseReport


class _Plan(NamedTuple):
    """What can be done about one batch norm; the same in every way that the model was traced.

    Attributes:
        activation: What it will apply; None for the identity, after a sum.
        residual: Whether it adds something before.
        exchanged: The activation's module, where that is all that has to go.
        owner: The module whose forward is to be rewritten otherwise.
        through: The modules between that and what is fused.
    """

    activation: Activation | None
    residual: bool
    exchanged: str | None
    owner: str
    through: frozenset[str]

    def row(self, name: str) -> FusedLayer:
        """What the report says of it."""
        how = (
            f"applies {self.exchanged}"
            if self.exchanged is not None
            else f"in the forward of {self.owner or 'the model'}"
        )
        where = self.owner if self.exchanged is None else None
        return FusedLayer(name, True, str(self.activation or ""), self.residual, where, how)


def fuse(model: nn.Module, *, only: Only = None) -> nn.Module:
    """A copy of a model whose batch norms do, in one op, what follows them: for training.

        f(batch norm(x))                one op in the place of two
        f(batch norm(x) + residual)     one op in the place of three; the shortcut of a residual block
        batch norm(x) + residual        one op in the place of two

    It computes the same, forward and backward, in one pass over the data instead of two or three, and keeps less for
    backward: x alone, and for the sum a bit or a value of each element. f is any activation of
    `steadynorm.activations.NAMES`, as a module, a function or a tensor's method. Batch norms that are not ours are
    converted first (`convert_`).

    The model is read by `torch.fx`, in every way that its forwards can take; where that fails, its largest parts that
    can be. Where f is a module that serves
    this batch norm alone, that module is exchanged for one that does nothing. Elsewhere (a function, a module that
    serves several, a sum) the forward of the smallest module that holds all of it is written anew. All else stays:
    names, so that checkpoints load, classes, attributes, hooks, untraceable code around it. A forward that was
    rewritten has its Python values, such as the number of its layers, written into it.

    What cannot be fused, or not safely, is left as it is, and the report says why: an output that is used twice too,
    hooks on the batch norm or the activation, a layer that is called twice, forwards that branch on their arguments'
    values. Under autocast the sum is in the dtype of the batch norm's input.

    Args:
        model: In training or evaluation; it is not changed.
        only: Which batch norms, as in `convert_`. All by default.

    Returns:
        The fused model, with a `fuse_report` (a `FuseReport`). Its state_dict has the same keys.

    Raises:
        ArgumentError: `model` is no module, or `only` fits nothing.
        ModelError: The model is TorchScript or cannot be copied.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> fused = fuse(model)
        >>> print(fused.fuse_report)
        1 of 1 batch norms fused
          1 with relu
        >>> fused[1]
        BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation=relu)
    """
    required_model(model, "fuse")
    fused = copied(model, "fuse")
    sites = sites_of(fused, is_batch_norm)
    meant = chosen(sites, only)
    wanted = {site.names[0] for site in sites if site.layer in meant}
    conversion = convert_(fused, only=only)
    _unshare(fused)
    readings = [Reading(copied(fused, "fuse").train(mode)) for mode in (True, False)]
    plans, left = _agreed(readings, wanted)
    _exchange(fused, readings, plans, left)
    _rewrite(fused, readings[0], plans, left)
    for name, plan in plans.items():
        cast(BatchNorm, fused.get_submodule(name)).activation = plan.activation
    names = [site.names[0] for site in sites]
    why = {name: _why(name, left, conversion, readings[0]) for name in names}
    rows = [plans[n].row(n) if n in plans else FusedLayer(n, False, "", False, None, why[n]) for n in names]
    untraced = readings[0].untraced | readings[1].untraced
    cast(FusedModel, fused).fuse_report = FuseReport(tuple(rows), tuple(untraced.items()), conversion)
    return fused


def _why(name: str, left: dict[str, str], conversion: ConversionReport, reading: Reading) -> str:
    notes = {row.name: row.note for row in conversion.left if not row.before.startswith("steadynorm.")}
    unread = "its part of the model could not be traced" if reading.untraced else "the forward does not call it"
    return notes.get(name) or left.get(name) or unread


def _unshare(model: nn.Module) -> None:
    """One activation at several places of `nn.Sequential`s becomes several, which can go one by one."""
    seen: set[int] = set()
    for parent in model.modules():
        for name, child in parent._modules.items():  # pyright: ignore[reportPrivateUsage]
            if child is None or not _is_activation(child) or hooked(child):
                continue
            if id(child) in seen and type(parent).forward is nn.Sequential.forward:
                parent._modules[name] = copy.deepcopy(child)  # pyright: ignore[reportPrivateUsage]
            seen.add(id(child))


def _is_activation(module: nn.Module) -> bool:
    try:
        return resolve(module) is not None
    except UnknownActivationError:
        return False


def _agreed(readings: list[Reading], wanted: set[str]) -> tuple[dict[str, _Plan], dict[str, str]]:
    """What can be done, whichever the mode and whether or not a forward's optional arguments are given."""
    found: dict[str, list[_Plan | str]] = defaultdict(list)
    views = [(reading, root, view) for reading in readings for root in reading.roots for view in root.views]
    for reading, root, view in views:
        for node in view.graph.nodes:
            norm = view.module(node)
            if isinstance(norm, BatchNorm) and (name := reading.name(norm)) in wanted:
                found[name].append(_plan(node, norm, reading, root, view))
    for reading, _, view in views:  # where an activation is called on something else
        called = {reading.name(module) for node in view.graph.nodes if (module := view.module(node)) is not None}
        for name, all_plans in found.items():
            first = all_plans[0]
            if isinstance(first, _Plan) and first.exchanged in called and name not in called:
                all_plans.append(f"{first.exchanged} is called without it, too")
    plans: dict[str, _Plan] = {}
    left: dict[str, str] = {}
    for name, all_plans in found.items():
        refused = [plan for plan in all_plans if isinstance(plan, str)]
        first = all_plans[0]
        if refused or isinstance(first, str):
            left[name] = refused[0]
        elif set(all_plans) == {first}:
            plans[name] = first
        else:
            left[name] = "what follows it depends on training, or on the optional arguments of the forward"
    return plans, left


def _plan(node: fx.Node, norm: BatchNorm, reading: Reading, root: Root, view: View) -> _Plan | str:
    try:
        reading.check(norm, view, root)
        if norm.activation is not None:
            raise Left(f"it applies {norm.activation} already")
        pair = pair_at(node, view.module)
        act = None if pair.act is None else view.module(pair.act)
        if pair.add is None and pair.activation is not None and act is not None:
            try:
                reading.check(act, view, root)
                return _Plan(pair.activation, False, reading.name(act), "", frozenset())
            except Left as why:
                if "hooks" in str(why):
                    raise
        return _around(pair, reading, root, view)
    except Left as why:
        return str(why)


def _around(pair: Pair, reading: Reading, root: Root, view: View) -> _Plan:
    """The smallest module whose forward makes all the calls of a pair."""
    paths = [_path(node, view) for node in pair.nodes]
    common = paths[0]
    for path in paths:
        same = [one == other for one, other in zip(common, path, strict=False)]
        common = common[: same.index(False) if False in same else len(same)]
    inner = {name for path in paths for name in path[len(common) :]}
    full = [f"{root.name}.{name}" if root.name and name else root.name or name for name in ["", *common]]
    owner = reading.model.get_submodule(full[-1])
    if type(owner).forward is nn.Sequential.forward or type(owner).__module__.startswith("torch.nn."):
        raise Left(f"{full[-1] or 'the model'} is a {type(owner).__name__}, whose forward is not rewritten")
    if "forward" in vars(owner):
        raise Left(f"the forward of {full[-1] or 'the model'} was replaced, on this one module")
    act = None if pair.act is None else view.module(pair.act)
    if act is not None and hooked(act):
        raise Left(f"{reading.name(act)} has hooks")
    through = frozenset(f"{root.name}.{name}" if root.name else name for name in inner)
    return _Plan(pair.activation, pair.add is not None, None, full[-1], through)


def _path(node: fx.Node, view: View) -> list[str]:
    """The modules whose forwards a node's call lies in, from the outside."""
    path = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return path[:-1] if view.module(node) is not None else path


def _exchange(model: nn.Module, readings: list[Reading], plans: dict[str, _Plan], left: dict[str, str]) -> None:
    """Puts nothing where activations were; what then cannot be traced any more needs the activations themselves."""
    for reading in readings:
        for root in reading.roots:
            here = [n for n, p in plans.items() if p.exchanged is not None and n in root.own]
            modules = [reading.model.get_submodule(cast(str, plans[name].exchanged)) for name in here]
            for name in here:
                _absorb(reading.model, reading, plans[name])
            try:
                reading.trace(root)
            except Exception as error:
                for activation in modules:
                    for alias in reading.names[id(activation)]:
                        replace(reading.model, alias, activation)
                for name in here:
                    left[name] = f"the forward needs the activation itself ({type(error).__name__})"
                    del plans[name]
    for plan in plans.values():
        if plan.exchanged is not None:
            _absorb(model, readings[0], plan)


def _absorb(model: nn.Module, reading: Reading, plan: _Plan) -> None:
    name = cast(str, plan.exchanged)
    stand_in = Absorbed(cast(Activation, plan.activation)).train(model.get_submodule(name).training)
    for alias in next(names for names in reading.names.values() if name in names):
        replace(model, alias, stand_in)


def _rewrite(model: nn.Module, reading: Reading, plans: dict[str, _Plan], left: dict[str, str]) -> None:
    """Rewrites the forwards, those of inner modules before those around them."""
    owners: dict[str, list[str]] = defaultdict(list)
    for name, plan in plans.items():
        if plan.exchanged is None:
            owners[plan.owner].append(name)
    for owner in sorted(owners, key=lambda name: -len(name.split(".")) if name else 0):
        names = sorted(owners[owner], key=lambda name: len(plans[name].through))  # of two that are added, the nearer
        while names:
            norms = {name: reading.model.get_submodule(name) for name in names}
            through = {reading.model.get_submodule(part) for name in names for part in plans[name].through}
            try:
                code = rewritten(reading.model.get_submodule(owner), norms.values(), through)
                become(reading.model.get_submodule(owner), code)
                become(model.get_submodule(owner), code)
                break
            except LeftOne as error:
                said, refused = str(error), [name for name, norm in norms.items() if norm is error.norm]
            except Left as error:
                said, refused = str(error), names
            for name in refused:
                left[name] = said
                del plans[name]
            names = [name for name in names if name not in refused]
