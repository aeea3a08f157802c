"""Small files of every kind, with values known by hand."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _write_idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    content = head + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _mnist_folder(folder: Path, suffix: str = "", test: bool = True) -> np.ndarray:
    images = np.arange(10 * 6).reshape(10, 2, 3) * 4
    _write_idx(folder / f"train-images-idx3-ubyte{suffix}", images)
    _write_idx(folder / f"train-labels-idx1-ubyte{suffix}", np.array([0, 1] * 5))
    if test:
        _write_idx(folder / f"t10k-images-idx3-ubyte{suffix}", images[:2] + 1)
        _write_idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.array([1, 0]))
    return images


def _image_folder(folder: Path, classes: dict[str, int], mode: str = "L", n: int = 5, size=(4, 3)) -> None:
    for name, value in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new(mode, size, value if mode == "L" else (value, 0, 255)).save(folder / name / f"{i}.png")


def _write_csv(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture(scope="session")
def mnist_folder() -> Callable[..., object]:
    return _mnist_folder


@pytest.fixture(scope="session")
def image_folder() -> Callable[..., object]:
    return _image_folder


@pytest.fixture(scope="session")
def write_csv() -> Callable[..., object]:
    return _write_csv
