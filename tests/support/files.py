"""Data sets that tests write, and what a configuration makes of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scpl_dist import data
from scpl_dist.data import DataSource, Split
from scpl_dist.run import config
from scpl_dist_recipes.text import TextSource


def resolve(name: str, root: Path, **values: Any) -> DataSource:
    """The data set of this name; ``data__augmentation="basic"`` sets ``data.augmentation``, which is "none" here."""
    keys = {"data.name": name, "data.root": str(root), "data.augmentation": "none"}
    keys |= {key.replace("__", "."): value for key, value in values.items()}
    return data.resolve(config.load(values=keys))


def resolve_text(name: str, root: Path, **values: Any) -> TextSource:
    """The same for texts, which a model reads."""
    source = resolve(name, root, **{"model__name": "lstm_tiny"} | values)
    assert isinstance(source, TextSource)
    return source


def everything(source: DataSource, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs and labels of a part."""
    return source.batch(split, 0, torch.arange(source.sizes[split]))


def picture(seed: int, size: tuple[int, int] = (8, 6)) -> np.ndarray[Any, Any]:
    """Random RGB pixels, height x width x 3; `size` is width and height."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def write_image(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    """Save pixels as the extension says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("text", "label")) -> Path:
    """A table, without a header if that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)
    return path
