"""Class numbers of labels: sorted by value, and the test set numbered as the training set is."""

import numpy as np
import pytest

from steadynorm.errors import DataError
from steadynorm.experiment.data.labels import encode


def test_a_test_set_is_numbered_by_the_training_classes():
    classes, y, y_test = encode("w", np.array(["c", "a", "b"]), np.array(["c", "b", "c"]))
    assert classes == ("a", "b", "c")
    assert y.tolist() == [2, 0, 1]
    assert y_test is not None
    assert y_test.tolist() == [2, 1, 2]


def test_numbers_are_sorted_as_numbers():
    classes, _, y_test = encode("w", np.array([10, 9, 2], dtype=np.uint8), np.array([9.0, 10.0]))
    assert classes == ("2", "9", "10")
    assert y_test is not None
    assert y_test.tolist() == [1, 2]


def test_unknown_test_classes_are_listed_up_to_ten():
    with pytest.raises(DataError, match=r"\(0, 1\), got 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\. of dtype int64"):
        encode("w", np.array([0, 1]), np.arange(30))


def test_text_and_numbers_do_not_mix():
    with pytest.raises(DataError, match="Use the same labels in both"):
        encode("w", np.array([0, 1]), np.array(["0", "1"]))
