"""`check`: torch's batch norms and ours on one's own model, side by side, and whether to switch."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from steadynorm.errors import ArgumentError, ModelError, SteadynormError
from steadynorm.nn.base import BatchNorm
from steadynorm.report.wording import plural
from steadynorm.surgery.check_report import CheckReport, Side
from steadynorm.surgery.conversion_report import ConversionReport
from steadynorm.surgery.converting import convert_
from steadynorm.surgery.fold_report import FoldReport
from steadynorm.surgery.folding import fold
from steadynorm.surgery.fuse_report import FuseReport
from steadynorm.surgery.fusing import fuse
from steadynorm.surgery.matching import is_batch_norm
from steadynorm.surgery.outputs import called
from steadynorm.surgery.reverting import revert_
from steadynorm.surgery.side_by_side import side_by_side
from steadynorm.surgery.sites import copied, required_model, sites_of
from steadynorm.surgery.stepping import deterministic, differentiable, in_short, measured

__all__ = ["check"]


def check(model: nn.Module, example: Any = None, *, seconds: float = 5.0) -> CheckReport:
    """Puts torch's batch norms and ours side by side on a model: errors, time, memory, and whether to switch.

    Copies of the model make one training step each on the example, with the same random gradient of the outputs and
    the same seed: as torch has it, after `convert_`, after `fuse`, and in float64. Against the last one:

        error = ‖x - x₆₄‖ / ‖x₆₄‖           of the outputs, in training and in evaluation after the step, of the
                                            gradients of the inputs, and of those of the parameters
        max |μ - μ₆₄| / σ₆₄, |σ² - σ²₆₄| / σ²₆₄        of the running mean and (unbiased) variance

    In the way stand: batch norms that `convert_` leaves; an error more than twice torch's and more than 4 machine
    epsilons, in the median of several draws; a step slower by more than 10 %; a forward that gives something else each
    time; SyncBatchNorm without its ranks; a model that is lazy, compiled by TorchScript or cannot be copied. The model
    itself, its buffers, modes and gradients, and the random state of torch, NumPy and Python stay as they are.

    Args:
        model: In any mode. Batch norms of ours are turned back for torch's side.
        example: An input of several examples: a tensor, a tuple of arguments, or a mapping of named ones. Without it
            nothing is run, and only what `convert_`, `fuse` and `fold` would do is said.
        seconds: What the timing of steps may take, in seconds. Kernels that have never run are compiled before.

    Returns:
        A `CheckReport`; print it. `report.safe` and `report.verdict` say what follows.

    Raises:
        ArgumentError: `model` is no module, or `seconds` is not positive.
        ModelError: The model fails on the example.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = check(model, torch.randn(4, 3, 16, 16), seconds=0.1)
        >>> [side.name for side in report.sides]
        ['torch', 'steadynorm', 'fused']
        >>> report.sides[1].error < 1e-5
        True
    """
    if not seconds > 0:
        raise ArgumentError(f"seconds must be positive, got {seconds!r}.")
    notes: list[str] = []
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        notes.append(f"the model inside of {type(model).__name__} was checked")
        model = cast(nn.Module, model.module)
    try:
        required_model(model, "check")
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            raise ModelError("its lazy layers have no tensors yet: run one forward, then check it")
        base = copied(model, "check")
    except ModelError as error:
        return CheckReport(type(model).__name__, 0, None, None, None, (), (str(error),), tuple(notes), "")
    with measured(model):
        return _checked(base, example, seconds, notes)


def _checked(base: nn.Module, example: Any, seconds: float, notes: list[str]) -> CheckReport:
    """The report on a copy that nobody else has."""
    for parameter in base.parameters():
        parameter.grad = None
    if example is not None:
        called(copied(base, "check").eval(), example)
    count = len(sites_of(base, is_batch_norm))
    versions = {"torch": copied(base, "check"), "steadynorm": copied(base, "check")}
    already = sum(isinstance(module, BatchNorm) for module in base.modules())
    if already:
        back = revert_(versions["torch"])
        notes.append(f"{plural(already, 'batch norm')} of steadynorm's already: turned back for torch's side")
        notes += [f"{row.name or 'the model'} could not be turned back: {row.note}" for row in back.left]
    conversion = convert_(versions["steadynorm"])
    reasons = list(_in_the_way(base, conversion))
    notes += _worth_knowing(base)
    fused = _tried(lambda: fuse(base), notes, "fuse")
    folded = _tried(lambda: fold(copied(base, "check").eval(), verify=example), notes, "fold")
    if fused is not None and cast(Any, fused).fuse_report.fused:
        versions["fused"] = fused
    sides: tuple[Side, ...] = ()
    if example is None:
        reasons += ["nothing was run: give an example of the model's input"] if count else []
    elif count:
        example = differentiable(copied(base, "check"), example)
        if not deterministic(copied(base, "check"), copied(base, "check"), example):
            reasons.append("its forward gives something else each time, under the same seed too, so errors say little")
        compared = side_by_side(versions, example, seconds)
        sides, notes = compared.sides, [*notes, *compared.notes]
        reasons += compared.reasons
    return CheckReport(
        type(base).__name__,
        count,
        conversion,
        None if fused is None else cast(FuseReport, cast(Any, fused).fuse_report),
        None if folded is None else cast(FoldReport, cast(Any, folded).fold_report),
        sides,
        tuple(reasons),
        tuple(notes),
        _place(base),
    )


def _place(model: nn.Module) -> str:
    first = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(()))
    kind = str(first.dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{first.device.type}, {kind}" + (f", {plural(threads, 'thread')}" if first.device.type == "cpu" else "")


def _tried(make: Callable[[], nn.Module], notes: list[str], name: str) -> nn.Module | None:
    try:
        return make()
    except SteadynormError as error:
        notes.append(f"{name}: {error}")
    except Exception as error:  # a forward of the user's that is read in a way that it was not written for
        notes.append(f"{name} failed: {in_short(error)}")
    return None


def _in_the_way(base: nn.Module, conversion: ConversionReport) -> Iterator[str]:
    left = [row for row in conversion.left if not isinstance(base.get_submodule(row.name), BatchNorm)]
    if left:
        first = left[0]
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        yield (
            f"{len(left)} of {len(conversion.layers)} batch norms are left as they are "
            f"({first.name or 'the model itself'}, {first.before}: {first.note}{more})"
        )
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in base.modules())
    if synced and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield "it has SyncBatchNorm and there is no process group: check it under torchrun, as it is trained"


def _worth_knowing(base: nn.Module) -> list[str]:
    """What stays as it is, and still should be known before one switches."""
    norms = [(name or "the model", m) for name, m in base.named_modules() if is_batch_norm(m)]
    hooked = [name for name, m in norms if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]  # pyright: ignore[reportPrivateUsage]
    half = [name for name, m in norms if any(b.is_floating_point() and b.itemsize < 4 for b in m.buffers())]
    notes: list[str] = []
    if hooked:
        notes.append(f"hooks on {', '.join(hooked[:3])} stay where they are, and ran in this check; fuse leaves those")
    if half:
        notes.append("running statistics in half precision are kept in float32 by steadynorm's layers")
    return notes
