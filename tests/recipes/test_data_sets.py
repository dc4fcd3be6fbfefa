"""Data sets of the recipes, from files that the tests write in the published layouts."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scpl_dist import models
from tests.support.files import everything, picture, resolve, resolve_text, write_csv, write_image


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
            write_image(root / "train" / name / "images" / f"{name}_{number}.JPEG", picture(index, (64, 64)))
    lines = []
    for number in range(6):
        name = names[number % 3]
        where = root / "val" / ("images" if layout == "annotations" else name) / f"val_{number}.JPEG"
        write_image(where, picture(100 + number, (64, 64)))
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


def test_ag_news_reads_title_and_description(tmp_path: Path) -> None:
    rows = [(str(index % 4 + 1), f"title{index}", f"text{index}") for index in range(40)]
    for file in ("train.csv", "test.csv"):
        write_csv(tmp_path / "ag_news_csv" / file, rows, ())
    source = resolve_text("ag_news", tmp_path)
    assert source.classes == 4
    assert source.sizes == {"train": 36, "validation": 4, "test": 40}
    assert len(source.vocabulary) == 2 * 36  # the title and the text of each training row


def test_dbpedia_reads_the_content_only(tmp_path: Path) -> None:
    rows = [(str(index % 14 + 1), "title", f"content{index} " + "w " * 500) for index in range(280)]
    for file in ("train.csv", "test.csv"):
        write_csv(tmp_path / "dbpedia_csv" / file, rows, ())
    source = resolve_text("dbpedia_14", tmp_path)
    assert source.classes == 14
    assert "title" not in source.vocabulary
    assert source.example().shape == (2, 400)


def test_imdb_is_split_for_good_and_legacy_keeps_its_mistakes(tmp_path: Path) -> None:
    rows = [(f"this is a review{index}", ("positive", "negative")[index % 2]) for index in range(100)]
    write_csv(tmp_path / "IMDB Dataset.csv", rows, ("review", "sentiment"))
    source = resolve_text("imdb", tmp_path)
    assert source.sizes == {"train": 70, "validation": 10, "test": 20}
    assert source.names == ["negative", "positive"]
    assert "this" not in source.vocabulary
    assert len(source.vocabulary) == 70
    legacy = resolve_text("imdb", tmp_path, data__args={"legacy": True})
    assert "this" in legacy.vocabulary
    assert len(legacy.vocabulary) == 100 + 3


def test_legacy_vectors_are_off_by_two_as_published(tmp_path: Path) -> None:
    rows = [(f"film{index % 2} was great{index % 3}", index % 2) for index in range(60)]
    write_csv(
        tmp_path / "IMDB Dataset.csv", [(text, str(label)) for text, label in rows], ("review", "sentiment")
    )
    vectors = tmp_path / "vectors.txt"
    vectors.write_text(
        "".join(f"{word} {' '.join([value] * 64)}\n" for word, value in [("was", "1"), ("film0", "2")])
    )
    source = resolve_text("imdb", tmp_path, data__args={"legacy": True, "vectors": str(vectors)})
    (first,) = models.build("lstm_tiny", {"legacy": True}, 2, seed=0, blocks=[0])
    source.prepare(first)
    numbers = source.vocabulary
    weight = first.get_parameter("vectors.weight")
    assert numbers["was"] == 2
    assert weight[0].eq(1).all()
    assert weight[numbers["film0"] - 2].eq(2).all()


def test_sst2_has_quotes_without_meaning(tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()
    lines = [f'" word{index} film\t{index % 2}' for index in range(40)]
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / file).write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    assert resolve_text("sst2", tmp_path).sizes == {"train": 36, "validation": 4, "test": 40}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ag_news", r"ag_news_csv/train\.csv: get .*ag_news_csv\.tgz"),
        ("dbpedia_14", r"dbpedia_csv/train\.csv: get .*dbpedia_csv\.tgz"),
        ("imdb", r"IMDB Dataset\.csv: get .*50K"),
        ("sst2", r"SST-2/train\.tsv: get .*SST-2\.zip"),
    ],
)
def test_missing_files_say_what_to_get_and_where_to_put_it(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no {tmp_path}/{file}.* and put it, unpacked, there"):
        resolve_text(name, tmp_path)


def test_a_file_with_other_classes_than_published_is_refused(tmp_path: Path) -> None:
    for file in ("train.csv", "test.csv"):
        write_csv(tmp_path / "ag_news_csv" / file, [("1", "a", "b"), ("2", "c", "d")] * 20, ())
    with pytest.raises(ValueError, match="has 2 classes, ag_news has 4"):
        resolve_text("ag_news", tmp_path)


def test_docstrings_are_real_texts_in_seven_classes(tmp_path: Path) -> None:
    source = resolve_text("docstrings", tmp_path)
    assert source.classes == 7
    assert sum(source.sizes.values()) > 4000
    shares = [source.sizes[split] / sum(source.sizes.values()) for split in ("train", "validation", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    counts = everything(source, "train")[1].bincount(minlength=7)
    assert counts.min() > 100
    assert counts.max() < 0.35 * counts.sum()
    assert {"file", "return", "socket", "thread"} <= set(source.vocabulary)
