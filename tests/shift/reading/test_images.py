import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import laplace

from steadynorm.errors import DataError
from steadynorm.shift.reading import datasets, images
from steadynorm.shift.reading.images import FEATURES, features, frame_of
from steadynorm.shift.reading.scan import scan


def test_features_by_their_definitions():
    rng = np.random.default_rng(0)
    x = rng.random((5, 3, 7, 9))
    found = features(x)
    assert list(found) == [*(f"{c}_{s}" for c in ("red", "green", "blue") for s in ("mean", "std")), *FEATURES]
    for i, image in enumerate(x):
        grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
        assert found["green_mean"][i] == pytest.approx(math.fsum(image[1].ravel()) / 63)
        assert found["blue_std"][i] == pytest.approx(image[2].std())
        assert found["brightness"][i] == pytest.approx(math.fsum(grey.ravel()) / 63)
        assert found["contrast"][i] == pytest.approx(grey.std())
        assert found["sharpness"][i] == pytest.approx(laplace(grey)[1:-1, 1:-1].var())
    assert set(found["width"]), set(found["height"]) == ({9.0}, {7.0})
    np.testing.assert_allclose(found["aspect"], 9 / 7)


def test_channels_that_are_not_three():
    x = np.random.default_rng(0).random((2, 4, 3, 3))
    found = features(x)
    np.testing.assert_allclose(found["channel_3_mean"], x[:, 3].mean(axis=(1, 2)))
    np.testing.assert_allclose(found["brightness"], x.mean(axis=(1, 2, 3)))
    assert tuple(features(x[:, :1])) == FEATURES


def test_eight_bits_are_divided_by_255():
    assert features(np.full((1, 1, 3, 3), 51, np.uint8))["brightness"] == pytest.approx([0.2])
    assert features(np.full((1, 1, 3, 3), 51, np.int64))["brightness"] == pytest.approx([51.0])


def test_small_and_damaged_images():
    assert np.isnan(features(np.zeros((2, 1, 2, 9)))["sharpness"]).all()
    assert np.isnan(features(np.full((1, 1, 3, 3), math.nan))["brightness"]).all()
    assert np.isnan(features(np.full((1, 1, 3, 3), math.inf))["contrast"]).all()
    assert frame_of("none", np.zeros((0, 3, 4, 4))).rows == 0
    for bad in (np.zeros((2, 3, 0, 4)), np.zeros((2, 3, 4)), np.zeros((1, 1, 3, 3), complex)):
        with pytest.raises(DataError, match=r"images of shape \(N, C, H, W\) with real values are required"):
            features(bad)
    with pytest.raises(DataError, match="pictures: images of shape"):
        frame_of("pictures", np.zeros((2, 3, 0, 4)))


def test_blocks_change_nothing(monkeypatch):
    x = np.random.default_rng(0).random((7, 3, 4, 5))
    whole = features(x)
    monkeypatch.setattr(images, "_BLOCK", 130)  # two images
    for name, values in features(x).items():
        np.testing.assert_array_equal(values, whole[name])


def test_darker_and_blurred_images_say_so():
    x = torch.rand(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1) * 0.5
    a, b, _ = scan(x, blurred)
    assert b.columns["brightness"].mean < 0.6 * a.columns["brightness"].mean
    assert b.columns["sharpness"].mean < 0.1 * a.columns["sharpness"].mean
    assert (b.columns["sharpness"].below, a.columns["width"].std) == (60, 0.0)


def test_a_folder_of_images_of_any_size_and_depth(tmp_path):
    (tmp_path / "cats" / "small").mkdir(parents=True)
    Image.new("RGB", (6, 3), (255, 0, 51)).save(tmp_path / "cats" / "a.png")
    Image.new("L", (4, 4), 51).save(tmp_path / "cats" / "small" / "b.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    side = scan(tmp_path, tmp_path)[0]
    assert side.rows == 2
    columns = {name: column.values.tolist() for name, column in side.columns.items()}
    assert columns["red_mean"] == pytest.approx([1.0, 0.2])
    assert columns["blue_mean"] == pytest.approx([0.2, 0.2])
    assert columns["brightness"] == pytest.approx([0.299 + 0.114 * 0.2, 0.2])
    assert (columns["width"], columns["height"], columns["aspect"]) == ([6.0, 4.0], [3.0, 4.0], [2.0, 1.0])
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.jpg: cannot be read as an image"):
        scan(tmp_path, tmp_path)


def test_of_many_images_a_stated_number_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_EXAMPLES", 4)
    for i in range(9):
        Image.new("L", (3, 3), i).save(tmp_path / f"{i}.png")
    side, _, _ = scan(tmp_path, np.zeros((2, 3, 3, 3)), seed=3)
    assert (side.rows, side.name) == (4, f"{tmp_path.name} (4 of 9)")
    np.testing.assert_allclose(side.columns["brightness"].values * 255, side.row_numbers, atol=1e-6)
