"""Does a shift persist once a model has adapted, or has more changed than means and variances?"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from steadynorm.errors import DataError
from steadynorm.moments import Moments
from steadynorm.shift.adapting.mixing import Layers, Rule, mix
from steadynorm.shift.adapting.passes import Adapting

if TYPE_CHECKING:
    from steadynorm.shift.watching.calibration import LayerReference
    from steadynorm.shift.watching.monitor import Monitor

__all__ = ["LEVEL", "aligned", "persists"]

LEVEL: Final = 0.01
"""The test's level: the share of clean adaptations that may be called persisting shifts."""
_LEAST_VARIANCE: Final = 1e-3


def aligned(references: Mapping[str, "LayerReference"], layers: Layers) -> Rule:
    """Statistics under which the examples have, at each layer, the mean and variance that the calibration had there.

        σ'² + eps = (σ²_seen + eps) / v        μ' = μ_seen - c √(σ'² + eps)

    with c and v the calibration's mean and (biased) variance in the layer's own units. Not the examples' own statistics
    (c = 0, v = 1): the calibration's differ a little from the stored ones, and that is no shift. A layer that is not
    watched takes the examples' own.
    """
    eps = {name: layer.eps for name, layer in layers}

    def rule(name: str, stored: Moments, seen: Moments, _: int) -> Moments:
        own = mix(stored, seen, 0.0)
        if name not in references:
            return own
        reference, like = references[name], own.mean
        centre, spread = (_like(v, like) for v in (reference.channel_mean, reference.channel_var))
        wide = (own.m2 + eps[name]) / spread.clamp(min=_LEAST_VARIANCE)
        return Moments(own.count, own.mean - centre * wide.sqrt(), (wide - eps[name]).clamp(min=0.0))

    return rule


def _like(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def persists(
    monitor: "Monitor", adapting: Adapting, forward: Callable[[Any], object] | None
) -> tuple[bool | None, str | None]:
    """Whether the monitor's test of fixed size rejects the examples once their means and variances are set right.

    The mix itself is not what is tested: what it keeps of the stored statistics would be a shift by itself. The model
    comes back as it was.

    Returns:
        Whether p <= `LEVEL`, and None; or None, and why there is no answer.
    """
    calibration = monitor.calibration
    references = {} if calibration is None else calibration.layers
    before = adapting.snapshot()
    try:
        adapting.write(aligned(references, adapting.layers))
        return monitor.p_value([one.batch for one in adapting.chunks], forward=forward) <= LEVEL, None
    except DataError as error:
        return None, f"whether the shift persists was not tested: {error}"
    finally:
        before.restore()
