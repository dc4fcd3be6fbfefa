"""The data sets of the published text experiments, and the mistakes of the published code with them.

Its word vectors were off by two: they were stacked in the order in which words had been counted, while the first two
numbers belong to padding and to unknown words. Its IMDB kept the stop-words and counted the words of the test part
too. ``legacy=True`` does all of it that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from scpl_dist.data import MissingFiles
from scpl_dist.data.table_files import read_table
from scpl_dist.run.config import Config
from scpl_dist_recipes.text import TextSource


def _published(
    origin: str,
    files: Sequence[str],
    texts: Sequence[str],
    label: str,
    classes: int,
    longest: int,
    header: Sequence[str] | None = None,
    quoted: bool = True,
    whole: bool = False,
) -> Callable[..., TextSource]:
    """The loader of a data set.

    Args:
        origin: what to get, and from where.
        files: training and test file under ``data.root``; only one if the set has no split.
        texts: columns of the text.
        label: column of the label.
        classes: number of classes.
        longest: words of a text that are used.
        header: names of the columns of files without a header.
        quoted: whether a double quote has a meaning.
        whole: whether the published code kept the stop-words and counted the words of all parts.
    """

    def load(
        config: Config,
        length: int = longest,
        vocabulary: int | None = None,
        vectors: str | None = None,
        validation: float = 0.1,
        legacy: bool = False,
    ) -> TextSource:
        root = Path(config.data.root)
        parts = {}
        for split, file in zip(("train", "test"), files, strict=False):
            if not (root / file).is_file():
                message = (
                    f"data.root = {config.data.root!r}: there is no {root / file}: "
                    f"get {origin} and put it, unpacked, there"
                )
                raise MissingFiles(message, classes, torch.zeros(2, length, dtype=torch.int64))
            parts[split] = read_table(root / file, texts, label, header, quoted)
        source = TextSource(
            config,
            parts,
            length,
            vocabulary,
            vectors,
            validation,
            keep_stop_words=legacy and whole,
            counted=("train", "validation", "test") if legacy and whole else ("train",),
            columns=texts,
        )
        if source.classes != classes:
            raise ValueError(
                f"{root / files[0]}: has {source.classes} classes, {config.data.name} has {classes}"
            )
        if legacy:
            source.vector_rows = {word: row - 2 for word, row in source.vector_rows.items()}
        return source

    return load


ag_news = _published(
    "https://s3.amazonaws.com/fast-ai-nlp/ag_news_csv.tgz",
    files=("ag_news_csv/train.csv", "ag_news_csv/test.csv"),
    header=("label", "title", "description"),
    texts=("title", "description"),
    label="label",
    classes=4,
    longest=60,
)
dbpedia_14 = _published(
    "https://s3.amazonaws.com/fast-ai-nlp/dbpedia_csv.tgz",
    files=("dbpedia_csv/train.csv", "dbpedia_csv/test.csv"),
    header=("label", "title", "content"),
    texts=("content",),
    label="label",
    classes=14,
    longest=400,
)
imdb = _published(
    '"IMDB Dataset of 50K Movie Reviews", one file of 50,000 reviews, from kaggle.com',
    files=("IMDB Dataset.csv",),
    texts=("review",),
    label="sentiment",
    classes=2,
    longest=350,
    whole=True,
)
sst2 = _published(
    "https://dl.fbaipublicfiles.com/glue/data/SST-2.zip",
    files=("SST-2/train.tsv", "SST-2/dev.tsv"),
    texts=("sentence",),
    label="label",
    classes=2,
    longest=15,
    quoted=False,
)
