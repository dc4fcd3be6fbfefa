"""Tables of texts and labels as a data set: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

from pathlib import Path

from scpl_dist.data.table_files import EXTENSIONS, find, read_table
from scpl_dist.run.config import Config
from scpl_dist_recipes.text import TextSource

_PARTS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}


def load(
    config: Config,
    length: int = 200,
    vocabulary: int | None = None,
    vectors: str | None = None,
    validation: float = 0.1,
) -> TextSource:
    """``data.root`` is one table, or a folder with ``train`` and perhaps ``validation`` and ``test`` tables.

    Parts without a table are held out of the training texts; see `TextSource` for the arguments.
    """
    root = Path(config.data.root)
    files: dict[str, Path | None] = {"train": root}
    if root.is_dir():
        files = {split: find(root, names) for split, names in _PARTS.items()}
    if files["train"] is None:
        raise ValueError(
            f"data.root = {config.data.root!r}: has no train table; name it train with one of the extensions "
            f"{', '.join(EXTENSIONS)}, or set data.root to the file"
        )
    texts, label = [config.data.text_column], config.data.label_column
    parts = {split: read_table(path, texts, label) for split, path in files.items() if path is not None}
    return TextSource(config, parts, length, vocabulary, vectors, validation, columns=texts)
