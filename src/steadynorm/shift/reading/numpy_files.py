"""The arrays of .npy and .npz files; pickled objects in them are refused, never loaded."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steadynorm.errors import DataError

__all__ = ["read"]

_DAMAGED: Final = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, NotImplementedError, MemoryError,
    SyntaxError, RuntimeError, tokenize.TokenError,
)  # fmt: skip


def read(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """The array of an .npy, mapped rather than loaded, or those of an .npz by name.

    Args:
        path: An existing file.

    Raises:
        DataError: The file is damaged, holds pickled objects, or not what its name says.
    """
    try:
        if path.suffix.lower() == ".npy":
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        with path.open("rb") as file:  # np.load looks at the content, not at the name
            if file.read(6) == b"\x93NUMPY":
                raise DataError(f"{path}: an .npz archive is required, got a single array. Call it .npy.")
        with np.load(path, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in archive.files}
    except DataError:
        raise
    except _DAMAGED as error:
        pickled = isinstance(error, ValueError) and ("allow_pickle" in str(error) or "Python objects" in str(error))
        why = "it holds pickled objects, which could run any code" if pickled else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: plain numeric or text arrays are required, but {why}. Write it again with numpy.save or "
            "numpy.savez."
        ) from error
