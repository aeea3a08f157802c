"""Measures the gap between training and evaluation, and which layer's statistics it is due to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from steadynorm.errors import DataError
from steadynorm.nn.watched import BatchNormLayer, channel_axis, example_moments, observing
from steadynorm.population.examples import Batch, Batches, read_batches
from steadynorm.population.streams import Order, Split, order_of, padded_share, split_of
from steadynorm.population.swapping import Floats, Losses, Norms, Statistics, Swapper, left_alone

__all__ = ["Difference", "Gap", "LayerGap", "measure_gap"]

_CERTAIN: Final = 4.0
"""Standard errors of a paired difference: by chance once in 30,000 (a normal difference, one side)."""


@dataclass(frozen=True)
class Difference:
    """How much worse the same examples fare one way than another.

    Attributes:
        loss: Mean loss lost, per example.
        deviations: In standard errors of the paired difference.
        accuracy: Accuracy lost; None where there are no classes.
        material: Certain (4 standard errors) and large enough to matter: a point of accuracy, or a tenth of the loss
            and 0.02.
    """

    loss: float
    deviations: float
    accuracy: float | None
    material: bool

    @classmethod
    def between(cls, worse: Losses, better: Losses) -> "Difference":
        """Example by example: worse - better."""
        told = np.isfinite(worse.loss) | np.isfinite(better.loss)  # what is infinite either way tells nothing
        if not np.isfinite(better.loss[told]).all():
            return cls(float("-inf"), 0.0, _lost(worse, better), False)
        if not np.isfinite(worse.loss[told]).all():
            return cls(float("inf"), float("inf"), _lost(worse, better), True)
        gap = np.where(told, worse.loss, 0.0) - np.where(told, better.loss, 0.0)
        mean, deviations = _paired(gap, worse.weight)
        accuracy = _lost(worse, better)
        matters = deviations > _CERTAIN and mean > max(0.1 * abs(better.mean), 0.02)
        if worse.correct is not None and better.correct is not None:
            points, z = _paired(better.correct - worse.correct, np.ones(len(worse.correct)))
            matters = matters or (points >= 0.01 and z > _CERTAIN)
        return cls(mean, deviations, accuracy, bool(matters))


def _lost(worse: Losses, better: Losses) -> float | None:
    first, second = better.accuracy, worse.accuracy
    return None if first is None or second is None else first - second


def _paired(gap: Floats, weight: Floats) -> tuple[float, float]:
    mean = float(np.average(gap, weights=weight))
    if len(gap) < 2:
        return mean, 0.0
    error = float(np.sqrt(np.average((gap - mean) ** 2, weights=weight) / (len(gap) - 1)))
    return mean, mean / error if error > 0 else (float("inf") if mean > 0 else 0.0)


@dataclass(frozen=True)
class LayerGap:
    """One layer's running statistics against those of the data.

    Attributes:
        name: The layer.
        mean_shift: Root mean square over channels of (running mean - mean) / deviation.
        variance_ratio: The geometric mean of running variance / variance (both unbiased) over the channels.
        by_chance: What `mean_shift` comes to by sampling these examples alone, 1/√N.
        costs: Loss lost with its running statistics, all others on the data's; None without targets.
        wins: Loss won with the data's statistics in it, all others on their running ones.
    """

    name: str
    mean_shift: float
    variance_ratio: float
    by_chance: float
    costs: float | None = None
    wins: float | None = None


@dataclass(frozen=True)
class Gap:
    """All that was measured on the data.

    Attributes:
        batches: The data.
        running: Losses with the running statistics; None without targets, as the next three.
        population: With the statistics of all the data.
        own_batch: With each batch's own statistics.
        shuffled: With those of as large batches in random order; None also where examples cannot be put together.
        reference: With the statistics of the reference data; None also without any.
        dropping: With the statistics that the data has while dropout is active; None also without dropout.
        layers: In the order of the forward.
        order: Of the batches at the first layer or the last, whichever is further from random.
        split: Of the examples at the first layer.
        by_domain: Losses with statistics of either group's own, where the split is clear.
        padded: The share of padded positions at the first layer.
        single: Batches that have one value per channel at some layer.
        apart: The layer where the reference data's statistics are furthest from these; None without any.
        augmented: Whether the reference data differs from one reading to the next; None where that is unknown.
    """

    batches: Batches
    layers: tuple[LayerGap, ...] = ()
    running: Losses | None = None
    population: Losses | None = None
    own_batch: Losses | None = None
    shuffled: Losses | None = None
    reference: Losses | None = None
    dropping: Losses | None = None
    order: Order | None = None
    split: Split | None = None
    by_domain: Losses | None = None
    padded: float = 0.0
    single: int = 0
    apart: LayerGap | None = None
    augmented: bool | None = None


def measure_gap(
    model: nn.Module,
    layers: Norms,
    loader: Iterable[Any],
    *,
    reference: Iterable[Any] | None,
    forward: Callable[[Any], Any] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    examples: int,
    progress: bool,
) -> Gap:
    """Runs the model over the data under one set of statistics after another; it is left as it was.

    Takes about three passes for each layer. See `steadynorm.diagnose` for the arguments.
    """
    batches = read_batches(loader, model, examples)
    if not batches.kept:
        return Gap(batches)
    others = None if reference is None else read_batches(reference, model, examples, "reference")
    if others is not None and not others.kept:
        raise DataError("every batch of the reference data holds NaN or infinite inputs. Remove those examples first.")
    with left_alone(model):
        swap = Swapper(model, layers, forward, loss)
        kept = batches.kept
        population = swap.population(kept)
        first, last, padded, single = _looked_at(swap, kept, population, [*population])
        others_found = None if others is None else swap.population(others.kept)
        apart = None
        if others is not None and others_found is not None:
            fewer = min(batches.examples, others.examples)
            rows = [_layer(n, others_found[n], population[n], fewer) for n in population if n in others_found]
            apart = max(rows, key=lambda row: row.mean_shift, default=None)
        augmented = None if others is None or reference is None else _augmented(others, reference, model, examples)
        large = tuple(batch for batch in kept if batch.size > 1) if single else kept
        running = swap.losses(kept)
        found = swap.losses(kept, population)
        order, split = _order(first, last, [b.size for b in kept]), None if first is None else split_of(first)
        gaps = [_layer(name, swap.own[name], population[name], batches.examples) for name in population]
        if running is None or found is None:
            return Gap(
                *(batches, tuple(gaps)),
                order=order,
                split=split,
                padded=padded,
                single=single,
                apart=apart,
                augmented=augmented,
            )
        gaps = _attributed(swap, kept, population, gaps, progress, running, found)
        mixed = batches.shuffled()
        dropping = None
        if _drops(model) and Difference.between(running, found).material:
            dropping = swap.losses(kept, swap.population(kept, dropping=True))
        return Gap(
            batches,
            tuple(gaps),
            running,
            found,
            swap.losses(large, population, by_batch=True) if large == kept else None,
            None if mixed is None or single else swap.losses(mixed, population, by_batch=True),
            None if others_found is None else swap.losses(kept, others_found),
            dropping,
            order,
            split,
            _by_domain(swap, kept, split),
            padded,
            single,
            apart,
            augmented,
        )


def _layer(name: str, own: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], examples: int) -> LayerGap:
    (mean, var), (new_mean, new_var) = ([t.double().cpu() for t in pair] for pair in (own, found))
    tiny = 1e-12 * max(float(new_var.max()), 1e-300)
    live = (new_var > tiny) & (var > 0)
    if not live.any():
        return LayerGap(name, 0.0, 1.0, examples**-0.5)
    shift = ((mean - new_mean) / new_var.sqrt())[live].square().mean().sqrt()
    ratio = (var[live] / new_var[live]).log().mean().exp()
    return LayerGap(name, float(shift), float(ratio), examples**-0.5)


def _attributed(
    swap: Swapper,
    kept: Sequence[Batch],
    population: Statistics,
    gaps: list[LayerGap],
    progress: bool,
    running: Losses,
    found: Losses,
) -> list[LayerGap]:
    """Each layer's share in the gap, by swapping its statistics alone; both ways."""
    if not Difference.between(running, found).material:
        return gaps
    if progress:
        from rich.console import Console
        from rich.progress import track

        rows: Iterable[LayerGap] = track(gaps, "layers", console=Console(stderr=True), transient=True)
    else:
        rows = gaps
    result: list[LayerGap] = []
    for gap in rows:
        back = swap.losses(kept, {name: swap.own[name] if name == gap.name else s for name, s in population.items()})
        alone = swap.losses(kept, {gap.name: population[gap.name]})
        costs = None if back is None else Difference.between(back, found).loss
        wins = None if alone is None else Difference.between(running, alone).loss
        result.append(LayerGap(gap.name, gap.mean_shift, gap.variance_ratio, gap.by_chance, costs, wins))
    return result


def _looked_at(
    swap: Swapper, kept: Sequence[Batch], population: Statistics, names: Sequence[str]
) -> tuple[Floats | None, Floats | None, float, int]:
    """Each example's means at the first and the last layer, the share of padding, and batches too small for any."""
    means: dict[str, list[Tensor]] = {names[0]: [], names[-1]: []}
    padded: list[tuple[float, int]] = []
    lone: set[int] = set()
    place = 0

    def see(name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None) -> None:
        if x.numel() == x.shape[channel_axis(layer)]:
            lone.add(place)
        if name in means:
            means[name].append(example_moments(x, channel_axis(layer), mask).mean.to("cpu", torch.float64))
        if name == names[0] and mask is None:  # what a mask leaves out does no harm
            padded.append((padded_share(x, channel_axis(layer)), len(x)))

    swap.model.eval()
    swap.write(population)
    with observing(swap.layers, see):
        for place, batch in enumerate(kept):  # noqa: B007 (read by `see`)
            swap.run(batch)
    rows = [torch.cat(means[name]).numpy() for name in (names[0], names[-1])]
    examples = sum(batch.size for batch in kept)
    fits = [found if len(found) == examples and np.isfinite(found).all() else None for found in rows]
    share = sum(part * size for part, size in padded) / max(sum(size for _, size in padded), 1)
    return fits[0], fits[1], share, len(lone)


def _order(first: Floats | None, last: Floats | None, sizes: list[int]) -> Order | None:
    found = [order_of(rows, sizes) for rows in (first, last) if rows is not None]
    return max((order for order in found if order is not None), key=lambda order: order.ratio, default=None)


def _by_domain(swap: Swapper, kept: Sequence[Batch], split: Split | None) -> Losses | None:
    """The losses where each group of examples has statistics of its own."""
    whole = Batches(tuple(kept), (), 0)
    if split is None or split.separation < 4 or whole.shuffled() is None or any(b.y is None for b in kept):
        return None
    x, y = torch.cat([b.x for b in kept]), torch.cat([b.y for b in kept])
    second = torch.from_numpy(split.second).to(x.device)
    parts: list[Losses] = []
    for group in (~second, second):
        pieces = zip(x[group].split(kept[0].size), y[group].split(kept[0].size), strict=True)
        batches = [Batch((a, b), a, b) for a, b in pieces]
        found = swap.losses(batches, swap.population(batches))
        if found is None:
            return None
        parts.append(found)
    if sum(len(part.loss) for part in parts) != len(x):  # a mean for each batch: nothing to put back in order
        return None
    loss, right = np.empty(len(x)), np.empty(len(x))
    classes = all(part.correct is not None for part in parts)
    for group, part in zip((~split.second, split.second), parts, strict=True):
        loss[group] = part.loss
        if part.correct is not None:
            right[group] = part.correct
    return Losses(loss, np.ones(len(x)), right if classes else None)


def _drops(model: nn.Module) -> bool:
    dropouts = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]
    return any(isinstance(module, dropouts) and module.p > 0 for module in model.modules())


def _augmented(first: Batches, reference: Iterable[Any], model: nn.Module, examples: int) -> bool | None:
    """Whether reading the reference data again gives other examples, not only another order of the same."""
    if iter(reference) is reference:
        return None
    before, after = (_marks(one) for one in (first, read_batches(reference, model, examples, "reference")))
    return len(before & after) < len(before) / 2


def _marks(batches: Batches) -> set[float]:
    marks: set[float] = set()
    for batch in batches.kept:
        x = batch.x.double().reshape(batch.size, -1)
        wave = torch.cos(torch.arange(x.shape[1], dtype=torch.float64, device=x.device))
        marks |= {round(value, 9) for value in (x @ wave).tolist()}
    return marks
