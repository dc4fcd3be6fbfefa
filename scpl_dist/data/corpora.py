"""Texts in files: the data sets of the published experiments, and tables of the user's.

Nothing is downloaded here: where a file is missing, the error says what to get and where to put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scpl_dist.data import tables
from scpl_dist.data.tables import Row
from scpl_dist.data.text import TextSource, text_source
from scpl_dist.run.config import Config

_NAMES = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}


@dataclass(frozen=True)
class Published:
    """Where a published data set is and how it was read.

    Attributes:
        origin: what to get, and from where.
        files: training and test file under ``data.root``; only one if the set has no split.
        header: names of the columns of a file without a header.
        texts: columns of the text.
        label: column of the label.
        classes: number of classes.
        length: words of a text that are used.
        quoted: whether a double quote has a meaning.
    """

    origin: str
    files: tuple[str, ...]
    header: tuple[str, ...] | None
    texts: tuple[str, ...]
    label: str
    classes: int
    length: int
    quoted: bool = True


PUBLISHED = {
    "ag_news": Published(
        origin="https://s3.amazonaws.com/fast-ai-nlp/ag_news_csv.tgz",
        files=("ag_news_csv/train.csv", "ag_news_csv/test.csv"),
        header=("label", "title", "description"),
        texts=("title", "description"),
        label="label",
        classes=4,
        length=60,
    ),
    "dbpedia_14": Published(
        origin="https://s3.amazonaws.com/fast-ai-nlp/dbpedia_csv.tgz",
        files=("dbpedia_csv/train.csv", "dbpedia_csv/test.csv"),
        header=("label", "title", "content"),
        texts=("content",),
        label="label",
        classes=14,
        length=400,
    ),
    "imdb": Published(
        origin='"IMDB Dataset of 50K Movie Reviews", one file of 50,000 reviews, from kaggle.com',
        files=("IMDB Dataset.csv",),
        header=None,
        texts=("review",),
        label="sentiment",
        classes=2,
        length=350,
    ),
    "sst2": Published(
        origin="https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
        files=("SST-2/train.tsv", "SST-2/dev.tsv"),
        header=None,
        texts=("sentence",),
        label="label",
        classes=2,
        length=15,
        quoted=False,
    ),
}
"""Data sets of the published text experiments."""


def published(
    config: Config,
    length: int | None = None,
    vocabulary: int | None = None,
    vectors: str | None = None,
    validation: float = 0.1,
    legacy: bool = False,
) -> TextSource:
    """The published data set that ``data.name`` means; see `text_source` for the arguments.

    IMDB's one file is split for good: a fifth of each class is the test part. With `legacy` its stop-words
    stay and its vocabulary includes the test part, as in the published code.

    Raises:
        ValueError: a file is missing or not as published.
    """
    name = config.data.name
    entry = PUBLISHED[name]
    root = Path(config.data.root)
    parts: dict[str, list[Row]] = {}
    for split, file in zip(("train", "test"), entry.files, strict=False):
        if not (root / file).is_file():
            raise ValueError(
                f"data.root = {config.data.root!r}: there is no {root / file}: "
                f"get {entry.origin} and put it, unpacked, there"
            )
        parts[split] = tables.read(root / file, entry.texts, entry.label, entry.header, entry.quoted)
    source = text_source(
        config,
        parts,
        length=entry.length if length is None else length,
        vocabulary=vocabulary,
        vectors=vectors,
        validation=validation,
        legacy=legacy,
        whole=legacy and name == "imdb",
    )
    if source.classes != entry.classes:
        raise ValueError(f"{root / entry.files[0]}: has {source.classes} classes, {name} has {entry.classes}")
    return source


def table(
    config: Config,
    length: int = 200,
    vocabulary: int | None = None,
    vectors: str | None = None,
    validation: float = 0.1,
    legacy: bool = False,
) -> TextSource:
    """Tables with a column of texts and one of labels: CSV, TSV, JSON lines or Parquet.

    ``data.root`` is one table, of which a tenth becomes the validation part and a fifth the test part, or a
    folder with ``train``, ``test`` and perhaps ``validation`` tables. See `text_source` for the arguments.

    Raises:
        ValueError: a file or column is missing, or a row is not usable.
    """
    root = Path(config.data.root)
    files: dict[str, Path | None] = {"train": root}
    if root.is_dir():
        files = {split: tables.find(root, names) for split, names in _NAMES.items()}
    if files["train"] is None:
        raise ValueError(
            f"data.root = {config.data.root!r}: has no train table; name it train with one of the extensions "
            f"{', '.join(tables.EXTENSIONS)}, or set data.root to the file"
        )
    columns = (config.data.text_column,), config.data.label_column
    parts = {split: tables.read(path, *columns) for split, path in files.items() if path is not None}
    return text_source(config, parts, length, vocabulary, vectors, validation, legacy)
