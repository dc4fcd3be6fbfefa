"""Text classification: from texts and labels to batches of word numbers.

A batch is padded to its longest text, which saves most of the work for short ones. The vocabulary comes from
the training part alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from scpl_dist import models
from scpl_dist.data.source import DataSource, Split, check_labels, check_share
from scpl_dist.data.splits import stratified
from scpl_dist.data.tables import Row
from scpl_dist.data.words import PADDING, Vocabulary, clean, read_vectors
from scpl_dist.run.config import Config


def text_source(
    config: Config,
    parts: Mapping[str, Sequence[Row]],
    length: int,
    vocabulary: int | None = None,
    vectors: str | None = None,
    validation: float = 0.1,
    legacy: bool = False,
    whole: bool = False,
) -> TextSource:
    """Clean texts, hold out missing parts and number the words.

    Args:
        config: the run.
        parts: texts and labels of "train" and perhaps of "validation" and "test". Samples without any word
            left after cleaning are dropped.
        length: words of a text that are used.
        vocabulary: largest number of words, padding and unknown words included; None takes what the model
            takes.
        vectors: file with word vectors, or None.
        validation: share of the training part that is held out if there is no validation part; of a single
            table a fifth becomes the test part too.
        legacy: repeat the mistakes of the published code (see `scpl_dist.data.words`).
        whole: keep stop-words and take the vocabulary from all parts.

    Raises:
        ValueError: labels that the training part does not have, one class only, impossible arguments.
    """
    _check_arguments(config, length, vectors, validation)
    names = sorted({label for _, label in parts["train"]}, key=_numerically)
    words: dict[str, list[list[str]]] = {}
    labels: dict[str, torch.Tensor] = {}
    for split, rows in parts.items():
        numbers = _numbers(rows, names, split)
        cleaned = [clean(text, keep_stop_words=whole)[:length] for text, _ in rows]
        words[split] = [text for text in cleaned if text]
        labels[split] = torch.tensor(
            [number for text, number in zip(cleaned, numbers, strict=True) if text]
        ).long()
    missing = {"validation": validation, "test": 0.2}
    missing = {split: share for split, share in missing.items() if split not in parts}
    everything, all_labels = words["train"], labels["train"]
    positions = stratified(all_labels, list(missing.values()))
    for split, chosen in zip(["train", *missing], positions, strict=True):
        words[split], labels[split] = [everything[index] for index in chosen.tolist()], all_labels[chosen]
    for split in words:
        check_labels(labels[split], len(names), f"data.root = {config.data.root!r}, {split}")
    counted = [text for split in (words if whole else ["train"]) for text in words[split]]
    entries = Vocabulary(counted, _limit(config, vocabulary))
    encoded = {
        split: ([entries.encode(text) for text in texts], labels[split]) for split, texts in words.items()
    }
    return TextSource(encoded, names, entries, vectors, legacy)


class TextSource(DataSource):
    """Texts as word numbers.

    Args:
        parts: word numbers of each text and ``(N,)`` labels, for each part.
        names: the classes.
        vocabulary: the words.
        vectors: file with word vectors for the embedding, or None.
        legacy: see `read_vectors`.
    """

    def __init__(
        self,
        parts: Mapping[str, tuple[list[list[int]], torch.Tensor]],
        names: Sequence[str],
        vocabulary: Vocabulary,
        vectors: str | None = None,
        legacy: bool = False,
    ) -> None:
        self.classes = len(names)
        self.names = list(names)
        self.vocabulary = vocabulary
        self.sizes = {split: len(labels) for split, (_, labels) in parts.items()}
        self._vectors = vectors
        self._legacy = legacy
        self._texts = {split: [torch.tensor(text) for text in texts] for split, (texts, _) in parts.items()}
        self._labels = {split: labels for split, (_, labels) in parts.items()}

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DataSource.batch`; inputs are ``(B, L)`` int64, L is the length of the longest text."""
        texts = [self._texts[split][index] for index in indices.tolist()]
        return pad_sequence(texts, batch_first=True, padding_value=PADDING), self._labels[split][indices]

    def prepare(self, first: nn.Module) -> None:
        """Put word vectors into the embedding ``first.vectors``, if a file of them is given.

        Raises:
            ValueError: block 0 has no embedding, or one that the vectors do not fit.
        """
        if self._vectors is None:
            return
        embedding = getattr(first, "vectors", None)
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(
                f"data.args: vectors = {self._vectors!r}: block 0 ({type(first).__name__}) has no embedding "
                "called vectors to put them in; leave vectors out"
            )
        with torch.no_grad():
            initial = embedding.weight
            initial.copy_(read_vectors(Path(self._vectors), self.vocabulary, initial.clone(), self._legacy))


def _check_arguments(config: Config, length: int, vectors: str | None, validation: float) -> None:
    if config.data.augmentation == "strong":
        raise ValueError(
            'data.augmentation = "strong": there is no augmentation of texts; set it to "none" or "basic"'
        )
    check_share(validation)
    if length < 1:
        raise ValueError(f"data.args: length = {length}: give the number of words to use, at least 1")
    if vectors is not None and not Path(vectors).is_file():
        raise ValueError(
            f"data.args: vectors = {vectors!r}: there is no such file; get glove.6B.zip and unpack it"
        )


def _limit(config: Config, vocabulary: int | None) -> int:
    taken = models.argument(config.model.name, config.model.args, "vocabulary")
    limit = int(taken) if isinstance(taken, int) else None
    if vocabulary is None:
        return limit or 30000
    if vocabulary < 3:
        raise ValueError(
            f"data.args: vocabulary = {vocabulary}: give at least 3, for padding, unknown and a word"
        )
    if limit is not None and vocabulary > limit:
        raise ValueError(
            f"data.args: vocabulary = {vocabulary}: the embedding of model.name = {config.model.name!r} has {limit} "
            f"words; set model.args.vocabulary = {vocabulary}"
        )
    return vocabulary


def _numbers(rows: Sequence[Row], names: Sequence[str], split: str) -> list[int]:
    number = {name: index for index, name in enumerate(names)}
    for position, (_, label) in enumerate(rows, start=1):
        if label not in number:
            raise ValueError(
                f"{split} row {position} has label {label!r}, the training part has {', '.join(names[:20])}"
            )
    return [number[label] for _, label in rows]


def _numerically(label: str) -> tuple[int, int, str]:
    """Sort key: numbers by value, then everything else by text."""
    return (0, int(label), "") if label.isdecimal() else (1, 0, label)
