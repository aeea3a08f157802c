"""What a data set must hold, and the digest of its contents."""

import pytest
import torch

from steadynorm.errors import DataError
from steadynorm.experiment.data import LabelledData

TEN = [0, 1] * 5


def test_fingerprint_depends_on_the_contents_only():
    x, y = torch.rand(10, 2), torch.tensor(TEN)
    one = LabelledData("one", x, y, ("a", "b"), "table")
    assert one.fingerprint() == LabelledData("other name", x.clone(), y.clone(), ("a", "b"), "table").fingerprint()
    nudged = x.clone()
    nudged[9, 1] += 1e-6
    others = [
        LabelledData("one", nudged, y, ("a", "b"), "table"),
        LabelledData("one", x, 1 - y, ("a", "b"), "table"),
        LabelledData("one", x, y, ("a", "c"), "table"),
        LabelledData("one", x.reshape(10, 2, 1, 1), y, ("a", "b"), "image"),
        LabelledData("one", x, y, ("a", "b"), "table", (x[:2], y[:2])),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ("a",)}, "at least two classes are required, got only 'a'"),
        ({"classes": ()}, "at least two classes are required, got none"),
        ({"kind": "text"}, "kind must be 'image' or 'table', got 'text'"),
        ({"kind": "image"}, r"image examples must have shape \(N, C, H, W\)"),
        ({"x": torch.rand(10, 0)}, "none of it 0"),
        ({"x": torch.rand(10, 2).double()}, "float32 examples .* got torch.float64"),
        ({"y": torch.tensor(TEN, dtype=torch.int32)}, "int64 labels .* torch.int32"),
        ({"y": torch.tensor(TEN[:9])}, "10 examples and 9 labels"),
        ({"y": torch.tensor(TEN) + 1}, "indices from 0 to 1 into the 2 classes, got 1 to 2"),
        ({"y": torch.tensor([0] * 6 + [1] * 4)}, "every class needs at least 5 examples, but 'b' has 4"),
        (
            {"x": torch.rand(10, 2).index_fill(0, torch.tensor([3]), torch.nan)},
            "2 that are not.*nan in example 3, feat",
        ),
        ({"test": (torch.rand(2, 3), torch.tensor([0, 1]))}, r"training set's shape \(2,\), got \(3,\)"),
        ({"test": (torch.rand(2, 2), torch.tensor([0, 0]))}, "test set: every class .* 'b' has 0"),
        ({"test": (torch.rand(2, 2), torch.tensor([0]))}, "test set: .* 2 examples and 1 labels"),
    ],
)
def test_what_a_data_set_must_hold(change, message):
    good = {"x": torch.rand(10, 2), "y": torch.tensor(TEN), "classes": ("a", "b"), "kind": "table", "test": None}
    with pytest.raises(DataError, match=message):
        LabelledData("set", **{**good, **change})
