"""A calibration on disk: safetensors for the arrays, JSON in its header for the rest. Summaries only, no example."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from steadynorm.errors import DataError, ModelError
from steadynorm.files.aside import write_aside
from steadynorm.shift.watching.calibration import Calibration, Gaussian, LayerReference
from steadynorm.shift.watching.embedding import Projection

__all__ = ["read_calibration", "write_calibration"]

Floats: TypeAlias = npt.NDArray[np.float64]

FORMAT: Final = "steadynorm.shift.Monitor"
SCHEMA: Final = 1
_ARRAYS: Final = ("centre", "weight", "mean", "whiten", "null", "channel_mean", "channel_sd", "channel_var")


def write_calibration(path: Path, calibration: Calibration, channels: Mapping[str, int]) -> None:
    """Writes it aside and renames it, so that a reader finds the old file or the new one.

    Args:
        path: Where to.
        calibration: What.
        channels: C of every layer of the model by name, by which it is recognised.

    Raises:
        DataError: The file cannot be written.
    """
    from safetensors.numpy import save

    arrays = {
        f"{i}.{key}": np.ascontiguousarray(value)
        for i, reference in enumerate(calibration.layers.values())
        for key, value in zip(_ARRAYS, _arrays_of(reference), strict=True)
    }
    about = {
        "schema": SCHEMA,
        "model": dict(channels),
        "layers": list(calibration.layers),
        "pool": calibration.pool,
        "block": calibration.block,
        "examples": calibration.examples,
        "widening": calibration.widening,
    }
    content = save(arrays, metadata={FORMAT: json.dumps(about)})
    try:
        write_aside({path: content})
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. Name a file in a folder that can."
        ) from error


def read_calibration(path: Path, channels: Mapping[str, int]) -> Calibration:
    """Reads what `write_calibration` wrote; nothing in it is executed.

    Args:
        path: The file.
        channels: C of every layer of the model it is to be used with, by name.

    Raises:
        DataError: No such file, or none that holds a calibration this version can read.
        ModelError: It is of another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, str] = file.metadata() or {}
            arrays: dict[str, Floats] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is no readable safetensors file: {error}. Save the calibration again.") from error
    about = _about(path, header)
    if about["model"] != dict(channels):
        raise ModelError(
            f"{path} was calibrated on another model: {_difference(about['model'], channels)}. Calibrate anew."
        )
    try:
        layers = {
            str(name): _reference({key: arrays[f"{i}.{key}"] for key in _ARRAYS}, int(channels[name]))
            for i, name in enumerate(about["layers"])
        }
        return Calibration(
            layers, int(about["pool"]), int(about["block"]), int(about["examples"]), float(about["widening"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). Save the calibration again.") from error


def _arrays_of(reference: LayerReference) -> tuple[Floats, ...]:
    p, g = reference.projection, reference.gaussian
    r = reference
    return p.centre, p.weight, g.mean, g.whiten, r.null, r.channel_mean, r.channel_sd, r.channel_var


def _reference(arrays: Mapping[str, Floats], channels: int) -> LayerReference:
    values = [np.asarray(arrays[key], dtype=np.float64) for key in _ARRAYS]
    centre, weight, mean, whiten, null, *by_channel = values
    wide, k = weight.shape
    fits = wide in (channels, 2 * channels) and centre.shape == (wide,) and mean.shape == (k,)
    fits = fits and whiten.shape == (k, k) and all(v.shape == (channels,) for v in by_channel)
    if not (fits and null.ndim == 1 and null.size and all(np.isfinite(v).all() for v in values)):
        raise ValueError("arrays of the wrong shape, or not finite")
    return LayerReference(channels, Projection(centre, weight), Gaussian(mean, whiten), np.sort(null), *by_channel)


def _about(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """The JSON part, once it is sure to be ours and of this schema."""
    if FORMAT not in header:
        raise DataError(f"{path} holds no calibration of a {FORMAT}; give a file that Monitor.save wrote.")
    try:
        about: Any = json.loads(header[FORMAT])
        schema = about["schema"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged: its header is not what Monitor.save writes. Save it again.") from error
    if schema != SCHEMA:
        raise DataError(
            f"{path} has schema {schema}, this version reads {SCHEMA}. Calibrate anew, or update steadynorm."
        )
    if not isinstance(about.get("model"), dict) or not isinstance(about.get("layers"), list):
        raise DataError(f"{path} is damaged: its header is not what Monitor.save writes. Save it again.")
    return about


def _difference(saved: Mapping[str, int], now: Mapping[str, int]) -> str:
    for name, channels in saved.items():
        if name not in now:
            return f"it has a layer {name!r}, which this model lacks"
        if now[name] != channels:
            return f"its layer {name!r} has {channels} channels, this model's {now[name]}"
    return f"it lacks this model's layer {next(n for n in now if n not in saved)!r}"
