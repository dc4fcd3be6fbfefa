"""What makes inputs of raw ones: the same for training and for predictions, and kept as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import PrivateAttr

from scpl_dist import data
from scpl_dist.data.pictures import Images
from scpl_dist.data.preprocessing import Preprocessing, Tensors, describe, restore
from scpl_dist.run.config import load
from scpl_dist.storage.run_folder import RunFolder

GREY = Images(classes=["a", "b"], channels=1, height=4, width=6, mean=[0.5], std=[0.25])


def kept(preprocessing: Preprocessing, folder: Path) -> Preprocessing:
    """What is read from a run folder that has been given it."""
    run = RunFolder(folder)
    run.keep_preprocessing(describe(preprocessing), preprocessing.save)
    found = run.preprocessing()
    assert found is not None
    return restore(found, run.tokenizer)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    drawn = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for index in range(20):
            path = tmp_path / "photos" / label / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.integers(0, 255, (30, 20 + index, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


def test_a_picture_becomes_to_the_bit_what_training_was_fed(photos: Path, tmp_path: Path) -> None:
    values = {"data.name": "image_folder", "data.root": str(photos), "data.args": {"size": 16}}
    source = data.resolve(load(values=values))
    assert source.preprocessing is not None
    again = kept(source.preprocessing, tmp_path)
    assert again == source.preprocessing
    assert again.classes == ["cat", "dog"]
    found = dict(again.read(photos))
    assert len(found) == 40
    fed, _ = source.batch("test", 0, torch.arange(source.sizes["test"]))
    made = again.batch(list(found.values()))
    assert all(any(torch.equal(row, other) for other in made) for row in fed)
    pictures = [Image.open(path) for path in found.values()]
    assert torch.equal(again.batch(pictures), made)
    assert torch.equal(again.batch([np.asarray(picture) for picture in pictures]), made)


def test_images_of_other_sizes_are_covered_and_cropped() -> None:
    wide = Image.new("L", (30, 10), 255)
    assert torch.equal(GREY.batch([wide, torch.ones(1, 4, 6)]), torch.full((2, 1, 4, 6), 2.0))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (torch.ones(3, 4, 6), r"shape \(3, 4, 6\): the model takes \(1, 4, 6\); give a PIL image"),
        (np.ones((4, 6)), r"an array of float64 \(4, 6\): give \(H, W\) or \(H, W, C\) of uint8"),
        (7, "int is no image: give a path"),
        ("nowhere.png", "nowhere.png: cannot be read as an image"),
    ],
)
def test_what_is_no_image_is_told(raw: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GREY.batch([raw])


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images; give an image or a folder"):
        list(GREY.read(tmp_path))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        list(GREY.read(tmp_path / "nowhere"))


def test_every_image_source_says_how(tmp_path: Path) -> None:
    digits = data.resolve(load()).preprocessing
    assert digits is not None
    assert digits.classes == [str(digit) for digit in range(10)]
    assert digits.batch([Image.new("L", (8, 8))]).shape == (1, 1, 16, 16)


def test_tensors_are_read_from_arrays(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float64).reshape(4, 3)
    np.save(tmp_path / "rows.npy", rows)
    names, found = zip(*Tensors(classes=["a"]).read(tmp_path / "rows.npy"), strict=True)
    assert names == ("0", "1", "2", "3")
    assert torch.equal(Tensors(classes=["a"]).batch(found), torch.arange(12.0).reshape(4, 3))
    with pytest.raises(ValueError, match=r"the inputs make no batch: .*; all need one shape"):
        Tensors(classes=["a"]).batch([torch.ones(2), torch.ones(3)])
    with pytest.raises(ValueError, match=r"rows.csv: give a file .npy of numpy"):
        list(Tensors(classes=["a"]).read(tmp_path / "rows.csv"))


class Numbered(Preprocessing):
    """One of a user's own, with a file."""

    _words: list[str] = PrivateAttr(default_factory=list)

    def batch(self, inputs: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([self._words.index(word) for word in inputs])

    def save(self, folder: Path) -> None:
        (folder / "words.json").write_text(json.dumps(self._words))

    @classmethod
    def load(cls, settings: Mapping[str, Any], folder: Path) -> Self:
        made = super().load(settings, folder)
        made._words.extend(json.loads((folder / "words.json").read_text()))
        return made


def test_one_of_your_own_is_found_by_its_class_and_keeps_its_files(tmp_path: Path) -> None:
    own = Numbered(classes=["x", "y"])
    own._words.extend(["one", "two"])
    for _ in range(2):  # a run that goes on writes it again
        again = kept(own, tmp_path)
    assert again.batch(["two", "one"]).tolist() == [1, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"preprocessing.json", "tokenizer"}


def test_settings_of_another_version_are_told() -> None:
    with pytest.raises(ValueError, match=r"of another version: settings\.depth: Extra inputs"):
        restore({"kind": "tensors", "settings": {"classes": ["a"], "depth": 3}}, Path())
