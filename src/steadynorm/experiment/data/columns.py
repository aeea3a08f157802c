"""The columns of one local CSV, TSV, Parquet or JSON file, read by DuckDB (the extra `tables`)."""

import csv
import glob
import gzip
import importlib
import re
import zlib
from pathlib import Path
from typing import Any, Final, TextIO, cast

from numpy.typing import NDArray

from steadynorm.errors import DataError, MissingDependencyError

__all__ = ["SUFFIXES", "is_table", "read_columns"]

SUFFIXES: Final = (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson", ".json")

_MISSING: Final = ["", "NA", "N/A", "NaN", "nan", "NULL", "null", "?"]
# Without BOOLEAN, under which DuckDB would turn the labels yes and no, or t and f, into True and False.
_CSV_TYPES: Final = ["BIGINT", "DOUBLE", "DATE", "TIMESTAMP", "VARCHAR"]


def is_table(path: Path) -> bool:
    """Whether a file's name ends like a table's, compressed by gzip or not."""
    return _suffix(path) in SUFFIXES


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Every column of a table file, by name and in order.

    Args:
        path: An existing local file.

    Returns:
        One (N,) array each; a missing value (in CSV also NA, NaN, null and ?) is masked or NaN.

    Raises:
        DataError: The file is damaged or not of the kind that its name says.
        MissingDependencyError: DuckDB is not installed.
    """
    try:
        duckdb: Any = importlib.import_module("duckdb")
    except ImportError as error:
        raise MissingDependencyError(
            f'reading the table {path} needs DuckDB, which is not installed: pip install "steadynorm[tables]"'
        ) from error
    # Absolute, so that no name reads as a URL, and escaped, so that none reads as a pattern: this one local file.
    name = glob.escape(str(path.resolve()))
    suffix = _suffix(path)
    separator = _separator(path) if suffix in (".csv", ".tsv") else None
    try:
        with duckdb.connect(":memory:", config={"autoinstall_known_extensions": "false"}) as connection:
            if separator is not None:
                relation = connection.read_csv(
                    name,
                    header=True,
                    skiprows=0,
                    sep=separator,
                    quotechar='"',
                    sample_size=-1,
                    na_values=_MISSING,
                    auto_type_candidates=_CSV_TYPES,
                    hive_partitioning=False,
                )
            elif suffix == ".parquet":
                relation = connection.read_parquet(name, hive_partitioning=False)
            else:
                layout = "auto" if suffix == ".json" else "newline_delimited"
                relation = connection.read_json(name, format=layout, sample_size=-1, hive_partitioning=False)
            return dict(relation.fetchnumpy())
    except (duckdb.Error, OSError, ValueError, MemoryError) as error:
        reason = None if separator is None else _odd_line(path, separator)
        reason = reason or " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
        raise DataError(f"{path}: cannot be read as {suffix}: {reason}. Mend the file, or export it again.") from error


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path, errors: str) -> TextIO:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    return cast("TextIO", opened(path, "rt", encoding="utf-8-sig", errors=errors, newline=""))


def _separator(path: Path) -> str:
    """What separates the names in the header: the most frequent candidate outside quotes, else a comma."""
    try:
        with _open(path, "replace") as file:
            header = file.readline()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}. Copy or export the file again.") from error
    if not header.strip():
        raise DataError(f"{path}: a table starts with a line of column names, got an empty line or file.")
    bare = re.sub(r'"[^"]*"', "", header)
    return max(("\t" if _suffix(path) == ".tsv" else ",", ",", ";", "\t", "|"), key=bare.count)


def _odd_line(path: Path, separator: str) -> str | None:
    """What is wrong with the first line that does not fit the header, if one is to be found."""
    try:
        with _open(path, "strict") as file:
            rows = csv.reader(file, delimiter=separator)
            width = len(next(rows, []))
            for row in rows:
                if row and len(row) != width:
                    return f"line {rows.line_num} has {len(row)} fields, the header {width}"
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 text ({error.reason} at byte {error.start:,} of a block)"
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        return str(error)
    return None
