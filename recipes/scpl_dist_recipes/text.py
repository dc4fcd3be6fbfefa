"""Text classification: from texts and labels to batches of numbers of words, or of tokens of a Hugging Face model.

A batch is padded to its longest text, which saves most of the work for short ones. The vocabulary of words comes from
the training part alone.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from scpl_dist.data import DataSource, Split, complete
from scpl_dist.data.table_files import Row
from scpl_dist.models import hub, resolve
from scpl_dist.run.config import Config
from scpl_dist_recipes.text_inputs import Tokens, Words
from scpl_dist_recipes.words import number_words, read_vectors


class TextSource(DataSource):
    """Texts as numbers.

    Args:
        config: the run.
        parts: texts and labels of "train" and perhaps of "validation" and "test"; missing parts are held out of the
            training part. Samples without any word are dropped.
        length: words of a text that are used, or tokens with a Hugging Face model.
        vocabulary: largest number of words, padding and unknown words included; None takes what the model takes.
        vectors: file with word vectors in the text format of GloVe and fastText, or None.
        validation: share of the training part that becomes the validation part, if there is none.
        keep_stop_words: whether the most common words of English are used, too.
        counted: parts whose words make the vocabulary.
        columns: of the text in tables of new texts.

    Attributes:
        names: the classes, in the order of their labels.
        vocabulary: word -> number; 0 is padding, 1 an unknown word, 2 the most frequent word. Empty with a Hugging Face
            model, whose tokeniser makes the numbers.
        vector_rows: word -> row of the embedding that its vector goes to.

    Raises:
        ValueError: labels that the training part does not have, one class only, impossible arguments.
    """

    vocabulary: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        config: Config,
        parts: Mapping[str, Sequence[Row]],
        length: int,
        vocabulary: int | None = None,
        vectors: str | None = None,
        validation: float = 0.1,
        keep_stop_words: bool = False,
        counted: Sequence[Split] = ("train",),
        columns: Sequence[str] = ("text",),
    ) -> None:
        _check_arguments(config, length, vectors)
        self.names = sorted({label for _, label in parts["train"]}, key=_numerically)
        self.classes = len(self.names)
        inputs: Words | Tokens
        if config.model.name.startswith(hub.PREFIX):
            inputs = _tokens(config, length, vocabulary, vectors, classes=self.names, columns=list(columns))
        else:
            inputs = Words(
                classes=self.names,
                columns=list(columns),
                length=length,
                keep_stop_words=keep_stop_words,
                words=[],
            )
        texts: dict[str, list[list[Any]]] = {}
        labels: dict[str, torch.Tensor] = {}
        for split, rows in parts.items():
            cleaned = [inputs.split(text) for text, _ in rows]
            numbers = _numbers(rows, self.names, split)
            texts[split] = [words for words in cleaned if words]
            labels[split] = torch.tensor(
                [number for words, number in zip(cleaned, numbers, strict=True) if words], dtype=torch.int64
            )
        self._parts = complete(labels, self.classes, f"data.root = {config.data.root!r}", validation)
        self.sizes = {split: len(part.labels) for split, part in self._parts.items()}
        if isinstance(inputs, Words):
            words = list(number_words(self._words(texts, counted), _limit(config, vocabulary)))
            inputs = inputs.model_copy(update={"words": words})
            self.vocabulary = inputs.vocabulary
        self.vector_rows = self.vocabulary
        self.preprocessing = self._inputs = inputs
        self._texts = {split: [inputs.numbers(words) for words in part] for split, part in texts.items()}
        self._vectors = vectors

    def training_labels(self) -> torch.Tensor:
        """See `DataSource.training_labels`."""
        return self._parts["train"].labels

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """See `DataSource.batch`; inputs are ``(B, L)`` int64, L is the length of the longest text.

        With a Hugging Face model they are {"input_ids", "attention_mask"} of this shape.
        """
        part = self._parts[split]
        texts = [self._texts[part.stored][position] for position in part.positions[indices].tolist()]
        return self._inputs.padded(texts), part.labels[indices]

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
            initial.copy_(read_vectors(Path(self._vectors), self.vector_rows, initial.clone()))

    def _words(self, texts: Mapping[str, list[list[str]]], counted: Sequence[Split]) -> Iterator[list[str]]:
        for split in counted:
            part = self._parts[split]
            yield from (texts[part.stored][position] for position in part.positions.tolist())


def _tokens(
    config: Config, length: int, vocabulary: int | None, vectors: str | None, **settings: Any
) -> Tokens:
    """The tokeniser of a Hugging Face model, for no more tokens than that has positions."""
    for name, value in (("vocabulary", vocabulary), ("vectors", vectors)):
        if value is not None:
            raise ValueError(
                f"data.args: {name} = {value!r}: model.name = {config.model.name!r} has its own tokeniser; leave it out"
            )
    name = config.model.name.removeprefix(hub.PREFIX)
    folder = hub.folder(name)
    limit = hub.positions(hub.configuration(name, folder))
    if length > limit:
        print(
            f"warning: data.args.length = {length}: {config.model.name} has {limit} positions; longer texts are cut",
            file=sys.stderr,
            flush=True,
        )
    return Tokens.of(folder, length=min(length, limit), **settings)


def _check_arguments(config: Config, length: int, vectors: str | None) -> None:
    if config.data.augmentation == "strong":
        raise ValueError(
            'data.augmentation = "strong": there is no augmentation of texts; set it to "none" or "basic"'
        )
    if length < 1:
        raise ValueError(f"data.args: length = {length}: give the number of words to use, at least 1")
    if vectors is not None and not Path(vectors).is_file():
        raise ValueError(
            f"data.args: vectors = {vectors!r}: there is no such file; get glove.6B.zip and unpack it"
        )


def _limit(config: Config, vocabulary: int | None) -> int:
    parameter = inspect.signature(resolve(config.model.name, config.model.args)).parameters.get("vocabulary")
    taken = None if parameter is None else parameter.default
    if vocabulary is None:
        return taken if isinstance(taken, int) else 30000
    if vocabulary < 3:
        raise ValueError(
            f"data.args: vocabulary = {vocabulary}: give at least 3, for padding, unknown and a word"
        )
    if isinstance(taken, int) and vocabulary > taken:
        raise ValueError(
            f"data.args: vocabulary = {vocabulary}: the embedding of model.name = {config.model.name!r} has {taken} "
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
