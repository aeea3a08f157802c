"""The columns of one local CSV, TSV, Parquet or JSON file, read by DuckDB (the extra `tables`)."""

import glob
import importlib
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from steadynorm.errors import DataError, MissingDependencyError
from steadynorm.files.tables import MISSING, odd_line, separator_of, suffix_of

__all__ = ["read_columns"]

# Without BOOLEAN, under which DuckDB would turn the labels yes and no, or t and f, into True and False.
_CSV_TYPES: Final = ["BIGINT", "DOUBLE", "DATE", "TIMESTAMP", "VARCHAR"]


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
    suffix = suffix_of(path)
    separator = separator_of(path) if suffix in (".csv", ".tsv") else None
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
                    na_values=MISSING,
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
        reason = None if separator is None else odd_line(path, separator)
        reason = reason or " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
        raise DataError(f"{path}: cannot be read as {suffix}: {reason}. Mend the file, or export it again.") from error
