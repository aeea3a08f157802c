"""`load` tells its sources apart; factories and paths that fail, and damaged files, are one clear error."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from steadynorm.errors import DataError
from steadynorm.experiment.data import load

TEN = [0, 1] * 5


def test_digits_are_the_bundled_ones_in_the_unit_interval():
    data = load("digits")
    assert data.x.shape == (1797, 1, 8, 8)
    assert data.x.dtype == torch.float32
    assert (float(data.x.min()), float(data.x.max())) == (0, 1)
    # The first row of the first digit, as printed in scikit-learn's documentation: 0 0 5 13 9 1 0 0.
    assert (data.x[0, 0, 0] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.y[:10].tolist() == list(range(10))
    assert data.classes == tuple("0123456789")


MODULE = """
import sys
import numpy as np
from steadynorm.experiment.data import LabelledData, load

def arrays():
    return np.zeros((10, 2)), np.array([0, 1] * 5)

def ready():
    return load(arrays())

def bunch():
    return {"data": np.zeros((10, 2)), "target": ["a", "b"] * 5}

def broken():
    return 1 / 0

def leaves():
    sys.exit("usage: no")

def small():
    return np.zeros((2, 2)), [0, 1]

class Place:
    make = staticmethod(arrays)

number = 3
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current folder, which a console script does not have on its path."""
    (tmp_path / "usermade_data.py").write_text(MODULE)
    (tmp_path / "usermade_bad.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    yield tmp_path
    for name in ("usermade_data", "usermade_bad"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["arrays", "ready", "bunch", "Place.make"])
def test_factories_by_name(user_module, name):
    before = list(sys.path)
    data = load(f"usermade_data:{name}")
    assert data.x.shape == (10, 2)
    assert len(data.classes) == 2
    assert sys.path == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("usermade_data:broken", r"factory 'usermade_data:broken' failed at .*usermade_data\.py:16: ZeroDivisionError"),
        ("usermade_data:leaves", "failed at .* SystemExit: usage: no"),
        ("usermade_data:small", "usermade_data:small: every class needs at least 5 examples"),
        ("usermade_data:absent", "module 'usermade_data' has no 'absent'"),
        ("usermade_data:number", "must name a function or a class, got a int"),
        ("usermade_bad:f", "importing 'usermade_bad' .* SyntaxError"),
        ("usermade_nowhere:f", "importing 'usermade_nowhere' .* ModuleNotFoundError"),
    ],
)
def test_what_fails_in_a_factory_is_one_clear_error(user_module, name, message):
    with pytest.raises(DataError, match=message):
        load(name)


def test_a_callable_and_a_mapping():
    x = np.zeros((10, 2))
    assert load(lambda: (x, TEN)).x.shape == (10, 2)
    assert load({"x": x, "y": TEN}).name == "arrays"
    data = load("digits")
    assert load(data) is data
    with pytest.raises(DataError, match="are required, got z"):
        load({"z": x})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/place", "no file or folder 'no/such/place'"),
        ("https://example.org/t.csv", "Only local files are read: download it first"),
        ("s3://bucket/t.parquet", "Only local files are read"),
        ("", "no rows|cannot be read|required"),
        ("x" * 5000, "cannot read|no file or folder"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load(source)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"a file of this kind \(\.xlsx\) cannot be read\. Data is"):
        load(tmp_path / "a.xlsx")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match="Pass the folder that it lies in"):
        load(tmp_path / "a.png")


def test_a_label_where_there_are_no_columns(tmp_path):
    for source in ("digits", tmp_path):
        with pytest.raises(DataError, match="label= names the column of a table file"):
            load(source, label="y")
    with pytest.raises(DataError, match="got label='y' with a tuple"):
        load((np.zeros((10, 2)), TEN), label="y")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8), st.data())
def test_a_damaged_file_is_our_error_or_still_readable(tmp_path, mnist_folder, image_folder, write_csv, damage, draw):
    """Bytes overwritten at random places in a file of each kind: never an exception that is not a DataError."""
    folder = tmp_path / "fuzz"
    if not folder.exists():
        folder.mkdir()
        np.savez_compressed(folder / "a.npz", x=np.random.default_rng(0).normal(size=(10, 3)), y=np.array(TEN))
        for name in ("images", "idx"):
            (folder / name).mkdir()
        image_folder(folder / "images", {"a": 3, "b": 200}, mode="RGB", size=(9, 9))
        for kind in ("jpg", "gif", "bmp", "tif", "webp"):
            Image.new("RGB", (9, 9), (9, 99, 199)).save(folder / "images" / "a" / f"z.{kind}")
        mnist_folder(folder / "idx", ".gz")
        write_csv(folder / "t.csv", "a,b,label", [f"{i},{i / 7},{'xyz'[i % 2]}" for i in range(10)])
        pytest.importorskip("duckdb").read_csv(str(folder / "t.csv")).write_parquet(str(folder / "t.parquet"))
    victims = sorted(path for path in folder.rglob("*") if path.is_file())
    victim = draw.draw(st.sampled_from(victims))
    whole = victim.read_bytes()
    content = bytearray(whole)
    for where, value in damage:
        content[int(where * len(content))] = value
    victim.write_bytes(content)
    source = victim.parent.parent if victim.parent.name in "ab" else victim.parent if victim.suffix == ".gz" else victim
    try:
        load(source)
    except DataError:
        pass
    finally:
        victim.write_bytes(whole)
