"""Texts as packed sequences: nothing is lost, nothing is in two parts, and each label is the token that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_dist import data
from scpl_dist.data.source import SPLITS, DataSource
from scpl_dist.data.tokens import Tokens
from scpl_dist.run.config import Config, load


def config(root: Path | str, **args: Any) -> Config:
    values = {"data.name": "text_lm", "task.name": "lm", "data.root": str(root)}
    return load(values=values | {"data.args": {"length": 8} | args})


def text(source: DataSource, split: str) -> str:
    """All inputs of a part in a row."""
    assert isinstance(source.preprocessing, Tokens)
    inputs, _ = source.batch(split, 0, torch.arange(source.sizes[split]))  # type: ignore[arg-type]
    return source.preprocessing.decode(inputs.flatten().tolist())


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    for index in range(20):
        (tmp_path / f"{index:02}.txt").write_text(f"<{index:02}> is document {index}, which is short.")
    (tmp_path / "again.md").write_text((tmp_path / "00.txt").read_text())
    (tmp_path / "picture.png").write_bytes(b"no text")
    return tmp_path


def test_labels_are_the_tokens_that_follow(documents: Path) -> None:
    source = data.resolve(config(documents))
    inputs, labels = source.batch("train", 3, torch.tensor([5, 6]))
    assert inputs.shape == labels.shape == (2, 8)
    assert (inputs.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert labels[0, -1] == inputs[1, 0]


def test_each_document_is_in_one_part_and_once(documents: Path) -> None:
    source = data.resolve(config(documents, validation=0.1, test=0.2))
    parts = {split: text(source, split) for split in SPLITS}
    # The last sequence of a part may be cut off with the end of a document.
    counts = {
        f"<{index:02}>": [part.count(f"<{index:02}>") for part in parts.values()] for index in range(20)
    }
    assert all(sorted(count) == [0, 0, 1] for count in counts.values()), counts
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [14, 2, 4]


def test_one_document_is_cut_into_a_beginning_and_an_end(tmp_path: Path) -> None:
    whole = "".join(f"{number} " for number in range(400))
    (tmp_path / "one.txt").write_text(whole)
    source = data.resolve(config(tmp_path / "one.txt", validation=0.1, test=0.1))
    train, validation, test = (text(source, split) for split in SPLITS)
    assert whole.startswith(train)
    assert whole.index(validation) >= len(train)
    assert whole.index(test) >= whole.index(validation) + len(validation)
    assert source.sizes["validation"] == pytest.approx(source.sizes["train"] / 8, rel=0.1)


def test_parts_may_have_files_of_their_own_and_texts_stand_in_a_column(tmp_path: Path) -> None:
    for split, word in (("train", "aab"), ("validation", "aba"), ("test", "xbb")):
        (tmp_path / f"{split}.csv").write_text(
            "text,label\n" + "\n".join(f"{word * 9}{n},0" for n in range(9))
        )
    source = data.resolve(config(tmp_path))
    assert [set(text(source, split)) & set("abx") for split in SPLITS] == [{"a", "b"}] * 2 + [{"b"}]
    assert isinstance(source.preprocessing, Tokens)
    assert source.preprocessing.unknown("abx0") == "x"  # the alphabet is that of the training part


def test_without_files_there_are_the_sources_of_the_standard_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = data.resolve(config("data", length=64, limit=60_000))
    assert 30_000 < sum(source.sizes.values()) * 64 <= 60_000
    assert "import " in text(source, "train")
    assert torch.equal(
        *(data.resolve(config("data", limit=60_000)).batch("train", 0, torch.arange(9))[0] for _ in "ab")
    )


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"length": 0}, "data.args: length = 0: give at least 1"),
        ({"limit": 0}, "data.args: limit = 0: give at least 1"),
        ({"validation": 0.4, "test": 0.2}, "validation = 0.4 and test = 0.2: give the shares"),
        (
            {"length": 300},
            r"the validation part has \d+ tokens, too few for two sequences of data.args.length = 300",
        ),
        ({"tokenizer": "words"}, "data.args: tokenizer = 'words': there is no file words"),
    ],
)
def test_arguments_that_cannot_be_are_refused(args: dict[str, Any], problem: str, documents: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        data.resolve(config(documents, **args))


def test_a_root_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"has no train texts; they are files \.txt, \.md, \.rst, \.py, \.csv"
    ):
        data.resolve(config(tmp_path))
    with pytest.raises(ValueError, match="there is no such file or folder; give a text, a table"):
        data.resolve(config(tmp_path / "absent"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a.txt: is not UTF-8 text: .*convert it to UTF-8"):
        data.resolve(config(tmp_path))
