"""Texts to guess the next token of: documents, one after the other, cut into sequences of one length.

    documents --> parts --> tokens of a part, an end after each document --> rows (L,), and the same one token on

Parts are made of whole documents, so no test text is in the training part, and a text that there is twice is used
once. A single document is cut into its beginning, which is trained on, and its end. The alphabet is that of the
training part.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scpl_dist.data.source import SPLITS, DataSource, Split
from scpl_dist.data.table_files import EXTENSIONS as TABLES
from scpl_dist.data.table_files import rows
from scpl_dist.data.tokens import tokenizer_of
from scpl_dist.run.config import Config, Data
from scpl_dist.run.seeds import derive

EXTENSIONS = (".txt", ".md", ".rst", ".py")
_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


def text_lm(
    config: Config,
    length: int = 128,
    tokenizer: str = "characters",
    validation: float = 0.05,
    test: float = 0.05,
    limit: int | None = None,
) -> TextStream:
    """``data.root`` is a text, a table with a column of texts, or a folder of such files.

    Where it is left as it is and there is no such folder, the texts are the sources of Python's standard library.

    Args:
        config: the run.
        length: tokens in a sequence.
        tokenizer: see `scpl_dist.data.tokens`.
        validation, test: shares of the characters that are held out, where there are no files ``validation`` and
            ``test`` beside ``train``.
        limit: characters that are read, whole documents; None reads all.

    Raises:
        ValueError: no texts, or fewer than two sequences of them in a part; impossible arguments.
    """
    if config.data.augmentation == "strong":
        raise ValueError(
            'data.augmentation = "strong": there is no augmentation of texts; set it to "none" or "basic"'
        )
    for name, value in (("length", length), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"data.args: {name} = {value}: give at least 1")
    if validation <= 0 or test <= 0 or validation + test > 0.5:
        raise ValueError(
            f"data.args: validation = {validation} and test = {test}: give the shares of the texts to hold out, above "
            "0 and at most 0.5 together"
        )
    root = Path(config.data.root)
    if config.data.root == Data().root and not root.exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        parts: dict[Split, list[str]] = {"train": _documents([*sorted(library.glob("*.py"))], config)}
        where = f"data.root = {config.data.root!r}, which is not there, so {library}/*.py"
    else:
        parts = {split: _documents(paths, config) for split, paths in _files(root, config).items()}
        where = f"data.root = {config.data.root!r}"
    parts = {split: _limited(list(dict.fromkeys(found)), limit) for split, found in parts.items()}
    return TextStream(_complete(parts, validation, test), length, tokenizer, where)


class TextStream(DataSource):
    """Tokens of all texts of a part in one row, read as sequences ``(length,)``; labels are the tokens that follow.

    What is left at the end of a part, less than a sequence, is left out.
    """

    def __init__(self, parts: Mapping[Split, Sequence[str]], length: int, name: str, where: str) -> None:
        self.preprocessing = self._tokens_of = tokenizer_of(name, parts["train"], length)
        self.classes = self._tokens_of.size
        self.length = length
        self._tokens = {split: self._joined(texts) for split, texts in parts.items()}
        self.sizes = {split: (len(tokens) - 1) // length for split, tokens in self._tokens.items()}
        for split in SPLITS:
            if self.sizes[split] < 2:
                raise ValueError(
                    f"{where}: the {split} part has {len(self._tokens[split])} tokens, too few for two sequences of "
                    f"data.args.length = {length}; give more texts, or a shorter length"
                )

    def batch(self, split: Split, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `DataSource.batch`; inputs and labels are ``(B, length)`` int64."""
        places = indices[:, None] * self.length + torch.arange(self.length + 1)
        rows = self._tokens[split][places].long()
        return rows[:, :-1], rows[:, 1:]

    def _joined(self, texts: Sequence[str]) -> Tensor:
        end = torch.tensor([self._tokens_of.end])
        parts = [part for text in texts for part in (self._tokens_of.encode(text), end)]
        return torch.cat(parts).to(torch.int32)


def _files(root: Path, config: Config) -> dict[Split, list[Path]]:
    """Files of each part; only "train" if nothing is called by the name of a part."""
    if root.is_file():
        return {"train": [root]}
    if not root.is_dir():
        raise ValueError(
            f"data.root = {config.data.root!r}: there is no such file or folder; give a text, a table, or a folder "
            "with texts"
        )
    entries = sorted(root.iterdir())
    named = {
        split: [entry for entry in entries if entry.name.partition(".")[0] in names]
        for split, names in _NAMES.items()
    }
    chosen: dict[Split, list[Path]] = {split: paths for split, paths in named.items() if paths}
    if "train" not in chosen:
        chosen = {"train": [root]}
    known = (*EXTENSIONS, *TABLES)
    found = {
        split: [
            path
            for entry in paths
            for path in (sorted(entry.rglob("*")) if entry.is_dir() else [entry])
            if path.is_file() and path.suffix.lower() in known
        ]
        for split, paths in chosen.items()
    }
    for split, files in found.items():
        if not files:
            raise ValueError(
                f"data.root = {config.data.root!r}: has no {split} texts; they are files {', '.join(known)}"
            )
    return found


def _documents(paths: Sequence[Path], config: Config) -> list[str]:
    """The texts of files: a row of a table is one each."""
    texts: list[str] = []
    for path in paths:
        if path.suffix.lower() in TABLES:
            texts += (text for text, _ in rows(path, [config.data.text_column]))
            continue
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 text: {error}; convert it to UTF-8") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return [text for text in texts if text.strip()]


def _limited(texts: list[str], limit: int | None) -> list[str]:
    if limit is None:
        return texts
    kept: list[str] = []
    total = 0
    for index in _order(len(texts)):
        total += len(texts[index])
        if total > limit and kept:
            break
        kept.append(texts[index][:limit])
    return kept


def _complete(parts: Mapping[Split, list[str]], validation: float, test: float) -> dict[Split, list[str]]:
    """All parts: those that are missing are held out of the training texts, as `validation` and `test` say."""
    complete, rest = dict(parts), list(parts["train"])
    shares: dict[Split, float] = {"validation": validation, "test": test}
    total = sum(map(len, rest))
    missing = [split for split in shares if split not in parts]
    if len(rest) <= len(missing):  # not enough documents for one in each part: cut the text
        text = "\n".join(rest)
        for split in reversed(missing):
            cut = len(text) - round(total * shares[split])
            text, complete[split] = text[:cut], [text[cut:]]
        return complete | {"train": [text]}
    rest = [rest[index] for index in _order(len(rest))]
    for split in missing:
        wanted, held = total * shares[split], [rest.pop()]
        while len(rest) > len(missing) and len("".join(held)) + len(rest[-1]) / 2 <= wanted:
            held.append(rest.pop())
        complete[split] = held
    return complete | {"train": rest}


def _order(size: int) -> list[int]:
    """The same for all runs: parts of a data set are no property of a run."""
    generator = torch.Generator().manual_seed(derive(0, "split"))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order
