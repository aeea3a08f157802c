"""Data that is in memory already, or in an .npz: arrays, tensors, torch data sets, mappings, and pairs of them."""

import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from steadynorm.errors import DataError
from steadynorm.experiment.data.labelled import Kind, LabelledData, check_size
from steadynorm.experiment.data.labels import encode

__all__ = ["from_object", "read_npz"]

_Array: TypeAlias = NDArray[Any]
_Part: TypeAlias = tuple[_Array, _Array]

_NAMES: Final = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("X_train", "y_train", "X_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x", "y", "", ""),
    ("X", "y", "", ""),
    ("data", "target", "", ""),
    ("images", "labels", "", ""),
)
_ORDER_ONE: Final = 10.0


def read_npz(path: Path) -> LabelledData:
    """Reads named arrays from an .npz file; pickled objects in it are refused, never loaded.

    Raises:
        DataError: Not an .npz, damaged, with pickled objects, or without arrays of the names that `load` documents.
    """
    damaged = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, NotImplementedError,
               MemoryError, SyntaxError, RuntimeError, tokenize.TokenError)  # fmt: skip
    try:
        with zipfile.ZipFile(path) as archive:
            check_size(sum(member.file_size for member in archive.infolist()), str(path))
        with np.load(path, allow_pickle=False) as file:
            wanted = _names(path.name, file)
            arrays = {name: np.asarray(file[name]) for name in wanted if name}
    except DataError:
        raise
    except damaged as error:
        pickled = isinstance(error, ValueError) and "allow_pickle" in str(error)
        why = "it holds pickled objects, which could run any code" if pickled else f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: an .npz of plain numeric or text arrays is required, but {why}. "
            "Write it again with numpy.savez(path, x=..., y=...)."
        ) from error
    return _from_mapping(path.stem, arrays)


def from_object(name: str, source: object) -> LabelledData:
    """Turns what a factory returned, or a caller passed, into a data set; `load` documents the forms.

    Raises:
        DataError: None of those forms, or its contents cannot be used.
    """
    if isinstance(source, LabelledData):
        return source
    if isinstance(source, Mapping):
        return _from_mapping(name, cast("Mapping[str, Any]", source))
    if isinstance(source, Dataset):
        return _build(name, _dataset(name, source), None, getattr(source, "classes", None))
    pair = cast("tuple[object, ...]", source) if isinstance(source, tuple) else ()
    if len(pair) != 2:
        got = f"a tuple of {len(pair)}" if isinstance(source, tuple) else f"a {type(source).__name__}"
        raise DataError(
            f"{name}: (x, y), a pair (train, test), a torch Dataset, a mapping of arrays or a LabelledData is "
            f"required, got {got}."
        )
    if all(isinstance(part, tuple | Dataset) for part in pair):
        train, test = (_part(f"{name}, {which}", part) for which, part in zip(("train", "test"), pair, strict=True))
        return _build(name, train, test, getattr(pair[0], "classes", None))
    return _build(name, _part(name, pair), None, None)


def _names(where: str, available: Mapping[str, Any]) -> tuple[str, str, str, str]:
    for x, y, x_test, y_test in _NAMES:
        if x in available and y in available:
            return (x, y, x_test, y_test) if x_test in available and y_test in available else (x, y, "", "")
    known = "; ".join(", ".join(name for name in names if name) for names in _NAMES)
    raise DataError(f"{where}: arrays named {known} are required, got {', '.join(map(str, available)) or 'none'}.")


def _from_mapping(name: str, arrays: Mapping[str, Any]) -> LabelledData:
    x, y, x_test, y_test = _names(name, arrays)
    test = _part(f"{name}, test", (arrays[x_test], arrays[y_test])) if x_test else None
    return _build(name, _part(name, (arrays[x], arrays[y])), test, None)


def _part(where: str, part: object) -> _Part:
    if isinstance(part, Dataset):
        return _dataset(where, part)
    pair = cast("tuple[object, ...]", part)
    if len(pair) != 2:
        raise DataError(f"{where}: a pair (x, y) is required, got a tuple of {len(pair)}.")
    return _array(where, pair[0]), _array(where, pair[1])


def _dataset(where: str, dataset: "Dataset[Any]") -> _Part:
    """The examples of a map-style torch Dataset, one by one."""
    if isinstance(dataset, TensorDataset):
        return _part(where, dataset.tensors)
    if not hasattr(dataset, "__len__"):
        raise DataError(
            f"{where}: a Dataset with a length is required, got {type(dataset).__name__}. Collect it first."
        )
    rows: list[Any] = []
    for i in range(len(cast("Any", dataset))):
        row: Any = dataset[i]
        if not isinstance(row, tuple | list) or len(cast("tuple[Any, ...]", row)) != 2:
            raise DataError(f"{where}: example {i} of the Dataset must be a pair (x, y), got a {type(row).__name__}.")
        x, y = cast("tuple[Any, Any]", row)
        rows.append((_array(where, x), _array(where, y)))
        if rows[-1][0].shape != rows[0][0].shape:
            raise DataError(
                f"{where}: examples must have one shape, got {rows[0][0].shape} in example 0 and {rows[-1][0].shape} "
                f"in example {i}. Resize them in the Dataset's transform."
            )
    if not rows:
        raise DataError(f"{where}: the Dataset is empty.")
    return np.stack([x for x, _ in rows]), np.stack([y for _, y in rows])


def _array(where: str, value: object) -> _Array:
    try:
        if isinstance(value, Tensor):
            plain = value.detach().cpu()
            return (plain.float() if plain.is_floating_point() else plain).numpy()
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where}: an array or tensor is required, got a {type(value).__name__}: {error}.") from error


def _build(name: str, train: _Part, test: _Part | None, classes: object) -> LabelledData:
    labels, y, y_test = encode(name, train[1], test[1] if test else None)
    x, kind, scale = _examples(name, train[0])
    fixed: tuple[Tensor, Tensor] | None = None
    if test is not None and y_test is not None:
        if (test[0].dtype.kind == "f") != (train[0].dtype.kind == "f"):
            raise DataError(
                f"{name}: training and test examples must be on one scale, got {train[0].dtype} and {test[0].dtype}. "
                "Convert both to one dtype."
            )
        fixed = _shaped(f"{name}, test", test[0], scale)[0], y_test
    named = isinstance(classes, list | tuple) and all(label.isdecimal() for label in labels)
    if named and [int(label) for label in labels] == list(range(len(cast("list[Any]", classes)))):
        labels = tuple(str(each) for each in cast("list[Any]", classes))
    return LabelledData(name, x, y, labels, kind, fixed)


def _examples(where: str, x: _Array) -> tuple[Tensor, Kind, float]:
    if x.dtype.kind not in "biuf":
        raise DataError(f"{where}: numeric examples are required, got dtype {x.dtype}. Encode text as numbers first.")
    scale = 1.0
    if x.ndim > 2 and x.size:
        low, high = float(x.min()), float(x.max())
        if x.dtype.kind in "iu" and low >= 0 and 128 <= high <= 255:
            scale = 255.0
        elif max(abs(low), abs(high)) > (_ORDER_ONE if x.dtype.kind == "f" else 1):
            raise DataError(
                f"{where}: pixels must be whole numbers up to 255, or of order one, got {x.dtype} from {low:g} to "
                f"{high:g}. Divide by the largest possible value."
            )
    return *_shaped(where, x, scale), scale


def _shaped(where: str, x: _Array, scale: float) -> tuple[Tensor, Kind]:
    """float32, (N, F) or (N, C, H, W), divided by `scale`."""
    if x.dtype.kind not in "biuf" or x.ndim not in (2, 3, 4):
        raise DataError(
            f"{where}: numeric examples of shape (N, F), (N, H, W), (N, C, H, W) or (N, H, W, C) are required, "
            f"got {x.dtype} of shape {x.shape}. Reshape them."
        )
    check_size(x.size, where)
    with np.errstate(over="ignore"):  # what does not fit float32 becomes inf, which LabelledData reports with its place
        tensor = torch.from_numpy(np.array(x, dtype=np.float32, order="C"))
    if x.ndim == 2:
        return tensor, "table"
    if x.ndim == 3:
        return tensor.unsqueeze(1) / scale, "image"
    last = x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
    return (tensor.permute(0, 3, 1, 2).contiguous() if last else tensor) / scale, "image"
