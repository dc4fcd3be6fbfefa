"""Tables of all kinds give the same rows, and each mistake is reported with file and row."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from scpl_dist.data import table_files

ROWS = [
    ("a plain text", "good"),
    ('with "quotes", commas\nand a line break', "bad"),
    ("\u00fcmlaut and \u4e2d\u6587", "good"),
    ("x" * 200_000, "7"),
]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"label": label, "text": text, "other": 1}) for text, label in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        texts, labels = zip(*rows, strict=True)
        parquet.write_table(
            arrow.table({"label": list(labels), "n": [1] * len(rows), "text": list(texts)}), path
        )
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(["label", "n", "text"])
            writer.writerows([label, 1, text] for text, label in rows)
    return path


@pytest.mark.parametrize("extension", table_files.EXTENSIONS)
def test_all_kinds_give_the_rows_that_were_written(extension: str, tmp_path: Path) -> None:
    assert table_files.read_table(write(tmp_path / f"t{extension}", ROWS), ["text"], "label") == ROWS


def test_columns_of_text_are_joined_and_numbers_are_labels(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"title": "One", "body": "two", "class": 3}\n')
    assert table_files.read_table(path, ["title", "body"], "class") == [("One two", "3")]


def test_a_csv_without_header_has_given_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('"3","Title","Some text"\n"1","Other","More"\n')
    rows = table_files.read_table(path, ["title", "text"], "label", header=["label", "title", "text"])
    assert rows == [("Title Some text", "3"), ("Other More", "1")]


def test_quotes_may_have_no_meaning(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('sentence\tlabel\n" so bad it is good\t1\nplain\t0\n')
    assert table_files.read_table(path, ["sentence"], "label", quoted=False) == [
        ('" so bad it is good', "1"),
        ("plain", "0"),
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\ufefftext,label\na,1\n", encoding="utf-8")
    assert table_files.read_table(path, ["text"], "label") == [("a", "1")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"text,label\n", "has no rows"),
        (
            "t.csv",
            b"words,label\na,1\n",
            r"has no column 'text', it has 'words', 'label'; set data\.text_column",
        ),
        ("t.csv", b"text,class\na,1\n", "has no column 'label'"),
        ("t.csv", b"text,label\na,1\nb\n", r"row 2 has the label None in column 'label'"),
        ("t.csv", b"text,label\na,1\nb,\n", r"row 2 has the label '' in column 'label'"),
        ("t.csv", b"label,text\n1,a\n1\n", "row 2 has no text in column text"),
        ("t.csv", b'text,label\n"a,1\n', "cannot be read after row 0"),
        ("t.csv", b"text,label\n\xff\xfe,1\n", "is not UTF-8"),
        ("t.jsonl", b"", "has no rows"),
        ("t.jsonl", b'{"text": "a", "label": 1}\nnonsense\n', "cannot be read after row 1"),
        ("t.jsonl", b"[1, 2]\n", r"\[1, 2\] is no JSON object"),
        ("t.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', "has no column 'label'"),
        ("t.jsonl", b'{"text": 5, "label": 1}\n', "row 1 has no text"),
        ("t.jsonl", b'{"text": "a", "label": 0.5}\n', r"row 1 has the label 0\.5"),
        ("t.jsonl", b'{"text": "a", "label": true}\n', "row 1 has the label True"),
        ("t.parquet", b"nonsense", "cannot be read as Parquet"),
        ("t.txt", b"text", "unknown kind of table"),
    ],
)
def test_what_is_wrong_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{says}|{name}: {says}"):
        table_files.read_table(path, ["text"], "label")


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"words": ["a"], "label": [1]}), path)
    with pytest.raises(ValueError, match=r"t\.parquet: has no column 'text', it has 'words', 'label'"):
        table_files.read_table(path, ["text"], "label")


def test_a_parquet_row_without_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"text": ["a", None], "label": [1, 2]}), path)
    with pytest.raises(ValueError, match="row 2 has no text"):
        table_files.read_table(path, ["text"], "label")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "t.parquet", ROWS)
    monkeypatch.setitem(
        sys.modules, "pyarrow", None
    )  # what an import finds where the package is not installed
    with pytest.raises(ValueError, match=r'pip install "scpl_dist\[parquet\]"'):
        table_files.read_table(path, ["text"], "label")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.csv: there is no such file"):
        table_files.read_table(tmp_path / "t.csv", ["text"], "label")


def test_find_takes_the_first_name_with_any_extension(tmp_path: Path) -> None:
    assert table_files.find(tmp_path, ["train"]) is None
    (tmp_path / "valid.jsonl").touch()
    (tmp_path / "val.csv").touch()
    assert table_files.find(tmp_path, ["validation", "valid", "val"]) == tmp_path / "valid.jsonl"
