"""recalibrate_: running statistics that are those of a whole data set, under the weights as they are now."""

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from steadynorm.errors import ArgumentError, DataError, RejectedBatchWarning, SteadynormWarning
from steadynorm.moments import Moments
from steadynorm.nn.base import BatchNorm
from steadynorm.nn.keeping import Buffers, evaluating
from steadynorm.nn.selection import unwrapped
from steadynorm.population.batches import Caller, batches_of
from steadynorm.population.changes import RecalibrateReport, change_of
from steadynorm.population.measuring import unsuspicious
from steadynorm.population.passes import Measurement, Passes
from steadynorm.population.pools import Key, running
from steadynorm.population.ranks import Ranks
from steadynorm.population.selecting import Selection, select

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Order", "recalibrate_"]

Order = Literal["joint", "sequential"]


def recalibrate_(
    model: nn.Module,
    loader: Any,
    *,
    forward: Callable[[Any], object] | None = None,
    batches: int | None = None,
    order: Order = "joint",
    progress: bool = True,
    process_group: "ProcessGroup | None" = None,
) -> RecalibrateReport:
    """Measures the inputs of a model's batch norms over a whole data set and commits them once, as running statistics.

        n = Σ n_b      μ = Σ n_b μ_b / n      σ² = Σ [m2_b + n_b (μ_b - μ)²] / (n - 1)          over the batches b

    The running mean becomes μ and the running variance σ² (unbiased): the law of total variance, in which a short last
    batch weighs what it is worth, with sums in float64. The moving average of training plays no part, nor does
    `momentum`. Needed wherever weights changed and statistics did not (averaged weights, pruning, new data), or were
    taken from batches too small to be typical.

    What a layer is measured on depends on how those before it normalise:

    - `"joint"`, one pass: every layer normalises by the batch it is given, as in training, while it is measured. So μ
      and σ² are those of the layer's inputs in training mode with this loader's batches; for the first layer they are
      the data's own, for deeper ones they depend on how the data is cut into batches, less so the larger these are.
    - `"sequential"`, one pass for each layer: each is measured on what the layers before it put out in evaluation, with
      their new statistics. So μ and σ² are exactly those of its inputs when the model serves, however the data is
      batched. Layers run in the order in which a forward calls them; a pass ends at its layer, where that is called
      equally often in each forward, so that L passes cost about L / 2 full ones. The loader must give the same
      examples again in each pass.

    Only batch norms are run so; every other module is in evaluation mode (no dropout). Masks and weights that a
    steadynorm layer is given count. A layer with `ghost_batch_size` normalises chunk by chunk in "joint", as in
    training; batch renorm is left out, and synchronised layers (SyncBatchNorm too) normalise by their own rank's batch.
    A batch of a single value per channel counts and is normalised to β. Layers called several times in a forward are
    measured on all calls together. Frozen layers (`freeze_`) and layers without running statistics are left alone; of
    a layer with domains, the one in use (`with domain(model, name):` around this) is measured.

    Afterwards `num_batches_tracked` of a measured layer is the number of batches measured, as after training on them.
    Modes, other buffers, gradients and the state of torch's generators are as before; if anything is raised, Ctrl-C
    included, so are the running statistics, bit for bit. Autograd records nothing; memory does not grow with the data.

    Under `torch.distributed` each rank measures its own shard, and the Moments of all ranks are merged by count: all
    end with the same bits, a rank without any batch as well. All ranks must call this.

    Args:
        model: Batch norms of steadynorm and of `torch.nn` are measured, in place. It may be wrapped in AveragedModel,
            DataParallel, DistributedDataParallel or torch.compile: averaged weights need this one call.
        loader: An iterable of batches, or one tensor as one batch. Tensors are moved to the model's device. A tensor is
            the input; a dict is passed by name, without label entries and what `model.forward` does not know; of a
            tuple as many leading entries are inputs as `model.forward` cannot do without, the others are labels.
        forward: Runs the model on one batch, in place of these rules: `lambda batch: model(batch["image"].cuda())`.
        batches: Use so many batches of the loader (per rank and pass); None for all.
        order: See above.
        progress: A bar on stderr, where that is a terminal.
        process_group: The ranks to merge over; None for all of them.

    Returns:
        What was measured, how far each layer moved, and notes on what was decided or left out.

    Raises:
        ArgumentError: An option that cannot be used; a loader that cannot be iterated over (again, for "sequential");
            a batch of which `model.forward` tells no way to run it.
        ModelError: There is no batch norm with running statistics, or all are frozen.
        DataError: No batch at all, fewer than two values per channel, or no finite batch for a layer.
        DistributedError: Another rank has failed.

    Warns:
        SteadynormWarning: The loader had fewer batches than `batches`.
        RejectedBatchWarning: A batch that was not finite at some layer was left out of its statistics.

    Source:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), who call it precise batch norm; Izmailov et al.,
        "Averaging Weights Leads to Wider Optima and Better Generalization" (2018).

    Example:
        >>> from steadynorm import BatchNorm1d
        >>> layer, data = BatchNorm1d(1), torch.tensor([[3.0], [5.0], [8.0], [9.0], [11.0], [24.0]])
        >>> report = recalibrate_(layer, data.split(4))
        >>> layer.running_mean, round(layer.running_var.item(), 4), report.examples, report.batches
        (tensor([10.]), 55.2, 6, 2)
    """
    if order not in get_args(Order):
        raise ArgumentError(f"order must be one of {get_args(Order)}, got {order!r}.")
    if batches is not None and (type(batches) is not int or batches < 1):
        raise ArgumentError(f"batches must be a whole number >= 1, or None for all; got {batches!r}.")
    inner = unwrapped(model)
    selection = select(inner)
    given = batches_of(loader)
    if order == "sequential" and isinstance(given, Iterator):
        raise ArgumentError(
            'order="sequential" runs over the data once for each layer, and this loader is an iterator that is used up '
            "by one run. Pass a list of batches or a DataLoader, or order='joint'."
        )
    caller = Caller(inner, forward)
    first = next(iter(selection.measured.values())).running_mean
    ranks = Ranks(process_group, torch.device("cpu") if first is None else first.device)
    kept = Buffers(model)
    try:
        with torch.no_grad(), unsuspicious(selection.measured):
            with evaluating(model):
                passes = Passes(selection.measured, given, caller, ranks, batches, show=progress)
                measurement = passes.joint() if order == "joint" else passes.sequential(_commit)
            kept.restore()
            report = _committed(selection, measurement, order, ranks, caller.note)
            for message, category in _warned(measurement, batches):
                warnings.warn(message, category, stacklevel=2)
    except BaseException:
        kept.restore()
        raise
    return report


def _commit(layer: nn.modules.batchnorm._BatchNorm, key: Key, moments: Moments, batches: int) -> None:  # pyright: ignore
    """Writes one layer's statistics; those of a layer that has seen nothing stay."""
    if not batches:
        return
    buffers = running(layer, key.domain)
    variance = moments.variance(unbiased=True)
    mean, var = moments.mean.to(buffers.mean.dtype), variance.to(buffers.var.dtype)
    if not bool((moments.count >= 2).all()):
        raise DataError(
            f"{key} was given fewer than two finite values per channel in {batches} batches, which have no variance. "
            "Check the data for NaN and the mask, and use more examples."
        )
    if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
        raise DataError(
            f"the statistics of {key} are too large for its {buffers.var.dtype} buffers; use model.float()."
        )
    buffers.mean.copy_(mean)
    buffers.var.copy_(var)
    if buffers.num_batches_tracked is not None:
        buffers.num_batches_tracked.fill_(batches)


def _committed(
    selection: Selection, found: Measurement, order: Order, ranks: Ranks, decided: str | None
) -> RecalibrateReport:
    """Commits all layers, and says how far each moved."""
    changes = [
        change_of(key.name, key.domain, running(layer, key.domain), moments, layer.eps)
        for key, moments in found.moments.items()
        if found.counted[key] and (layer := selection.measured[key.name])
    ]
    for key, moments in found.moments.items():
        _commit(selection.measured[key.name], key, moments, found.counted[key])
    notes = [decided] if decided else []
    used = {key.name for key in found.moments if found.counted[key]}
    unused = [name for name in selection.measured if name not in used]
    synced = [
        name
        for name, layer in selection.measured.items()
        if isinstance(layer, nn.SyncBatchNorm) or (isinstance(layer, BatchNorm) and layer.process_group is not None)
    ]
    singles = [str(key) for key, count in found.singles.items() if count]
    if not used:
        raise DataError(
            "no batch norm of this model was run on any batch. Does forward= run this very model? Batch norms that are "
            "run as functions cannot be measured."
        )
    for what, names in (
        ("not run by any batch, and left as they were", unused),
        ("frozen, and left as they were", selection.frozen),
        ("without running statistics", selection.untracked),
        ("called more than once in a forward, and measured on all calls together", found.repeated),
        ("given single values, which count and were normalised to β", singles),
        (
            "synchronised in training; here they normalised by each rank's own batches",
            synced if order == "joint" else (),
        ),
    ):
        if names:
            notes.append(f"{len(names)} layers {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.")
    notes += [message for message, _ in _warned(found, None)]
    return RecalibrateReport(
        order, found.passes, found.batches, found.examples, ranks.size, tuple(changes), tuple(notes)
    )


def _warned(found: Measurement, batches: int | None) -> list[tuple[str, type[SteadynormWarning]]]:
    """What is worth a warning as well as a note."""
    said: list[tuple[str, type[SteadynormWarning]]] = []
    if found.short:
        asked = "" if batches is None else f" of {batches}"
        said.append(
            (
                f"the loader ran short: {found.batches} batches, {found.short} fewer than asked for{asked}.",
                SteadynormWarning,
            )
        )
    if any(found.rejected.values()):
        most = max(found.rejected, key=lambda key: found.rejected[key])
        message = (
            f"{found.rejected[most]} of {found.counted[most]} batches were not finite at {most} and left out of it."
        )
        said.append((message, RejectedBatchWarning))
    return said
