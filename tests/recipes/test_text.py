"""Text data sets from tables that the tests write, and from Python's own docstrings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scpl_dist import models
from tests.support.files import everything, resolve_text, write_csv

Rows = list[tuple[str, str]]
ROWS: Rows = [(f"common word{index} number{index % 7}", ("bad", "good")[index % 2]) for index in range(100)]


def test_one_table_is_split_by_class_in_70_10_20_percent(tmp_path: Path) -> None:
    source = resolve_text("csv", write_csv(tmp_path / "all.csv", ROWS))
    assert source.sizes == {"train": 70, "validation": 10, "test": 20}
    assert source.names == ["bad", "good"]
    for split in ("train", "validation", "test"):
        assert everything(source, split)[1].bincount().tolist() == [source.sizes[split] // 2] * 2


def test_a_folder_has_a_table_for_each_part(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "common", "label": "good"}) + "\n")
    assert resolve_text("csv", tmp_path).sizes == {"train": 90, "validation": 10, "test": 1}
    write_csv(tmp_path / "dev.tsv", [])
    (tmp_path / "dev.tsv").write_text("text\tlabel\ncommon words\tbad\n")
    source = resolve_text("csv", tmp_path)
    assert source.sizes == {"train": 100, "validation": 1, "test": 1}
    assert everything(source, "test")[1].tolist() == [1]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", ROWS, ("review", "stars"))
    keys = {"data__text_column": "review", "data__label_column": "stars"}
    assert resolve_text("csv", path, **keys).classes == 2
    with pytest.raises(
        ValueError, match=r"no column 'text', it has 'review', 'stars'; set data\.text_column"
    ):
        resolve_text("csv", path)


def test_words_are_numbered_from_the_training_part_alone(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("cat dog", "a"), ("cat", "b")] * 10)
    write_csv(tmp_path / "validation.csv", [("cat", "a")])
    write_csv(tmp_path / "test.csv", [("cat bird dog", "b")])
    source = resolve_text("csv", tmp_path)
    assert source.vocabulary == {"cat": 2, "dog": 3}
    assert everything(source, "test")[0].tolist() == [[2, 1, 3]]


def test_batches_are_padded_to_their_longest_text(tmp_path: Path) -> None:
    write_csv(
        tmp_path / "train.csv", [("one", "a"), ("one two three", "b"), ("one two", "a"), ("one", "b")] * 5
    )
    write_csv(tmp_path / "test.csv", [("one", "a")])
    source = resolve_text("csv", tmp_path, data__args={"validation": 0.5})
    inputs, labels = everything(source, "train")
    lengths = (inputs != 0).sum(1)
    assert inputs.shape[1] == lengths.max()
    assert inputs.dtype == labels.dtype == torch.int64
    for row, length in enumerate(lengths.tolist()):
        alone = source.batch("train", 0, torch.tensor([row]))[0]
        assert alone.shape == (1, length)
        assert torch.equal(alone[0], inputs[row, :length])
    assert source.example().shape[0] == 2


def test_texts_are_cut_and_empty_ones_dropped(tmp_path: Path) -> None:
    long = [(" ".join(f"w{index}" for index in range(50)), label) for label in ("a", "b") for _ in range(10)]
    source = resolve_text(
        "csv", write_csv(tmp_path / "all.csv", [*long, ("the of and", "a")]), data__args={"length": 7}
    )
    assert sum(source.sizes.values()) == 20
    assert source.example().shape == (2, 7)


def test_numbers_as_labels_are_sorted_by_value(tmp_path: Path) -> None:
    rows = [(f"word{index}", str(index % 3 + 8)) for index in range(60)]
    assert resolve_text("csv", write_csv(tmp_path / "all.csv", rows)).names == ["8", "9", "10"]


def test_the_vocabulary_fits_the_model(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", ROWS)
    assert len(resolve_text("csv", path, model__args={"vocabulary": 20}).vocabulary) == 18
    assert (
        len(resolve_text("csv", path, data__args={"vocabulary": 30}).vocabulary) == 28
    )  # and padding, unknown
    with pytest.raises(
        ValueError, match=r"vocabulary = 5000: .*lstm_tiny' has 4000 words; set model\.args\.vocabulary"
    ):
        resolve_text("csv", path, data__args={"vocabulary": 5000})
    assert (
        len(resolve_text("csv", path, model__name="vgg8", data__args={"vocabulary": 5000}).vocabulary) < 5000
    )


def test_vectors_go_into_the_embedding_and_only_there(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", ROWS)
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("common " + " ".join(["0.5"] * 64) + "\nnumber3 " + " ".join(["-1.5"] * 64) + "\n")
    source = resolve_text("csv", path, data__args={"vectors": str(vectors)})
    first, second = models.build("lstm_tiny", {}, 2, seed=0, blocks=[0, 1])
    source.prepare(first)
    weight = first.get_parameter("vectors.weight")
    assert weight[source.vocabulary["common"]].eq(0.5).all()
    assert weight[source.vocabulary["number3"]].eq(-1.5).all()
    assert not weight[0].any()
    assert weight.requires_grad
    with pytest.raises(ValueError, match=r"block 0 \(LSTMBlock\) has no embedding"):
        source.prepare(second)
    with pytest.raises(ValueError, match=r"vectors = '.*nowhere': there is no such file"):
        resolve_text("csv", path, data__args={"vectors": str(tmp_path / "nowhere")})


def test_without_vectors_the_embedding_stays(tmp_path: Path) -> None:
    (first,) = models.build("lstm_tiny", {}, 2, seed=0, blocks=[0])
    before = first.get_parameter("vectors.weight").clone()
    resolve_text("csv", write_csv(tmp_path / "all.csv", ROWS)).prepare(first)
    assert torch.equal(first.get_parameter("vectors.weight"), before)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("word", "a")] * 30, "has 1 class, a classifier needs at least 2"),
        ([("word", "a"), ("word", "b")], "no class has 10 samples, so no validation part"),
        ([("the of", "a"), ("and", "b")], "train: has no samples"),
    ],
)
def test_tables_that_no_classifier_can_learn_from_are_refused(rows: Rows, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        resolve_text("csv", write_csv(tmp_path / "all.csv", rows))


def test_a_class_that_the_training_part_lacks_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", ROWS)
    write_csv(tmp_path / "test.csv", [("word", "good"), ("word", "ugly")])
    with pytest.raises(ValueError, match=r"test row 2 has label 'ugly', the training part has bad, good"):
        resolve_text("csv", tmp_path)


def test_an_empty_folder_and_impossible_args_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no train table; name it train with one of the extensions \.csv"
    ):
        resolve_text("csv", tmp_path)
    path = write_csv(tmp_path / "all.csv", ROWS)
    for args, says in [
        ({"length": 0}, "length = 0: give the number of words"),
        ({"vocabulary": 2}, "vocabulary = 2: give at least 3"),
        ({"validation": 0.9}, r"validation = 0\.9: give the share"),
        ({"length": "7"}, r"data\.args\.length = '7': input should be a valid integer"),
        ({"size": 3}, "csv takes length, vocabulary, vectors, validation$"),
    ]:
        with pytest.raises(ValueError, match=says):
            resolve_text("csv", path, data__args=args)
    with pytest.raises(ValueError, match='"strong": there is no augmentation of texts'):
        resolve_text("csv", path, data__augmentation="strong")
