"""Tables outside of this process's memory: files, read by DuckDB, and whatever else Ibis can name."""

import glob
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from steadynorm.errors import ArgumentError, DataError, MissingDependencyError
from steadynorm.files.tables import MISSING, SUFFIXES, odd_line, separator_of, suffix_of
from steadynorm.shift.reading.engine import TableFrame

__all__ = ["TABLE_SUFFIXES", "from_files", "from_ibis", "from_url"]

_ARROW: Final = (".arrow", ".feather", ".ipc")
TABLE_SUFFIXES: Final = (*SUFFIXES, *_ARROW)
"""How the names of table files end; text formats may be compressed by gzip (.gz)."""

_SORTS: Final = {
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON"),
    **dict.fromkeys(_ARROW, "Arrow"),
}
# Without BOOLEAN: yes and no in one file, yes, no and maybe in the next, are one column of categories.
# Without DATE and TIMESTAMP WITH TIME ZONE: "inf" would be one. A plain date is a time as well; see `_zoned_times`.
_CSV_TYPES: Final = ["BIGINT", "DOUBLE", "TIMESTAMP", "VARCHAR"]
_ZONED: Final = "timestamp('UTC')"
_MEMORY: Final = "1GB"  # for DuckDB's own buffers; beyond it, DuckDB spills to the temporary folder


def from_files(name: str, paths: Sequence[Path], stack: ExitStack) -> TableFrame:
    """One table out of files of one sort; a column that one of them lacks is missing there.

    Text and Arrow files are rewritten once as Parquet in a temporary folder, since every pass would parse them again.

    Args:
        name: What reports call it.
        paths: Existing local files.
        stack: Closes the connection and removes the temporary folder in the end.

    Raises:
        DataError: Files of several sorts, a damaged one, or one that is not what its name says.
        MissingDependencyError: The extra `tables` is not installed.
    """
    sorts = sorted({_SORTS.get(suffix_of(path), f"{path.suffix or 'no suffix'}") for path in paths})
    if len(sorts) > 1 or sorts[0] not in _SORTS.values():
        raise DataError(
            f"{name}: table files of one sort are required, got {', '.join(sorts)}. Name files that end in one of "
            f"{', '.join(TABLE_SUFFIXES)}."
        )
    ibis = _ibis(name)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steadynorm-")))
    connection = _connected(ibis, folder)
    stack.callback(connection.disconnect)
    # Absolute, so that no name reads as a URL, and escaped, so that none reads as a pattern.
    names = [glob.escape(str(path.resolve())) for path in paths]
    if sorts[0] == "CSV":
        names = [_from_csv(connection, paths, names, folder)]
    elif sorts[0] == "JSON":
        names = [_from_json(connection, paths, names, folder)]
    elif sorts[0] == "Arrow":
        names = [_from_arrow(path, folder / f"{i}.parquet") for i, path in enumerate(paths)]
    try:
        table = connection.read_parquet(names, hive_partitioning=False, union_by_name=True)
        table = _zoned_times(table) if sorts[0] == "CSV" else _known_times(table)
    except Exception as error:
        raise _damaged(paths, "Parquet", error) from error
    return TableFrame.of(name, table, ordered=True)


def _known_times(table: Any) -> Any:
    """Ibis knows DuckDB's times with a zone to the microsecond only, and pandas writes nanoseconds."""
    fine = [name for name, dtype in table.schema().items() if dtype.is_unknown() and "TIMESTAMPTZ_NS" in str(dtype)]
    return table.mutate(**{name: table[name].cast(_ZONED) for name in fine}) if fine else table


def _zoned_times(table: Any) -> Any:
    """Columns of text in which every value is a time with a zone, as in 2024-05-01T12:00:00Z, become times."""
    texts = [name for name, dtype in table.schema().items() if dtype.is_string()]
    some = table.select(*texts).limit(1).to_pyarrow().to_pylist() if texts else []
    likely = [name for name in texts if some and _starts_like_a_time(some[0][name])]
    if not likely:
        return table
    counts: dict[str, Any] = {}
    for i, name in enumerate(likely):
        whole = table[name].like("____-__-__%:%")
        counts |= {f"all{i}": table[name].count(), f"times{i}": table[name].try_cast(_ZONED).count(where=whole)}
    found = table.aggregate(**counts).to_pyarrow().to_pylist()[0]
    times = [name for i, name in enumerate(likely) if 0 < found[f"all{i}"] == found[f"times{i}"]]
    return table.mutate(**{name: table[name].try_cast(_ZONED) for name in times}) if times else table


def _starts_like_a_time(text: str | None) -> bool:
    return text is None or (len(text) > 10 and text[4:5] == text[7:8] == "-" and ":" in text)


def from_url(text: str, stack: ExitStack) -> TableFrame:
    """A table of a database: "engine-url::table", such as "duckdb://file.ddb::sales" or "postgres://...::main.sales".

    Raises:
        DataError: There is no such database or table. The message shows no more of the address than its engine, since
            addresses hold passwords.
        MissingDependencyError: The extra `tables`, or the engine's own driver, is not installed.
    """
    address, _, wanted = text.rpartition("::")
    engine, _, place = address.partition("://")
    shown = f"{engine}://...::{wanted}"
    if not engine or not wanted:
        raise ArgumentError(f'a table in a database is named "engine-url::table", got {shown!r}.')
    ibis = _ibis(shown)
    file = place.partition("?")[0]
    if engine in ("duckdb", "sqlite") and not Path(file).expanduser().is_file():
        raise DataError(f"{shown}: there is no database file {file!r}. Check the path.")
    try:
        if engine == "duckdb":
            connection: Any = ibis.duckdb.connect(str(Path(file).expanduser()), read_only=True)
            _set_up(connection)
            # By SET, since both sides may be tables of one file, which takes one configuration.
            connection.raw_sql(f"SET memory_limit = '{_MEMORY}'")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="steadynorm-"))
            with suppress(Exception):  # the other side has set it
                connection.raw_sql(f"SET temp_directory = '{folder}'")
        else:
            connection = ibis.connect(address)
    except ImportError as error:
        raise MissingDependencyError(
            f'{shown}: Ibis lacks a driver for this engine: pip install "ibis-framework[{engine}]"'
        ) from error
    except Exception as error:
        raise DataError(
            f"{shown}: no connection ({type(error).__name__}). Check the address and its password."
        ) from error
    stack.callback(connection.disconnect)
    return TableFrame.of(wanted, _named(connection, wanted, shown))


def from_ibis(name: str, table: Any) -> TableFrame:
    """An Ibis table expression, run by the engine that it belongs to."""
    return TableFrame.of(name, table)


def _named(connection: Any, wanted: str, shown: str) -> Any:
    """The table; what stands before a dot is its schema, unless a table is called so as a whole."""
    schema, _, table = wanted.rpartition(".")
    for name, database in ((wanted, None), (table, schema or None)):
        # Every engine has its own way to say that there is none.
        with suppress(Exception):
            return connection.table(name, database=database)
    there: list[str] = []
    with suppress(Exception):
        there = sorted(map(str, connection.list_tables()))
    known = f" The tables: {', '.join(there[:20])}{', ...' if len(there) > 20 else ''}." if there else ""
    raise DataError(f"{shown}: there is no such table, or it may not be read.{known}")


def _ibis(name: str) -> Any:
    try:
        import ibis
    except ImportError as error:
        raise MissingDependencyError(
            f'reading {name} needs Ibis and DuckDB, which are not installed: pip install "steadynorm[tables]"'
        ) from error
    return ibis


def _connected(ibis: Any, folder: Path) -> Any:
    # Rows keep their order: together with single-threaded sampling, the same seed then draws the same rows.
    connection = ibis.duckdb.connect(
        ":memory:",
        memory_limit=_MEMORY,
        threads=os.cpu_count() or 1,
        temp_directory=str(folder / "spilled"),
        autoinstall_known_extensions=False,
    )
    connection.raw_sql("SET parquet_metadata_cache = true")  # else every query parses it again, a third of its time
    _set_up(connection)
    return connection


def _set_up(connection: Any) -> None:
    connection.raw_sql("SET enable_progress_bar = false")  # which would write to the standard output
    connection.raw_sql("SET TimeZone = 'UTC'")


def _from_csv(connection: Any, paths: Sequence[Path], names: list[str], folder: Path) -> str:
    separators = {separator_of(path) for path in paths}
    if len(separators) > 1:
        raise DataError(
            f"{paths[0].parent}: files with one separator are required, got "
            f"{', '.join(map(repr, sorted(separators)))}. Export them alike."
        )
    try:
        relation = connection.con.read_csv(
            names,
            header=True,
            skiprows=0,
            sep=separators.pop(),
            quotechar='"',
            comment="",
            sample_size=-1,
            na_values=MISSING,
            auto_type_candidates=_CSV_TYPES,
            hive_partitioning=False,
            union_by_name=len(names) > 1,
        )
        return _written(relation, folder)
    except Exception as error:
        for path in paths:
            if (reason := odd_line(path, separator_of(path))) is not None:
                raise DataError(
                    f"{path}: cannot be read as CSV: {reason}. Mend the file, or export it again."
                ) from error
        raise _damaged(paths, "CSV", error) from error


def _from_json(connection: Any, paths: Sequence[Path], names: list[str], folder: Path) -> str:
    for path in paths:
        if not path.stat().st_size:
            raise DataError(f"{path}: a JSON object per line is required, got an empty file. Export it again.")
    layout = "auto" if any(suffix_of(path) == ".json" for path in paths) else "newline_delimited"
    try:
        relation = connection.con.read_json(names, format=layout, sample_size=-1, union_by_name=len(names) > 1)
        return _written(relation, folder)
    except Exception as error:
        raise _damaged(paths, "JSON", error) from error


def _written(relation: Any, folder: Path) -> str:
    target = folder / "table.parquet"
    relation.write_parquet(str(target))
    return glob.escape(str(target))


def _from_arrow(path: Path, target: Path) -> str:
    """Batch by batch, so that no more than a batch is in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader: Any = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            except pa.ArrowInvalid:  # not the file format, but maybe the stream
                source.seek(0)
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            with pq.ParquetWriter(target, reader.schema) as writer:
                for batch in batches:
                    writer.write_batch(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged([path], "Arrow", error) from error
    return glob.escape(str(target))


def _damaged(paths: Sequence[Path], sort: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split("\n\n")[0].split())[:300] or type(error).__name__
    named = f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return DataError(f"{named}: cannot be read as {sort}: {reason}. Mend the file, or export it again.")
