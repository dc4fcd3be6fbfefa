"""Image data sets from files that the tests write, in the layouts that people have."""

from __future__ import annotations

import hashlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scpl_dist import data
from scpl_dist.data import images
from scpl_dist.data.source import DataSource, Split
from scpl_dist.run import config


def resolve(name: str, root: Path, **values: Any) -> DataSource:
    keys = {"data.name": name, "data.root": str(root), "data.augmentation": "none"}
    keys |= {key.replace("__", "."): value for key, value in values.items()}
    return data.resolve(config.load(values=keys))


def picture(seed: int, size: tuple[int, int] = (8, 6)) -> np.ndarray[Any, Any]:
    """Random RGB pixels, height x width x 3."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def write(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folder(root: Path, counts: dict[str, int], classes: tuple[str, ...] = ("bird", "cat")) -> Path:
    """Write `counts` images of each class for each part; "" is the root itself."""
    seed = 0
    for part, count in counts.items():
        for name in classes:
            for number in range(count):
                write(root / part / name / f"{number:03}.png", picture(seed))
                seed += 1
    return root


def everything(source: DataSource, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return source.batch(split, 0, torch.arange(source.sizes[split]))


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, hundred: bool) -> np.ndarray[Any, Any]:
    """A small CIFAR in torchvision's layout, with its checksums; returns the training pixels."""
    from torchvision import datasets

    dataset = datasets.CIFAR100 if hundred else datasets.CIFAR10
    key, classes = ("fine_labels", 100) if hundred else ("labels", 10)
    names = [f"class{index}" for index in range(classes)]
    base = root / dataset.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = []
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for attribute, entries in lists.items():
        for file, _ in getattr(dataset, attribute):
            count = 400 if hundred else 40
            rows = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = [index % classes for index in range(count)]
            content = pickle.dumps({"data": rows, key: labels})
            (base / file).write_bytes(content)
            entries.append([file, hashlib.md5(content).hexdigest()])
            if attribute == "train_list":
                pixels.append(rows)
        monkeypatch.setattr(dataset, attribute, entries)
    content = pickle.dumps({dataset.meta["key"]: names})
    (base / dataset.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": hashlib.md5(content).hexdigest()})
    return np.concatenate(pixels)


@pytest.mark.parametrize(("name", "hundred"), [("cifar10", False), ("cifar100", True)])
def test_cifar_is_normalised_and_split(
    name: str, hundred: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = write_cifar(tmp_path, monkeypatch, hundred)
    source = resolve(name, tmp_path, data__args={"validation": 0.25})
    assert source.classes == (100 if hundred else 10)
    assert list(source.sizes.values()) == ([300, 100, 400] if hundred else [150, 50, 40])
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    }[name]
    expected = torch.tensor(pixels).reshape(-1, 3, 32, 32) / 255
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    parts = [everything(source, split) for split in ("train", "validation")]
    assert all(set(labels.tolist()) == set(range(source.classes)) for _, labels in parts)
    got = torch.cat([part for part, _ in parts])
    nearest = torch.cdist(got.flatten(1), expected.flatten(1)).argmin(1)
    torch.testing.assert_close(got, expected[nearest])
    assert sorted(nearest.tolist()) == list(range(len(expected)))


def test_cifar_may_be_mirrored_and_shifted_by_four_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch, hundred=False)
    plain = everything(resolve("cifar10", tmp_path), "train")[0]
    moved = everything(resolve("cifar10", tmp_path, data__augmentation="basic"), "train")[0]
    matches = {(top, left, flip): 0 for top in range(9) for left in range(9) for flip in (False, True)}
    black = (-torch.tensor((0.4914, 0.4822, 0.4465)) / torch.tensor((0.2023, 0.1994, 0.2010)))[:, None, None]
    padded = torch.nn.functional.pad(plain - black, (4,) * 4) + black
    for index in range(len(plain)):
        for top, left, flip in matches:
            crop = padded[index, :, top : top + 32, left : left + 32]
            if torch.allclose(crop.flip(2) if flip else crop, moved[index], atol=1e-5):
                matches[top, left, flip] += 1
                break
    assert sum(matches.values()) == len(plain)
    assert 60 < sum(count for (_, _, flip), count in matches.items() if flip) < 120


def test_missing_cifar_says_what_to_get_and_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"CIFAR10 is missing.*cifar-10-python\.tar\.gz.*cifar-10-batches-py.*download"
    ):
        resolve("cifar10", tmp_path)


def test_damaged_cifar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch, hundred=False)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="CIFAR10 is missing or damaged"):
        resolve("cifar10", tmp_path)


@pytest.mark.parametrize("layout", ["annotations", "folders"])
def test_tiny_imagenet_in_both_layouts(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    names = ("n01", "n02", "n03")
    for index, name in enumerate(names):
        for number in range(20):
            write(root / "train" / name / "images" / f"{name}_{number}.JPEG", picture(index, (64, 64)))
    lines = []
    for number in range(6):
        name = names[number % 3]
        where = root / "val" / ("images" if layout == "annotations" else name) / f"val_{number}.JPEG"
        write(where, picture(100 + number, (64, 64)))
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62")
    if layout == "annotations":
        (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    source = resolve("tiny_imagenet", tmp_path)
    assert source.sizes == {"train": 54, "validation": 6, "test": 6}
    inputs, labels = everything(source, "test")
    assert inputs.shape == (6, 3, 32, 32)
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
    with Image.open(root / "train" / "n02" / "images" / "n02_7.JPEG") as image:
        pixels = np.array(image.resize((32, 32), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    expected = (
        torch.tensor(pixels) / 255 - torch.tensor([0.4802, 0.4481, 0.3975])[:, None, None]
    ) / torch.tensor([0.2770, 0.2691, 0.2821])[:, None, None]
    train, labels = everything(source, "train")
    torch.testing.assert_close(train[labels == 1][0], expected)


def test_missing_tiny_imagenet_says_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny-imagenet-200\.zip and unpack it in"):
        resolve("tiny_imagenet", tmp_path)


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"": 20}, [28, 4, 8]),
        ({"train": 20}, [28, 4, 8]),
        ({"train": 20, "test": 3}, [36, 4, 6]),
        ({"train": 20, "val": 3}, [36, 4, 6]),
        ({"train": 20, "valid": 2, "test": 3}, [40, 4, 6]),
    ],
)
def test_image_folders_in_all_layouts(counts: dict[str, int], sizes: list[int], tmp_path: Path) -> None:
    source = resolve("image_folder", folder(tmp_path, counts))
    assert list(source.sizes.values()) == sizes
    assert source.classes == 2
    seen = set()
    for split in ("train", "validation", "test"):
        inputs, labels = everything(source, split)
        assert inputs.shape[1:] == (3, 6, 8)
        assert labels.bincount().tolist() == [len(labels) // 2] * 2
        seen |= {tuple(row) for row in inputs.flatten(1).tolist()}
    assert len(seen) == sum(sizes)


def test_pixels_of_a_folder_are_those_of_the_files(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 10, "validation": 1, "test": 1})
    source = resolve("image_folder", tmp_path, data__args={"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]})
    inputs, labels = source.batch("train", 0, torch.tensor([13, 2]))
    assert labels.tolist() == [1, 0]
    for row, seed in zip(inputs, (13, 2), strict=True):
        torch.testing.assert_close(row, torch.tensor(picture(seed).transpose(2, 0, 1)) / 255)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    source = resolve("image_folder", folder(tmp_path, {"": 10}), data__args={"channels": 1})
    assert source.example().shape == (2, 1, 6, 8)


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    folder(tmp_path, {"": 10})
    write(tmp_path / "cat" / "odd.png", picture(0, (9, 20)))
    with pytest.raises(ValueError, match=r"odd\.png has 9x20 pixels.*has 8x6.*set data\.args\.size"):
        resolve("image_folder", tmp_path)
    assert resolve("image_folder", tmp_path, data__args={"size": 5}).example().shape == (2, 3, 5, 5)


def test_resizing_keeps_the_middle_of_a_long_image(tmp_path: Path) -> None:
    long = np.zeros((4, 12, 3), dtype=np.uint8)
    long[:, 4:8] = 255
    for name in ("a", "b"):
        for number in range(10):
            write(tmp_path / name / f"{number}.png", long)
    args = {"size": 4, "mean": [0.0] * 3, "std": [1.0] * 3}
    assert resolve("image_folder", tmp_path, data__args=args).example().eq(1).all()


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    folder(tmp_path, {"": 10})
    (tmp_path / "cat" / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        resolve("image_folder", tmp_path)
    (tmp_path / "cat" / "broken.png").write_bytes((tmp_path / "cat" / "000.png").read_bytes()[:60])
    source = resolve("image_folder", tmp_path)
    with pytest.raises(ValueError, match=r"broken\.png: the image is damaged"):
        [everything(source, split) for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    ("classes", "counts", "says"),
    [
        (("cat",), {"train": 3}, r"train: has 1 folders of classes, a classifier needs at least 2"),
        ((), {"": 0}, r"has 0 folders of classes"),
        (("cat", "dog"), {"train": 1}, r"validation: has no samples"),
    ],
)
def test_too_few_classes_or_images_are_refused(
    classes: tuple[str, ...], counts: dict[str, int], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        resolve("image_folder", folder(tmp_path, counts, classes))


def test_classes_of_later_parts_must_be_known(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 10})
    folder(tmp_path, {"test": 2}, ("cat", "dog"))
    with pytest.raises(ValueError, match=r"test: class 'dog' is not among the 2 of the training part"):
        resolve("image_folder", tmp_path)


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"": 10})
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog: has no images"):
        resolve("image_folder", tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"channels": 4}, "channels = 4: give 3 for RGB or 1"),
        ({"validation": 0.0}, "validation = 0.0: give the share"),
        ({"validation": "x"}, r"data\.args\.validation = 'x': input should be a valid number"),
        ({"mean": [0.5]}, "have 1 values for 3 channels"),
        ({"colour": 1}, "image_folder takes size, channels"),
    ],
)
def test_impossible_args_are_refused(args: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        resolve("image_folder", folder(tmp_path, {"": 10}), data__args=args)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such folder"):
        resolve("image_folder", tmp_path / "nowhere")


def test_files_are_decoded_once_and_the_same_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path, {"": 10})
    kept = resolve("image_folder", tmp_path)
    expected = everything(kept, "train")[0]
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    streamed = resolve("image_folder", tmp_path)
    assert torch.equal(everything(streamed, "train")[0], expected)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert torch.equal(everything(kept, "train")[0], expected)
    with pytest.raises(ValueError, match="cannot be read as an image"):
        everything(streamed, "train")


def test_threads_that_meet_at_the_same_files_get_the_same_images(tmp_path: Path) -> None:
    folder(tmp_path, {"": 30})
    source = resolve("image_folder", tmp_path)
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda _: everything(source, "train")[0], range(8)))
    assert all(torch.equal(batch, batches[0]) for batch in batches)
