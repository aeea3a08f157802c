"""The corruptions are the published ones: closed forms, an independent library, the same images for the same seed."""

import colorsys

import numpy as np
import pytest
from scipy.ndimage import zoom

from corruptions import (
    CONSTANTS,
    CORRUPTIONS,
    MEANING,
    REPORTED,
    SEVERITIES,
    VALIDATION,
    corrupt,
    corruptions_for,
    disk,
    enlarging,
    plasma,
)

RGB = np.random.default_rng(0).random((6, 3, 32, 32))
GREY = RGB[:, :1, :28, :28]
STEP = 0.5 / 255 + 1e-6


def test_at_least_eight_are_reported_and_the_tables_are_complete():
    assert len(REPORTED) >= 8
    assert set(REPORTED) | set(VALIDATION) == set(CORRUPTIONS) == set(CONSTANTS) == set(MEANING)
    assert all(len(constants) == len(SEVERITIES) for constants in CONSTANTS.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_range_and_seed(name: str):
    for x in (RGB, GREY) if name in corruptions_for(1) else (RGB,):
        for severity in (1, 5):
            y = corrupt(x, name, severity)
            assert (y.shape, y.dtype) == (x.shape, np.float32)
            assert 0 <= y.min() <= y.max() <= 1
            assert np.array_equal(y, corrupt(x, name, severity))
            assert not np.array_equal(y, x)
    if "noise" in name or name == "fog":
        assert not np.array_equal(y, corrupt(x, name, 5, seed=1))


@pytest.mark.parametrize("name", ["brightness", "saturate"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_colours_against_the_standard_library(name: str, severity: int):
    x = RGB[:1, :, :4, :4].copy()
    x[0, :, 0, 0], x[0, :, 0, 1] = 0.0, 0.3  # black, grey
    c = CONSTANTS[name][severity - 1]
    y = corrupt(x, name, severity)
    for place in np.ndindex(4, 4):
        h, s, v = colorsys.rgb_to_hsv(*x[0][:, *place])
        if name == "brightness":
            v = min(v + c, 1)
        else:
            s = min(s * c[0] + c[1], 1)
        np.testing.assert_allclose(y[0][:, *place], colorsys.hsv_to_rgb(h, s, v), atol=STEP)


def test_contrast_in_closed_form():
    mean = RGB.mean((2, 3), keepdims=True)
    np.testing.assert_allclose(corrupt(RGB, "contrast", 5), (RGB - mean) * 0.15 + mean, atol=STEP)


def test_noise_has_the_published_size():
    x = np.full((40, 1, 28, 28), 0.5)
    assert corrupt(x, "gaussian_noise", 5).std() == pytest.approx(0.10, rel=0.02)
    assert corrupt(x, "speckle_noise", 5).std() == pytest.approx(0.5 * 0.2, rel=0.02)
    assert corrupt(x, "shot_noise", 5).std() == pytest.approx((0.5 / 50) ** 0.5, rel=0.02)
    hit = corrupt(x, "impulse_noise", 5)
    assert (hit == 1).mean() == pytest.approx(0.035, rel=0.1)
    assert (hit == 0).mean() == pytest.approx(0.035, rel=0.1)


def test_enlarging_is_scipys_zoom():
    x = RGB[0, 0, :28]
    for factor in np.arange(1, 1.26, 0.01):
        inner = [int(np.ceil(side / factor)) for side in x.shape]
        top, left = ((side - i) // 2 for side, i in zip(x.shape, inner, strict=True))
        large = zoom(x[top : top + inner[0], left : left + inner[1]], factor, order=1)
        top, left = ((found - side) // 2 for found, side in zip(large.shape, x.shape, strict=True))
        rows, columns = (enlarging(side, factor) for side in x.shape)
        np.testing.assert_allclose(rows @ x @ columns.T, large[top : top + 28, left : left + 32], atol=1e-12)


def test_the_lens_spreads_a_point_over_its_disk():
    for radius, edge in CONSTANTS["defocus_blur"]:
        kernel = disk(radius, edge)
        assert kernel.sum() == pytest.approx(1)
        assert np.array_equal(kernel, kernel.T)
    x = np.zeros((1, 1, 28, 28))
    x[0, 0, 14, 14] = 1.0
    np.testing.assert_allclose(corrupt(x, "defocus_blur", 5)[0, 0, 6:23, 6:23], disk(1.5, 0.1), atol=STEP)


def test_fog_is_fractal_and_fills_its_range():
    cloud = plasma(3, 32, 1.75, np.random.default_rng(0))
    assert (cloud.min((1, 2)) == 0).all()
    assert (cloud.max((1, 2)) == 1).all()
    near = np.corrcoef(cloud[:, :, :-1].ravel(), cloud[:, :, 1:].ravel())[0, 1]
    far = np.corrcoef(cloud[:, :, :-16].ravel(), cloud[:, :, 16:].ravel())[0, 1]
    assert near > 0.8 > far


@pytest.mark.parametrize(
    ("images", "name", "severity"),
    [
        (RGB[0], "fog", 1),
        (RGB * 255, "fog", 1),
        (RGB * np.nan, "fog", 1),
        (RGB, "frost", 1),
        (RGB, "fog", 6),
        (GREY, "saturate", 1),
    ],
)
def test_refusals(images: np.ndarray, name: str, severity: int):
    with pytest.raises(ValueError, match=r"images|corruption"):
        corrupt(images, name, severity)


def test_no_images():
    assert corrupt(RGB[:0], "fog", 1).shape == (0, 3, 32, 32)
