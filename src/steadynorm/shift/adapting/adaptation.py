"""adapt_: batch norms that normalise by a mix of what they remember and what they are served now."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
from torch import Tensor, nn

from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.nn.keeping import evaluating
from steadynorm.nn.watched import bn_layers
from steadynorm.shift.adapting.guards import Floats, Guard, size_guard
from steadynorm.shift.adapting.inputs import read_chunks
from steadynorm.shift.adapting.mixing import Share, is_frozen, stored_share
from steadynorm.shift.adapting.passes import PRIOR, Adapting
from steadynorm.shift.adapting.persisting import persists
from steadynorm.shift.adapting.report import AdaptReport, Confidence
from steadynorm.shift.adapting.tent import minimise_entropy

if TYPE_CHECKING:
    from steadynorm.shift.watching.monitor import Monitor

__all__ = ["Method", "adapt_"]

Method = Literal["prior", "adabn", "alpha", "tent"]

UNSURE: Final = 0.5
"""Mean entropy, as a share of the largest, that no model worth using shows; see `_collapse`."""
RISE: Final = 0.2


def adapt_(
    model: nn.Module,
    batches: Tensor | Iterable[Any],
    method: Method = "prior",
    *,
    prior: float = PRIOR,
    alpha: float | Mapping[str, float] | None = None,
    lr: float = 1e-3,
    steps: int = 1,
    class_shares: Sequence[float] | None = None,
    classifier: bool = True,
    monitor: "Monitor | None" = None,
    forward: Callable[[Any], object] | None = None,
    chunk: int = 256,
    guard: bool = True,
) -> AdaptReport:
    """Adapts a model's running statistics to the inputs it is served now, without labels, unless that would harm it.

        "prior"   a = N / (N + n)       N: `prior` pseudo-examples of what is stored, against n examples seen
        "adabn"   a = 0                 what is seen alone
        "alpha"   a = 1 - alpha         of each layer its own
        "tent"    a = 0, and γ, β <- Adam steps on the mean entropy of the predictions

        μ <- a μ + (1 - a) μ_seen       σ² <- a σ² + (1 - a) σ²_seen        (both σ² unbiased, as running_var is)

    The layers are measured one after the other within one forward: each normalises by its mix at once, so that the next
    is measured on what the mixed ones before it put out. More examples than `chunk` go through in several forwards,
    whose statistics are pooled (law of total variance); a deeper layer then saw the earlier of them through mixes that
    knew less, so choose `chunk` as large as memory allows. n counts examples, not pixels. In "tent" each chunk is
    normalised by itself while γ and β learn; in the end the running statistics are measured anew with them.

    Nothing else of the model changes: `num_batches_tracked`, modes, gradients, other weights, the random state.
    Where the model is adapted again, it starts from where it is: call `report.undo()` first to start from the source
    (Tent's episodic reset), and do so from time to time on a long stream.

    Guards let an adaptation through, or leave the model as it was (verdict "abstained"):

    | guard | refuses |
    | --- | --- |
    | examples | n < 64; n < 256 where the stored statistics keep less than 5 % (adabn, tent, alpha near 1) |
    | neighbours | a correlation of neighbouring inputs beyond 4.5 standard errors and 0.1 |
    | classes | predicted classes that are less than 80 % as diverse as those of an unskewed stream |
    | order | runs of equal predicted classes, beyond 4.5 standard errors |

    A shift can make a model predict one class for everything, which is not a skewed stream. So the predictions judged
    are those of the model with the first half of its batch norms adapted, by the prior mix: early layers hold
    little of the class and much of the shift. Where the first batch norm sees features without positions, which may be
    the class itself, the predictions of the model as it is must pass as well.

    Where the mean entropy after adapting is above half of the largest and has risen by more than 0.2, or the
    predictions fall on less than half as many classes, the verdict is "retrain" and the model is left as it was. Where
    the monitor's test rejects the examples even with their means and variances set to those of its calibration (p at
    most 0.01), more than means and variances has changed: the verdict is "retrain" and the model stays adapted.

    Args:
        model: With torch.nn's or steadynorm's batch norms that keep running statistics; changed in place. Layers
            frozen by `steadynorm.freeze_` stay as they are.
        batches: The examples in the order they came: one tensor (N, ...), or an iterable of tensors or of tuples with
            the inputs first (a DataLoader). All are held in memory: give a few hundred to a few thousand.
        method: See above.
        prior: N >= 0.
        alpha: In [0, 1], for "alpha": one for all layers, or by layer name; layers not named keep what is stored.
        lr: Of Adam, for "tent".
        steps: Passes over the examples, for "tent".
        class_shares: (K,) shares of the classes in training; alike by default.
        classifier: The output is logits (N, K, *). With False no guard looks at predicted classes.
        monitor: A calibrated `Monitor` of this model. What it has seen, and its evidence, stay as they are.
        forward: Runs the model on one batch as given and returns its logits; for batches of another form, dicts for
            instance, of which the first tensor's length counts the examples.
        chunk: Examples in a forward, at most (without `forward`).
        guard: With False nothing is refused or taken back; the report has no guards.

    Returns:
        The report; `report.undo()` takes the adaptation back.

    Raises:
        ArgumentError: A value out of its range, or one that the method does not take; a monitor that is not calibrated,
            or of another model.
        DataError: No examples, batches that are none, or NaN or infinite values.
        ModelError: No batch norm with running statistics was used, or all are frozen.

    Source:
        Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation" (2020); Li et
        al., "Revisiting batch normalization for practical domain adaptation" (2016); Wang et al., "Tent: fully
        test-time adaptation by entropy minimization" (2021).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
        >>> report = adapt_(model, torch.randn(112, 4) + 8, classifier=False)
        >>> report.verdict, round(report.layers[0].share, 3), bool((model[0].running_mean > 6).all())
        ('adapted', 0.125, True)
        >>> report.undo()
        >>> model[0].running_mean
        tensor([0., 0., 0., 0.])
    """
    everything = bn_layers(model)
    layers = [(name, layer) for name, layer in everything if not is_frozen(layer)]
    share = _share(method, prior, alpha, [name for name, _ in everything])
    if not layers:
        raise ModelError("all batch norms of this model are frozen; call steadynorm.unfreeze_(model) to adapt them.")
    if not (0 < lr < float("inf") and steps >= 1 and chunk >= 2):
        raise ArgumentError(
            f"lr > 0 and finite, steps >= 1 and chunk >= 2 are required, got lr={lr}, steps={steps}, chunk={chunk}."
        )
    if monitor is not None and (monitor.calibration is None or monitor.model is not model):
        problem = "is not calibrated" if monitor.calibration is None else "watches another model"
        raise ArgumentError(f"monitor must be a calibrated Monitor of this model, and it {problem}.")
    chunks = read_chunks(batches, model, chunk, as_given=forward is not None)
    run = forward if forward is not None else model
    adapting = Adapting(layers, run, chunks, classifier, _shares_of(class_shares))
    notes = [f"{name} is frozen and stays" for name, layer in everything if is_frozen(layer)]
    found: list[Guard] = []
    n, before = adapting.examples, None

    def report(verdict: Any, reason: str, **more: Any) -> AdaptReport:
        return AdaptReport(method, verdict, reason, examples=n, guards=tuple(found), notes=tuple(notes), **more)

    if method == "tent" and not classifier:
        raise ArgumentError(
            'method="tent" learns from predicted classes, so it needs a classifier; got classifier=False.'
        )
    if guard:
        found.append(size_guard(n, min(share(name, n) for name, _ in layers)))
        if not found[-1].passed:
            return report("abstained", _refusal(found[-1]), applied=False)
    if method == "tent" and min(one.examples for one in chunks) < 2:
        raise DataError('method="tent" normalises each batch by itself, so each needs at least 2 examples; one has 1.')
    with evaluating(model):
        before = adapting.look()
        if guard:
            found += adapting.guards()
            refused = [one for one in found if not one.passed]
            if refused:
                return report("abstained", _refusal(refused[0]), applied=False, before=before)
        if classifier and before is None:
            notes.append("predictions were not looked at: the outputs are no finite logits (N, K, *)")
        snapshot = adapting.snapshot(affine=method == "tent")
        try:
            if method == "tent":
                minimise_entropy(model, layers, adapting.runs, lr, steps)
            changes = adapting.mix(share)
            after = adapting.look()
            collapse = _collapse(before, after) if guard else None
            alarm, unknown = (None, None) if monitor is None else persists(monitor, adapting, forward)
        except BaseException:
            snapshot.restore()
            raise
    unused = len(layers) - len(changes)
    notes += [f"{unused} batch norms were not used by the forward and stay as they are"] if unused else []
    notes += [unknown] if unknown else []
    more: dict[str, Any] = {"layers": changes, "before": before, "after": after, "alarm": alarm}
    if collapse is not None:
        snapshot.restore()
        return report("retrain", f"{collapse}; the model is left as it was", applied=False, **more)
    more |= {"applied": True, "_snapshot": snapshot}
    if alarm:
        return report("retrain", "the monitor rejects the examples, their means and variances set right", **more)
    return report("adapted", f"the stored statistics keep {changes[0].share:.0%} of the say", **more)


def _share(method: str, prior: float, alpha: float | Mapping[str, float] | None, names: Sequence[str]) -> Share:
    """a, the weight that the stored statistics keep, by layer and number of examples."""
    if method not in get_args(Method):
        raise ArgumentError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}.")
    if (alpha is not None) != (method == "alpha"):
        raise ArgumentError(f'alpha goes with method="alpha", which needs it; got method={method!r}, alpha={alpha!r}.')
    if not 0 <= prior < float("inf"):
        raise ArgumentError(f"prior must be a number of examples >= 0 and finite, got {prior!r}.")
    if alpha is None:
        return stored_share(prior if method == "prior" else 0.0)
    weights = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(names, alpha)
    unknown = sorted(set(weights) - set(names))
    if unknown or not all(0 <= weight <= 1 for weight in weights.values()):
        raise ArgumentError(f"alpha must lie in [0, 1], by names of batch norms ({', '.join(names)}); got {alpha!r}.")
    return lambda name, _: 1.0 - weights.get(name, 0.0)


def _shares_of(class_shares: Sequence[float] | None) -> Floats | None:
    if class_shares is None:
        return None
    shares = np.asarray(class_shares, dtype=np.float64)
    if shares.ndim != 1 or not (shares >= 0).all() or not 0 < shares.sum() < float("inf"):
        raise ArgumentError(f"class_shares must be one number >= 0 for each class, not all 0; got {class_shares!r}.")
    return shares / shares.sum()


def _refusal(guard: Guard) -> str:
    why = {
        "examples": "too few examples to measure statistics by",
        "neighbours": "neighbouring inputs are alike: the stream is correlated, and these statistics are of the moment",
        "classes": "the predicted classes are skewed, so that these statistics would be of some classes only "
        "(or the model's predictions are too far off to tell)",
        "order": "equal predicted classes come together: the stream is correlated or sorted by class",
    }[guard.name]
    return f"{why} ({guard.name} {guard.seen:.3g}, limit {guard.limit:.3g})"


def _collapse(before: Confidence | None, after: Confidence | None) -> str | None:
    if before is None:
        return None
    if after is None:
        return "the adapted model's outputs are not finite"
    if after.entropy > UNSURE and after.entropy > before.entropy + RISE:
        return f"the predictions become unsure: entropy {before.entropy:.2f} -> {after.entropy:.2f} of the largest"
    if after.effective_classes < before.effective_classes / 2:
        return (
            f"the predictions fall on {after.effective_classes:.1f} classes instead of {before.effective_classes:.1f}"
        )
    return None
