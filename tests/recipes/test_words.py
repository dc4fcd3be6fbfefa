"""Cleaning, vocabulary and word vectors do what the published code meant to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scpl_dist_recipes.stopwords import STOP_WORDS
from scpl_dist_recipes.words import PADDING, UNKNOWN, clean, encode, number_words, read_vectors


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The Quick brown-fox, jumps!", ["quick", "brownfox", "jumps"]),
        ("I loved it.<br /><br />Really <b>good</b>", ["loved", "itreally", "good"]),
        ("Don't, you're; it's 3.14%", ["dont", "youre", "314"]),
        ("to be or not to be", []),
        ("  ", []),
        ("caf\u00e9 \u4e2d\u6587", ["caf\u00e9", "\u4e2d\u6587"]),
    ],
)
def test_cleaning_is_the_published_one(text: str, words: list[str]) -> None:
    assert clean(text) == words


def test_stop_words_may_stay() -> None:
    assert clean("To be, or not", keep_stop_words=True) == ["to", "be", "or", "not"]
    assert len(STOP_WORDS) == 179


def test_words_are_numbered_by_frequency() -> None:
    texts = [["b", "a", "c"], ["a", "b", "a"], ["d"]]
    vocabulary = number_words(texts, size=100)
    assert vocabulary == {"a": 2, "b": 3, "c": 4, "d": 5}
    assert encode(["d", "x", "a"], vocabulary) == [5, UNKNOWN, 2]
    assert PADDING not in vocabulary.values()


def test_a_vocabulary_never_has_more_than_its_size() -> None:
    vocabulary = number_words([[f"w{index}" for index in range(50)]], size=10)
    assert max(vocabulary.values()) == 9
    assert encode(["w0", "w9"], vocabulary) == [2, UNKNOWN]


@pytest.fixture
def vocabulary() -> dict[str, int]:
    return number_words([["cat", "cat", "cat", "dog", "dog", "new york"], ["rare"]], size=10)


def vectors_file(tmp_path: Path, header: str = "") -> Path:
    path = tmp_path / "vectors.txt"
    path.write_text(header + "the 9 9 9\ndog 4 5 6\ncat 1 2 3\nnew york 7 8 9\n")
    return path


@pytest.mark.parametrize("header", ["", "4 3\n"])
def test_each_word_gets_its_own_vector(header: str, vocabulary: dict[str, int], tmp_path: Path) -> None:
    initial = torch.zeros(12, 3)
    initial[5] = torch.tensor([1.0, -1.0, 0.0])
    matrix = read_vectors(vectors_file(tmp_path, header), vocabulary, initial)
    assert matrix[2:5].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert torch.equal(matrix[5], initial[5])
    assert not matrix[:2].any()
    assert not matrix[6:].any()


@pytest.mark.parametrize(
    ("content", "width", "says"),
    [
        ("cat 1 2 3\n", 4, "line 1 has 3 numbers, the embedding is 4 wide: set model.args.width"),
        ("cat 1 2 3\n", 2, "line 1 has 3 numbers, the embedding is 2 wide"),
        ("2 3\ncat 1 2 3\n", 2, "line 2 has 3 numbers, the embedding is 2 wide"),
        ("dog 4 5 6\ncat 1 2\n", 3, "line 2 has 2 numbers"),
        ("cat 1 x 3\n", 3, "line 1 has something else than numbers"),
        ("bird 1 2 3\n", 3, "has none of the 4 words"),
        ("", 3, "has none of the 4 words"),
    ],
)
def test_unusable_vectors_are_refused(
    content: str, width: int, says: str, vocabulary: dict[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=says):
        read_vectors(path, vocabulary, torch.zeros(12, width))
