"""Texts as numbers and back: characters, bytes, or a trained vocabulary of the library ``tokenizers``.

"characters"   those of the training part, and a number for all others
"bytes"        of UTF-8: 256 numbers, whatever the text
PATH           a ``tokenizer.json``, or a folder of a Hugging Face model with one in it

Each has a number more for the end of a text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scpl_dist.data.preprocessing import Preprocessing

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # what known vocabularies call it
_FILE = "tokenizer.json"


class Tokens(Preprocessing):
    """Tokens are int64 from 0 to below `size`."""

    classes: list[str] = Field(default_factory=list)
    length: int
    """Tokens that the model was trained to see at once."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def end(self) -> int:
        """What comes after each text."""

    @property
    def silent(self) -> list[int]:
        """Tokens that stand for no text of their own."""
        return [self.end]

    @abstractmethod
    def encode(self, text: str) -> Tensor:
        """Tokens of a text, ``(n,)``, without `end`."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; a part of a character becomes a replacement character."""

    def unknown(self, text: str) -> str:
        """Characters of a text that have no token."""
        return ""

    def batch(self, inputs: Sequence[Any]) -> Tensor:
        """``(B, L)`` of texts, of each the last `length` tokens; what follows a shorter one changes nothing in it."""
        for raw in inputs:
            if not isinstance(raw, str) or not raw:
                raise ValueError(f"{raw!r} is no text: give a str that is not empty")
        rows = [self.encode(text)[-self.length :] for text in inputs]
        return pad_sequence(rows, batch_first=True, padding_value=self.end)


class Characters(Tokens):
    """Characters by their place in an alphabet, from 2 on."""

    kind = "characters"
    alphabet: str

    @classmethod
    def of(cls, texts: Iterable[str], length: int) -> Self:
        found = np.unique(np.concatenate([np.unique(_codes(text)) for text in texts]))
        return cls(alphabet="".join(map(chr, found.tolist())), length=length)

    @property
    def size(self) -> int:
        return len(self.alphabet) + 2

    @property
    def end(self) -> int:
        return 0

    @property
    def silent(self) -> list[int]:
        return [0, 1]

    @cached_property
    def _known(self) -> Any:
        return _codes(self.alphabet)

    def encode(self, text: str) -> Tensor:
        codes = _codes(text)
        places = np.searchsorted(self._known, codes).clip(max=len(self._known) - 1)
        return torch.from_numpy(np.where(self._known[places] == codes, places + 2, 1))

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.alphabet[token - 2] for token in tokens if token >= 2)

    def unknown(self, text: str) -> str:
        return "".join(sorted(set(text) - set(self.alphabet)))


class Bytes(Tokens):
    """Bytes of UTF-8."""

    kind = "bytes"

    @property
    def size(self) -> int:
        return 257

    @property
    def end(self) -> int:
        return 256

    def encode(self, text: str) -> Tensor:
        return torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class Trained(Tokens):
    """A vocabulary of the library ``tokenizers``, which is kept as its ``tokenizer.json``."""

    kind = "tokenizer"
    _made: Any = PrivateAttr()

    @classmethod
    def of_file(cls, file: Path, length: int) -> Self:
        """ValueError without a place: the file or the library cannot be used."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError('needs the library tokenizers: pip install "scpl_dist[hf]"') from None
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        try:
            made = Tokenizer.from_file(str(file))
        except Exception as error:  # whatever the library raises on a file that is none of its own
            raise ValueError(f"{file} is no file of the library tokenizers ({error})") from None
        made.no_truncation()
        made.no_padding()
        found = cls(length=length)
        found._made = made
        if all(made.token_to_id(name) is None for name in _ENDS):
            raise ValueError(f"{file} has no token for the end of a text; add one of {', '.join(_ENDS)}")
        return found

    @cached_property
    def size(self) -> int:
        highest: int = max(self._made.get_vocab().values())
        return highest + 1

    @cached_property
    def end(self) -> int:
        known: Iterator[int | None] = (self._made.token_to_id(name) for name in _ENDS)
        return next(number for number in known if number is not None)

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self._made.encode(text, add_special_tokens=False).ids, dtype=torch.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._made.decode(list(tokens))
        return text

    def save(self, folder: Path) -> None:
        self._made.save(str(folder / _FILE))

    @classmethod
    def load(cls, settings: Mapping[str, Any], folder: Path) -> Self:
        return cls.of_file(folder / _FILE, cls.model_validate(settings).length)


def tokenizer_of(name: str, texts: Iterable[str], length: int) -> Tokens:
    """What ``data.args.tokenizer`` names; characters are those of `texts`. ValueError: it is none."""
    if name == "characters":
        return Characters.of(texts, length)
    if name == "bytes":
        return Bytes(length=length)
    path = Path(name)
    try:
        return Trained.of_file(path / _FILE if path.is_dir() else path, length)
    except ValueError as error:
        raise ValueError(
            f'data.args: tokenizer = {name!r}: {error}; use "characters", "bytes", or the path of a {_FILE} or of the '
            "folder with it"
        ) from None


def _codes(text: str) -> Any:
    """Code points, ``(n,)``; halves of a pair, which some files have, are code points, too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
