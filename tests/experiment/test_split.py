"""Stratified splits: counts by hand, parts that share nothing, the same for the same seed, standardised honestly."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadynorm.errors import ArgumentError, DataError
from steadynorm.experiment.data import LabelledData, load
from steadynorm.experiment.split import Split, split, standardisation


def numbered(*counts: int, kind: str = "image") -> LabelledData:
    """Examples that carry their own row number, classes of the given sizes, in class order."""
    n = sum(counts)
    x = torch.arange(float(n)).reshape((n, 1, 1, 1) if kind == "image" else (n, 1))
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return LabelledData("numbered", x, y, tuple(f"c{i}" for i in range(len(counts))), kind)  # type: ignore[arg-type]


def rows(x: torch.Tensor) -> list[int]:
    return [int(value) for value in x.flatten()]


def parts(s: Split) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(s.x_train, s.y_train), (s.x_val, s.y_val), (s.x_test, s.y_test)]


def test_fifths_of_each_class_by_hand():
    s = split(numbered(50, 10, 5), seed=3)
    assert s.y_train.bincount().tolist() == [30, 6, 3]
    assert s.y_val.bincount().tolist() == [10, 2, 1]
    assert s.y_test.bincount().tolist() == [10, 2, 1]


@settings(deadline=None)
@given(st.lists(st.integers(5, 40), min_size=2, max_size=5), st.integers(0, 2**63 - 1))
def test_parts_share_nothing_lose_nothing_and_keep_their_labels(counts, seed):
    data = numbered(*counts)
    three = parts(split(data, seed))
    assert sorted(row for x, _ in three for row in rows(x)) == list(range(sum(counts)))
    for x, y in three:
        assert y.tolist() == [int(data.y[row]) for row in rows(x)]
        assert set(y.tolist()) == set(range(len(counts)))


def test_same_seed_same_split_and_another_seed_another():
    data = numbered(40, 40)
    first, again, other = (split(data, seed) for seed in (7, 7, 8))
    for (a, _), (b, _), (c, _) in zip(parts(first), parts(again), parts(other), strict=True):
        assert rows(a) == rows(b)
        assert rows(a) != rows(c)


def test_every_example_is_as_likely_to_be_tested_as_any_other():
    counts = torch.zeros(20)
    for seed in range(400):
        counts[rows(split(numbered(10, 10), seed).x_test)] += 1
    # 400 draws at 1/5: mean 80, deviation 8; 5 deviations either way.
    assert counts.min() > 40
    assert counts.max() < 120


def test_parts_are_shuffled_so_that_a_first_batch_holds_several_classes():
    assert len(set(split(numbered(40, 40), 0).y_train[:10].tolist())) == 2


def test_a_fixed_test_set_is_kept_and_only_the_rest_is_shared_out():
    data = numbered(10, 10)
    fixed = torch.tensor([[[[100.0]]], [[[101.0]]]]), torch.tensor([1, 0])
    data = LabelledData("fixed", data.x, data.y, data.classes, "image", fixed)
    s = split(data, 0, val=0.3)
    assert rows(s.x_test) == [100, 101]
    assert s.y_test.tolist() == [1, 0]
    assert s.y_val.bincount().tolist() == [3, 3]
    assert sorted(rows(s.x_train) + rows(s.x_val)) == list(range(20))


def test_a_table_is_standardised_by_its_training_part_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator) * torch.tensor([1e-3, 1.0, 1e4]) + torch.tensor([5.0, -2.0, 1e5])
    data = LabelledData("table", x, torch.arange(60) % 3, ("a", "b", "c"), "table")
    s = split(data, 1)
    assert s.mean is not None
    assert s.scale is not None
    for j in range(3):
        column = s.x_train[:, j].double()
        assert abs(float(column.mean())) < 1e-3
        assert float(column.pow(2).mean() - column.mean() ** 2) == pytest.approx(1, rel=1e-4)
        # The same constants everywhere: undoing them gives back values of the raw table.
        source = x[:, j].double()
        for part in (s.x_train, s.x_val, s.x_test):
            undone = part[:, j].double() / float(s.scale[j]) + float(s.mean[j])
            nearest = (undone[:, None] - source[None]).abs().amin(1)
            assert float(nearest.max()) < 1e-5 * float(source.abs().max())
    assert float(s.x_val.mean(0).abs().max()) > 1e-3  # 12 examples: never centred by the training part exactly


def test_images_are_left_as_they_are():
    s = split(load("digits"), 0)
    assert s.mean is None
    assert s.scale is None
    assert float(s.x_train.min()) == 0
    assert float(s.x_train.max()) == 1
    assert len(s.x_train) + len(s.x_val) + len(s.x_test) == 1797


def test_standardisation_is_biased_and_a_constant_feature_becomes_zero():
    values = [3.0, 5.0, 8.0, 9.0, 11.0, 24.0]
    mean, scale = standardisation(torch.tensor([[v, 0.1, 0.0 if v == 3 else 1e-45] for v in values]))
    assert float(mean[0]) == 10
    assert float(scale[0]) == pytest.approx(1 / statistics.pstdev(values), rel=1e-6)
    assert scale[1:].tolist() == [0, 0]  # the last varies by the smallest float32: 1 / deviation would be inf


def test_a_column_constant_in_training_only_is_zero_everywhere():
    tested = rows(split(numbered(10, 10), 0).x_test)  # the same rows for every data set with these labels and this seed
    x = torch.zeros(20, 2)
    x[:, 0] = torch.arange(20.0)
    x[tested, 1] = 7.0
    s = split(LabelledData("t", x, numbered(10, 10).y, ("a", "b"), "table"), 0)
    assert all(float(part[:, 1].abs().max()) == 0 for part in (s.x_train, s.x_val, s.x_test))


@pytest.mark.parametrize("fractions", [(0, 0.2), (0.2, 0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.2)])
def test_fractions_out_of_range(fractions):
    with pytest.raises(ArgumentError, match="positive fractions with a sum below 1"):
        split(numbered(10, 10), 0, val=fractions[0], test=fractions[1])


def test_a_negative_seed():
    with pytest.raises(ArgumentError, match="non-negative"):
        split(numbered(10, 10), -1)


def test_a_class_too_small_for_the_fractions_is_named():
    with pytest.raises(DataError, match=r"'c1' has 5 examples, too few to give 2 to validation and 3 to test"):
        split(numbered(50, 5), 0, val=0.4, test=0.55)
