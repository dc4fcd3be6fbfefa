"""From texts to word numbers: what training was fed, from files of lines and tables too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scpl_dist.data.preprocessing import describe, restore
from tests.support.files import everything, resolve_text, write_csv

ROWS = [(f"common number{index} {'good' if index % 2 else 'bad'}", "ab"[index % 2]) for index in range(40)]


def test_a_text_becomes_what_training_was_fed(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "all.csv", ROWS)
    source = resolve_text("csv", path, data__args={"length": 2})
    assert source.preprocessing is not None
    again = restore(describe(source.preprocessing), Path())
    assert again.classes == ["a", "b"]
    fed = sorted(
        row.tolist() for split in ("train", "validation", "test") for row in everything(source, split)[0]
    )
    found = [text for _, text in again.read(path)]
    assert found == [text for text, _ in ROWS]
    assert sorted(again.batch(found).tolist()) == fed


def test_lines_and_texts_without_words(tmp_path: Path) -> None:
    inputs = resolve_text("csv", write_csv(tmp_path / "all.csv", ROWS)).preprocessing
    assert inputs is not None
    (tmp_path / "lines.txt").write_text("Common good\n\nthe of\r\n")
    found = list(inputs.read(tmp_path / "lines.txt"))
    assert found == [("1", "Common good"), ("2", ""), ("3", "the of")]
    made = inputs.batch([text for _, text in found])
    assert made.shape == (3, 2)
    assert torch.equal(made[1:], torch.tensor([[1, 0], [1, 0]]))  # an unknown word
    with pytest.raises(ValueError, match="int is no text: give a str"):
        inputs.batch([3])


def test_a_table_without_the_column_is_told(tmp_path: Path) -> None:
    inputs = resolve_text("csv", write_csv(tmp_path / "all.csv", ROWS)).preprocessing
    assert inputs is not None
    (tmp_path / "other.csv").write_text("title\nfine\n")
    with pytest.raises(ValueError, match=r"other.csv: has no column 'text', it has 'title'"):
        list(inputs.read(tmp_path / "other.csv"))
    with pytest.raises(ValueError, match=r"nowhere.txt: cannot be read as UTF-8 text .*; give lines of text"):
        list(inputs.read(tmp_path / "nowhere.txt"))
