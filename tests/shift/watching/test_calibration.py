"""Embedding, resampling, T², and the calibration that widens its own null."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from steadynorm.errors import ArgumentError
from steadynorm.nn.watched import ExampleMoments
from steadynorm.shift.watching.calibration import Gaussian, fit_calibration, fit_gaussian, t_squared, widening
from steadynorm.shift.watching.embedding import CLIP, features, fit_projection
from steadynorm.shift.watching.resampling import block_length, draw, pseudo_means
from steadynorm.shift.watching.sequential import e_value, p_value, shiryaev_roberts


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_features_in_the_units_of_the_buffers():
    layer = nn.BatchNorm2d(2, eps=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([3.5, 0.5]))
    seen = ExampleMoments(torch.tensor([[5.0, -1.0]]), torch.tensor([[7.5, 0.0]]))
    found = features(seen, layer)[0]
    expected = [4 / 2, 1 / 1, 0.5 * np.log(8 / 4), 0.5 * np.log(0.5 / 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert features(ExampleMoments(seen.mean, None), layer).shape == (1, 2)


@pytest.mark.parametrize(("m", "f"), [(400, 6), (30, 80)])
def test_components_are_those_of_an_independent_singular_value_decomposition(m, f):
    x = normal(0, m, f) @ np.diag(np.linspace(3, 0.3, f)) + normal(1, m, 1)
    standard = (x - x.mean(0)) / x.std(0)
    u, _, _ = np.linalg.svd(standard, full_matrices=False)
    expected = np.clip(u[:, :4] * np.sqrt(m), -CLIP, CLIP)
    found = fit_projection(x, 4).scores(x)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-8)


def test_constant_features_have_no_part_and_few_dimensions_give_few_components():
    x = np.concatenate([normal(0, 200, 2), np.full((200, 3), 4.0)], axis=1)
    projection = fit_projection(x, 12)
    assert projection.weight.shape == (5, 2)
    assert not projection.weight[2:].any()


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 30), size=st.integers(1, 40), block=st.integers(1, 10), seed=st.integers(0, 99))
def test_samples_come_in_blocks_of_the_circle_and_their_means_are_plain_means(m, size, block, seed):
    rng = np.random.default_rng(seed)
    indices = draw(m, size, 5, block, rng)
    assert indices.shape == (5, size)
    steps = np.diff(indices, axis=1) % m
    inside = np.arange(1, size) % block != 0
    assert (steps[:, inside] == 1 % m).all()
    scores = rng.normal(size=(m, 2))
    np.testing.assert_allclose(pseudo_means(scores, indices), scores[indices].mean(1), atol=1e-12)


def test_block_length_grows_with_the_memory_of_the_stream():
    noise = normal(0, 2000, 6)
    memory = [0.0, 0.5, 0.9]
    lengths = []
    for rho in memory:
        stream = np.zeros_like(noise)
        for t in range(1, len(noise)):
            stream[t] = rho * stream[t - 1] + noise[t]
        lengths.append(block_length(stream))
    assert lengths[0] == 1
    # The optimum for an AR(1) is (1.5 (2ρ / (1 - ρ²))²)^(1/3) n^(1/3): 17 and 65 examples.
    assert 10 <= lengths[1] <= 30
    assert 40 <= lengths[2] <= 100
    assert block_length(np.ones((50, 2))) == 1


def test_t_squared_is_chi_square_where_the_covariance_is_known():
    covariance = np.array([[2.0, 0.6], [0.6, 0.5]])
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    means = np.random.default_rng(0).multivariate_normal([1, -1], covariance / 64, size=4000)
    found = t_squared(means, Gaussian(np.array([1.0, -1.0]), whiten), 64)
    expected = 64 * np.einsum("ij,jk,ik->i", means - [1, -1], np.linalg.inv(covariance), means - [1, -1])
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert stats.kstest(found, stats.chi2(2).cdf).pvalue > 0.01


def test_gaussian_is_shrunk_a_little_towards_the_identity():
    scores = normal(0, 500, 3) @ np.array([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1e-9]])
    mean, whiten = fit_gaussian(scores)
    np.testing.assert_allclose(mean, scores.mean(0))
    expected = 0.99 * np.cov(scores.T, bias=True) + 0.01 * np.eye(3)
    np.testing.assert_allclose(whiten @ whiten.T, np.linalg.inv(expected), rtol=1e-6, atol=1e-8)


def test_the_null_is_widened_more_for_a_small_calibration():
    rng = np.random.default_rng(0)
    small = widening([normal(1, 300, 8)], 64, 1, rng)
    large = widening([normal(1, 2000, 8)], 64, 1, rng)
    assert small > large >= 1
    assert small > 1.1
    assert large < 1.15


def test_clean_streams_keep_the_rate_and_a_shift_is_found_soon():
    """Fresh data from the population itself, over several calibrations: heavy tails, two correlated layers."""

    def population(rng, n):
        z = rng.standard_t(6, size=(n, 10)) @ mix
        return {"a": z[:, :6], "b": z[:, 3:]}

    mix = normal(5, 10, 10)
    rng, early, delay, means = np.random.default_rng(0), [], [], []
    for c in range(4):
        calibration = fit_calibration(population(rng, 1000), {"a": 3, "b": 7}, seed=c)
        assert calibration.block == 1
        for _stream in range(5):
            e = []
            for shift in (0.0, 0.6):
                m, first = 0.0, np.inf
                for test in range(100 if shift == 0 else 20):
                    pool = {k: v + shift for k, v in population(rng, 64).items()}
                    value = np.mean([calibration.layers[k].e_value(v) for k, v in pool.items()])
                    m = float(shiryaev_roberts(m, value))
                    first = min(first, test + 1) if m >= 1000 else first
                    if shift == 0:
                        e.append(value)
                (early if shift == 0 else delay).append(first)
            means.append(np.mean(e))
    assert np.mean(np.isfinite(early)) <= 0.1
    assert np.mean(means) <= 1.0
    assert max(delay) <= 6


def test_channels_reference_and_pools_of_correlated_streams():
    x = np.repeat(normal(0, 200, 4), 8, axis=0)
    calibration = fit_calibration({"a": x}, {"a": 2}, pool=16)
    assert calibration.block > 8
    assert calibration.pool == 4 * calibration.block
    np.testing.assert_allclose(calibration.layers["a"].channel_mean, x[:, :2].mean(0))
    np.testing.assert_allclose(calibration.layers["a"].channel_sd, x[:, :2].std(0))
    independent = fit_calibration({"a": x}, {"a": 2}, pool=16, block=1)
    assert independent.pool == 16


def test_block_bootstrap_null_is_as_wide_as_the_streams_own_pools():
    x = np.repeat(normal(0, 300, 3), 6, axis=0)
    calibration = fit_calibration({"a": x}, {"a": 3}, block=24, pool=96)
    fresh = np.repeat(normal(1, 4000, 3), 6, axis=0)
    reference = calibration.layers["a"]
    pools = reference.projection.scores(fresh).reshape(-1, 96, 3).mean(1)
    e = e_value(p_value(t_squared(pools, reference.gaussian, 96), reference.null))
    naive = fit_calibration({"a": x}, {"a": 3}, block=1, pool=96).layers["a"]
    too_narrow = e_value(p_value(t_squared(pools, naive.gaussian, 96), naive.null))
    assert e.mean() <= 1.05 < 2 < too_narrow.mean()


@pytest.mark.parametrize(
    ("x", "says"),
    [(normal(0, 100, 3), "at least 256"), (np.sort(normal(0, 1000, 3), axis=0), "shuffle them or pass block=1")],
)
def test_calibrations_that_are_too_small(x, says):
    with pytest.raises(ArgumentError, match=says):
        fit_calibration({"a": x}, {"a": 3})
