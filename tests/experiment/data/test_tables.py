"""Tables: values by hand in every format, and each unusable column or file by its name."""

import gzip
import sys

import pytest
import torch

from steadynorm.errors import DataError, MissingDependencyError
from steadynorm.experiment.data import load

TEN = [0, 1] * 5


HEADER = "a,b,colour,flag,label"
ROWS = [
    f"{i},{i / 4},{('blue', 'green', 'red')[i % 3]},{'true' if i < 5 else 'false'},{'yes' if i % 2 else 'no'}"
    for i in range(10)
]


def expected_table() -> torch.Tensor:
    """ROWS by hand: colour becomes (blue, green, red), flag is 1 where true."""
    return torch.tensor([[i, i / 4, i % 3 == 0, i % 3 == 1, i % 3 == 2, i < 5] for i in range(10)], dtype=torch.float32)


def test_a_csv_by_hand(tmp_path, write_csv):
    data = load(write_csv(tmp_path / "t.csv", HEADER, ROWS))
    assert data.kind == "table"
    assert data.name == "t"
    assert data.x.tolist() == expected_table().tolist()
    assert data.classes == ("no", "yes")
    assert data.y.tolist() == TEN


@pytest.mark.parametrize("name", ["t.tsv", "t.csv.gz", "semicolons.csv"])
def test_other_ways_to_write_it(tmp_path, name):
    separator = "\t" if name == "t.tsv" else ";" if name == "semicolons.csv" else ","
    text = "\n".join([HEADER, *ROWS]).replace(",", separator).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert load(tmp_path / name).x.tolist() == expected_table().tolist()


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.ndjson", "t.json"])
def test_parquet_and_json(tmp_path, name, write_csv):
    duckdb = pytest.importorskip("duckdb")
    relation = duckdb.read_csv(str(write_csv(tmp_path / "t.csv", HEADER, ROWS)), dtype={"label": "VARCHAR"})
    if name.endswith("parquet"):
        relation.write_parquet(str(tmp_path / name))
    else:
        lines = [
            f'{{"a": {a}, "b": {b}, "colour": "{c}", "flag": {f}, "label": "{y}"}}'
            for a, b, c, f, y in (row.split(",") for row in ROWS)
        ]
        (tmp_path / name).write_text(f"[{','.join(lines)}]" if name == "t.json" else "\n".join(lines))
    data = load(tmp_path / name)
    assert data.x.tolist() == expected_table().tolist()
    assert data.classes == ("no", "yes")


def test_the_label_column(tmp_path, write_csv):
    rows = [f"{i % 2},{i},{i % 2}" for i in range(10)]
    assert load(write_csv(tmp_path / "t.csv", "Target,a,b", rows)).x.shape == (10, 2)
    path = write_csv(tmp_path / "t.csv", "kind,a,b", rows)
    assert load(path, label="kind").y.tolist() == TEN
    with pytest.raises(DataError, match=r"--label\); got the columns 'kind', 'a', 'b'"):
        load(path)
    with pytest.raises(DataError, match=r"no column 'sort' .* the columns are 'kind', 'a', 'b'"):
        load(path, label="sort")
    with pytest.raises(DataError, match="got several: 'label', 'y'"):
        load(write_csv(tmp_path / "t.csv", "label,a,y", rows))
    with pytest.raises(DataError, match="at least one column besides the label 'y'"):
        load(write_csv(tmp_path / "t.csv", "y", ["0", "1"] * 5))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", r"column 'a' misses 1 of 40 values \(the first in row 8\)"),
        ("NA", "column 'a' misses 1 of 40 values"),
        ("nan", "column 'a' misses 1 of 40 values"),
        ("inf", r"column 'a' has 1 values that are not finite in float32 \(the first, inf, in row 8\)"),
        ("1e39", r"not finite in float32 \(the first, 1e\+39, in row 8\)"),
        ("12 kg", r"column 'a' is text with 40 distinct values \(row 8 holds '12 kg'\)"),
    ],
)
def test_bad_values_name_the_column_and_the_row(tmp_path, value, message, write_csv):
    rows = [f"{value if i == 7 else i + 0.5},{i % 2}" for i in range(40)]
    with pytest.raises(DataError, match=message):
        load(write_csv(tmp_path / "t.csv", "a,label", rows))


def test_a_stray_word_far_down_is_named_too(tmp_path, write_csv):
    """Types are told from the whole file, not from a sample at its start."""
    rows = [f"{'oops' if i == 29_998 else i},{i % 2}" for i in range(30_000)]
    with pytest.raises(DataError, match=r"text with 30,000 distinct values \(row 29999 holds 'oops'\)"):
        load(write_csv(tmp_path / "t.csv", "a,label", rows))


def test_a_missing_label_is_named(tmp_path, write_csv):
    rows = [f"{i},{'' if i == 3 else 'xy'[i % 2]}" for i in range(12)]
    with pytest.raises(DataError, match="column 'label' misses 1 of 12"):
        load(write_csv(tmp_path / "t.csv", "a,label", rows))


def test_columns_that_are_neither_numbers_nor_few_words(tmp_path, write_csv):
    dates = [f"2020-01-{i + 1:02},{i % 2}" for i in range(10)]
    with pytest.raises(DataError, match="column 'day' holds values of type datetime"):
        load(write_csv(tmp_path / "t.csv", "day,label", dates))
    (tmp_path / "t.jsonl").write_text("\n".join(f'{{"v": [{i}], "label": {i % 2}}}' for i in range(10)))
    with pytest.raises(DataError, match="column 'v' holds values of type list"):
        load(tmp_path / "t.jsonl")
    with pytest.raises(DataError, match=r"12 that are not whole numbers .* continuous target"):
        load(write_csv(tmp_path / "t.csv", "a,y", [f"{i},{i + 0.5}" for i in range(12)]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "got an empty line or file"),
        ("t.csv", b"a,label\n", "got no rows"),
        ("t.csv", b"a,label\n1,2\n1,2,3,4\n5,6\n", "line 3 has 4 fields, the header 2"),
        ("t.csv", b"a,label\n1,2\n1\n5,6\n", "line 3 has 1 fields, the header 2"),
        ("t.csv", b"a,label\nM\xfcnchen,2\n", "not UTF-8 text"),
        ("t.csv", "a,label\n1,2\n".encode("utf-16"), "cannot be read|label column"),
        ("t.csv.gz", b"no gzip", r"t\.csv\.gz: cannot be read"),
        ("t.parquet", b"PAR1 no parquet PAR1", r"cannot be read as \.parquet"),
        ("t.jsonl", b'{"a": 1}\n{"a":\n', r"cannot be read as \.jsonl"),
    ],
    ids=["empty", "header only", "row too long", "row too short", "latin-1", "utf-16", "gzip", "parquet", "jsonl"],
)
def test_damaged_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


def test_a_compressed_table_cut_off_after_its_header(tmp_path):
    content = gzip.compress("\n".join([HEADER, *ROWS * 2000]).encode(), compresslevel=0)
    (tmp_path / "t.csv.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"t\.csv\.gz: cannot be read as \.csv: .*end-of-stream"):
        load(tmp_path / "t.csv.gz")


@pytest.mark.skipif(sys.platform == "win32", reason="such names are not allowed there")
@pytest.mark.parametrize("name", ["*.csv", "t[12].csv", "it's; DROP TABLE x; --.csv", "label=7/t.csv", "a?.csv"])
def test_a_path_is_one_local_file_whatever_it_is_called(tmp_path, name, write_csv):
    """Never a pattern (which would read the neighbours too), SQL, or a column hidden in the folder's name."""
    for neighbour in ("t1.csv", "ab.csv", "other.csv"):
        write_csv(tmp_path / neighbour, HEADER, ROWS * 2)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = load(write_csv(path, HEADER, ROWS))
    assert data.x.tolist() == expected_table().tolist()


def test_a_table_without_duckdb_names_the_extra(tmp_path, monkeypatch, write_csv):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "steadynorm\[tables\]"'):
        load(write_csv(tmp_path / "t.csv", HEADER, ROWS))
