"""Parallel convolutions of one input whose batch norms have gone and whose sum is all that is used: one convolution."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd as TorchConv  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvTransposeNd as TorchConvTranspose  # pyright: ignore[reportPrivateUsage]

from steadynorm.surgery.affine import Affine, Weights, affine_map, padding_of
from steadynorm.surgery.layers import is_batchnorm, is_foldable
from steadynorm.surgery.normed import Normed
from steadynorm.surgery.passing import input_of
from steadynorm.surgery.patterns import Left, View
from steadynorm.surgery.planning import Fold, Plan
from steadynorm.surgery.remains import Absent
from steadynorm.surgery.writing import written_before

__all__ = ["Merge", "merge", "merges_in"]

_INPLACE: Final = (operator.iadd, "add_")
_SUMS: Final = (operator.add, torch.add, "add", *_INPLACE)


class Merge(NamedTuple):
    """A set of branches that becomes one convolution.

    Attributes:
        host: The convolution that takes the others over.
        parts: Those that go, convolutions and batch norms alone, each with where in the host's kernel its own lies.
        behind: The batch norms, folded already, behind the convolutions.
    """

    host: str
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    behind: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is about."""
        return (self.host, *(name for name, _ in self.parts), *self.behind)


@dataclass(frozen=True)
class _Branch:
    """A convolution, with the batch norms behind it, or a batch norm alone."""

    name: str
    layer: TorchConv | TorchBatchNorm
    node: fx.Node
    behind: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Points of the kernel; none of a batch norm's."""
        return torch.Size(self.layer.kernel_size).numel() if isinstance(self.layer, TorchConv) else 0


def merges_in(plan: Plan, view: View) -> list[Merge]:
    """What can be merged in one way through a forward, with the batch norms of the plan gone.

    Two branches fit where they have the same stride, groups and channels, pad with zeros, and give outputs of the same
    size, in which each point of the smaller kernel lies on one of the larger. A batch norm alone is a kernel of one
    point.
    """
    found: list[Merge] = []
    for top in view.graph.nodes:
        if not _is_sum(top) or any(_is_sum(user) for user in top.users):
            continue
        branches = {
            term: branch for term in _terms(top, plan, view) if (branch := _branch(term, plan, view)) is not None
        }
        order = sorted(branches, key=lambda term: -branches[term].size)
        gone: set[fx.Node] = set()
        sums = list(_sums(top, plan, view))
        for host in order:
            conv = branches[host].layer
            if host in gone or not isinstance(conv, TorchConv):
                continue
            places: dict[fx.Node, tuple[int, ...]] = {}
            for term in order[order.index(host) + 1 :]:
                if term in gone or not _read_the_same(branches[host].node, branches[term].node, plan, view):
                    continue
                place, without = _place(conv, branches[term].layer), gone.union(places, [term])
                if place is not None and not any(_writes_into(without, one, plan, view) for one in sums):
                    places[term] = place
            if places:
                gone |= set(places)
                behind = tuple(name for term in (host, *places) for name in branches[term].behind)
                parts = tuple((branches[term].name, place) for term, place in places.items())
                found.append(Merge(branches[host].name, parts, behind))
    return found


def _read_the_same(one: fx.Node, other: fx.Node, plan: Plan, view: View) -> bool:
    if input_of(one) is not input_of(other):
        return False
    order = {node: place for place, node in enumerate(one.graph.nodes)}
    first, last = sorted((one, other), key=order.__getitem__)
    return not written_before(first, [last], view.module, plan.gone)


def _is_sum(node: fx.Node) -> bool:
    two = len(node.args) == 2 and not node.kwargs
    return two and node.op in ("call_function", "call_method") and node.target in _SUMS


def _is_inner(node: object, plan: Plan, view: View) -> bool:
    """Whether a sum is nothing but a part of another one: what it writes into is read by no one else."""
    if not isinstance(node, fx.Node) or not _is_sum(node) or len(node.users) != 1:
        return False
    written = node.args[0]
    while node.target in _INPLACE and isinstance(written, fx.Node) and len(written.users) == 1:
        module = view.module(written)
        if module is None:
            return _is_inner(written, plan, view)
        if id(module) not in plan.gone:
            return isinstance(module, (TorchConv, TorchBatchNorm))
        written = input_of(written)
    return node.target not in _INPLACE


def _sums(node: fx.Node, plan: Plan, view: View) -> Iterator[fx.Node]:
    """A sum, and the sums that it adds up."""
    yield node
    for part in node.args:
        if _is_inner(part, plan, view):
            yield from _sums(cast(fx.Node, part), plan, view)


def _terms(node: fx.Node, plan: Plan, view: View) -> Iterator[fx.Node]:
    """What it adds up in the end, less numbers."""
    inner = dict.fromkeys(_sums(node, plan, view))
    for one in inner:
        yield from (part for part in one.args if isinstance(part, fx.Node) and part not in inner)


def _writes_into(gone: set[fx.Node], node: fx.Node, plan: Plan, view: View) -> bool:
    """Whether a sum writes into what is gone."""
    first = node.args[0]
    if node.target not in _INPLACE or not isinstance(first, fx.Node):
        return False
    return gone.issuperset(_terms(first, plan, view) if _is_inner(first, plan, view) else [first])


def _branch(node: fx.Node, plan: Plan, view: View) -> _Branch | None:
    behind: list[str] = []
    while len(node.users) == 1 and (module := view.module(node)) is not None:
        name, below = plan.reading.name(module), input_of(node)
        if isinstance(module, TorchConv) and is_foldable(module):
            folded = behind and all(plan.folds[one].into == (name,) for one in behind)
            plain = not isinstance(module, (TorchConvTranspose, Normed)) and module.padding_mode == "zeros"
            return _Branch(name, module, node, tuple(behind)) if folded and plain else None
        if id(module) in plan.gone and isinstance(below, fx.Node):
            behind.append(name)
            node = below
            continue
        if behind or name in plan.folds or not isinstance(module, TorchBatchNorm) or not is_batchnorm(module):
            return None
        if plan.more_than_affine(node, module) or not plan.second(module):
            return None
        try:
            plan.affine(module, node, view)
        except Left:
            return None
        return _Branch(name, module, node)
    return None


def _place(host: TorchConv, layer: TorchConv | TorchBatchNorm) -> tuple[int, ...] | None:
    """Where in the host's kernel a layer's lies, axis by axis; None where it does not fit."""
    axes = len(host.kernel_size)
    if isinstance(layer, TorchBatchNorm):
        if not host.in_channels == host.out_channels == layer.num_features or any(step != 1 for step in host.stride):
            return None
        kernel, dilation, padding = (1,) * axes, host.dilation, (0,) * 2 * axes
    else:
        one, other = ((c.stride, c.groups, c.in_channels, c.out_channels, c.weight.dtype) for c in (host, layer))
        if one != other:
            return None
        kernel, dilation, padding = layer.kernel_size, layer.dilation, padding_of(layer)
    found: list[int] = []
    for axis, step in enumerate(host.dilation):
        last = 2 * (axes - 1 - axis)
        low, high = padding_of(host)[last : last + 2]
        own_low, own_high = padding[last : last + 2]
        place, beside = divmod(low - own_low, step)
        fits = not beside and 0 <= place <= host.kernel_size[axis] - kernel[axis]
        longer = low + high - step * (host.kernel_size[axis] - 1)
        if not fits or longer != own_low + own_high - dilation[axis] * (kernel[axis] - 1):
            return None
        if kernel[axis] > 1 and dilation[axis] != step:
            return None
        found.append(place)
    return tuple(found)


def merge(plan: Plan, one: Merge) -> None:
    """Takes a merge into the plan: the weights of all its branches in the host, and zeros in the place of the others.

    Raises:
        Left: The sum is not finite in the host's dtype.
    """
    host = cast(TorchConv, plan.reading.model.get_submodule(one.host))
    weight, bias = plan.weights[one.host]
    alone = [name for name, _ in one.parts if name not in plan.weights]
    for name, place in one.parts:
        norm = plan.originals[name]
        added = _as_convolution(host, affine_map(cast(TorchBatchNorm, norm))) if name in alone else plan.weights[name]
        sizes = zip(place, host.kernel_size, added.weight.shape[2:], strict=True)
        around = [side for before, whole, own in sizes for side in (whole - own - before, before)][::-1]
        weight, bias = weight + F.pad(added.weight, around), bias + added.bias
    made = {one.host: Weights(weight, bias)}
    plan.check_size([host], made)
    plan.weights |= made
    how = f"into {one.host}, merged with its parallel branches"
    for name in one.behind:
        fold = plan.folds[name]
        plan.folds[name] = Fold((one.host,), how, fold.remains if fold.into == (one.host,) else nn.Identity())
    for name, _ in one.parts:
        zero = Absent(torch.zeros((), dtype=host.weight.dtype, device=host.weight.device))
        if name in alone:
            plan.folds[name] = Fold((one.host,), how, zero)
            plan.left.pop(name, None)
        else:
            plan.absent[name] = zero
            del plan.weights[name]


def _as_convolution(host: TorchConv, affine: Affine) -> Weights:
    """A batch norm as a convolution by one point."""
    inside = host.out_channels // host.groups
    channels = torch.arange(host.out_channels)
    weight = torch.zeros(host.out_channels, inside, dtype=torch.float64)
    weight[channels, channels % inside] = affine.scale
    return Weights(weight.reshape(*weight.shape, *[1] * len(host.kernel_size)), affine.shift)
