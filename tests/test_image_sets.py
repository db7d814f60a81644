"""Image sets are read as their files hold them, and what is wrong with the files is said."""

from __future__ import annotations

from urllib.error import URLError

import numpy as np
import pytest
import torch
from image_files import write_cifar, write_mnist
from torchvision import datasets

from toll_plugin.image_sets import data_root, download_image_set, read_image_set


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_grey_images_are_those_of_the_files(name, folder, tmp_path):
    written = write_mnist(tmp_path, folder)
    for part, read in zip(("train", "test"), read_image_set(name, tmp_path), strict=True):
        assert read.images.dtype == torch.uint8
        assert np.array_equal(read.images[:, 0].numpy(), written[f"{part}_images"])
        assert np.array_equal(read.labels.numpy(), written[f"{part}_labels"])


@pytest.mark.parametrize(
    ("name", "kind", "labels"),
    [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "labels"), ("cifar100_coarse", "CIFAR100", "coarse")],
)
def test_colour_images_are_those_of_the_files(name, kind, labels, tmp_path, monkeypatch):
    written = write_cifar(tmp_path, kind, monkeypatch)
    for part, read in zip(("train", "test"), read_image_set(name, tmp_path), strict=True):
        assert read.images.dtype == torch.uint8
        assert np.array_equal(read.images.numpy(), written[f"{part}_images"])
        assert np.array_equal(read.labels.numpy(), written[f"{part}_{labels}"])


def test_where_data_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("TOLL_DATA_ROOT", raising=False)
    assert str(data_root()) == "datasets"
    monkeypatch.setenv("TOLL_DATA_ROOT", str(tmp_path))
    assert data_root() == tmp_path
    assert str(data_root("here")) == "here"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root("~/data") == tmp_path / "data"
    write_mnist(tmp_path)
    assert len(read_image_set("mnist")[1].labels) == 40


def test_missing_files_are_named_with_what_to_do(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte").unlink()
    rule = r"MNIST is not complete: t10k-labels-idx1-ubyte missing in .*MNIST/raw\. Download .*https.*TOLL_DATA_ROOT"
    with pytest.raises(FileNotFoundError, match=rule):
        read_image_set("mnist", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"data_batch_1, .*cifar-10-python\.tar\.gz and unpack it in "):
        read_image_set("cifar10", tmp_path)
    with pytest.raises(ValueError, match="name must be one of 'mnist'"):
        read_image_set("emnist", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "labels", "kind"])
def test_a_damaged_idx_file(damage, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    if damage == "labels":
        path = path.with_name("train-labels-idx1-ubyte")
        path.write_bytes(np.array([0x801, 79], dtype=">i4").tobytes() + bytes(79))
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-100], "empty": b"", "kind": b"\x00\x00\x08\x09" + content[4:]}[damage])
    with pytest.raises(ValueError, match=r"MNIST is damaged in .*MNIST/raw .*delete it\. Download"):
        read_image_set("mnist", tmp_path)


def test_a_damaged_cifar_file_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py/data_batch_3"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"CIFAR10 is damaged in .*\(data_batch_3 has another checksum\)"):
        read_image_set("cifar10", tmp_path)


def test_a_download_happens_only_for_missing_files_and_may_fail(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        raise URLError(asked)

    monkeypatch.setattr(datasets.MNIST, "download", download)
    with pytest.raises(FileNotFoundError, match="MNIST is not complete") as info:
        download_image_set("mnist", tmp_path)
    assert isinstance(info.value.__cause__, URLError)
    assert asked == [str(tmp_path)]
    write_mnist(tmp_path)
    download_image_set("mnist", tmp_path)
    assert len(asked) == 1
