"""`load`: tells a name, a path, a factory and data in memory apart, and hands each to the module that reads it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch.utils.data import Dataset

from steadynorm.errors import DataError
from steadynorm.experiment.data import arrays, idx, images, tables
from steadynorm.experiment.data.labelled import LabelledData
from steadynorm.files import user_code
from steadynorm.files.images import is_image
from steadynorm.files.tables import SUFFIXES, is_table

__all__ = ["Source", "load"]

Source: TypeAlias = (
    "str | os.PathLike[str] | Callable[[], object] | LabelledData | Dataset[Any] | tuple[Any, Any] | Mapping[str, Any]"
)

_ACCEPTED: Final = (
    '"digits"; a folder of MNIST-style idx files; a folder of images with one sub-folder per class; '
    f'a table ({", ".join(SUFFIXES)}, also .gz); an .npz file; or a factory "pkg.mod:function"'
)


def load(source: Source, *, label: str | None = None) -> LabelledData:
    """Reads a labelled data set into memory and checks it.

    | source | what becomes of it |
    | --- | --- |
    | "digits" | scikit-learn's bundled 1,797 digits, (N, 1, 8, 8), divided by 16 |
    | a folder with `train-images-idx3-ubyte` and so on | images (N, 1, H, W) over 255; the t10k pair is the test set |
    | a folder of folders of images | one class per folder, optionally below train/ and test/; 8-bit values over 255 |
    | .csv, .tsv, .parquet, .jsonl, .ndjson, .json | a table; needs the extra `tables`; text of few values is one-hot |
    | .npz | arrays named x, y or data, target or x_train, y_train, x_test, y_test and the like |
    | "pkg.mod:function" or a callable | what it returns: any of the rows below |
    | a `LabelledData` | itself |
    | (x, y), a torch `Dataset`, or a pair (train, test) of either | arrays or tensors |
    | a mapping | named arrays, as in an .npz |

    Arrays: x of shape (N, F) is a table; (N, H, W), (N, C, H, W) and (N, H, W, C) are images. Whole-number pixels with
    a largest value of 128 to 255 are divided by 255; 0/1 and floating-point ones are used as they are, if they are
    of order one.

    Args:
        source: One of the above. A path wins over a factory of the same spelling; write "./digits" for a folder
            called digits.
        label: The label column of a table; by default the one called label, target, class or y.

    Returns:
        The data set, on the CPU.

    Raises:
        DataError: The source is not there, is damaged, or does not hold what a classification needs; the message
            says which file, row or column and what to do.
        MissingDependencyError: A table, without the extra `tables`.

    Example:
        >>> data = load("digits")
        >>> data.x.shape, len(data.classes)
        (torch.Size([1797, 1, 8, 8]), 10)
        >>> load((torch.rand(30, 4), torch.arange(30) % 3)).classes
        ('0', '1', '2')
    """
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        try:
            return _from_text(text, label)
        except OSError as error:
            raise DataError(f"cannot read {text!r}: {error}. Check the path and its permissions.") from error
    if label is not None:
        raise DataError(f"label= names the column of a table file, got label={label!r} with a {type(source).__name__}.")
    if callable(source) and not isinstance(source, LabelledData | Dataset):
        return _from_factory(source, str(getattr(source, "__qualname__", type(source).__name__)))
    return arrays.from_object("arrays", source)


def _from_text(text: str, label: str | None) -> LabelledData:
    path = Path(text).expanduser()
    if label is not None and not is_table(path):
        raise DataError(f"label= names the column of a table file ({', '.join(SUFFIXES)}), got {text!r}.")
    if text == "digits":
        return _digits()
    if path.is_dir():
        return idx.read_folder(path) if idx.is_folder(path) else images.read_folder(path)
    if path.is_file():
        return _from_file(path, label)
    if user_code.is_name(text):
        return _from_factory(user_code.import_named(text, DataError), text)
    remote = " Only local files are read: download it first." if "://" in text else ""
    raise DataError(f"no file or folder {text!r}.{remote} Data is {_ACCEPTED}.")


def _from_file(path: Path, label: str | None) -> LabelledData:
    if is_table(path):
        return tables.read(path, label)
    if path.suffix.lower() == ".npz":
        return arrays.read_npz(path)
    hint = " Pass the folder that it lies in." if "ubyte" in path.name or is_image(path) else ""
    raise DataError(
        f"{path}: a file of this kind ({path.suffix or 'no suffix'}) cannot be read.{hint} Data is {_ACCEPTED}."
    )


def _from_factory(factory: Callable[..., object], name: str) -> LabelledData:
    result = user_code.call(factory, name=f"the data factory {name!r}", error=DataError)
    return arrays.from_object(name, result)


def _digits() -> LabelledData:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    return LabelledData("digits", x, torch.from_numpy(bunch.target).long(), tuple("0123456789"), "image")
