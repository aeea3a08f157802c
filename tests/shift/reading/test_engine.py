import datetime
import math
import os
import sys

import numpy as np
import pytest

from steadynorm.errors import DataError
from steadynorm.shift.reading.engine import TableFrame
from steadynorm.shift.reading.expressions import sampled_rows
from steadynorm.shift.reading.scan import scan
from support_tables import rows, write

ibis = pytest.importorskip("ibis")


def agree(one, other, exact_order: bool):
    """Two scans of the same rows by different engines."""
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert list(mine.columns) == list(theirs.columns)
        for name, a in mine.columns.items():
            b = theirs.columns[name]
            for field in ("kind", "rows", "missing", "infinite", "below", "above", "counts", "other", "distinct"):
                assert getattr(a, field) == getattr(b, field), (name, field)
            for field in ("mean", "std", "minimum", "maximum"):
                told, expected = getattr(a, field), getattr(b, field)
                assert told == (expected if expected is None else pytest.approx(expected, rel=1e-12, abs=1e-12)), name
            if exact_order:
                np.testing.assert_array_equal(a.values, b.values)
            else:
                np.testing.assert_array_equal(np.sort(a.values), np.sort(b.values))


def wide(seed: int, columns: int = 45) -> dict:
    rng = np.random.default_rng(seed)
    table = rows(200, seed)
    table |= {f"x{i}": rng.normal(i, 1 + i, 200).tolist() for i in range(columns)}
    table["x3"][5:8] = [math.nan, math.inf, -math.inf]
    table["flag"] = [None if k == 0 else k == 1 for k in rng.integers(0, 3, 200).tolist()]
    start = datetime.datetime(2024, 5, 1, 12, 30)
    table["when"] = [start + datetime.timedelta(hours=k) for k in rng.integers(0, 999, 200).tolist()]
    return table


def test_more_columns_than_one_query_takes(tmp_path):
    old, new = wide(0), wide(1)
    kinds = {"whole": "categorical"}
    files = [write(table, tmp_path / f"{i}.parquet") for i, table in enumerate((old, new))]
    agree(scan(*files, types=kinds), scan(old, new, types=kinds), exact_order=True)


def test_an_expression_of_ibis():
    pa = pytest.importorskip("pyarrow")
    day = datetime.datetime(2024, 5, 1)
    table = ibis.memtable(pa.table(rows() | {"when": [day] * 400}))
    kept = table.filter(table.whole > 10).mutate(double=table.x * 2)
    a, b, _ = scan(kept, rows())
    assert scan(kept, kept)[0].columns["when"].maximum == day.replace(tzinfo=datetime.UTC).timestamp()
    whole = [v for v in rows()["whole"] if v > 10]
    assert (a.rows, a.columns["whole"].mean) == (len(whole), pytest.approx(sum(whole) / len(whole)))
    assert (a.name, b.name, a.row_numbers) == ("reference", "current", None)


def test_types_of_every_sort(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    file = tmp_path / "t.parquet"
    duckdb.sql(
        "select 1::tinyint a, 2::ubigint b, 1.25::decimal(9, 2) c, 1.5::float d, 1e26::hugeint e, "
        "'x'::varchar f, uuid() g, date '2020-01-01' h, timestamp '2020-01-01 00:00:01' i, "
        "timestamptz '2020-01-01 02:00:00+02' j, true k, [1] l, {'a': 1} m, 'x'::blob n, time '01:02:03' o, "
        "interval 1 day p"
    ).write_parquet(str(file))
    a, _, schema = scan(file, file)
    assert {name: column.kind for name, column in a.columns.items()} == {
        **dict.fromkeys("abcde", "numeric"),
        **dict.fromkeys("fg", "categorical"),
        **dict.fromkeys("hij", "time"),
        "k": "boolean",
    }
    assert [name for name, _ in schema.left_out] == list("lmnop")
    assert (a.columns["c"].mean, a.columns["e"].mean, a.columns["j"].mean) == (1.25, 1e26, 1_577_836_800.0)


def test_a_null_typed_column(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    file = tmp_path / "t.ddb"
    with duckdb.connect(str(file)) as connection:
        connection.execute("create view t as select 1.5 as x, null as n")
    for kind in ("numeric", "categorical", "boolean", "time", "text"):
        a, b, _ = scan(f"duckdb://{file}::t", {"x": [1.0], "n": ["a"]}, types={"n": kind})
        assert (a.columns["n"].kind, a.columns["n"].missing, a.columns["n"].values.shape) == (kind, 1, (1,))
    a, b, _ = scan(f"duckdb://{file}::t", {"x": [1.0], "n": ["a"]})
    assert (a.columns["n"].counts, b.columns["n"].counts) == ({"a": 0}, {"a": 1})


def test_times_do_not_depend_on_the_machines_zone(tmp_path, monkeypatch):
    when = datetime.datetime(2024, 7, 1, 12, tzinfo=datetime.UTC)
    file = write({"t": [when], "n": [when.replace(tzinfo=None)]}, tmp_path / "t.parquet")
    monkeypatch.setenv("TZ", "America/New_York")
    columns = scan(file, file)[0].columns
    assert columns["t"].mean == columns["n"].mean == when.timestamp()


def test_what_an_engine_raises_becomes_one_line(tmp_path):
    file = write(rows(), tmp_path / "t.parquet")
    table = ibis.duckdb.connect(":memory:").read_parquet(str(file))
    frame = TableFrame.of("t", table)
    file.unlink()
    with pytest.raises(DataError, match="t: cannot be read: IO Error") as caught:
        frame.facts({"x": "numeric"}, {})
    assert "\n" not in str(caught.value)

    class Gone:
        def schema(self):
            raise RuntimeError("the session has ended\n\nwith a long story")

    with pytest.raises(DataError, match=r"t: cannot be read: the session has ended\. Mend"):
        TableFrame.of("t", Gone())


def test_a_table_without_columns_has_no_rows():
    class Bare:
        def schema(self):
            return {}

    assert TableFrame.of("t", Bare()).rows == 0


def test_counts_of_categories_by_their_text(tmp_path):
    table = {"s": ["a", "b", "a"], "n": [1.0, 2.5, 1.0], "b": [True, False, True], "t": [datetime.date(2020, 1, 1)] * 3}
    frame = TableFrame.of("t", ibis.duckdb.connect(":memory:").read_parquet(str(write(table, tmp_path / "t.parquet"))))
    assert frame.counts_of("s", ["a", "z"]) == {"a": 2}
    assert frame.counts_of("n", ["1", "2.5", "red"]) == {"1": 2, "2.5": 1}
    assert frame.counts_of("b", ["true", "maybe"]) == {"true": 2}
    assert frame.counts_of("t", ["2020-01-01T00:00:00+00:00", "soon"]) == {"2020-01-01T00:00:00+00:00": 3}
    assert frame.counts_of("n", ["red"]) == {}


def test_an_engine_without_seeds_samples_without_one():
    class Query:
        def __init__(self, seed):
            self.seed = seed

        def compile(self):
            if self.seed is not None:
                raise ibis.common.exceptions.UnsupportedOperationError("no seeds")

    class Table:
        def sample(self, fraction, *, method, seed=None):
            assert (fraction, method) == (0.5, "row")
            return Query(seed)

    assert sampled_rows(Table(), 0.5, seed=3).seed is None


@pytest.fixture(scope="module")
def spark():
    pytest.importorskip("pyspark", reason="PySpark is not installed: the extra `spark`")
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    session = (
        builder.config("spark.sql.shuffle.partitions", "1").config("spark.sql.session.timeZone", "UTC").getOrCreate()
    )
    yield session
    session.stop()


@pytest.mark.slow
def test_the_same_expressions_on_spark(spark, tmp_path):
    connection = ibis.pyspark.connect(spark)
    old, new = wide(0, 4), wide(1, 4)
    files = [write(table, tmp_path / f"{i}.parquet") for i, table in enumerate((old, new))]
    tables = [connection.read_parquet(str(file)) for file in files]
    kinds = {"whole": "categorical"}
    agree(scan(*tables, types=kinds), scan(old, new, types=kinds), exact_order=False)
    side = scan(*tables, sample=50)[0]
    assert side.sampled <= 50
    assert set(side.columns["x0"].values) <= set(old["x0"])
