"""Order, kinds and padding of examples, against closed forms and independent computations."""

import numpy as np
import pytest
import torch
from scipy import stats

from steadynorm.population.streams import order_of, padded_share, split_of


def test_the_ratio_of_order_is_the_one_of_an_analysis_of_variance():
    rng = np.random.default_rng(0)
    x, sizes = rng.normal(size=(30, 4)) + np.repeat(rng.normal(size=(5, 4)), 6, axis=0), [6] * 5
    between = [sum(6 * (x[6 * b : 6 * b + 6, c].mean() - x[:, c].mean()) ** 2 for b in range(5)) / 4 for c in range(4)]
    expected = np.mean(np.array(between) / x.var(0, ddof=1))
    found = order_of(x, sizes)
    assert found.ratio == pytest.approx(expected, rel=1e-12)
    f = stats.f_oneway(*np.split(x[:, :1], 5)).statistic[0]  # the same in one channel, in terms of F
    one = order_of(x[:, :1], sizes).ratio
    assert one == pytest.approx(f * 29 / (25 + 4 * f), rel=1e-12)


def test_p_values_of_random_order_are_uniform():
    rng = np.random.default_rng(1)
    p = [order_of(rng.normal(size=(40, 3)), [10] * 4).p for _ in range(150)]
    assert stats.kstest(p, "uniform").pvalue > 0.001
    assert order_of(np.ones((40, 3)), [10] * 4) is None
    assert order_of(rng.normal(size=(20, 3)), [10, 10]) is None


def test_halves_of_known_distributions():
    uniform = split_of(np.linspace(0, 1, 2001)[:, None])
    assert uniform.separation == pytest.approx(12**0.5, rel=1e-2)  # means 1/2 apart, deviations 1/2/√12
    assert uniform.share == pytest.approx(0.5, abs=0.01)
    normal = split_of(stats.norm.ppf((np.arange(4000) + 0.5) / 4000)[:, None])
    half = stats.halfnorm
    assert normal.separation == pytest.approx(2 * half.mean() / half.std(), rel=1e-2)


def test_two_kinds_are_found_whatever_the_direction():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(300, 8))
    second = rng.random(300) < 0.2
    x[second] += rng.normal(size=8) * 12
    found = split_of(x)
    assert (found.second == second).all() or (found.second == ~second).all()
    assert found.share == pytest.approx(min(second.mean(), 1 - second.mean()))
    assert found.separation > 8
    assert split_of(x[:10]) is None
    assert split_of(np.ones((50, 3))) is None
    assert split_of(np.concatenate([np.zeros((49, 1)), np.ones((1, 1))])) is None


def test_padding_of_sequences_images_and_rows():
    torch.manual_seed(0)
    sequences = torch.randn(4, 3, 10)
    for i, length in enumerate((4, 6, 8, 10)):
        sequences[i, :, length:] = torch.tensor([1.0, -2.0, 0.0])[:, None]
    assert padded_share(sequences, 1) == pytest.approx((6 + 4 + 2 + 0) / 40)
    assert padded_share(sequences.movedim(1, -1), -1) == pytest.approx(12 / 40)
    image = torch.randn(2, 3, 8, 6)
    image[:, :, 5:] = 0
    assert padded_share(image, 1) == pytest.approx(3 / 8)
    rows = torch.randn(10, 4)
    assert padded_share(rows, 1) == 0
    rows[3:7] = 0
    assert padded_share(rows, 1) == 0  # equal examples
    assert padded_share(torch.randn(3, 4, 1, 1), 1) == 0
