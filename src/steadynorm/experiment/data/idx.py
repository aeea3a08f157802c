"""MNIST-style idx files: a 4-byte magic number, big-endian sizes, then one unsigned byte per value.

Format: Yann LeCun's MNIST page, "The idx file format" (http://yann.lecun.com/exdb/mnist/).
"""

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadynorm.errors import DataError
from steadynorm.experiment.data.labelled import LabelledData, check_size
from steadynorm.experiment.data.labels import encode

__all__ = ["is_folder", "read_folder"]

_NAME: Final = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?", re.IGNORECASE)


def is_folder(folder: Path) -> bool:
    """Whether a folder holds files with the names of MNIST's."""
    return any(_NAME.fullmatch(path.name) for path in folder.iterdir())


def read_folder(folder: Path) -> LabelledData:
    """Reads `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and, if there, the `t10k-` (or `test-`) pair.

    Args:
        folder: The folder; each file may end in .gz.

    Returns:
        Images (N, 1, H, W) divided by 255; the second pair is the fixed test set.

    Raises:
        DataError: A file is missing, is not an idx file, or has another length than it declares.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := _NAME.fullmatch(path.name):
            part = "train" if match[1].lower() == "train" else "test"
            # sorted: the unpacked file comes before its .gz and is the quicker one to read
            found.setdefault((part, match[2].lower()), path)
    parts = ["train", "test"] if any(part == "test" for part, _ in found) else ["train"]
    missing = [f"{part} {what}" for part in parts for what in ("images", "labels") if (part, what) not in found]
    if missing:
        raise DataError(
            f"{folder}: train-images-idx3-ubyte and train-labels-idx1-ubyte are required, and t10k- ones come as a "
            f"pair; missing: {', '.join(missing)}. Put every file of the set into one folder."
        )
    x, labels = _pair(found["train", "images"], found["train", "labels"])
    if len(parts) == 1:
        classes, y, _ = encode(str(folder), labels)
        return LabelledData(folder.resolve().name, x, y, classes, "image")
    x_test, labels_test = _pair(found["test", "images"], found["test", "labels"])
    classes, y, y_test = encode(str(folder), labels, labels_test)
    return LabelledData(folder.resolve().name, x, y, classes, "image", None if y_test is None else (x_test, y_test))


def _pair(images: Path, labels: Path) -> tuple[Tensor, NDArray[np.uint8]]:
    pixels, classes = _read(images, 3), _read(labels, 1)
    if len(pixels) != len(classes):
        raise DataError(
            f"{images} has {len(pixels):,} images, but {labels} has {len(classes):,} labels: one label per image is "
            "required. Take both files from the same set."
        )
    return torch.from_numpy(pixels.astype(np.float32)).unsqueeze_(1).div_(255), classes


def _read(path: Path, ndim: int) -> NDArray[np.uint8]:
    header = 4 * (1 + ndim)
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            head = file.read(header)
            magic = 0x0800 + ndim
            if len(head) < header or int.from_bytes(head[:4], "big") != magic:
                raise DataError(
                    f"{path}: an idx file of unsigned bytes in {ndim} dimensions starts with the magic number {magic} "
                    f"and {ndim} sizes, got {head[:4].hex(' ') or 'an empty file'}. Download the file again."
                )
            shape = tuple(int.from_bytes(head[i : i + 4], "big") for i in range(4, header, 4))
            size = math.prod(shape)
            check_size(size, str(path))
            body = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}. Download the file again.") from error
    if len(body) != size:
        got = f"only {len(body):,}" if len(body) < size else "more"
        raise DataError(
            f"{path}: sizes {' x '.join(map(str, shape))} require {size:,} bytes after the header, got {got}. "
            "The file is damaged: download it again."
        )
    return np.frombuffer(body, np.uint8).reshape(shape)
