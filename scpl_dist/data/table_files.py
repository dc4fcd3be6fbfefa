"""Reads tables with a column of texts and perhaps a column of labels: CSV, TSV, JSON lines and Parquet.

Every row is checked while it is read, so that a mistake is reported with file and row.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet")
"""Kinds of tables, by their file's extension."""

Row = tuple[str, str]
"""Text and label."""


def find(folder: Path, names: Sequence[str]) -> Path | None:
    """The first table in `folder` with one of these names and any of the extensions."""
    candidates = (folder / f"{name}{extension}" for name in names for extension in EXTENSIONS)
    return next((path for path in candidates if path.is_file()), None)


def read_table(
    path: Path,
    text_columns: Sequence[str],
    label_column: str,
    header: Sequence[str] | None = None,
    quoted: bool = True,
) -> list[Row]:
    """Text and label of each row of a table, both as text.

    Args:
        path: the file; its extension says what it is.
        text_columns: columns of the text, joined by a blank.
        label_column: column of the label; labels may be any text or whole number.
        header: names of the columns of a CSV file whose first row is a row of data.
        quoted: whether a double quote has a meaning in a CSV or TSV file.

    Raises:
        ValueError: the file is missing, empty or not readable, or lacks a column, or a row lacks a value.
    """
    found = list(rows(path, text_columns, label_column, header, quoted))
    if not found:
        raise ValueError(f"{path}: has no rows")
    return found


def rows(
    path: Path,
    text_columns: Sequence[str],
    label_column: str | None = None,
    header: Sequence[str] | None = None,
    quoted: bool = True,
) -> Iterator[Row]:
    """What `read_table` gives, one after the other; without a column of labels these are empty."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    columns = [*text_columns, *([] if label_column is None else [label_column])]
    number = 0
    try:
        for number, row in enumerate(_rows(path, columns, header, quoted), start=1):
            values = [row.get(name) for name in text_columns]
            label = "" if label_column is None else row.get(label_column)
            if not all(isinstance(value, str) for value in values):
                raise ValueError(f"{path}: row {number} has no text in column {', '.join(text_columns)}")
            empty = label_column is not None and str(label).strip() == ""
            if not isinstance(label, str | int) or isinstance(label, bool) or empty:
                raise ValueError(
                    f"{path}: row {number} has the label {label!r} in column {label_column!r}; "
                    "labels are texts or whole numbers"
                )
            yield " ".join(map(str, values)), str(label).strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}; convert it to UTF-8") from None
    except (OSError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read after row {number}: {error}") from None


def _rows(
    path: Path, columns: Sequence[str], header: Sequence[str] | None, quoted: bool
) -> Iterator[Mapping[str, Any]]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _separated(path, columns, header, "," if kind == ".csv" else "\t", quoted)
    if kind == ".jsonl":
        return _json_lines(path, columns)
    if kind == ".parquet":
        return _parquet(path, columns)
    raise ValueError(f"{path}: unknown kind of table; use one of {', '.join(EXTENSIONS)}")


def _separated(
    path: Path, columns: Sequence[str], header: Sequence[str] | None, separator: str, quoted: bool
) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a review may be longer than the 128 KiB that csv allows by default
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, fieldnames=header, delimiter=separator, quoting=quoting, strict=quoted)
        if reader.fieldnames is None:
            raise ValueError(f"{path}: is empty")
        _check_columns(path, columns, reader.fieldnames)
        yield from reader


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{path}: {line.strip()[:40]} is no JSON object with {', '.join(columns)}")
            _check_columns(path, columns, list(row))
            yield row


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f'{path}: reading Parquet needs pyarrow: pip install "scpl_dist[parquet]", or convert it to CSV'
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {error}") from None


def _check_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    for column in columns:
        if column not in present:
            raise ValueError(
                f"{path}: has no column {column!r}, it has {', '.join(map(repr, present))}; "
                "set data.text_column and data.label_column"
            )
