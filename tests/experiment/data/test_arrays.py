"""Arrays, tensors, .npz files and torch data sets: shapes, scales and labels, by hand."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from steadynorm.errors import DataError
from steadynorm.experiment.data import load

TEN = [0, 1] * 5


@pytest.mark.parametrize("names", [("x", "y"), ("X", "y"), ("data", "target"), ("images", "labels")])
def test_npz_names(tmp_path, names):
    x = np.arange(20.0).reshape(10, 2)
    np.savez(tmp_path / "a.npz", **{names[0]: x, names[1]: np.array(TEN)})
    data = load(tmp_path / "a.npz")
    assert data.x.tolist() == x.tolist()
    assert data.y.tolist() == TEN
    assert (data.name, data.kind, data.test) == ("a", "table", None)


def test_npz_with_a_test_set(tmp_path):
    x = np.full((10, 2, 2), 255, np.uint8)
    y = np.array(["cat", "dog"] * 5)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y[:, None], x_test=x[:2] // 5, y_test=y[:2])
    data = load(tmp_path / "a.npz")
    assert data.x.tolist() == np.ones((10, 1, 2, 2)).tolist()
    assert data.test is not None
    torch.testing.assert_close(data.test[0], torch.full((2, 1, 2, 2), 0.2))
    assert data.test[1].tolist() == [0, 1]
    assert data.classes == ("cat", "dog")


class Bomb:
    """What a hostile file would run when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


def test_npz_with_pickled_objects_is_refused_unopened(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Bomb()], dtype=object), y=np.array(TEN))
    with pytest.raises(DataError, match="pickled objects, which could run any code"):
        load(tmp_path / "a.npz")


def test_npz_damaged_or_without_the_arrays(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, features=np.zeros(3))
    with pytest.raises(DataError, match=r"x, y; .* are required, got features"):
        load(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(DataError, match=r"a\.npz: an \.npz of plain .* is required"):
        load(path)


def test_shapes_of_arrays():
    y = np.array(TEN)
    assert load((np.zeros((10, 3)), y)).kind == "table"
    assert load((np.zeros((10, 3, 4)), y)).x.shape == (10, 1, 3, 4)
    assert load((np.zeros((10, 3, 4, 5)), y)).x.shape == (10, 3, 4, 5)
    last = np.zeros((10, 8, 9, 3))
    last[:, 7, 6, 2] = 1
    data = load((last, y))
    assert data.x.shape == (10, 3, 8, 9)
    assert float(data.x[4, 2, 7, 6]) == 1
    assert (
        load((torch.zeros(10, 3, dtype=torch.bfloat16, requires_grad=True), torch.tensor(TEN))).x.dtype == torch.float32
    )


def test_pixels_are_brought_to_order_one_or_refused():
    y = np.array(TEN)
    x = np.zeros((10, 2, 2))
    for dtype in (np.uint8, np.int64):
        assert float(load(((x + 255).astype(dtype), y)).x.max()) == 1
        assert float(load(((x + 1).astype(dtype), y)).x.max()) == 1
        with pytest.raises(DataError, match=r"pixels must be whole numbers up to 255, or of order one, .* 16"):
            load(((x + 16).astype(dtype), y))
    assert float(load((x - 2.5, y)).x.min()) == -2.5
    with pytest.raises(DataError, match="Divide by the largest possible value"):
        load((x + 200.0, y))
    with pytest.raises(DataError, match="on one scale, got uint8 and float64"):
        load((((x + 255).astype(np.uint8), y), (x[:2], y[:2])))
    assert float(load((np.full((10, 2), 200.0), y)).x.max()) == 200  # a table: split standardises it


def test_arrays_are_copied():
    x = np.zeros((10, 2), np.float32)
    data = load((x, np.array(TEN)))
    x += 1
    assert float(data.x.max()) == 0


@pytest.mark.parametrize(
    ("y", "classes", "codes"),
    [
        ([7, 3] * 5, ("3", "7"), [1, 0] * 5),
        ([2.0, 10.0] * 5, ("2", "10"), TEN),
        ([True, False] * 5, ("False", "True"), [1, 0] * 5),
        (np.array(["b", "a"] * 5, dtype=object), ("a", "b"), [1, 0] * 5),
        (np.array([[4], [5]] * 5), ("4", "5"), TEN),
    ],
)
def test_labels_of_any_plain_type(y, classes, codes):
    data = load((np.zeros((10, 2)), y))
    assert data.classes == classes
    assert data.y.tolist() == codes


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((np.zeros((10, 2)), np.zeros((10, 2))), "shape .* Take the argmax of one-hot labels"),
        ((np.zeros((10, 2)), np.array([None, 1] * 5)), "text, whole numbers or truth values, got dtype object"),
        ((np.zeros((10, 2)), np.array([np.nan, 1] * 5)), "5 that are not whole numbers"),
        ((np.zeros((10, 2)), np.array([1e300, 1] * 5)), "5 that are not whole numbers"),
        ((np.zeros((10, 2)), np.array(TEN[:9])), "10 examples and 9 labels"),
        ((np.zeros(10), np.array(TEN)), r"shape \(N, F\), .* got float64 of shape \(10,\)"),
        ((np.array([["a"]] * 10), np.array(TEN)), "numeric examples are required, got dtype <U1"),
        (([[1, 2], [3]] * 5, np.array(TEN)), "an array or tensor is required, got a list"),
        ((np.full((10, 2), 1e300), np.array(TEN)), "finite in float32, got 20 that are not; the first is inf"),
        ((1, 2, 3), "is required, got a tuple of 3"),
        (3, "is required, got a int"),
        (((np.zeros((10, 2)), TEN), (1, 2, 3)), r"test: a pair \(x, y\) is required, got a tuple of 3"),
        (((np.zeros((10, 2)), TEN), (np.zeros((2, 2)), ["0", "1"])), "must be among the training set's"),
    ],
)
def test_arrays_that_cannot_be_used(source, message):
    with pytest.raises(DataError, match=message):
        load(source)


class Squares(Dataset):
    """A map-style data set of tensors that shows PIL's and torchvision's habits: images and class names."""

    classes = ("odd one", "even one")

    def __init__(self, n: int = 10, size=(2, 2), label=lambda i: i % 2):
        self.n, self.size, self.label = n, size, label

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return Image.new("L", (9, 9) if i == 7 and self.size is None else (2, 2), 200 + i), self.label(i)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def test_torch_data_sets():
    data = load(Squares())
    assert data.classes == ("odd one", "even one")
    torch.testing.assert_close(data.x[:, 0, 0, 0], (200 + torch.arange(10.0)) / 255)
    pair = load((Squares(), Squares(2)))
    assert pair.test is not None
    assert pair.test[1].tolist() == [0, 1]
    tensors = TensorDataset(torch.rand(10, 3), torch.tensor(TEN))
    assert load(tensors).x.equal(tensors.tensors[0])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Squares(size=None), r"one shape, got \(2, 2\) in example 0 and \(9, 9\) in example 7"),
        (Squares(0), "the Dataset is empty"),
        (Endless(), "a Dataset with a length is required, got Endless"),
        (TensorDataset(torch.zeros(10, 2)), "a tuple of 1"),
        ([1, 2], "got a list"),
    ],
)
def test_torch_data_sets_that_cannot_be_used(dataset, message):
    with pytest.raises(DataError, match=message):
        load(dataset)


class NoPairs(Squares):
    def __getitem__(self, i):
        return torch.zeros(2)


def test_a_data_set_of_no_pairs():
    with pytest.raises(DataError, match=r"example 0 of the Dataset must be a pair \(x, y\), got a Tensor"):
        load(NoPairs())


def test_class_names_are_used_only_if_they_fit():
    assert load(Squares(label=lambda i: i % 2 + 5)).classes == ("5", "6")
