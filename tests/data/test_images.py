"""Image data sets from files that the tests write, in the layouts that people have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scpl_dist.data import folders
from tests.support.files import everything, picture, resolve, write_image


def folder(root: Path, counts: dict[str, int], classes: tuple[str, ...] = ("bird", "cat")) -> Path:
    """Write `counts` images of each class for each part; "" is the root itself."""
    seed = 0
    for part, count in counts.items():
        for name in classes:
            for number in range(count):
                write_image(root / part / name / f"{number:03}.png", picture(seed))
                seed += 1
    return root


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
    write_image(tmp_path / "cat" / "odd.png", picture(0, (9, 20)))
    with pytest.raises(ValueError, match=r"odd\.png has 9x20 pixels.*has 8x6.*set data\.args\.size"):
        resolve("image_folder", tmp_path)
    assert resolve("image_folder", tmp_path, data__args={"size": 5}).example().shape == (2, 3, 5, 5)


def test_resizing_keeps_the_middle_of_a_long_image(tmp_path: Path) -> None:
    long = np.zeros((4, 12, 3), dtype=np.uint8)
    long[:, 4:8] = 255
    for name in ("a", "b"):
        for number in range(10):
            write_image(tmp_path / name / f"{number}.png", long)
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
        (("cat", "dog"), {"train": 1}, r"no class has 10 samples, so no validation part can be held out"),
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


def test_a_part_without_folders_of_classes_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"train": 10})
    write_image(tmp_path / "test" / "loose.png", picture(0))
    with pytest.raises(ValueError, match=r"test: has no folders of classes"):
        resolve("image_folder", tmp_path)


def test_an_empty_class_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {"": 10})
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"dog: has no images"):
        resolve("image_folder", tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"channels": 4}, r"data\.args\.channels = 4: input should be 1 or 3"),
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
    monkeypatch.setattr(folders, "CACHE_BYTES", 0)
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
