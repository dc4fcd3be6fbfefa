"""Tiny ImageNet, as it is published or with its test images sorted into folders of classes."""

from __future__ import annotations

from pathlib import Path

import torch

from scpl_dist.data import ImageSource, MissingFiles, class_names, find_images, image_part
from scpl_dist.run.config import Config

CLASSES = 200


def tiny_imagenet(config: Config, size: int = 32, validation: float = 0.1) -> ImageSource:
    """200 classes, 100,000 training images, resized to `size`; its "val" folder is the test part.

    Raises:
        MissingFiles: the folders are not there.
        ValueError: a class that only the test part has, or a file that is no image.
    """
    root = Path(config.data.root) / "tiny-imagenet-200"
    train, test = root / "train", root / "val"
    if not train.is_dir() or not test.is_dir():
        message = (
            f"data.root = {config.data.root!r}: there is no {train} or {test}: get "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in {config.data.root}"
        )
        raise MissingFiles(message, CLASSES, torch.zeros(2, 3, size, size))
    classes = class_names(train)
    table = test / "val_annotations.txt"
    samples = _annotated(table, classes) if table.is_file() else find_images(test, classes)
    return ImageSource(
        config,
        {"train": image_part(find_images(train, classes), size), "test": image_part(samples, size)},
        len(classes),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        validation=validation,
        names=classes,
    )


def _annotated(table: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Images of the published test part, whose classes stand in a table."""
    samples = []
    for line in table.read_text(encoding="utf-8").splitlines():
        file, name = line.split("\t")[:2]
        if name not in classes:
            raise ValueError(f"{table}: class {name!r} is not among the {len(classes)} of the training part")
        samples.append((table.parent / "images" / file, classes.index(name)))
    return samples
