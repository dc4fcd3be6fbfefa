"""From text to word numbers: cleaning, the vocabulary of a training part, and word vectors.

Cleaning and vocabulary are those of the published code (arXiv 2602.00062). Its word vectors were off by two:
they were stacked in the order in which words had been counted, while the first two numbers belong to padding
and to unknown words. `read_vectors` puts each vector where its word is; ``legacy=True`` keeps the old order.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from scpl_dist.data.stopwords import STOP_WORDS

PADDING, UNKNOWN = 0, 1
"""Numbers of the padding and of words that the vocabulary does not have."""

_TAG = re.compile("<.*?>")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, keep_stop_words: bool = False) -> list[str]:
    """Words of a text: lower case, without ``<tags>``, punctuation and English stop-words."""
    words = _TAG.sub("", text.lower()).translate(_NO_PUNCTUATION).split()
    return words if keep_stop_words else [word for word in words if word not in STOP_WORDS]


class Vocabulary:
    """Numbers of the most frequent words: 0 is padding, 1 an unknown word, 2 the most frequent word.

    Args:
        texts: words of each text of the training part; equally frequent words keep the order they come in.
        size: largest number of entries, padding and unknown included.
    """

    def __init__(self, texts: Iterable[Sequence[str]], size: int) -> None:
        counts: Counter[str] = Counter()
        for words in texts:
            counts.update(words)
        self.numbers = {
            word: number for number, (word, _) in enumerate(counts.most_common(size - 2), start=2)
        }

    def __len__(self) -> int:
        """Number of entries, padding and unknown included."""
        return len(self.numbers) + 2

    def encode(self, words: Sequence[str]) -> list[int]:
        """Numbers of words."""
        return [self.numbers.get(word, UNKNOWN) for word in words]


def read_vectors(
    path: Path, vocabulary: Vocabulary, initial: torch.Tensor, legacy: bool = False
) -> torch.Tensor:
    """Word vectors in the text format of GloVe and fastText for the words of a vocabulary.

    Args:
        path: file with a word and its numbers in each line; a first line with two numbers is skipped.
        vocabulary: the words.
        initial: ``(V, D)``, V at least the size of the vocabulary; words without a vector keep theirs.
        legacy: give number k the vector of the word with number k + 2, as the published code does.

    Returns:
        ``(V, D)`` float32.

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
            number = vocabulary.numbers.get(word)
            if number is not None:
                try:
                    found[number] = [float(value) for value in numbers[-width:]]
                except ValueError:
                    raise ValueError(f"{path}: line {line_number} has something else than numbers") from None
    if not found:
        raise ValueError(f"{path}: has none of the {len(vocabulary)} words of the training part")
    matrix = initial.clone()
    matrix[torch.tensor(list(found)) - (2 if legacy else 0)] = torch.tensor(list(found.values()))
    return matrix
