"""Arrays that the command line is given: files of them, which are never unpickled, or a shape to draw."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from steadynorm.errors import ArgumentError, DataError
from steadynorm.files.weights import read_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["arrays_in", "example_of", "one_of"]

_SHAPE = re.compile(r"\d+(x\d+)*")


def arrays_in(path: Path) -> dict[str, "Tensor"]:
    """What an .npy, .npz or .safetensors file holds, by name; the one array of an .npy file is called "x".

    Raises:
        DataError: It is another kind of file, or cannot be read as plain arrays.
    """
    import torch

    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return dict(cast("Mapping[str, Tensor]", read_weights(path, DataError)))
    if suffix not in (".npy", ".npz"):
        raise DataError(f"arrays must be in an .npy, .npz or .safetensors file, got {path}.")
    import numpy as np

    try:
        array: Any = np.load(path, allow_pickle=False)
        if suffix == ".npy":
            return {"x": torch.from_numpy(np.array(array, order="C"))}
        with array as archive:
            return {name: torch.from_numpy(np.array(archive[name], order="C")) for name in archive.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as plain arrays: {error}. Write it again with numpy.save.") from error


def one_of(arrays: Mapping[str, "Tensor"], path: Path) -> "Tensor":
    """The array called x, or the only one.

    Raises:
        DataError: There is neither.
    """
    if "x" not in arrays and len(arrays) != 1:
        raise DataError(f"{path} must hold an array named x, or a single one; it holds {', '.join(arrays) or 'none'}.")
    return arrays["x"] if "x" in arrays else next(iter(arrays.values()))


def example_of(text: str, network: "nn.Module") -> Any:
    """An example of a network's inputs.

    Args:
        text: A shape such as 8x3x224x224, drawn from N(0, 1) with a fixed seed; or a file of arrays: of one, or of
            several that are the network's arguments by name.
        network: Whose floating-point dtype floating-point arrays are given, and whose device.

    Raises:
        ArgumentError: It is neither.
        DataError: The file cannot be read.
    """
    import torch

    held = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(()))

    def fitting(tensor: "Tensor") -> "Tensor":
        return tensor.to(held.device, held.dtype if tensor.is_floating_point() else None)

    if _SHAPE.fullmatch(text):
        shape = [int(size) for size in text.split("x")]
        return fitting(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    path = Path(text)
    if path.suffix.lower() not in (".npy", ".npz", ".safetensors"):
        raise ArgumentError(
            f"an example must be a shape such as 8x3x224x224, or an .npy, .npz or .safetensors file; got {text!r}."
        )
    arrays = {name: fitting(tensor) for name, tensor in arrays_in(path).items()}
    return one_of(arrays, path) if len(arrays) <= 1 else arrays
