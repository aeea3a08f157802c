"""Folders of images: values by hand, odd sizes, files that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from steadynorm.errors import DataError
from steadynorm.experiment.data import load


def test_grey_images_by_hand(tmp_path, image_folder):
    image_folder(tmp_path, {"dark": 51, "light": 204})
    (tmp_path / "dark" / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden").mkdir()
    data = load(tmp_path)
    assert data.x.shape == (10, 1, 3, 4)
    assert data.classes == ("dark", "light")
    assert data.y.tolist() == [0] * 5 + [1] * 5
    torch.testing.assert_close(data.x[:, 0, 0, 0], torch.tensor([0.2] * 5 + [0.8] * 5))


def test_colour_images_and_one_grey_among_them_in_either_order(tmp_path, image_folder):
    image_folder(tmp_path, {"a": 51, "b": 102}, mode="RGB")
    Image.new("L", (4, 3), 153).save(tmp_path / "a" / "0.png")
    data = load(tmp_path)
    assert data.x.shape == (10, 3, 3, 4)
    torch.testing.assert_close(data.x[0, :, 0, 0], torch.tensor([0.6, 0.6, 0.6]))
    torch.testing.assert_close(data.x[1, :, 2, 3], torch.tensor([0.2, 0.0, 1.0]))
    torch.testing.assert_close(data.x[9, :, 2, 3], torch.tensor([0.4, 0.0, 1.0]))


def test_sixteen_bit_images_keep_their_scale(tmp_path, image_folder):
    image_folder(tmp_path, {"a": 0, "b": 0})
    for i in range(5):
        Image.fromarray(np.full((3, 4), 13107, np.uint16)).save(tmp_path / "a" / f"{i}.png")
    torch.testing.assert_close(load(tmp_path).x[:5], torch.full((5, 1, 3, 4), 0.2))


def test_train_and_test_folders(tmp_path, image_folder):
    image_folder(tmp_path / "train", {"a": 0, "b": 255})
    image_folder(tmp_path / "test", {"a": 0, "b": 255}, n=1)
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert len(data.x) == 10
    assert data.test is not None
    assert data.test[0][:, 0, 0, 0].tolist() == [0, 1]
    assert data.test[1].tolist() == [0, 1]
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="no other folder is read, found val"):
        load(tmp_path)
    (tmp_path / "val").rmdir()
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(DataError, match="same classes, got a, b in train/ and a, b, c in test/"):
        load(tmp_path)


def test_an_odd_size_names_the_file_and_its_size(tmp_path, image_folder):
    image_folder(tmp_path, {"a": 0, "b": 0})
    Image.new("L", (7, 6)).save(tmp_path / "b" / "2.png")
    with pytest.raises(DataError, match=r"b.2\.png: all images must have one size, 4 x 3 as .*0\.png, got 7 x 6"):
        load(tmp_path)


def test_images_that_cannot_be_read_are_named(tmp_path, image_folder):
    image_folder(tmp_path, {"a": 0, "b": 0}, size=(64, 64))
    path = tmp_path / "b" / "3.png"
    whole = path.read_bytes()
    for content in (b"", b"GIF89a nonsense", whole[:60]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"3\.png: cannot be read as an image"):
            load(tmp_path)
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "b" / "3.tif")
    path.unlink()
    with pytest.raises(DataError, match="got mode 'F'"):
        load(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, image_folder):
    image_folder(tmp_path, {"a": 0, "b": 0})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(DataError, match=r"0\.png: .*decompression bomb"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "got an empty folder"),
        (["only"], "at least two classes are required, got only 'only'"),
        (["train", "test"], "train: .*one folder of images per class are required"),
    ],
)
def test_folders_without_classes(tmp_path, folders, message, image_folder):
    if folders == ["only"]:
        image_folder(tmp_path, {"only": 0})
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_a_class_folder_without_images_and_a_small_class(tmp_path, image_folder):
    image_folder(tmp_path, {"a": 0, "b": 0})
    (tmp_path / "c").mkdir()
    with pytest.raises(DataError, match=r"c: every class folder must hold images .* none in this one"):
        load(tmp_path)
    Image.new("L", (4, 3)).save(tmp_path / "c" / "0.png")
    with pytest.raises(DataError, match="'c' has 1"):
        load(tmp_path)


def test_real_colour_photographs(shared_data):
    folder = shared_data / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip("no cifar10 folder there")
    data = load(folder)
    assert data.x.shape[1:] == (3, 32, 32)
    assert data.classes[:2] == ("airplane", "automobile")
    assert 0.4 < float(data.x.mean()) < 0.55  # the literature's channel means: 0.491, 0.482, 0.447
