"""Mini-batches from CSV files: what is read, and what a bad file is told."""

import pytest

from steadynorm.errors import ArgumentError, DataError
from steadynorm.walkthrough import explain, from_csv


@pytest.fixture
def write(tmp_path):
    def write(content, encoding="utf-8"):
        path = tmp_path / "batch.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        "height,weight\n3,10\n5,30\n",
        "\ufeffheight,weight\r\n3,10\r\n\r\n5,30",
        "height;weight\n3;10\n5;30\n",
        '"height"\t weight\n3\t10\n 5 \t30\n\t\n',
    ],
)
def test_named_columns_in_the_usual_spellings_of_csv(write, content):
    expected = explain([[3, 10], [5, 30]], 2, [0, 1], momentum=None, digits=3, names=["height", "weight"])
    assert from_csv(write(content), 2, [0, 1], momentum=None, digits=3) == expected


def test_without_a_heading_and_with_one_column(write):
    assert from_csv(write("3\n5\n8\n9\n11\n24\n")) == explain([3, 5, 8, 9, 11, 24])
    assert [f.name for f in from_csv(write("1,2\n3,4\n")).features] == ["feature 1", "feature 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("a,b\n", "at least 2 rows of numbers, 0 found under the heading 'a, b'"),
        ("1,2\n", "1 found\\."),
        ("a,b\n1,2\n\n3\n", "2 expected, line 4 has 1"),
        ("a,b\n1,2\n3,x\n", "line 3, column 2 holds 'x'"),
        ("1,2\n3,\n", "line 2, column 2 holds ''"),
        ("1,2\n3,nan\n", "finite number"),
        ("a,1\n1,2\n3,4\n", "line 1, column 1 holds 'a'"),
        (b"\xff\xfe1\x00,\x00", "UTF-8"),
        ('1\n"2', "unexpected end"),
    ],
)
def test_a_bad_file_is_told_where_and_why(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        from_csv(write(content))
    assert "batch.csv" in str(caught.value)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        from_csv(tmp_path / "none.csv")
    with pytest.raises(DataError, match="directory"):
        from_csv(tmp_path)


def test_a_bad_option_is_not_the_files_fault(write):
    with pytest.raises(ArgumentError, match="eps"):
        from_csv(write("1\n2\n"), eps=-1)
