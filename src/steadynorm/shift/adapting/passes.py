"""The passes that an adaptation is made of: look at the predictions, check the stream, write the mix."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from steadynorm.errors import ArgumentError, DataError, ModelError
from steadynorm.nn.watched import BatchNormLayer, channel_axis, example_moments, observing
from steadynorm.nn.watched import running_statistics as stored
from steadynorm.shift.adapting import guards as checks
from steadynorm.shift.adapting.guards import Floats, Guard
from steadynorm.shift.adapting.inputs import Chunk, probabilities
from steadynorm.shift.adapting.mixing import Layers, Mixer, Rule, Share, Snapshot, shares, stored_share
from steadynorm.shift.adapting.report import Confidence, LayerChange

__all__ = ["PRIOR", "Adapting"]

PRIOR: Final = 16.0


class Adapting:
    """A model's layers and the examples that it is adapted to.

    Args:
        layers: Those that may be written to, in the order of the model.
        run: The forward of one chunk's batch.
        chunks: The examples in their order.
        classifier: Whether the outputs are logits.
        class_shares: (K,) of the classes in training; None for all alike.
    """

    def __init__(
        self,
        layers: Layers,
        run: Callable[[Any], object],
        chunks: Sequence[Chunk],
        classifier: bool,
        class_shares: Floats | None,
    ) -> None:
        self.layers, self.chunks, self._classifier, self._shares = layers, chunks, classifier, class_shares
        self.runs: list[Callable[[], object]] = [lambda batch=one.batch: run(batch) for one in chunks]
        self.examples = sum(one.examples for one in chunks)

    def snapshot(self, affine: bool = False) -> Snapshot:
        """Of all that an adaptation may change."""
        return Snapshot(self.layers, affine)

    def predict(self, mixer: Mixer | None = None) -> Floats | None:
        """(N, K) probabilities, or None where the outputs are none; a mixer is told how many examples went before."""
        found: list[Tensor | None] = []
        with torch.no_grad():
            for one, run in zip(self.chunks, self.runs, strict=True):
                if mixer is not None:
                    mixer.examples += one.examples
                output = run()
                found.append(probabilities(output, one.examples) if self._classifier else None)
        known = [p for p in found if p is not None]
        if len(known) < len(found) or len({p.shape[1] for p in known}) > 1:
            return None
        p = torch.cat(known)
        return p.numpy() if bool(torch.isfinite(p).all()) else None

    def look(self) -> Confidence | None:
        """How sure the model is, as it is."""
        p = self.predict()
        if p is None:
            return None
        labels = p.argmax(1)
        return Confidence(float(checks.entropy(p).mean()), float(p.max(1).mean()), checks.effective_classes(labels))

    def guards(self) -> list[Guard]:
        """What the inputs of the first layer, and the predictions with half of the layers adapted, say."""
        features: dict[str, list[Tensor]] = {}
        spatial = False

        def see(name: str, layer: BatchNormLayer, x: Tensor, mask: Tensor | None) -> None:
            nonlocal spatial
            if name == next(iter(features), name):
                found = example_moments(x, channel_axis(layer), mask)
                spatial = spatial or found.var is not None
                features.setdefault(name, []).append(found.mean)

        snapshot = self.snapshot()
        mixer = Mixer(self.layers[: (len(self.layers) + 1) // 2], shares(stored_share(PRIOR)))
        try:
            with observing(self.layers, see), mixer.attached():
                p = self.predict(mixer)
        finally:
            snapshot.restore()
        found: list[Guard] = []
        means = torch.cat(next(iter(features.values()), [torch.zeros(0, 1)])).to("cpu", torch.float64)
        if len(means) == self.examples and bool(torch.isfinite(means).all()):
            found.append(checks.drift_guard(means.numpy()))
        if p is not None:
            expected = np.full(p.shape[1], 1 / p.shape[1]) if self._shares is None else self._shares
            if len(expected) != p.shape[1]:
                raise ArgumentError(
                    f"class_shares has {len(expected)} entries, and the model has {p.shape[1]} classes."
                )
            views = [p]
            as_it_is = None if spatial else self.predict()
            if as_it_is is not None:  # an input of its own, unlike a channel of many positions, may be the class itself
                views.append(as_it_is)
            labels = [view.argmax(1) for view in views]
            found.append(min((checks.skew_guard(one, expected) for one in labels), key=lambda guard: guard.seen or 0.0))
            found.append(max((checks.order_guard(one) for one in labels), key=lambda guard: guard.seen or 0.0))
        return found

    def mix(self, share: Share) -> tuple[LayerChange, ...]:
        """Writes the mixed statistics, and says how far they moved."""
        old = {name: tuple(_copied(t) for t in stored(layer)) for name, layer in self.layers}
        used = self.write(shares(share))
        return tuple(_change(name, layer, old[name], share(name, self.examples)) for name, layer in used)

    def write(self, rule: Rule) -> Layers:
        """Writes what a rule makes of the stored statistics and those of the examples.

        Returns:
            The layers that the forward used.

        Raises:
            DataError: What one saw is not finite.
            ModelError: It used none.
        """
        mixer = Mixer(self.layers, rule)
        with mixer.attached():
            self.predict(mixer)
        used = [(name, layer) for name, layer in self.layers if name in mixer.seen]
        if not used:
            raise ModelError("the forward used none of the model's batch norms. Does `forward` run this very model?")
        for name, layer in used:
            if not all(bool(torch.isfinite(t).all()) for t in stored(layer)):
                raise DataError(f"what {name} saw of these examples is not finite; the model is left as it was.")
        return used


def _change(name: str, layer: BatchNormLayer, old: tuple[Tensor, ...], share: float) -> LayerChange:
    mean, var = old
    new_mean, new_var = (_copied(t) for t in stored(layer))
    moved = (new_mean - mean) / (var + layer.eps).sqrt()
    spread = 0.5 * ((new_var + layer.eps) / (var + layer.eps)).log().abs()
    most = int(moved.abs().argmax())
    return LayerChange(name, share, moved.square().mean().sqrt().item(), moved[most].item(), most, spread.mean().item())


def _copied(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64, copy=True)
