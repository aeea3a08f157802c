"""Training steps of a model on an example: what comes out, what is kept for backward, how long they take."""

import random
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # pyright: ignore[reportPrivateUsage]

from steadynorm.errors import ModelError, SteadynormError, SteadynormWarning
from steadynorm.nn.examining import examining
from steadynorm.nn.keeping import uncompiled
from steadynorm.surgery.apart import Step, apart, coarsest
from steadynorm.surgery.outputs import called, floating

__all__ = [
    "deterministic",
    "differentiable",
    "in_short",
    "kept_for_backward",
    "measured",
    "seconds_of",
    "step",
]

_ROUNDS: Final = 60


@contextmanager
def measured(model: nn.Module) -> Generator[None]:
    """Within it, copies of a model may be run as in training: no generator of random numbers is disturbed by it.

    Torch's, NumPy's and Python's come back in the end. No monitor counts the forwards, gradients are on, and compiled
    parts run eagerly.
    """
    devices = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices)), examining(), uncompiled(model), torch.enable_grad():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SteadynormWarning)  # of batches that are refused: the table shows it
                yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _seed(seed: int = 0) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class _Run:
    """Forward and backward of a model in training, with a random gradient of its outputs."""

    def __init__(self, model: nn.Module, example: Any, seed: int = 0) -> None:
        self.model, self.seed, self.leaves = model, seed, list[Tensor]()
        held = (*model.parameters(), *model.buffers())
        kind = next((t.dtype for t in held if t.is_floating_point()), None)
        self.example = pytree.tree_map_only(Tensor, lambda t: self._leaf(t, kind), _plain(example))
        self.upstream: list[Tensor] = []

    def _leaf(self, tensor: Tensor, kind: torch.dtype | None) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # In float64 everything is; otherwise the example is what its owner gave.
        leaf = tensor.detach().to(torch.float64 if kind == torch.float64 else tensor.dtype, copy=True)
        if tensor.requires_grad:
            self.leaves.append(leaf.requires_grad_())
        return leaf

    def forward(self) -> list[Tensor]:
        """The outputs that a gradient can come from."""
        # Not the leaves themselves: a first layer that works in place would be refused, and would spoil the others.
        given = pytree.tree_map_only(Tensor, lambda t: t.clone(), self.example)
        try:
            with torch.enable_grad():
                output = _call(self.model, given)
        except SteadynormError:
            raise
        except Exception as error:
            raise ModelError(
                f"in training this {type(self.model).__name__} failed on the example: {in_short(error)}. Give an input "
                "that it takes (a tensor, a tuple of arguments, a mapping of named ones), of several examples."
            ) from error
        return floating(output)

    def backward(self, outputs: Sequence[Tensor]) -> None:
        ends = [one for one in outputs if one.requires_grad]
        if not self.upstream:
            chance = torch.Generator().manual_seed(self.seed)
            drawn = [torch.randn(one.shape, generator=chance, dtype=torch.float64) for one in ends]
            self.upstream = [g.to(one.device, one.dtype) for g, one in zip(drawn, ends, strict=True)]
        try:
            torch.autograd.backward(ends, self.upstream)
        except SteadynormError:
            raise
        except Exception as error:
            raise ModelError(
                f"the backward pass of this {type(self.model).__name__} failed on the example: {in_short(error)}."
            ) from error

    def clear(self) -> None:
        for tensor in (*self.leaves, *self.model.parameters()):
            tensor.grad = None


def _plain(example: Any) -> Any:
    return dict(cast("Mapping[str, Any]", example)) if isinstance(example, Mapping) else example


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**cast("dict[str, Any]", example))
    return model(*example) if isinstance(example, tuple) else model(example)


def in_short(error: BaseException) -> str:
    """An error in one line."""
    said = " ".join(str(error).split())[:300].rstrip(" .")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def step(model: nn.Module, example: Any, seed: int = 0) -> Step:
    """One of a model, which learns from it.

    Args:
        model: In any mode; in training afterwards.
        example: Its input. For a model in float64 the floating-point tensors are cast to that; gradients are taken of
            those that ask for them.
        seed: Of the random numbers that the model draws, and of the gradient of its outputs.

    Raises:
        ModelError: The model fails on it.
    """
    _seed(seed)
    model.train()
    run = _Run(model, example, seed)
    outputs = run.forward()
    run.backward(outputs)
    gradients = {n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None}
    inputs = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in run.leaves]
    run.clear()
    ends = ("running_mean", "running_var", "num_batches_tracked")
    statistics = {n: b.detach().clone() for n, b in model.named_buffers() if n.rpartition(".")[2] in ends}
    model.eval()
    evaluated = floating(called(model, pytree.tree_map_only(Tensor, Tensor.detach, run.example)))
    model.train()
    return Step([o.detach() for o in outputs], inputs, gradients, statistics, evaluated)


def differentiable(model: nn.Module, example: Any) -> Any:
    """The example with its floating-point tensors asking for gradients, where the model takes such; else asking none.

    Args:
        model: A copy that nobody needs any more.
        example: Its input.

    Raises:
        ModelError: It fails on both.
    """

    asking = pytree.tree_map_only(
        Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, _plain(example)
    )
    without = pytree.tree_map_only(Tensor, Tensor.detach, _plain(example))
    model.train()
    try:
        _Run(model, asking).forward()
    except ModelError:
        _Run(model, without).forward()
        return without
    return asking


def deterministic(model: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether two copies of a model, given the same seed, give the same outputs but for rounding."""
    outputs: list[list[Tensor]] = []
    for one in (model, other):
        _seed()
        one.train()
        outputs.append(_Run(one, example).forward())
    error = apart(*outputs)
    return error is None or error <= 100 * coarsest(outputs[0])


def kept_for_backward(model: nn.Module, example: Any) -> int:
    """Bytes that a forward in training keeps for its backward: on CUDA all memory that a step takes beside the model.

    On the CPU those of the storages that autograd holds on to, each counted once, parameters and buffers left out.
    """
    _seed()
    model.train()
    run = _Run(model, example)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run.backward(run.forward())
        run.clear()
        return torch.cuda.max_memory_allocated(device) - before
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run.forward()
    size = sum(held.values())
    run.backward(outputs)
    run.clear()
    return size


def seconds_of(models: Mapping[str, nn.Module], example: Any, budget: float) -> dict[str, list[float]]:
    """The time of training steps, the models taking turns.

    Args:
        models: By name; each is warmed up by a step.
        example: Their input.
        budget: Seconds after which no further round begins. One is always made.

    Returns:
        By name, the seconds of each round's step, forward and backward.
    """
    runs = {name: _Run(model.train(), example) for name, model in models.items()}
    for run in runs.values():
        run.backward(run.forward())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started, order = time.perf_counter(), list(runs)
    for number in range(_ROUNDS):
        if number and time.perf_counter() - started > budget:
            break
        for name in order:
            runs[name].clear()
            _settled()
            before = time.perf_counter()
            runs[name].backward(runs[name].forward())
            _settled()
            taken[name].append(time.perf_counter() - before)
        order = [*order[1:], order[0]]
    for run in runs.values():
        run.clear()
    return taken


def _settled() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
