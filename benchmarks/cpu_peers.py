"""The contenders of one row: ours, the framework's in several ways, and a copy of the bytes that must move."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import steadynorm as sn
from cpu_oracle import EPS, Outcome, Problem
from cpu_rows import Row, floor_transfers

__all__ = ["LABELS", "Peer", "contenders", "floor", "kept_for_backward", "problem_of"]

LABELS = {
    "ours": "steadynorm",
    "eager": "torch.nn",
    "in_place": "torch.nn, add and ReLU in place",
    "compiled": "torch.compile",
    "onednn": "oneDNN",
    "floor": "a copy",
}
Layer = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class Peer:
    """An implementation bound to the tensors of a row.

    Attributes:
        layer: Called with x and the residual.
        x: Its input, which requires a gradient; likewise `residual`, where there is one.
        gradient: Of the output.
        norm: The module that holds gamma and beta.
        leaves: Whatever has a gradient after a backward.
    """

    layer: Layer
    x: Tensor
    residual: Tensor | None
    gradient: Tensor
    norm: nn.Module
    leaves: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [self.x, *self.norm.parameters(), *([] if self.residual is None else [self.residual])]

    def forward(self) -> Tensor:
        """A training forward, ready for a backward."""
        return self.layer(self.x, self.residual)

    def both(self) -> None:
        """Forward and backward; new memory for y and for every gradient, as in a training step."""
        self.layer(self.x, self.residual).backward(self.gradient)
        for leaf in self.leaves:
            leaf.grad = None

    def outcome(self) -> Outcome:
        """What it computes, for the oracle."""
        y = self.forward()
        y.backward(self.gradient)
        norm, residual = self.norm, self.residual
        tensors = [
            y.detach(),
            self.x.grad,
            norm.weight.grad,
            norm.bias.grad,
            None if residual is None else residual.grad,
        ]
        for leaf in self.leaves:
            leaf.grad = None
        return Outcome(*(t.to_dense() if t is not None and t.is_mkldnn else t for t in tensors))


def problem_of(row: Row, seed: int = 0) -> Problem:
    """Random values such as a convolution puts out: means within ±1 and deviations from 1/2 to 2 by channel."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, row.dtype)
    layout = torch.channels_last if row.layout == "channels_last" else torch.contiguous_format
    channels = row.shape[1]
    per_channel = (1, channels, *(1,) * (len(row.shape) - 2))

    def normal() -> Tensor:
        return torch.randn(row.shape, generator=generator).to(memory_format=layout)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(channels).uniform_(low, high, generator=generator)

    x = normal().mul_(uniform(0.5, 2.0).view(per_channel)).add_(uniform(-1.0, 1.0).view(per_channel)).to(dtype)
    residual = normal().to(dtype) if row.variant == "add_relu" else None
    rectify = row.variant != "plain"
    return Problem(x, residual, normal().to(dtype), uniform(0.5, 1.5), uniform(-0.5, 0.5), rectify)


def contenders(row: Row, problem: Problem, compiled: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers of a row by name, and why the others are missing."""
    channels, images = row.shape[1], len(row.shape) == 4
    x, residual = _leaf(problem.x), None if problem.residual is None else _leaf(problem.residual)
    theirs = nn.BatchNorm2d if images else nn.BatchNorm1d
    ours = sn.BatchNorm2d if images else sn.BatchNorm1d
    activation = "relu" if problem.rectify else None

    def peer(norm: nn.Module, layer: Layer) -> Peer:
        return Peer(layer, x, residual, problem.gradient, _set(norm, problem))

    norm = ours(channels, eps=EPS, activation=activation)
    peers = {"ours": peer(norm, lambda x, r, norm=norm: norm(x) if r is None else norm(x, residual=r))}
    skipped: dict[str, str] = {}
    norm = theirs(channels, eps=EPS)
    eager = _eager(norm, problem.rectify)
    peers["eager"] = peer(norm, eager)
    if problem.rectify:
        norm = theirs(channels, eps=EPS)
        peers["in_place"] = peer(norm, _in_place(norm))
    if compiled:
        torch._dynamo.reset()
        norm = theirs(channels, eps=EPS)
        peers["compiled"] = peer(norm, torch.compile(_eager(norm, problem.rectify), dynamic=False, fullgraph=True))
    reason = onednn_reason(row)
    if reason is None:
        norm = _set(theirs(channels, eps=EPS), problem)
        blocked = [None if t is None else t.detach().to_mkldnn() for t in (x, residual, problem.gradient)]
        leaves = [None if t is None else t.requires_grad_() for t in blocked[:2]]
        peers["onednn"] = Peer(_eager(norm, problem.rectify), *leaves, blocked[2], norm)
    else:
        skipped["onednn"] = reason
    return peers, skipped


def onednn_reason(row: Row) -> str | None:
    """Why oneDNN's batch norm, which torch reaches through `to_mkldnn()`, cannot be asked for this row."""
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if len(row.shape) != 4:
        return "torch lets oneDNN train on (N, C, H, W) only"
    if row.layout == "channels_last":
        return "to_mkldnn() stores every tensor in (N, C, H, W) order"
    if row.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this CPU"
    return None


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def _set(norm: nn.Module, problem: Problem) -> nn.Module:
    with torch.no_grad():
        norm.weight.copy_(problem.weight)
        norm.bias.copy_(problem.bias)
    return norm


def _eager(norm: nn.Module, rectify: bool) -> Layer:
    def layer(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if residual is not None:
            y = y + residual
        return nn.functional.relu(y) if rectify else y

    return layer


def _in_place(norm: nn.Module) -> Layer:
    def layer(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x)
        if residual is not None:
            y += residual
        return nn.functional.relu(y, inplace=True)

    return layer


def floor(row: Row) -> dict[str, Callable[[], None]]:
    """Copies into memory that is there already, of exactly the bytes that a pass must read and write.

    On integers, which move at the same speed whatever the bits say.
    """
    sources = [torch.ones(-(-row.x_bytes // 4), dtype=torch.int32) for _ in range(3)]
    targets = [torch.empty_like(source) for source in sources[:2]]

    def move(transfers: tuple[int, int]) -> None:
        reads, writes = transfers
        if writes == 2:  # three read, two written: one read and written by the copy, the others by the sum
            targets[1].copy_(sources[2])
        if reads - (writes - 1) == 2:
            torch.add(sources[0], sources[1], out=targets[0])
        else:
            targets[0].copy_(sources[0])

    forward, backward = (floor_transfers(row.variant, direction) for direction in ("forward", "backward"))

    def both() -> None:
        move(forward)
        move(backward)

    return {"forward": lambda: move(forward), "both": both}


def kept_for_backward(forward: Callable[[], object], apart: list[Tensor]) -> int:
    """Bytes that a forward keeps until its backward: of every storage saved, once, less those of `apart`."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        held = forward()  # held, so that no storage's address is given out again while it is counted
    for t in apart:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del held
    return sum(storages.values())
