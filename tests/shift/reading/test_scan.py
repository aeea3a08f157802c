import datetime
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steadynorm.errors import ArgumentError, DataError
from steadynorm.shift.reading import scan as scanning
from steadynorm.shift.reading.scan import Column, scan
from support_tables import rows, write

FORMATS = ["csv", "csv.gz", "tsv", "parquet", "jsonl", "ndjson", "json", "arrow", "feather", "jsonl.gz"]


def check_numbers(column: Column, values: list[float | None], reference: list[float | None]):
    """Against the definitions, in Python's exact fractions or math.fsum."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    assert column.rows == len(values)
    assert column.missing == sum(v is None or math.isnan(v) for v in values)
    assert column.infinite == sum(v is not None and math.isinf(v) for v in values)
    mean = math.fsum(finite) / len(finite)
    assert column.mean == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert column.std == pytest.approx(math.sqrt(math.fsum((v - mean) ** 2 for v in finite) / (len(finite) - 1)))
    assert (column.minimum, column.maximum) == (min(finite), max(finite))
    inside = [v for v in reference if v is not None and math.isfinite(v)]
    assert column.below == sum(v < min(inside) for v in finite)
    assert column.above == sum(v > max(inside) for v in finite)


@pytest.mark.parametrize("suffix", [None, *FORMATS])
def test_the_same_facts_from_memory_and_from_every_kind_of_file(suffix, tmp_path):
    old, new = rows(400), rows(300, seed=1)
    new["x"][7], new["x"][8], new["colour"][0] = 80.0, 120.0, "violet"
    sources = [old, new] if suffix is None else [write(t, tmp_path / f"{i}.{suffix}") for i, t in enumerate((old, new))]
    a, b, schema = scan(*sources)
    assert schema == scanning.Schema((), (), (), ())
    assert (a.rows, b.rows, a.sampled, b.sampled) == (400, 300, 400, 300)
    assert [c.kind for c in a.columns.values()] == ["numeric", "numeric", "categorical", "text"]
    for side, table in ((a, old), (b, new)):
        for name in ("x", "whole"):
            check_numbers(side.columns[name], table[name], old[name])
        lengths = [float(len(text)) for text in table["note"]]
        check_numbers(side.columns["note"], lengths, [float(len(text)) for text in old["note"]])
        colours = side.columns["colour"]
        assert colours.counts == {c: table["colour"].count(c) for c in colours.counts}
        assert colours.missing == table["colour"].count(None)
        assert (colours.other, colours.mean, colours.distinct) == (0, None, len(set(table["colour"]) - {None}))
        # The whole sides are the samples here, so they are the columns themselves, in order.
        np.testing.assert_array_equal(side.columns["x"].values, np.array(table["x"], dtype=np.float64))
        np.testing.assert_array_equal(side.columns["note"].values, lengths)
        keys = list(colours.counts)
        assert [None if np.isnan(v) else keys[int(v)] for v in colours.values] == table["colour"]
    assert list(a.columns["colour"].counts) == list(b.columns["colour"].counts)
    assert min(b.columns["x"].below, b.columns["x"].above) >= 1


def test_names_of_sides_and_rows_of_the_sample(tmp_path):
    path = write(rows(), tmp_path / "train.parquet")
    a, b, _ = scan(path, rows())
    assert (a.name, b.name) == ("train.parquet", "current")
    np.testing.assert_array_equal(a.row_numbers, np.arange(400))
    assert scan(path, rows(), sample=100)[0].row_numbers is None
    np.testing.assert_array_equal(b.row_numbers, np.arange(400))


def test_two_sources_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    a, b, _ = scan(*(write(rows(), tmp_path / when / "data.csv") for when in ("old", "new")))
    assert (a.name, b.name) == ("data.csv (reference)", "data.csv (current)")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=64) | st.none(), min_size=1, max_size=30),
    st.lists(st.floats(width=64) | st.none(), min_size=1, max_size=30),
)
def test_any_numbers_in_memory(old, new):
    for side, values in zip(scan({"x": old}, {"x": new})[:2], (old, new), strict=True):
        column = side.columns["x"]
        finite = [v for v in values if v is not None and math.isfinite(v)]
        assert column.missing + column.infinite + len(finite) == column.rows == len(values)
        if not finite:
            assert (column.mean, column.std, column.minimum) == (None, None, None)
            continue
        assert (column.minimum, column.maximum) == (min(finite), max(finite))
        assert min(finite) * (1 - 1e-12 * math.copysign(1, min(finite))) <= column.mean or column.mean >= min(finite)
        assert (column.std is None) == (len(finite) == 1)
        np.testing.assert_array_equal(column.values, np.array(values, dtype=np.float64))


@pytest.mark.parametrize("where", ["memory", "file"])
def test_non_finite_constant_and_missing_columns(where, tmp_path):
    table = {
        "wild": [math.inf, -math.inf, math.nan, None, 2.0, 4.0],
        "constant": [7] * 6,
        "none": [None] * 6,
        "hollow": [None, math.nan, math.inf, None, None, None],
        "huge": [1e200, -1e200, 1.7e308, -1.7e308, 0.0, 0.0],
        "single": [None, 3.0, None, None, None, None],
    }
    source = table if where == "memory" else write(table, tmp_path / "t.parquet")
    side = scan(source, source)[0]
    wild = side.columns["wild"]
    assert (wild.missing, wild.infinite, wild.mean, wild.std) == (2, 2, 3.0, pytest.approx(math.sqrt(2)))
    assert (wild.minimum, wild.maximum) == (2.0, 4.0)
    np.testing.assert_array_equal(wild.values, [math.inf, -math.inf, math.nan, math.nan, 2.0, 4.0])
    constant = side.columns["constant"]
    assert (constant.mean, constant.std, constant.minimum, constant.maximum) == (7.0, 0.0, 7.0, 7.0)
    none = side.columns["none"]
    assert (none.kind, none.missing, none.mean, none.std, none.minimum) == ("numeric", 6, None, None, None)
    assert np.isnan(none.values).all()
    hollow = side.columns["hollow"]
    assert (hollow.missing, hollow.infinite, hollow.mean) == (5, 1, None)
    huge = side.columns["huge"]
    assert huge.mean == pytest.approx(0.0, abs=1e292)
    # Against exact integers: Python's have no largest.
    exact = math.isqrt(sum(int(v) ** 2 for v in table["huge"]) // 5)
    assert huge.std == pytest.approx(float(exact), rel=1e-12)
    assert (side.columns["single"].mean, side.columns["single"].std) == (3.0, None)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "csv"])
@pytest.mark.parametrize("odd", [[math.nan], [math.inf], [math.nan, -math.inf], [None, math.nan]])
def test_nan_in_files_is_missing_whatever_the_files_statistics_say(suffix, odd, tmp_path):
    # Parquet's statistics of a column never name NaN.
    table = {"x": [1.0, 2.5, 2.5, *odd]}
    path = write(table, tmp_path / f"t.{suffix}")
    column = scan(path, path)[0].columns["x"]
    check_numbers(column, table["x"], table["x"])
    told = scan(path, path, types={"x": "categorical"})[0].columns["x"]
    assert told.missing == column.missing
    assert (told.counts["2.5"], told.counts["1"], sum(told.counts.values())) == (2, 1, 3 + column.infinite)
    told = scan(path, path, types={"x": "boolean"})[0].columns["x"]
    assert (told.missing, told.counts) == (column.missing, {"false": 0, "true": 3 + column.infinite})


@pytest.mark.parametrize("where", ["memory", "file"])
def test_truth_values_and_times(where, tmp_path):
    tz = datetime.timezone(datetime.timedelta(hours=2))
    naive = [
        datetime.datetime(2020, 1, 1, 0, 0, 0, 250_000),
        None,
        datetime.datetime(1969, 12, 31, 23, 59, 58, 500_000),
    ]
    table = {
        "flag": [True, None, False],
        "day": [datetime.date(1970, 1, 2), datetime.date(1969, 12, 31), None],
        "naive": naive,
        "zoned": [datetime.datetime(2020, 1, 1, 2, tzinfo=tz), None, datetime.datetime(2300, 1, 1, tzinfo=tz)],
    }
    source = table if where == "memory" else write(table, tmp_path / "t.parquet")
    columns = scan(source, source)[1].columns
    assert [c.kind for c in columns.values()] == ["boolean", "time", "time", "time"]
    assert columns["flag"].counts == {"false": 1, "true": 1}
    assert (columns["flag"].missing, columns["flag"].distinct, columns["flag"].other) == (1, 2, 0)
    np.testing.assert_array_equal(columns["flag"].values, [1.0, np.nan, 0.0])
    np.testing.assert_array_equal(columns["day"].values, [86_400.0, -86_400.0, np.nan])
    np.testing.assert_array_equal(columns["naive"].values, [1_577_836_800.25, np.nan, -1.5])
    zoned = datetime.datetime(2299, 12, 31, 22, tzinfo=datetime.UTC).timestamp()
    np.testing.assert_array_equal(columns["zoned"].values, [1_577_836_800.0, np.nan, zoned])
    assert (columns["zoned"].minimum, columns["zoned"].maximum) == (1_577_836_800.0, zoned)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_types_can_be_overridden(where, tmp_path):
    table = {
        "code": [1, 2, 2, None],
        "real": [1.0, 2.5, 2.5, math.nan],
        "digits": ["1.5", "2", "x", None],
        "flag": [0.0, 3.0, math.nan, 0.0],
        "switch": ["true", "FALSE", "maybe", None],
        "stamp": [86_400, 0, 1, 2],
        "written": ["1970-01-02", "1970-01-01 00:00:01", "soon", None],
        "word": ["a", "bbb", "a", None],
        "when": [datetime.datetime(1970, 1, 2)] * 3 + [None],
        "yes": [True, True, False, None],
        "empty": [None] * 4,
    }
    source = table if where == "memory" else write(table, tmp_path / "t.parquet")
    kinds = {
        **dict.fromkeys(("code", "real", "when", "yes", "empty"), "categorical"),
        **{
            "digits": "numeric",
            "flag": "boolean",
            "switch": "boolean",
            "stamp": "time",
            "written": "time",
            "word": "text",
        },
    }
    columns = scan(source, source, types=kinds)[0].columns
    assert {name: column.kind for name, column in columns.items()} == {name: kinds[name] for name in table}
    assert columns["code"].counts == {"2": 2, "1": 1}
    assert columns["real"].counts == {"2.5": 2, "1": 1}
    assert columns["real"].missing == 1
    assert columns["digits"].missing == 2
    np.testing.assert_array_equal(columns["digits"].values, [1.5, 2.0, np.nan, np.nan])
    assert columns["flag"].counts == {"false": 2, "true": 1}
    np.testing.assert_array_equal(columns["flag"].values, [0.0, 1.0, np.nan, 0.0])
    assert (columns["switch"].counts, columns["switch"].missing) == ({"false": 1, "true": 1}, 2)
    assert columns["stamp"].maximum == 86_400.0
    np.testing.assert_array_equal(columns["written"].values, [86_400.0, 1.0, np.nan, np.nan])
    np.testing.assert_array_equal(columns["word"].values, [1.0, 3.0, 1.0, np.nan])
    assert columns["when"].counts == {"1970-01-02T00:00:00+00:00": 3}
    assert columns["yes"].counts == {"true": 2, "false": 1}
    assert (columns["empty"].counts, columns["empty"].missing) == ({}, 4)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_categories_beyond_the_largest_are_counted_together(where, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "MAX_CATEGORIES", 3)
    monkeypatch.setattr(scanning, "_CANDIDATES", 1)
    old = {"c": [*"a" * 20, *"b" * 9, *"c" * 6, *"d" * 3, *"e" * 2, None]}
    new = {"c": [*"aaaaffffffffeeg"]}
    sources = (old, new) if where == "memory" else [write(t, tmp_path / f"{i}.csv") for i, t in enumerate((old, new))]
    a, b, _ = scan(*sources)
    # Rows added: a 24, b 9, f 8, c 6. Each side's own three largest lack one of these, whose count there is asked for;
    # by shares, f would come before b.
    assert a.columns["c"].counts == {"a": 20, "b": 9, "f": 0}
    assert b.columns["c"].counts == {"a": 4, "b": 0, "f": 8}
    assert list(a.columns["c"].counts) == list(b.columns["c"].counts) == ["a", "b", "f"]
    assert (a.columns["c"].other, b.columns["c"].other) == (11, 3)
    assert (a.columns["c"].distinct, b.columns["c"].distinct) == (5, 4)
    keys = [*a.columns["c"].counts, "other"]
    assert [keys[int(v)] for v in a.columns["c"].values[:-1]] == [c if c in "abf" else "other" for c in old["c"][:-1]]
    assert np.isnan(a.columns["c"].values[-1])


@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_sample_is_random_bounded_and_repeatable(where, tmp_path):
    table = {"i": list(range(20_000)), "twice": [2 * i for i in range(20_000)]}
    source = table if where == "memory" else write(table, tmp_path / "t.csv")
    a, b, _ = scan(source, source, sample=2_000, seed=5)
    again, other = scan(source, source, sample=2_000, seed=5)[0], scan(source, source, sample=2_000, seed=6)[0]
    for side in (a, b):
        drawn = side.columns["i"].values
        assert (side.rows, side.sampled, drawn.shape) == (20_000, 2_000, (2_000,))
        assert len(set(drawn.tolist())) == 2_000, "without replacement"
        np.testing.assert_array_equal(side.columns["twice"].values, 2 * drawn, err_msg="rows stay together")
        # The mean of a uniform sample without replacement, within five of its standard errors.
        error = 20_000 / math.sqrt(12) * math.sqrt(0.9 / 2_000)
        assert abs(drawn.mean() - 9_999.5) < 5 * error
        assert side.columns["i"].mean == pytest.approx(9_999.5), "the facts are of all rows"
        if where == "memory":
            np.testing.assert_array_equal(side.row_numbers, drawn)
    np.testing.assert_array_equal(a.columns["i"].values, again.columns["i"].values)
    assert set(a.columns["i"].values) != set(other.columns["i"].values)
    assert set(a.columns["i"].values) != set(b.columns["i"].values), "equal sources are not sampled alike"


def test_wide_tables_are_sampled_by_fewer_rows(monkeypatch):
    monkeypatch.setattr(scanning, "MAX_SAMPLED_VALUES", 100)
    a, _, _ = scan(np.zeros((50, 10)), np.zeros((50, 10)))
    assert (a.rows, a.sampled) == (50, 10)


def test_text_is_categories_by_the_reference_alone(tmp_path):
    few, many = {"c": ["a", "b"] * 100}, {"c": [f"text {i}" for i in range(200)]}
    for old, new in ((few, many), (write(few, tmp_path / "few.csv"), write(many, tmp_path / "many.csv"))):
        assert [side.columns["c"].kind for side in scan(old, new)[:2]] == ["categorical", "categorical"]
        a, b, _ = scan(new, old)
        assert a.columns["c"].kind == b.columns["c"].kind == "text"
        assert (b.columns["c"].mean, b.columns["c"].counts) == (1.0, None)
        np.testing.assert_array_equal(b.columns["c"].values, np.ones(200))


def test_where_the_reference_has_no_text_the_current_side_decides(tmp_path):
    nothing, many = {"c": [None] * 90, "d": [None] * 90}, {"c": [f"text {i}" for i in range(90)], "d": ["a", "b"] * 45}
    for old, new in (
        (nothing, many),
        (write(nothing, tmp_path / "a.csv"), write(many, tmp_path / "b.csv")),
        (write(nothing, tmp_path / "a.parquet"), write(many, tmp_path / "b.parquet")),
    ):
        a, b, _ = scan(old, new)
        assert {name: column.kind for name, column in a.columns.items()} == {"c": "text", "d": "categorical"}
        assert (a.columns["c"].missing, a.columns["c"].mean, a.columns["c"].values.shape) == (90, None, (90,))
        assert b.columns["c"].mean == pytest.approx(np.mean([len(text) for text in many["c"]]))
        assert (a.columns["d"].counts, b.columns["d"].counts) == ({"a": 0, "b": 0}, {"a": 45, "b": 45})


def test_long_texts_are_told_apart_by_their_beginning_and_measured_whole(tmp_path):
    table = {"c": ["x" * 500 + end for end in ("", "yy")] * 30, "free": [str(i) + "é" * 300 for i in range(60)]}
    for source in (table, write(table, tmp_path / "t.parquet")):
        columns = scan(source, source)[0].columns
        assert columns["c"].counts == {"x" * 128: 60}
        assert (columns["free"].kind, columns["free"].minimum, columns["free"].maximum) == ("text", 301.0, 302.0)


@pytest.mark.parametrize("where", ["memory", "file"])
def test_schemas_that_differ(where, tmp_path):
    old = {
        "gone": [1.0],
        "both": [1.0],
        "flag": [True],
        "digits": ["7"],
        "words": ["seven"],
        "time": [1],
        "list": [[1]],
    }
    new = {"both": [2], "flag": [0], "digits": [8], "words": [8], "time": [datetime.date(1970, 1, 1)], "list": [[2]],
           "fresh": ["a"]}  # fmt: skip
    sources = (
        (old, new) if where == "memory" else [write(t, tmp_path / f"{i}.parquet") for i, t in enumerate((old, new))]
    )
    a, b, schema = scan(*sources)
    assert list(a.columns) == list(b.columns) == ["both", "flag", "digits"]
    assert (schema.only_reference, schema.only_current) == (("gone",), ("fresh",))
    assert [name for name, _, _ in schema.retyped] == ["flag", "digits", "words", "time"]
    reasons = dict(schema.left_out)
    assert list(reasons) == ["time", "list", "words"]
    assert "1 of its values are no numbers" in reasons["words"]
    assert "list" in reasons["list"] or "array" in reasons["list"]
    assert (a.columns["flag"].kind, a.columns["flag"].mean, b.columns["flag"].mean) == ("numeric", 1.0, 0.0)
    assert (a.columns["digits"].kind, a.columns["digits"].mean) == ("numeric", 7.0)


def test_truth_values_against_their_spelling(tmp_path):
    a, b, schema = scan({"c": [True, False]}, {"c": ["False", "true"]})
    assert a.columns["c"].counts == b.columns["c"].counts == {"false": 1, "true": 1}
    assert len(schema.retyped) == 1
    with pytest.raises(DataError, match=r"no column is left to compare: 'c': .*1 of its values are no truth values"):
        scan({"c": [True, False]}, {"c": ["False", "perhaps"]})


@pytest.mark.parametrize("where", ["memory", "file"])
def test_only_some_columns(where, tmp_path):
    source = rows() if where == "memory" else write(rows(), tmp_path / "t.csv")
    a, _, schema = scan(source, source, columns=["whole", "x"])
    assert list(a.columns) == ["x", "whole"]
    assert schema == scanning.Schema((), (), (), ())


def test_arguments_that_cannot_be_used():
    source = rows()
    with pytest.raises(ArgumentError, match=r"columns= names 'X', which neither side has. The columns: 'x', 'whole'"):
        scan(source, source, columns=["X"])
    with pytest.raises(ArgumentError, match="columns= must be a list of names, got the text 'x'"):
        scan(source, source, columns="x")
    with pytest.raises(ArgumentError, match=r"types= names 'y'"):
        scan(source, source, types={"y": "numeric"})
    with pytest.raises(ArgumentError, match=r"types= must be one of numeric, .*, got 'number' for 'x'"):
        scan(source, source, types={"x": "number"})
    with pytest.raises(ArgumentError, match=r"column 'x' of type float cannot be read as text"):
        scan(source, source, types={"x": "text"})
    with pytest.raises(ArgumentError, match="sample must be at least 1 row, got 0"):
        scan(source, source, sample=0)


def test_nothing_to_compare():
    with pytest.raises(DataError, match=r"no column in common: reference has 'a'; current has 'b'"):
        scan({"a": [1]}, {"b": [1]})
    with pytest.raises(DataError, match=r"reference: rows are required, got none"):
        scan({"a": []}, {"a": [1]})
    with pytest.raises(DataError, match=r"no column is left to compare: 1 left out, e.g. 'a'"):
        scan({"a": [[1]]}, {"a": [1]})


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl", "arrow"])
def test_awkward_names_of_columns(suffix, tmp_path):
    names = [
        'quo"ted',
        "it's",
        "two words",
        "a.b",
        "naïve ☃",
        "x; DROP TABLE t; --",
        '"; select 1',
        "SELECT",
        "{0}",
        "%s",
    ]
    table = {name: [float(i), i + 1.0] for i, name in enumerate(names)}
    a, b, _ = scan(write(table, tmp_path / f"t.{suffix}"), table)
    assert list(a.columns) == names
    for i, name in enumerate(names):
        assert a.columns[name].mean == b.columns[name].mean == i + 0.5


def test_times_as_categories_that_read_alike_are_one():
    times = np.array(["2024-01-01", "2024-01-01", "99999-01-01", "99999-01-02"], dtype="datetime64[s]")
    counts = scan(times, times, types={"f0": "categorical"})[0].columns["f0"].counts
    assert counts == {"2024-01-01T00:00:00+00:00": 2, "3.0935e+12 s": 2}


def test_awkward_categories(tmp_path):
    texts = ["'; drop table t; --", 'a"b', "\\", "", "☃", "%", "line\nbreak", "nul\x00l"]
    table = {"c": [text for i, text in enumerate(texts) for _ in range(i + 1)]}
    a, b, _ = scan(write(table, tmp_path / "t.parquet"), table)
    assert a.columns["c"].counts == b.columns["c"].counts == {text: i + 1 for i, text in enumerate(texts)}


def test_progress_is_shown_where_asked(capsys):
    scan(rows(), rows(), progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    scan(rows(), rows())
    assert capsys.readouterr().err == ""
