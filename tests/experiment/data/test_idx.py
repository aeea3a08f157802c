"""MNIST-style idx files: values by hand, and damage of every kind."""

import struct

import pytest
import torch

from steadynorm.errors import DataError
from steadynorm.experiment.data import load

TEN = [0, 1] * 5


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_values_by_hand(tmp_path, suffix, mnist_folder):
    images = mnist_folder(tmp_path, suffix)
    data = load(str(tmp_path))
    assert data.x.shape == (10, 1, 2, 3)
    assert data.kind == "image"
    torch.testing.assert_close(data.x[:, 0].double(), torch.tensor(images / 255), rtol=0, atol=1e-7)
    assert data.y.tolist() == TEN
    assert data.test is not None
    torch.testing.assert_close(data.test[0][:, 0].double(), torch.tensor((images[:2] + 1) / 255), rtol=0, atol=1e-7)
    assert data.test[1].tolist() == [1, 0]


def test_idx_without_a_test_pair(tmp_path, mnist_folder):
    mnist_folder(tmp_path, test=False)
    assert load(tmp_path).test is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "magic number 2051 .* an empty file"),
        ("train-images-idx3-ubyte", b"\x89PNG" + bytes(20), "magic number 2051 .* 89 50 4e 47"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x0803, 10, 2, 3) + bytes(59), "require 60 bytes .* only 59"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x0803, 10, 2, 3) + bytes(61), "require 60 bytes .* got more"),
        ("train-labels-idx1-ubyte", struct.pack(">2I", 0x0801, 9) + bytes(9), "10 images, but .* 9 labels"),
        ("train-labels-idx1-ubyte", struct.pack(">4I", 0x0803, 10, 2, 3) + bytes(60), "magic number 2049"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x0801, 2) + b"\1\7", r"must be among .*\(0, 1\), got 7"),
    ],
    ids=["empty", "another format", "cut off", "too long", "a label short", "images for labels", "unknown test label"],
)
def test_damaged_idx(tmp_path, name, content, message, mnist_folder):
    mnist_folder(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_truncated_and_corrupt_gzip(tmp_path, mnist_folder):
    mnist_folder(tmp_path, ".gz")
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (whole[:30], b"not gzip", whole[:12] + b"\xff\xff\xff" + whole[15:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read"):
            load(tmp_path)


def test_idx_files_that_are_missing_are_named(tmp_path, mnist_folder):
    mnist_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match="missing: train labels, test images"):
        load(tmp_path)
    with pytest.raises(DataError, match="Pass the folder that it lies in"):
        load(tmp_path / "train-images-idx3-ubyte")


def test_a_data_set_too_large_for_memory_is_refused_before_it_is_read(tmp_path, mnist_folder):
    mnist_folder(tmp_path, test=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x0803, 60_000, 2000, 2000))
    with pytest.raises(DataError, match=r"at most 8 GiB of float32; this one takes 894\.1 GiB"):
        load(tmp_path)


def test_the_real_mnist(shared_data):
    if not (shared_data / "mnist").is_dir():
        pytest.skip("no mnist folder there")
    data = load(shared_data / "mnist")
    assert data.x.shape == (60000, 1, 28, 28)
    assert data.test is not None
    # As published: 6,742 ones in the training set, 892 fives in the test set, and the mean pixel 0.1307 that the
    # literature standardises by.
    assert int((data.y == 1).sum()) == 6742
    assert int((data.test[1] == 5).sum()) == 892
    assert float(data.x.mean()) == pytest.approx(0.1307, abs=5e-5)
