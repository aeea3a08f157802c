"""Which batch norms of a traced part go, into which layers, and what becomes of the weights of those."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchBatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd as TorchConv  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvTransposeNd as TorchConvTranspose  # pyright: ignore[reportPrivateUsage]

from steadynorm.nn.base import BatchNorm
from steadynorm.surgery.affine import (
    Affine,
    Weights,
    affine_map,
    after,
    before,
    inputs_of,
    outputs_of,
    padding_of,
    weights_of,
)
from steadynorm.surgery.layers import is_batchnorm
from steadynorm.surgery.passing import input_of, places_of
from steadynorm.surgery.patterns import Left, View
from steadynorm.surgery.reading import Reading, Root
from steadynorm.surgery.remains import ChannelPad, Remainder
from steadynorm.surgery.writing import written_before

__all__ = ["Fold", "Plan"]


@dataclass(frozen=True)
class Fold:
    """One batch norm that goes.

    Attributes:
        into: The names of the layers that take it over.
        how: In words.
        remains: What stands in its place.
        unpadded: The convolution whose padding that does instead.
    """

    into: tuple[str, ...]
    how: str
    remains: nn.Module
    unpadded: str | None = None


@dataclass
class Plan:
    """The folds of one trace, and the reasons against those that are not in it.

    Attributes:
        folds: By the batch norm's name.
        left: Why not, by the batch norm's name.
        weights: Of the layers that take them over, by name.
    """

    reading: Reading
    root: Root
    view: View
    originals: Mapping[str, nn.Module]
    ranks: Mapping[str, set[int]]
    banned: Mapping[str, str]
    folds: dict[str, Fold] = field(default_factory=dict[str, Fold])
    left: dict[str, str] = field(default_factory=dict[str, str])
    weights: dict[str, Weights] = field(default_factory=dict[str, Weights])
    absent: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    gone: set[int] = field(default_factory=set[int])

    def make(self) -> "Plan":
        """Folds backward, in the order of the graph; what is left then, forward, from its end."""
        norms = [node for node in self.view.graph.nodes if self._norm(node) is not None]
        for node in norms:
            self._try(node, backward=True)
        for node in reversed(norms):
            if self.reading.name(cast(nn.Module, self._norm(node))) not in self.folds:
                self._try(node, backward=False)
        return self

    def _norm(self, node: fx.Node) -> TorchBatchNorm | None:
        module = self.view.module(node)
        return module if isinstance(module, TorchBatchNorm) and is_batchnorm(module) else None

    def _try(self, node: fx.Node, backward: bool) -> None:
        norm = cast(TorchBatchNorm, self._norm(node))
        name = self.reading.name(norm)
        try:
            if name in self.banned:
                raise Left(self.banned[name])
            affine = self.affine(norm, node, self.view)
            made = self._backward(node, norm, affine) if backward else self._forward(node, norm, affine)
        except Left as why:
            earlier = self.left.get(name)
            self.left[name] = str(why) if earlier in (None, str(why)) else f"{earlier}; {why}"
            return
        fold, weights = made
        self.folds[name] = fold
        self.left.pop(name, None)
        self.weights |= weights
        if isinstance(fold.remains, (Remainder, nn.Identity)) and not self.more_than_affine(node, norm):
            self.gone.add(id(norm))

    def affine(self, norm: TorchBatchNorm, node: fx.Node, view: View) -> Affine:
        """Its map.

        Raises:
            Left: It may not go.
        """
        self.reading.check(norm, view, self.root)
        name = self.reading.name(norm)
        if norm.running_mean is None or norm.running_var is None:
            raise Left("it keeps no running statistics (track_running_stats=False)")
        original = cast(TorchBatchNorm, self.originals[name])
        if isinstance(original, BatchNorm) and original.domains and original.active_domain is None:
            raise Left("it keeps statistics of several domains: fold inside `with steadynorm.domain(model, name)`")
        if set(node.kwargs) - {"input", "residual"}:
            raise Left("it is called with a mask or weights of the examples")
        affine = affine_map(original)
        if not bool(affine.scale.isfinite().all() and affine.shift.isfinite().all()):
            raise Left("its map is not finite")
        return affine

    @staticmethod
    def more_than_affine(node: fx.Node, norm: TorchBatchNorm) -> bool:
        """Whether a call adds something to what the batch norm computes, or applies an activation."""
        return "residual" in node.kwargs or (isinstance(norm, BatchNorm) and norm.activation is not None)

    def _backward(self, node: fx.Node, norm: TorchBatchNorm, affine: Affine) -> tuple[Fold, dict[str, Weights]]:
        """Into the layers before it."""
        fed = self.view.fed_by(node, self.gone)
        layers = [layer for layer, _ in fed]
        sizes = [outputs_of(layer) for layer in layers]
        for layer in layers:
            self.reading.check(layer, self.view, self.root)
        if sum(sizes) != norm.num_features:
            raise Left(f"its {norm.num_features} channels are not the {sum(sizes)} outputs of what comes before it")
        places = places_of(input_of(node), self.view.module)
        rank = None if places is None else places + 2
        dims = {d for layer, joined in fed for d in self._dims(norm, layer, joined, rank)}
        weights = {
            self.reading.name(layer): after(layer, self._weights(layer), Affine(scale, shift))
            for layer, scale, shift in zip(layers, affine.scale.split(sizes), affine.shift.split(sizes), strict=True)
        }
        self.check_size(layers, weights)
        into = tuple(weights)
        return Fold(into, f"into {', '.join(into)} before it", self._remains(node, norm, dims)), weights

    def _forward(self, node: fx.Node, norm: TorchBatchNorm, affine: Affine) -> tuple[Fold, dict[str, Weights]]:
        """Into the layers after it."""
        if self.more_than_affine(node, norm):
            raise Left("its activation or residual stands between it and what comes after it")
        fed = self.view.feeds(node, self.gone)
        pad: tuple[Tensor, TorchConv] | None = None
        weights: dict[str, Weights] = {}
        dims: set[int] = set()
        for layer, joined, pooled, measured in fed:
            name = self.reading.name(layer)
            self.reading.check(layer, self.view, self.root)
            own = affine
            if isinstance(layer, TorchConv):
                if joined:
                    raise Left(f"a flattening lies between it and {name}")
                if self._needs_pad(layer, affine, name):
                    pad = (self._zero(affine, layer, name, alone=len(fed) == 1 and not pooled and not measured), layer)
            elif joined and norm.num_features and inputs_of(layer) % norm.num_features == 0 and self.second(norm):
                positions = inputs_of(layer) // norm.num_features
                own = Affine(*(t.repeat_interleave(positions) for t in affine))
            elif pooled or joined:
                raise Left(f"the features of {name} are not its channels")
            if own.scale.numel() != inputs_of(layer):
                raise Left(f"its {norm.num_features} channels are not the {inputs_of(layer)} inputs of {name}")
            rank = None
            if isinstance(layer, TorchConv):
                places = places_of(input_of(self.view.nodes[id(layer)]), self.view.module)
                if places is not None and places != len(layer.kernel_size):
                    raise Left(f"{name} takes inputs without a batch")
                rank = None if pooled else len(layer.kernel_size) + 2
            dims |= self._dims(norm, layer, joined, rank)
            weights[name] = before(layer, self._weights(layer), own)
        self.check_size([layer for layer, *_ in fed], weights)
        into = tuple(weights)
        how = f"into {', '.join(into)} after it"
        if pad is not None:
            value, conv = pad
            how += ", which pads with the value that it maps to zero"
            return Fold(into, how, ChannelPad(value, padding_of(conv)), into[0]), weights
        readers = [self.view.nodes[id(one.layer)] for one in fed]
        if written_before(node, readers, self.view.module, self.gone):
            raise Left(f"its input may be written into before {into[-1]} reads it")
        return Fold(into, how, self._remains(node, norm, dims)), weights

    @staticmethod
    def second(norm: TorchBatchNorm) -> bool:
        """Whether its channels lie on the second axis."""
        return not isinstance(norm, BatchNorm) or norm.channel_dim == 1

    def _dims(self, norm: TorchBatchNorm, layer: nn.Module, joined: bool, rank: int | None) -> set[int]:
        """The numbers of axes of the batch norm's input for which its channels are the layer's; empty if any do."""
        ranks = self.ranks.get(self.reading.name(norm), set())
        if isinstance(layer, TorchConv):
            if not self.second(norm):
                raise Left("its channels are not those of a convolution: channel_dim is not 1")
            name = self.reading.name(layer)
            if self.ranks.get(name, set()) - {len(layer.kernel_size) + 2}:
                raise Left(f"{name} takes inputs without a batch")
            return self._dims_by_convolution(norm, name, joined, rank)
        if joined or (isinstance(norm, BatchNorm) and norm.channel_dim == -1):
            return set()
        if not self.second(norm):
            raise Left("channel_dim is neither 1 nor -1")
        if ranks - {2}:
            said = " and ".join(f"{rank}-D" for rank in sorted(ranks))
            raise Left(f"its input is {said}: its channels are not the features of {self.reading.name(layer)}")
        return {2}

    @staticmethod
    def _dims_by_convolution(norm: TorchBatchNorm, name: str, joined: bool, rank: int | None) -> set[int]:
        """Those of a batch norm beside a convolution of batches, whose input has this many axes where that is known."""
        taken = (4,) if isinstance(norm, nn.BatchNorm2d) else (5,) if isinstance(norm, nn.BatchNorm3d) else ()
        taken = (2, 3) if isinstance(norm, nn.BatchNorm1d) else taken
        if rank is None or joined:
            return set()
        if taken and rank not in taken:
            raise Left(f"its input is not what {name} has with a batch")
        return set() if len(taken) == 1 else {rank}

    @staticmethod
    def _needs_pad(conv: TorchConv, affine: Affine, name: str) -> bool:
        """Whether the shift is missing where a convolution pads with zeros."""
        if not bool(affine.shift.any()):
            return False
        if isinstance(conv, TorchConvTranspose):
            if any(size != 1 for size in (*conv.kernel_size, *conv.stride)) or any(conv.output_padding):
                raise Left(f"{name} after it is transposed: its borders would get another share of the shift")
            return False
        return conv.padding_mode == "zeros" and any(padding_of(conv))

    @staticmethod
    def _zero(affine: Affine, conv: TorchConv, name: str, alone: bool) -> Tensor:
        """What the batch norm maps to zero, (C,)."""
        if not alone:
            raise Left(f"{name} pads with zeros, and something else behind the batch norm would see another padding")
        flat = affine.scale == 0
        if bool((flat & (affine.shift != 0)).any()):
            raise Left(f"{name} pads with zeros, which no input of a channel with scale 0 is mapped to")
        value = torch.where(affine.shift == 0, 0.0, -affine.shift / affine.scale.masked_fill(flat, 1.0))
        value = value.to(device=conv.weight.device, dtype=conv.weight.dtype)
        if not bool(value.isfinite().all()):
            raise Left(f"{name} pads with zeros, and what is mapped to zero does not fit {conv.weight.dtype}")
        return value

    def _weights(self, layer: nn.Module) -> Weights:
        name = self.reading.name(layer)
        return self.weights[name] if name in self.weights else weights_of(self.originals[name])

    @staticmethod
    def check_size(layers: list[nn.Module], weights: Mapping[str, Weights]) -> None:
        """That weights are finite in the layers' dtypes.

        Raises:
            Left: They are not.
        """
        for layer, (name, made) in zip(layers, weights.items(), strict=True):
            dtype = cast(Tensor, layer.weight).dtype
            if not all(bool(t.to(dtype).isfinite().all()) for t in made):
                raise Left(f"the folded weights of {name} are not finite in {dtype}")

    def _remains(self, node: fx.Node, norm: TorchBatchNorm, dims: set[int]) -> nn.Module:
        activation = norm.activation if isinstance(norm, BatchNorm) else None
        if activation is None and not dims and "residual" not in node.kwargs:
            return nn.Identity()
        return Remainder(activation, sorted(dims))
