"""What can be compared: tells files, tables, frames, arrays, data sets and images apart, and opens each."""

import glob
import itertools
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from steadynorm.errors import ArgumentError, DataError, MissingDependencyError
from steadynorm.files.images import SUFFIXES as IMAGE_SUFFIXES
from steadynorm.files.images import is_image
from steadynorm.files.tables import suffix_of
from steadynorm.shift.reading import datasets, images, numpy_files, tables
from steadynorm.shift.reading.arrays import ArrayFrame
from steadynorm.shift.reading.frames import Frame
from steadynorm.shift.reading.values import Held, from_array, from_arrow, from_objects, from_series

__all__ = ["Source", "opened"]

Source: TypeAlias = "str | os.PathLike[str] | NDArray[Any] | Tensor | Mapping[str, Any] | Dataset[Any] | Any"
"""What `compare` takes.

| source | what its columns are |
| --- | --- |
| a path, a glob or a folder of .csv, .tsv, .jsonl, .ndjson, .json (also .gz), .parquet, .arrow, .feather | the files' |
| "engine-url::table", such as "duckdb://file.ddb::sales" | the table's |
| an `ibis.Table` | the expression's |
| a pandas, polars or pyarrow table, or any object with `__arrow_c_stream__` or `__dataframe__` | its own |
| a numpy array or a tensor (N,) or (N, F), a .npy | f0, f1, ... |
| images (N, C, H, W) | `images.FEATURES` of each |
| a mapping of names to 1-d arrays or lists, an .npz | its names; name_0, name_1, ... for a 2-d array |
| a torch `Dataset` | as above, of the first element of its examples; at most `datasets.MAX_EXAMPLES` of them |
| a folder of images, with folders in it | `images.FEATURES` of each; at most `datasets.MAX_EXAMPLES` of them |

In CSV and TSV, true and false are text, since yes, no and maybe are; NA, N/A, NaN, NULL, ? and nothing are missing.
Text and Arrow files are rewritten as Parquet in the temporary folder (`TMPDIR`) first, which is removed afterwards. In
several files, columns are matched by their names; one that a file lacks is missing in its rows.

A column's name that comes twice in a file or frame gets _1, _2, ... In files, names that differ only in upper and lower
case count as the same name.
"""

_ACCEPTED: Final = (
    f"a path or glob of tables ({', '.join(tables.TABLE_SUFFIXES)}; text also .gz), a .npy or .npz, a folder of "
    'images, "engine-url::table", a data frame, an ibis table, an array, a tensor, a mapping of columns, or a Dataset'
)


def opened(source: Source, role: str, stack: ExitStack, *, seed: int = 0, progress: bool = False) -> Frame:
    """Opens a source for reading.

    Args:
        source: One of the above. A path wins over the other readings of a text.
        role: "reference" or "current": what a source without a name is called.
        stack: Closes what was opened.
        seed: Of the choice of examples from a data set or a folder of images that has too many.
        progress: Shows a bar on the standard error while examples are read.

    Returns:
        Its columns.

    Raises:
        DataError: It is not there, is damaged, or holds no columns.
        ArgumentError: It is none of the above.
        MissingDependencyError: It needs the extra `tables`.
    """
    if isinstance(source, str | os.PathLike):
        text = os.fspath(cast("str", source))
        try:
            return _from_text(text, stack, seed, progress)
        except OSError as error:
            raise DataError(f"cannot read {text!r}: {error}. Check the path and its permissions.") from error
    if isinstance(source, Tensor):
        return _from_array(role, _plain(source))
    if isinstance(source, np.ndarray):
        return _from_array(role, cast("NDArray[Any]", source))
    if isinstance(source, Mapping):
        return _from_columns(role, cast("Mapping[str, Any]", source))
    if isinstance(source, Dataset):
        return datasets.read(role, cast("Dataset[Any]", source), seed, progress)
    return _from_frame(role, source)


def _from_text(text: str, stack: ExitStack, seed: int, progress: bool) -> Frame:
    if not text.strip():
        raise ArgumentError(f"an empty path names nothing. Required is {_ACCEPTED}.")
    path = Path(text).expanduser()
    if path.is_file():
        return _from_file(path, stack)
    if path.is_dir():
        return _from_folder(path, stack, seed, progress)
    if "::" in text and "://" in text:
        return tables.from_url(text, stack)
    if any(sign in text for sign in "*?["):
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        found = sorted(each for each in map(Path, matches) if each.is_file())
        if not found:
            raise DataError(
                f"no file matches {text!r}. Check the pattern, or quote it so that the shell leaves it alone."
            )
        return tables.from_files(Path(text).name, found, stack)
    remote = ' A table in a database is named "engine-url::table".' if "://" in text else ""
    raise DataError(f"no file or folder {text!r}.{remote} Required is {_ACCEPTED}.")


def _from_file(path: Path, stack: ExitStack) -> Frame:
    if path.suffix.lower() in (".npy", ".npz"):
        arrays = numpy_files.read(path)
        return _from_array(path.name, arrays) if isinstance(arrays, np.ndarray) else _from_columns(path.name, arrays)
    if suffix_of(path) in tables.TABLE_SUFFIXES:
        return tables.from_files(path.name, [path], stack)
    hint = " Pass the folder that it lies in." if is_image(path) else ""
    raise DataError(
        f"{path}: a file of this kind ({path.suffix or 'no suffix'}) cannot be read.{hint} Required is {_ACCEPTED}."
    )


def _from_folder(path: Path, stack: ExitStack, seed: int, progress: bool) -> Frame:
    files = [each for each in sorted(path.rglob("*")) if each.is_file() and not _hidden(each.relative_to(path))]
    pictures = [each for each in files if is_image(each)]
    found = [each for each in files if suffix_of(each) in tables.TABLE_SUFFIXES]
    if pictures and found:
        raise DataError(
            f"{path}: a folder of images or of table files is required, got both, {pictures[0].name!r} and "
            f"{found[0].name!r} among them. Name the files with a glob."
        )
    if pictures:
        return datasets.read_images(path.resolve().name, pictures, seed, progress)
    if found:
        return tables.from_files(path.resolve().name, found, stack)
    raise DataError(
        f"{path}: a folder of images ({', '.join(sorted(IMAGE_SUFFIXES))}) or of table files is required, got "
        f"{f'{len(files)} files of other kinds' if files else 'no files'}. Check the path."
    )


def _hidden(path: Path) -> bool:
    """Spark and others write their own notes beside the data, in names that start with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in path.parts)


def _plain(tensor: Tensor) -> NDArray[Any]:
    """numpy has no bfloat16."""
    try:
        own = tensor.detach().cpu()
        return (own.float() if own.dtype == torch.bfloat16 else own).numpy()
    except (TypeError, RuntimeError, NotImplementedError) as error:  # sparse, quantised, meta
        raise DataError(
            f"a plain dense tensor is required, got {tensor.layout}, {tensor.dtype}. Convert it."
        ) from error


def _from_array(name: str, array: NDArray[Any]) -> ArrayFrame:
    if array.dtype.names:
        return _from_columns(name, {field: array[field] for field in array.dtype.names})
    if array.ndim == 1:
        return ArrayFrame(name, len(array), {"f0": from_array(array)})
    if array.ndim == 2:
        return ArrayFrame(name, len(array), {f"f{i}": from_array(array[:, i]) for i in range(array.shape[1])})
    if array.ndim == 4:
        return images.frame_of(name, array)
    raise DataError(
        f"{name}: an array of shape (N,), (N, F) or (N, C, H, W) is required, got {array.shape}. Reshape it."
    )


def _from_columns(name: str, columns: Mapping[str, Any]) -> ArrayFrame:
    held: dict[str, Held] = {}
    lengths: dict[str, int] = {}
    for key, values in columns.items():
        for column, part in _parts(name, str(key), values).items():
            if column in held:
                raise DataError(f"{name}: two columns would be called {column!r}. Rename one of them.")
            held[column], lengths[column] = part
    return _framed(name, held, lengths)


def _parts(name: str, key: str, values: Any) -> dict[str, tuple[Held, int]]:
    if isinstance(values, Tensor):
        values = _plain(values)
    if isinstance(values, np.ndarray):
        array = cast("NDArray[Any]", values)
        if array.ndim == 1:
            return {key: (from_array(array), len(array))}
        if array.ndim == 2:
            return {f"{key}_{i}": (from_array(array[:, i]), len(array)) for i in range(array.shape[1])}
        raise DataError(f"{name}: column {key!r} must be of shape (N,) or (N, F), got {array.shape}. Reshape it.")
    if isinstance(values, list | tuple):
        return {key: (from_objects(cast("list[Any]", values)), len(cast("list[Any]", values)))}
    if _is_pandas(values, "Series"):
        return {key: (from_series(values), len(values))}
    raise ArgumentError(
        f"{name}: column {key!r} must be a 1-d array, tensor or list, got a {type(values).__name__}. Convert it first."
    )


def _framed(name: str, held: Mapping[str, Held], lengths: Mapping[str, int]) -> ArrayFrame:
    if not held:
        raise DataError(f"{name}: at least one column is required, got none.")
    rows = next(iter(lengths.values()))
    odd = next((column for column, length in lengths.items() if length != rows), None)
    if odd is not None:
        raise DataError(
            f"{name}: columns of equal length are required, got {rows} rows in {next(iter(held))!r} and {lengths[odd]} "
            f"in {odd!r}. Leave out what does not belong to the table."
        )
    return ArrayFrame(name, rows, held)


def _from_frame(role: str, source: Any) -> Frame:
    ibis_types = sys.modules.get("ibis.expr.types")
    if ibis_types is not None and isinstance(source, ibis_types.Table):
        return tables.from_ibis(role, source)
    if _is_pandas(source, "Series"):
        source = source.to_frame()
    if _is_pandas(source, "DataFrame"):
        names = _unique([str(name) for name in source.columns])
        held = {name: from_series(source.iloc[:, i]) for i, name in enumerate(names)}
        return _framed(role, held, dict.fromkeys(held, len(source)))
    if not (hasattr(source, "__arrow_c_stream__") or hasattr(source, "__dataframe__")):
        raise ArgumentError(f"{role}: required is {_ACCEPTED}; got a {type(source).__name__}.")
    try:
        import pyarrow as pa
        from pyarrow import interchange
    except ImportError as error:
        raise MissingDependencyError(
            f"{role}: a {type(source).__name__} is read through pyarrow, which is not installed: "
            'pip install "steadynorm[tables]"'
        ) from error
    try:
        table: Any = pa.table(source) if hasattr(source, "__arrow_c_stream__") else interchange.from_dataframe(source)
        names = _unique([str(name) for name in table.column_names])
        held = {name: from_arrow(table.column(i)) for i, name in enumerate(names)}
    except (pa.ArrowException, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{role}: a {type(source).__name__} that Arrow can read is required: {error}.") from error
    return _framed(role, held, dict.fromkeys(held, int(table.num_rows)))


def _is_pandas(value: object, kind: str) -> bool:
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, getattr(pandas, kind))


def _unique(names: list[str]) -> list[str]:
    found: dict[str, None] = {}
    for name in names:
        others = (f"{name}_{i}" for i in itertools.count(1))
        found[name if name not in found else next(each for each in others if each not in {*found, *names})] = None
    return list(found)
