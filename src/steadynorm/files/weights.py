"""Files of tensors: .safetensors, and what torch.save wrote, of which nothing is executed."""

import pickle
import warnings
from pathlib import Path
from typing import Any

from steadynorm.errors import SteadynormError

__all__ = ["read_weights"]


def read_weights(path: Path, error: type[SteadynormError]) -> Any:
    """What a file of tensors holds, on the CPU; pickled code is refused, never run.

    Args:
        path: A .safetensors file, or else one of torch.save, which is read with `weights_only=True`.
        error: What is raised where it cannot be read, would run code on loading, or is damaged.
    """
    import torch
    from safetensors.torch import load_file

    try:
        path.open("rb").close()
    except OSError as raised:
        raise error(f"cannot read {path}: {raised.strerror or raised}. Give a checkpoint file.") from raised
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, of files that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as raised:
        raise error(
            f"{path} is refused: it holds more than tensors and plain values, and loading it could run code. Save "
            "model.state_dict() instead of the model, or give the model's factory and --weights."
        ) from raised
    except Exception as raised:  # a damaged file makes its readers raise anything
        what = "a safetensors file" if path.suffix.lower() == ".safetensors" else "written by torch.save"
        reason = next(iter(str(raised).splitlines()), "")[:120] or type(raised).__name__
        raise error(f"{path} is damaged, incomplete or not {what} ({reason}). Copy it again.") from raised
