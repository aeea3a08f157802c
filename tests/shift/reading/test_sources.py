import builtins
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from steadynorm.errors import ArgumentError, DataError, MissingDependencyError
from steadynorm.shift.reading import datasets
from steadynorm.shift.reading.scan import scan
from steadynorm.shift.reading.sources import opened
from support_tables import rows, write


def read(source, **options):
    return scan(source, source, **options)[0]


def means(source):
    return {name: column.mean for name, column in read(source).columns.items()}


@pytest.mark.parametrize("make", [np.asarray, torch.as_tensor], ids=["numpy", "torch"])
def test_arrays_and_tensors(make):
    assert means(make([1.0, 2.0, 6.0])) == {"f0": 3.0}
    assert means(make([[1, 20], [3, 40]])) == {"f0": 2.0, "f1": 30.0}
    assert read(make([[True], [False]])).columns["f0"].counts == {"false": 1, "true": 1}


def test_tensors_of_any_float_and_with_gradients():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert means(torch.tensor([[1.5], [2.5]], dtype=dtype, requires_grad=True)) == {"f0": 2.0}


def test_arrays_of_other_dtypes():
    assert read(np.array(["a", "b", "a"])).columns["f0"].counts == {"a": 2, "b": 1}
    days = np.array(["1970-01-02", "NaT", "1970-01-04"], dtype="datetime64[D]")
    assert read(days).columns["f0"].mean == 2 * 86_400
    months = read(np.array(["1970-02", "NaT"], dtype="datetime64[M]")).columns["f0"]
    assert (months.mean, months.missing) == (31 * 86_400, 1)
    assert read(np.array([1.0, None, 3.0], dtype=object)).columns["f0"].missing == 1
    masked = np.ma.array([1, 2, 9], mask=[False, False, True])
    assert (read(masked).columns["f0"].mean, read(masked).columns["f0"].missing) == (1.5, 1)
    texts = np.ma.array(["a", "b", "a"], mask=[False, False, True])
    assert read(texts).columns["f0"].counts == {"a": 1, "b": 1}
    objects = np.ma.array([1.0, "b", 3.0], mask=[False, True, False], dtype=object)
    assert read(objects).columns["f0"].mean == 2.0
    fields = np.array([(1, 2.5)], dtype=[("a", int), ("b", float)])
    assert means(fields) == {"a": 1.0, "b": 2.5}
    assert (
        "complex128" in dict(scan({"c": np.ones(2, complex), "x": [1, 2]}, {"c": [1, 2], "x": [1, 2]})[2].left_out)["c"]
    )


@pytest.mark.parametrize(
    ("values", "spelled"),
    [([1, "a"], "a mix of int and str"), ([True, 2.5, "a"], "a mix of"), ([b"x"], "bytes"), ([{}], "dict"),
     ([1, np.datetime64("2020-01-01")], "a mix of"), ([10**400], "beyond what a float64 holds"),
     ([1.5, "a"], "a mix of")],
)  # fmt: skip
def test_lists_of_what_cannot_be_compared_are_left_out(values, spelled):
    table = {"odd": values, "x": [1.0] * len(values)}
    _, _, schema = scan(table, table)
    assert spelled in dict(schema.left_out)["odd"]


def test_lists_with_missing_values_of_every_kind():
    pd = pytest.importorskip("pandas")
    table = {
        "n": [1.0, None, float("nan"), pd.NA],
        "s": ["a", None, float("nan"), pd.NA],
        "t": [np.datetime64("1970-01-02"), None, pd.NaT, pd.Timestamp("1970-01-04", tz="UTC")],
        "b": [True, None, np.True_, pd.NA],
    }
    columns = read(table).columns
    assert [(c.kind, c.missing) for c in columns.values()] == [
        ("numeric", 3), ("categorical", 3), ("time", 2), ("boolean", 2)
    ]  # fmt: skip
    assert columns["t"].mean == 2 * 86_400


def test_mappings():
    table = {"a": [1, 2], "b": np.array([[1.0, 5.0], [3.0, 7.0]]), "c": torch.tensor([4.0, 6.0]), 7: (0, 1)}
    assert means(table) == {"a": 1.5, "b_0": 2.0, "b_1": 6.0, "c": 5.0, "7": 0.5}
    with pytest.raises(DataError, match="equal length are required, got 2 rows in 'a' and 3 in 'b'"):
        read({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(DataError, match="at least one column is required, got none"):
        read({})
    with pytest.raises(ArgumentError, match="column 'a' must be a 1-d array, tensor or list, got a int"):
        read({"a": 3})
    with pytest.raises(DataError, match=r"column 'a' must be of shape \(N,\) or \(N, F\), got \(1, 1, 1\)"):
        read({"a": np.zeros((1, 1, 1))})


def test_pandas_frames():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {
            "x": [1.0, None, 3.0],
            "i": pd.array([1, None, 3], dtype="Int64"),
            "s": ["a", None, "b"],
            "o": pd.Series(["a", None, 2], dtype=object),
            "c": pd.Categorical(["u", None, "v"], categories=["w", "v", "u"]),
            "cn": pd.Categorical([10, None, 30]),
            "co": pd.Categorical([(1,), None, (2,)]),
            "b": pd.array([True, None, False], dtype="boolean"),
            "t": pd.to_datetime(["1970-01-02", None, "1970-01-04"]),
            "z": pd.to_datetime(["1970-01-02 02:00", None, "1970-01-04 02:00"]).tz_localize("Europe/Berlin"),
        }
    )
    a, _, schema = scan(frame, frame)
    assert {name: (c.kind, c.missing) for name, c in a.columns.items()} == {
        "x": ("numeric", 1),
        "i": ("numeric", 1),
        "s": ("categorical", 1),
        "c": ("categorical", 1),
        "cn": ("numeric", 1),
        "b": ("boolean", 1),
        "t": ("time", 1),
        "z": ("time", 1),
    }
    assert sorted(name for name, _ in schema.left_out) == ["co", "o"]
    assert a.columns["c"].counts == {"u": 1, "v": 1}
    assert [a.columns[name].mean for name in ("x", "i", "cn", "t", "z")] == [
        2.0,
        2.0,
        20.0,
        2 * 86_400,
        2 * 86_400 + 3600,
    ]
    np.testing.assert_array_equal(a.row_numbers, [0, 1, 2])
    twice = pd.DataFrame([[1, 2, 3]], columns=["a", "a", "a_1"])
    assert means(twice) == {"a": 1.0, "a_2": 2.0, "a_1": 3.0}
    assert means(pd.Series([1.0, 3.0], name="s")) == {"s": 2.0}
    assert means({"s": pd.Series([1.0, 3.0])}) == {"s": 2.0}


def test_arrow_tables_and_whatever_speaks_arrow():
    pa = pytest.importorskip("pyarrow")
    import datetime
    import decimal

    table = pa.table(
        {
            "x": pa.chunked_array([[1.0], [None, 3.0]]),
            "d": pa.array([decimal.Decimal("1.5"), None, decimal.Decimal("2.5")]),
            "s": pa.chunked_array([["a"], [None, "b"]]),
            "k": pa.array(["u", None, "v"]).dictionary_encode(),
            "b": pa.array([True, None, False]),
            "t": pa.array([datetime.date(1970, 1, 2), None, datetime.date(1970, 1, 4)]),
            "v": pa.DictionaryArray.from_arrays(pa.array([0, None, 1]), pa.array(["u", "v"], type=pa.string_view())),
            "w": pa.array(["u", None, "v"], type=pa.string_view()),
            "n": pa.nulls(3),
            "l": pa.array([[1], None, [2]]),
        }
    )
    a, _, schema = scan(table, table)
    assert [(name, c.kind, c.missing) for name, c in a.columns.items()] == [
        ("x", "numeric", 1), ("d", "numeric", 1), ("s", "categorical", 1), ("k", "categorical", 1), ("b", "boolean", 1),
        ("t", "time", 1), ("v", "categorical", 1), ("w", "categorical", 1), ("n", "numeric", 3),
    ]  # fmt: skip
    assert [name for name, _ in schema.left_out] == ["l"]
    assert (a.columns["x"].mean, a.columns["d"].mean, a.columns["t"].mean) == (2.0, 2.0, 2 * 86_400)
    assert (a.columns["s"].counts, a.columns["k"].counts) == ({"a": 1, "b": 1}, {"u": 1, "v": 1})
    assert a.columns["v"].counts == a.columns["w"].counts == {"u": 1, "v": 1}

    class Stream:
        def __arrow_c_stream__(self, requested_schema=None):
            return table.select(["x"]).__arrow_c_stream__(requested_schema)

    class Exchange:
        def __dataframe__(self, **options):
            return table.select(["x"]).__dataframe__(**options)

    assert means(Stream()) == means(Exchange()) == {"x": 2.0}

    class Broken:
        def __arrow_c_stream__(self, requested_schema=None):
            raise ValueError("gone")

    with pytest.raises(DataError, match="reference: a Broken that Arrow can read is required: gone"):
        read(Broken())


def test_empty_chunked_text():
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"s": pa.chunked_array([], type=pa.string())})
    with pytest.raises(DataError, match="rows are required, got none"):
        read(table)


def test_npy_and_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert means(tmp_path / "a.npy") == {"f0": 2.0, "f1": 3.0}
    np.savez(tmp_path / "b.npz", x=np.array([[1, 2], [3, 4]]), y=np.array(["u", "v"]))
    assert list(read(tmp_path / "b.npz").columns) == ["x_0", "x_1", "y"]
    np.save(tmp_path / "images.npy", np.zeros((3, 1, 4, 4)))
    assert read(tmp_path / "images.npy").columns["brightness"].mean == 0.0


def test_npy_and_npz_that_cannot_be_read(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    for name in ("pickled.npy", "pickled.npz"):
        with pytest.raises(DataError, match="pickled objects, which could run any code"):
            read(tmp_path / name)
    for name in ("empty.npy", "empty.npz"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match=r"text\.npz: plain numeric or text arrays are required, but"):
        read(tmp_path / "text.npz")
    np.save(tmp_path / "c.npy", np.zeros(3))
    (tmp_path / "c.npy").rename(tmp_path / "c.npz")
    with pytest.raises(DataError, match=r"an \.npz archive is required, got a single array"):
        read(tmp_path / "c.npz")
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    with pytest.raises(DataError, match=r"\(N,\), \(N, F\) or \(N, C, H, W\) is required, got \(2, 2, 2\)"):
        read(tmp_path / "cube.npy")


class Numbers(Dataset):
    def __init__(self, n, example):
        self.n, self.example = n, example

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.example(i)


class Stream(IterableDataset):
    def __iter__(self):
        return iter((np.array([float(i), 1.0]), 0) for i in range(30))


def test_data_sets(monkeypatch):
    assert means(TensorDataset(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1]))) == {"f0": 2.0, "f1": 3.0}
    assert means(Numbers(3, float)) == {"f0": 1.0}
    assert means(Numbers(2, lambda i: {0: torch.zeros(1, 4, 4), 1: torch.ones(1, 4, 4)}[i]))["brightness"] == 0.5
    last = Numbers(2, lambda i: (np.full((6, 5, 3), 255, np.uint8), i))
    assert (means(last)["red_mean"], means(last)["width"], means(last)["height"]) == (1.0, 5.0, 6.0)
    assert means(Numbers(2, lambda i: np.full((4, 5), 51, np.uint8)))["brightness"] == pytest.approx(0.2)
    monkeypatch.setattr(datasets, "MAX_EXAMPLES", 20)
    assert means(Stream()) == {"f0": 9.5, "f1": 1.0}
    many = read(Numbers(1_000, float))
    assert (many.rows, many.name) == (20, "reference (20 of 1,000)")
    np.testing.assert_array_equal(many.columns["f0"].values, many.row_numbers)
    assert many.row_numbers.max() > 20


def test_data_sets_that_cannot_be_read():
    with pytest.raises(DataError, match="examples are required, got none"):
        read(Numbers(0, float))
    with pytest.raises(DataError, match="reference, example 1: ZeroDivisionError"):
        read(Numbers(2, lambda i: 1 / (1 - i)))
    with pytest.raises(DataError, match="example 0: a number, a vector or an image"):
        read(Numbers(2, lambda i: "text"))
    with pytest.raises(DataError, match="one sort are required, got 1 features in the first and 2 in example 1"):
        read(Numbers(2, lambda i: [np.ones(i + 1)]))


def test_what_is_no_source():
    for source in (3, None, object(), [1, 2]):
        with pytest.raises(ArgumentError, match=r"reference: required is a path or glob of tables .* got a"):
            scan(source, rows())


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder .*gone\.csv"):
        read(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"no file matches .*\*\.csv"):
        read(str(tmp_path / "*.csv"))
    with pytest.raises(DataError, match="got no files"):
        read(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match="got 1 files of other kinds"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"a file of this kind \(\.txt\) cannot be read"):
        read(tmp_path / "notes.txt")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="Pass the folder"):
        read(tmp_path / "a.png")
    with pytest.raises(DataError, match='A table in a database is named "engine-url::table"'):
        read("https://example.com/a.csv")
    with pytest.raises(DataError, match="cannot read"):
        read("x" * 5_000)


def test_a_folder_or_a_glob_of_files_is_one_table(tmp_path):
    for i in range(3):
        (tmp_path / f"part={i}").mkdir()
        write({"x": [float(i), i + 1.0], "c": ["a", "b"]}, tmp_path / f"part={i}" / "data.parquet")
    (tmp_path / "_SUCCESS").write_text("")
    for source in (tmp_path, str(tmp_path / "**" / "*.parquet"), str(tmp_path / "part=[012]" / "data.parquet")):
        side = read(source)
        assert (side.rows, list(side.columns), side.columns["x"].mean) == (6, ["x", "c"], 1.5)
    write({"x": [1.0]}, tmp_path / "more.csv")
    with pytest.raises(DataError, match="files of one sort are required, got CSV, Parquet"):
        read(tmp_path)


def test_files_that_differ_in_their_columns_are_joined_by_name(tmp_path):
    for suffix in ("csv", "parquet", "jsonl"):
        write({"x": [1.0], "y": [5.0]}, tmp_path / f"0.{suffix}")
        write({"y": [7.0], "x": [3.0], "z": [0.0]}, tmp_path / f"1.{suffix}")
        columns = read(str(tmp_path / f"*.{suffix}")).columns
        assert [(c.mean, c.missing) for c in columns.values()] == [(2.0, 0), (6.0, 0), (0.0, 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "a table starts with a line of column names"),
        ("empty.parquet", b"", "cannot be read as Parquet"),
        ("empty.jsonl", b"", "got an empty file"),
        ("empty.arrow", b"", "cannot be read as Arrow"),
        ("empty.csv.gz", b"", "empty.csv.gz"),
        ("header.csv", b"a,b\n", "rows are required, got none"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, the header 2"),
        ("latin.csv", "a,b\n1,caf\xe9\n".encode("latin-1"), "not UTF-8 text"),
        ("bad.parquet", b"PAR1" + b"\0" * 50, "cannot be read as Parquet"),
        ("bad.jsonl", b'{"a": 1}\n{"a": \n', "cannot be read as JSON"),
        ("bad.arrow", b"ARROW1" + b"\0" * 50, "cannot be read as Arrow"),
        ("bad.csv.gz", b"a,b\n1,2\n", "bad.csv.gz: cannot be read"),
    ],
)
def test_damaged_files_are_one_line_that_names_them(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_are_neither_urls_nor_patterns(tmp_path):
    write({"x": [1.0]}, tmp_path / "a[1].csv")
    write({"x": [5.0]}, tmp_path / "a1.csv")
    assert means(tmp_path / "a[1].csv") == {"x": 1.0}
    (tmp_path / "it's; drop.csv").write_text("x\n2\n")
    assert means(tmp_path / "it's; drop.csv") == {"x": 2.0}


def test_separators(tmp_path):
    (tmp_path / "a.csv").write_text("x;y\n1;a\n3;b\n")
    assert means(tmp_path / "a.csv") == {"x": 2.0, "y": None}
    (tmp_path / "b.csv").write_text("x,y\n1,a\n")
    with pytest.raises(DataError, match="one separator are required, got ',', ';'"):
        read(str(tmp_path / "*.csv"))


def test_names_that_come_twice_in_a_file(tmp_path):
    (tmp_path / "a.csv").write_text("x,X,x\n1,2,3\n")
    assert means(tmp_path / "a.csv") == {"x": 1.0, "X_1": 2.0, "x_2": 3.0}


def test_tables_of_databases(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    file = tmp_path / "shop.ddb"
    with duckdb.connect(str(file)) as connection:
        connection.execute("create table sales as select 1.5 as price; create schema old")
        connection.execute('create table old.sales as select 2.5 as price; create table "a.b" as select 3.5 as price')
    before = file.read_bytes()
    assert means(f"duckdb://{file}::sales") == {"price": 1.5}
    assert means(f"duckdb://{file}::old.sales") == {"price": 2.5}
    assert means(f"duckdb://{file}::a.b") == {"price": 3.5}
    assert scan(f"duckdb://{file}::sales", {"price": [1.0]})[0].name == "sales"
    assert file.read_bytes() == before
    with duckdb.connect(str(file), read_only=True):  # which DuckDB allows beside other readers only
        assert means(f"duckdb://{file}::sales") == {"price": 1.5}
    with pytest.raises(DataError, match="there is no such table, or it may not be read"):
        read(f'duckdb://{file}::x"; drop table sales; --')
    with pytest.raises(DataError, match="no database file"):
        read(f"duckdb://{tmp_path / 'gone.ddb'}::sales")
    assert not (tmp_path / "gone.ddb").exists()
    (tmp_path / "bad.ddb").write_text("no database" * 1000)
    with pytest.raises(DataError, match=r"no connection \(IOException\)"):
        read(f"duckdb://{tmp_path / 'bad.ddb'}::sales")
    with pytest.raises(ArgumentError, match='named "engine-url::table"'):
        read(f"duckdb://{file}::")


def test_passwords_are_not_repeated(monkeypatch):
    ibis = pytest.importorskip("ibis")

    def refuse(url):
        raise RuntimeError(f"cannot connect to {url}")

    monkeypatch.setattr(ibis, "connect", refuse)
    with pytest.raises(DataError, match="no connection") as caught:
        read("postgres://user:secret@host/db::sales")
    assert "secret" not in str(caught.value)

    def lack(url):
        raise ImportError("psycopg")

    monkeypatch.setattr(ibis, "connect", lack)
    with pytest.raises(MissingDependencyError, match=r'pip install "ibis-framework\[postgres\]"'):
        read("postgres://user:secret@host/db::sales")


def test_without_the_extra(monkeypatch, tmp_path):
    path = write({"x": [1.0]}, tmp_path / "t.csv")
    real = builtins.__import__

    def lack(name, *args, **kwargs):
        if name.partition(".")[0] in ("ibis", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", lack)
    assert means({"x": [1.0], "s": ["a"]}) == {"x": 1.0, "s": None}
    with pytest.raises(MissingDependencyError, match=r'pip install "steadynorm\[tables\]"'):
        read(path)

    class Stream:
        __arrow_c_stream__ = None

    with pytest.raises(MissingDependencyError, match=r"a Stream is read through pyarrow"):
        read(Stream())


def test_what_was_opened_is_closed_and_removed(monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = write(rows(), tmp_path / "t.csv")
    with ExitStack() as stack:
        assert opened(path, "reference", stack).rows == 400
        assert list((tmp_path / "temporary").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("zone", ["Z", "+02:00"])
def test_times_with_a_zone_in_text_are_times(tmp_path, zone):
    path = tmp_path / "t.csv"
    path.write_text("at,note\n" + "".join(f"2024-05-0{i % 9 + 1}T12:00:00{zone},2024-05-01T12\n" for i in range(90)))
    side, _, schema = scan(path, path)
    assert {name: column.kind for name, column in side.columns.items()} == {"at": "time", "note": "categorical"}
    assert not schema.left_out
    first = 1714564800.0 - (7200 if zone != "Z" else 0)  # 2024-05-01T12:00:00 by `date -u`
    assert side.columns["at"].minimum == first


def test_nanoseconds_with_a_zone_in_parquet_are_times(tmp_path):
    pd = pytest.importorskip("pandas")
    times = pd.DataFrame({"at": pd.date_range("2024-05-01T12:00:00", periods=90, freq="D", tz="UTC").as_unit("ns")})
    times.to_parquet(tmp_path / "t.parquet")
    side, _, _ = scan(tmp_path / "t.parquet", times)
    assert side.columns["at"].kind == "time"
    assert side.columns["at"].minimum == 1714564800.0


@pytest.mark.parametrize(
    ("cells", "kind", "missing"),
    [
        (["inf", *["1.5", "2.5"] * 40], "numeric", 0),
        (["inf", "-inf", "nan"] * 30, "numeric", 30),
        ([*map(str, range(90)), "#N/A"], "text", 0),
        (["2024-05-01", "2024-05-02"] * 40, "time", 0),
    ],
)
def test_cells_that_engines_misread(tmp_path, cells, kind, missing):
    path = tmp_path / "t.csv"
    path.write_text("x,n\n" + "".join(f"{cell},{i}\n" for i, cell in enumerate(cells)))
    side = scan(path, path)[0]
    assert (side.rows, side.columns["x"].kind, side.columns["x"].missing) == (len(cells), kind, missing)


def test_a_folder_of_both_sorts_an_empty_path_and_names_that_meet(tmp_path):
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    (tmp_path / "plot.png").write_bytes(b"")
    with pytest.raises(DataError, match="got both"):
        scan(tmp_path, tmp_path)
    with pytest.raises(ArgumentError, match="empty path"):
        scan("", tmp_path / "a.csv")
    with pytest.raises(DataError, match="two columns would be called 'a_0'"):
        scan({"a": np.zeros((3, 2)), "a_0": np.zeros(3)}, {"a_0": np.zeros(3)})
    with pytest.raises(DataError, match="dense tensor"):
        scan(torch.zeros(3, 2).to_sparse(), torch.zeros(3, 2))


def test_a_stream_of_examples_is_not_held_in_memory():
    class Stream(torch.utils.data.IterableDataset):
        alive = most = 0

        def __iter__(self):
            for _ in range(40):
                yield Counted(torch.zeros(3))

    class Counted(list):
        def __init__(self, x):
            super().__init__([x])
            Stream.alive += 1
            Stream.most = max(Stream.most, Stream.alive)

        def __del__(self):
            Stream.alive -= 1

    assert scan(Stream(), Stream())[0].rows == 40
    assert Stream.most <= 3


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("boolean", ["t", "TRUE", "f", "False", "yes", "no", "y", "N", "1", "0", "on", "2", " true "]),
        ("numeric", ["1_000", "١", "1e5", " 5 ", "+5", ".5", "inf", "-Infinity", "0x10", "1,5", "1e"]),
        ("time", ["20240105", "2024-01-05", "2024-1-5", "2024/01/05", "2024-01-05 10:00", "2024-01-05T10:00:00Z",
                  "2024-01-05T10:00:00+02:00", "2024-01-05T10:00:00.25", "2024", "2024-01", "next week"]),
    ],
)  # fmt: skip
def test_text_means_the_same_in_memory_and_in_a_file(tmp_path, kind, texts):
    path = write({"x": texts}, tmp_path / "t.parquet")
    for text in texts:
        path = write({"x": [text, *texts]}, tmp_path / "t.parquet")
        file, memory, _ = scan(path, {"x": [text, *texts]}, types={"x": kind})
        np.testing.assert_array_equal(file.columns["x"].values[:1], memory.columns["x"].values[:1], err_msg=text)
