"""From text to word numbers: cleaning and vocabulary of the published code (arXiv 2602.00062), and word vectors."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from scpl_dist_recipes.stopwords import STOP_WORDS

PADDING, UNKNOWN = 0, 1
"""Numbers of the padding and of words that the vocabulary does not have."""

_TAG = re.compile("<.*?>")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, keep_stop_words: bool = False) -> list[str]:
    """Words of a text: lower case, without ``<tags>``, punctuation and English stop-words."""
    words = _TAG.sub("", text.lower()).translate(_NO_PUNCTUATION).split()
    return words if keep_stop_words else [word for word in words if word not in STOP_WORDS]


def number_words(texts: Iterable[Sequence[str]], size: int) -> dict[str, int]:
    """Numbers of the most frequent words, from 2; `size` includes padding and unknown words.

    Equally frequent words keep the order they come in.
    """
    counts: Counter[str] = Counter()
    for words in texts:
        counts.update(words)
    return {word: number for number, (word, _) in enumerate(counts.most_common(size - 2), start=2)}


def encode(words: Sequence[str], vocabulary: Mapping[str, int]) -> list[int]:
    """Numbers of words."""
    return [vocabulary.get(word, UNKNOWN) for word in words]


def read_vectors(path: Path, rows: Mapping[str, int], initial: torch.Tensor) -> torch.Tensor:
    """`initial` ``(V, D)`` with the vectors of a file in `rows`: word -> row; the others stay.

    A line has a word and its numbers; a first line with two numbers (fastText) is skipped.

    Raises:
        ValueError: a line that cannot be read, vectors of another width than D, or no known word at all.
    """
    width = initial.shape[1]
    found: dict[int, list[float]] = {}
    with path.open(encoding="utf-8") as file:
        for line_number, line in enumerate(file, start=1):
            word, *numbers = line.rstrip().split(" ")
            if line_number == 1 and len(numbers) == 1:
                continue
            if len(numbers) < width or (not found and line_number <= 2 and len(numbers) > width):
                raise ValueError(
                    f"{path}: line {line_number} has {len(numbers)} numbers, the embedding is {width} wide: "
                    "set model.args.width to the width of the vectors"
                )
            word = " ".join([word, *numbers[:-width]])  # some words have a blank inside
            row = rows.get(word)
            if row is not None:
                try:
                    found[row] = [float(value) for value in numbers[-width:]]
                except ValueError:
                    raise ValueError(f"{path}: line {line_number} has something else than numbers") from None
    if not found:
        raise ValueError(f"{path}: has none of the {len(rows)} words of the training part")
    matrix = initial.clone()
    matrix[torch.tensor(list(found))] = torch.tensor(list(found.values()))
    return matrix
