"""From texts to word numbers, in training and for texts that come later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import PrivateAttr
from torch.nn.utils.rnn import pad_sequence

from scpl_dist.data import Preprocessing
from scpl_dist.data.table_files import EXTENSIONS, rows
from scpl_dist.models import hub
from scpl_dist_recipes.words import PADDING, UNKNOWN, clean, encode


class Texts(Preprocessing):
    """Inputs are texts, which files have in lines or in columns of a table."""

    columns: list[str]
    """Of the text in a table, joined by a blank."""

    length: int
    """Parts of a text that are used: words or tokens."""
    unit: ClassVar[str]  # what they are, in the plural
    _cut: int = PrivateAttr(0)  # texts of `batch` that had more of them

    def whole(self, text: str) -> list[Any]:
        """All parts of a text."""
        raise NotImplementedError

    def split(self, text: str) -> list[Any]:
        """The parts of a text that are used."""
        return self.whole(text)[: self.length]

    def numbers(self, parts: Sequence[Any]) -> torch.Tensor:
        """``(L,)`` int64 of the parts of a text."""
        raise NotImplementedError

    def padded(self, texts: Sequence[torch.Tensor]) -> Any:
        """Texts of several lengths as one batch, ``(B, L)`` int64 or several of them by name."""
        raise NotImplementedError

    def batch(self, inputs: Sequence[Any]) -> Any:
        """See `padded`; inputs are texts."""
        for raw in inputs:
            if not isinstance(raw, str):
                raise ValueError(f"{type(raw).__name__} is no text: give a str")
            self._cut += len(self.whole(raw)) > self.length
        return self.padded([self.numbers(self.split(text)) for text in inputs])

    def doubts(self) -> Iterator[str]:
        """How many texts were too long."""
        if self._cut:
            yield f"{self._cut} text(s) with more than {self.length} {self.unit} were cut, as in training"

    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Texts of a table, or else the lines of a text file, each named by its number; "-" is the standard input."""
        if path.suffix.lower() in EXTENSIONS:
            for number, (text, _) in enumerate(rows(path, self.columns), start=1):
                yield str(number), text
            return
        try:
            with open(
                0 if str(path) == "-" else path, encoding="utf-8-sig", closefd=str(path) != "-"
            ) as file:
                for number, line in enumerate(file, start=1):
                    yield str(number), line.rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot be read as UTF-8 text ({error}); give lines of text, or a table "
                f"({', '.join(EXTENSIONS)}) with {', '.join(self.columns)}"
            ) from None


class Words(Texts):
    """Texts as numbers of words: cleaned, cut to a length, padded to the longest text of the batch."""

    unit = "words"
    keep_stop_words: bool = False
    words: list[str]
    """The vocabulary, in order: the first word has the number 2, after padding and unknown words."""

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """Word -> number."""
        return {word: number for number, word in enumerate(self.words, start=2)}

    def whole(self, text: str) -> list[str]:
        """The words of a text, whether they have a number or not."""
        return clean(text, self.keep_stop_words)

    def numbers(self, words: Sequence[str]) -> torch.Tensor:
        """``(L,)`` int64 of words; an unknown one if there is none, as no model takes nothing."""
        return torch.tensor(encode(words, self.vocabulary) or [UNKNOWN])

    def padded(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """``(B, L)`` int64 of texts of several lengths."""
        return pad_sequence(list(texts), batch_first=True, padding_value=PADDING)


class Tokens(Texts):
    """Texts as ids of the tokens of a Hugging Face model: cut to a length, padded to the longest text of the batch."""

    unit = "tokens"  # with those that the tokeniser adds at the beginning and at the end
    _tokeniser: Any = PrivateAttr()

    @classmethod
    def of(cls, folder: Path, **settings: Any) -> Self:
        """With the tokeniser in a folder."""
        made = cls(**settings)
        made._tokeniser = hub.tokeniser(folder)
        return made

    def save(self, folder: Path) -> None:
        """See `Preprocessing.save`."""
        self._tokeniser.save_pretrained(folder)

    @classmethod
    def load(cls, settings: Mapping[str, Any], folder: Path) -> Self:
        """See `Preprocessing.load`."""
        return cls.of(folder, **settings)

    def whole(self, text: str) -> list[int]:
        """Ids of all tokens of a text."""
        ids: list[int] = self._tokeniser(text, verbose=False)["input_ids"]
        return ids

    def split(self, text: str) -> list[int]:
        """Ids of the tokens of a text that are used; empty for an empty text, whatever the tokeniser adds."""
        if not text.strip():
            return []
        ids: list[int] = self._tokeniser(text, truncation=True, max_length=self.length)["input_ids"]
        return ids

    def numbers(self, ids: Sequence[int]) -> torch.Tensor:
        """``(L,)`` int64; of an empty text what the tokeniser adds, or padding, as no model takes nothing."""
        return torch.tensor(ids or self._tokeniser("")["input_ids"] or [self._padding])

    def padded(self, texts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name "input_ids" and "attention_mask", 1 for tokens and 0 for padding, ``(B, L)`` int64."""
        masks = [torch.ones_like(text) for text in texts]
        return {
            "input_ids": pad_sequence(list(texts), batch_first=True, padding_value=self._padding),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }

    @property
    def _padding(self) -> int:
        """Decoders may have no token for it: any will do, as the mask covers it."""
        padding: int | None = self._tokeniser.pad_token_id
        return 0 if padding is None else padding
