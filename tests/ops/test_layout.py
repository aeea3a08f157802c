"""How an input's axes are read, and how weights line up with its positions."""

import pytest
import torch

from steadynorm.errors import ShapeError
from steadynorm.ops.layout import Layout, accumulator_dtype, align


def test_reads_channels_positions_and_count():
    x = torch.zeros(2, 3, 4, 5)
    assert Layout.of(x) == Layout(dim=1, positions=(0, 2, 3), channels=3, count=40, view=(1, 3, 1, 1))
    assert Layout.of(x, -1) == Layout(dim=3, positions=(0, 1, 2), channels=5, count=24, view=(1, 1, 1, 5))
    assert Layout.of(torch.zeros(0, 3)).count == 0


def test_a_weight_lines_up_from_the_batch_axis_on():
    x = torch.zeros(2, 3, 4, 5)
    first, last = Layout.of(x), Layout.of(x, -1)
    assert align(torch.zeros(2), x, first).shape == (2, 1, 1, 1)
    assert align(torch.zeros(2, 4), x, first).shape == (2, 1, 4, 1)
    assert align(torch.zeros(2, 4, 5), x, first).shape == (2, 1, 4, 5)
    assert align(torch.zeros(2, 3, 4), x, last).shape == (2, 3, 4, 1)
    assert align(torch.zeros(()), x, first).shape == (1, 1, 1, 1)
    with pytest.raises(ShapeError, match="what must be broadcastable"):
        align(torch.zeros(5), x, first, "what")


def test_statistics_are_float64_where_the_device_has_it():
    assert accumulator_dtype(torch.device("cpu")) == torch.float64
    assert accumulator_dtype(torch.device("mps")) == torch.float32
