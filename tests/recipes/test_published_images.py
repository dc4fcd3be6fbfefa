"""Published sets of images: Fashion-MNIST with its real files, the others with small files in their formats."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torchvision import datasets

from scpl_dist.data import MissingFiles
from tests.support.files import everything, picture, resolve, write_image
from tests.support.programs import missing

FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package


@pytest.fixture
def fashion() -> Path:
    if not FASHION.exists():
        missing("no files of Fashion-MNIST: apt-get install dataset-fashion-mnist")
    return FASHION


def test_fashion_mnist_is_read_at_full_size_as_it_is_published(fashion: Path) -> None:
    source = resolve("fashion_mnist", fashion)
    assert (source.classes, source.sizes) == (10, {"train": 54000, "validation": 6000, "test": 10000})
    images, labels = everything(source, "test")
    assert images.shape == (10000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    assert labels[:5].tolist() == [9, 2, 1, 1, 6]  # an ankle boot, a pullover, two trousers, a shirt
    images, labels = everything(source, "train")
    assert labels.bincount().tolist() == [5400] * 10
    assert float(images.mean()) == pytest.approx(0, abs=0.01)
    assert float(images.std()) == pytest.approx(1, abs=0.01)


def test_fashion_mnist_is_the_same_in_the_folder_of_torchvision(fashion: Path, tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in fashion.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    own, theirs = resolve("fashion_mnist", tmp_path), datasets.FashionMNIST(tmp_path, train=False)
    images, labels = everything(own, "test")
    assert torch.equal(labels, theirs.targets)
    torch.testing.assert_close(images[:, 0] * 0.3530 + 0.2860, theirs.data / 255)
    assert torch.equal(images, everything(resolve("fashion_mnist", fashion), "test")[0])


def test_clothes_are_shifted_and_mirrored_and_digits_only_shifted(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for name, mirrored in (("mnist", False), ("fashion_mnist", True)):
        batch = everything(resolve(name, tmp_path, data__augmentation="basic"), "train")[0]
        # A bright spot in the upper left corner moves by at most 3 pixels, or to the other side.
        right = (batch[:, 0, :, 14:].amax((1, 2)) > batch.min()).any()
        assert bool(right) == mirrored
        assert batch.shape[1:] == (1, 28, 28)


def write_mnist(root: Path) -> None:
    for part, count in (("train", 100), ("t10k", 20)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 5, 5] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (root / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.mark.parametrize("content", [b"", b"no array", bytes([0, 0, 8, 1, 0, 0, 0, 9, 1])])
def test_damaged_mnist_is_refused(content: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(MissingFiles, match="MNIST is missing or damaged"):
        resolve("mnist", tmp_path)


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(datasets.SVHN.split_list)
    for split in ("train", "test"):
        pixels = np.stack([picture(index, (32, 32)) for index in range(40)], axis=3)
        file = root / entries[split][1]
        savemat(file, {"X": pixels, "y": (np.arange(40) % 10 + 1)[:, None]})  # the digit 0 is stored as 10
        entries[split] = [*entries[split][:2], hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", entries)


def test_svhn_is_read_from_its_matrices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path, monkeypatch)
    source = resolve("svhn", tmp_path, data__args={"validation": 0.25})
    assert (source.classes, source.sizes) == (10, {"train": 30, "validation": 10, "test": 40})
    images, labels = everything(source, "test")
    assert labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    pixels = torch.from_numpy(picture(3, (32, 32))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.4377, 0.4438, 0.4728]), torch.tensor([0.1980, 0.2010, 0.1970])
    torch.testing.assert_close(images[3] * std[:, None, None] + mean[:, None, None], pixels)


def test_flowers_have_three_parts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "flowers-102"
    count = 306
    for number in range(1, count + 1):
        write_image(base / "jpg" / f"image_{number:05d}.jpg", picture(number))
    savemat(base / "imagelabels.mat", {"labels": np.arange(count) % 102 + 1})
    numbers = np.arange(1, count + 1)
    savemat(base / "setid.mat", {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]})
    files = dict(datasets.Flowers102._file_dict)
    for key in ("label", "setid"):
        name = files[key][0]
        files[key] = (name, hashlib.md5((base / name).read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", files)
    source = resolve("flowers102", tmp_path, data__args={"size": 8})
    assert (source.classes, source.sizes) == (102, {"train": 102, "validation": 102, "test": 102})
    images, labels = source.batch("validation", 0, torch.arange(3))
    assert images.shape == (3, 3, 8, 8)
    assert labels.tolist() == [0, 1, 2]


def test_food_is_read_by_its_lists(tmp_path: Path) -> None:
    base = tmp_path / "food-101"
    names = [f"dish_{number:03d}" for number in range(101)]
    (base / "meta").mkdir(parents=True)
    for split, count in (("train", 10), ("test", 1)):
        lists = {name: [f"{name}/{split}{number}" for number in range(count)] for name in names}
        (base / "meta" / f"{split}.json").write_text(json.dumps(lists))
        for path in (path for paths in lists.values() for path in paths):
            write_image(base / "images" / f"{path}.jpg", picture(1))
    source = resolve("food101", tmp_path, data__args={"size": 6})
    assert (source.classes, source.sizes) == (101, {"train": 909, "validation": 101, "test": 101})
    assert source.batch("test", 0, torch.arange(2))[0].shape == (2, 3, 6, 6)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "svhn", "flowers102", "food101"])
def test_what_is_missing_is_named_with_the_way_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFiles, match=r"is missing or damaged there .* data\.download = true"):
        resolve(name, tmp_path)
    assert not list(tmp_path.iterdir())
