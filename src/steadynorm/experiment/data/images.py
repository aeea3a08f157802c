"""A folder of images, one sub-folder per class, optionally below train/ and test/."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from steadynorm.errors import DataError
from steadynorm.experiment.data.labelled import LabelledData, check_size
from steadynorm.files.images import SUFFIXES, is_image, read_image

__all__ = ["read_folder"]


def read_folder(folder: Path) -> LabelledData:
    """Reads every image below a folder; the folders directly below it, or below its train/ and test/, are the classes.

    Args:
        folder: The folder. Hidden files and files that are no images by their names are passed over.

    Returns:
        Images (N, C, H, W) in [0, 1]: C = 1 if every image is grey (16-bit ones divided by 65535, others by 255),
        else C = 3, all converted to RGB. Transparency is dropped; of an animation the first frame counts.

    Raises:
        DataError: No class folders or an empty one, an image that cannot be read, or one of another size than the
            first.
    """
    folders = _subfolders(folder)
    fixed_test = {"train", "test"} <= set(folders)
    if fixed_test and len(folders) > 2:
        others = ", ".join(sorted(set(folders) - {"train", "test"}))
        raise DataError(
            f"{folder}: besides train/ and test/ no other folder is read, found {others}. Move its images into "
            "train/ (validation examples are taken out of it) or leave it out."
        )
    classes = tuple(sorted(_subfolders(folders["train"]))) if fixed_test else tuple(sorted(folders))
    if fixed_test and set(_subfolders(folders["test"])) != set(classes):
        raise DataError(
            f"{folder}: train/ and test/ must hold the same classes, got {_some(classes)} in train/ and "
            f"{_some(_subfolders(folders['test']))} in test/. Rename or add the folders that differ."
        )
    if not classes:
        raise DataError(
            f"{folders.get('train', folder)}: idx files (train-images-idx3-ubyte, ...) or one folder of images per "
            f"class are required, got {'none of them' if any(folder.iterdir()) else 'an empty folder'}. "
            "Sort the images into folders named after their classes."
        )
    train = _files(folders["train"] if fixed_test else folder, classes)
    test = _files(folders["test"], classes) if fixed_test else []
    pixels = _pixels([path for path, _ in train + test])
    x, y = torch.from_numpy(pixels), torch.tensor([label for _, label in train + test])
    n = len(train)
    fixed = (x[n:], y[n:]) if fixed_test else None
    return LabelledData(folder.resolve().name, x[:n], y[:n], classes, "image", fixed)


def _subfolders(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The images of each class folder with their labels, in the order of their names."""
    found: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        files = sorted(path for path in (folder / name).iterdir() if is_image(path) and not path.name.startswith("."))
        if not files:
            raise DataError(
                f"{folder / name}: every class folder must hold images ({', '.join(sorted(SUFFIXES))}) directly, "
                "found none in this one. Add some, or remove the folder."
            )
        found += [(path, label) for path in files]
    return found


def _pixels(files: list[Path]) -> NDArray[np.float32]:
    """(N, C, H, W) in [0, 1]: C = 1 as long as every image is grey, else 3."""
    height, width, channels = read_image(files[0]).shape
    check_size(len(files) * channels * height * width, str(files[0].parent.parent))
    pixels = np.empty((len(files), channels, height, width), np.float32)
    for i, path in enumerate(files):
        image = read_image(path)
        if image.shape[:2] != (height, width):
            raise DataError(
                f"{path}: all images must have one size, {width} x {height} as {files[0]}, "
                f"got {image.shape[1]} x {image.shape[0]}. Resize the images to one size first."
            )
        if image.shape[2] > pixels.shape[1]:  # the first colour image after grey ones
            check_size(pixels.size * 3, str(files[0].parent.parent))
            pixels = np.repeat(pixels, 3, axis=1)
        pixels[i] = image.transpose(2, 0, 1)
    return pixels


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (", ..." if len(ordered) > 10 else "") or "none"
