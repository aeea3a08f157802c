"""Examples read one by one: a torch Dataset, or a folder of images; at most a stated number of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from steadynorm.errors import DataError
from steadynorm.files.images import read_image
from steadynorm.progress import tracked
from steadynorm.shift.reading.arrays import ArrayFrame
from steadynorm.shift.reading.images import features, joined
from steadynorm.shift.reading.values import from_array

__all__ = ["MAX_EXAMPLES", "read", "read_images"]

MAX_EXAMPLES: Final = 20_000
"""Most examples that are looked at, which are then all rows of their side: chosen at random, or the first ones of an
`IterableDataset`."""

_Floats = NDArray[np.float64]


def read(name: str, dataset: "Dataset[Any]", seed: int = 0, progress: bool = False) -> ArrayFrame:
    """The first element of each example: image features of (C, H, W), (H, W) or a Pillow image; f0, f1, ... of vectors.

    Args:
        name: What reports call it.
        dataset: A torch Dataset; its examples are tuples, or the inputs themselves.
        seed: Of the choice of examples, where there are more than `MAX_EXAMPLES`.
        progress: Shows a bar on the standard error.

    Raises:
        DataError: No examples, one that cannot be had, or not all of one sort.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        stream = iter(cast("Iterator[Any]", dataset))  # of which no more than an example is in memory
        return _framed(name, range(MAX_EXAMPLES), lambda _: _row(next(stream)), progress)
    length = len(cast("Any", dataset))
    picked = _picked(length, seed)
    frame = _framed(_shown(name, len(picked), length), picked, lambda i: _row(cast("Any", dataset)[i]), progress)
    return ArrayFrame(frame.name, frame.rows, frame.columns, np.asarray(picked, dtype=np.int64))


def read_images(name: str, paths: Sequence[Path], seed: int = 0, progress: bool = False) -> ArrayFrame:
    """The features of image files of any size, grey ones as red = green = blue; `row_numbers` count the sorted paths.

    Args:
        name: What reports call the folder.
        paths: The files.
        seed: Of the choice of files, where there are more than `MAX_EXAMPLES`.
        progress: Shows a bar on the standard error.

    Raises:
        DataError: A file that cannot be read as an image.
    """
    picked = _picked(len(paths), seed)

    def row(i: int) -> dict[str, _Floats]:
        pixels = read_image(paths[i])
        return features(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)[None])

    frame = _framed(_shown(name, len(picked), len(paths)), picked, row, progress)
    return ArrayFrame(frame.name, frame.rows, frame.columns, np.asarray(picked, dtype=np.int64))


def _picked(length: int, seed: int) -> list[int]:
    if length <= MAX_EXAMPLES:
        return list(range(length))
    return np.sort(np.random.default_rng(seed).choice(length, MAX_EXAMPLES, replace=False)).tolist()


def _shown(name: str, picked: int, length: int) -> str:
    return name if picked == length else f"{name} ({picked:,} of {length:,})"


def _framed(name: str, picked: Sequence[int], row: Callable[[int], dict[str, _Floats]], progress: bool) -> ArrayFrame:
    rows: list[dict[str, _Floats]] = []
    for i in tracked(picked, f"reading {name}", show=progress):
        try:
            found = row(i)
        except StopIteration:
            break
        except DataError as error:
            raise DataError(f"{name}, example {i}: {error}") from error
        except Exception as error:  # whatever the user's own data set raises
            raise DataError(f"{name}, example {i}: {type(error).__name__}: {error}") from error
        if rows and found.keys() != rows[0].keys():
            raise DataError(
                f"{name}: examples of one sort are required, got {len(rows[0])} features in the first and "
                f"{len(found)} in example {i}. Bring them into one shape in the Dataset's transform."
            )
        rows.append(found)
    if not rows:
        raise DataError(f"{name}: examples are required, got none.")
    columns = {column: from_array(values) for column, values in joined(rows).items()}
    return ArrayFrame(name, len(rows), columns)


def _row(example: Any) -> dict[str, _Floats]:
    """One example as a row of named numbers."""
    first: Any = example[0] if isinstance(example, tuple | list) else example
    if isinstance(first, Tensor):
        array: NDArray[Any] = first.detach().cpu().float().numpy() if first.is_floating_point() else first.cpu().numpy()
    else:
        array = np.asarray(first)
        if array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[0] not in (1, 3, 4):
            array = array.transpose(2, 0, 1)
    if array.dtype.kind not in "biuf" or array.ndim > 3:
        raise DataError(
            f"a number, a vector or an image (C, H, W) is required, got a {type(first).__name__} of {array.dtype} and "
            f"shape {array.shape}. Compare an array or a mapping instead."
        )
    if array.ndim >= 2:
        return features(array[None] if array.ndim == 3 else array[None, None])
    return {f"f{i}": np.array([value]) for i, value in enumerate(np.asarray(array, np.float64).reshape(-1).tolist())}
