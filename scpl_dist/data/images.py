"""Images from files: CIFAR, Tiny ImageNet and folders with one folder for each class.

CIFAR is read by torchvision, and downloaded by it only if ``data.download`` asks for that. Images of folders
are decoded when a batch first needs them and kept as bytes if all of them fit in memory, so a run starts at
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from scpl_dist.data.source import ImageSource, check_labels, check_share
from scpl_dist.data.splits import stratified
from scpl_dist.run.config import Config

CACHE_BYTES = 4 * 2**30
"""Decoded images of one part are kept in memory up to this size."""

_EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_PARTS = {"train": ["train"], "validation": ["validation", "valid", "val"], "test": ["test"]}


def cifar10(config: Config, validation: float = 0.1) -> ImageSource:
    """CIFAR-10: 10 classes, 50,000 training images, of which `validation` are held out, 10,000 test images."""
    return _cifar(config, "CIFAR10", 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), validation)


def cifar100(config: Config, validation: float = 0.1) -> ImageSource:
    """CIFAR-100: 100 classes, 50,000 training images, of which `validation` are held out, 10,000 test images."""
    return _cifar(config, "CIFAR100", 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), validation)


def _cifar(
    config: Config, name: str, classes: int, mean: Sequence[float], std: Sequence[float], validation: float
) -> ImageSource:
    from torchvision import datasets  # takes a second to import

    check_share(validation)
    dataset = getattr(datasets, name)
    try:
        whole, test = (
            dataset(config.data.root, train=part, download=config.data.download) for part in (True, False)
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"data.root = {config.data.root!r}: {name} is missing or damaged there ({error}): get {dataset.url} and "
            f"unpack it, so that there is a folder {Path(config.data.root) / dataset.base_folder}; "
            "or set data.download = true"
        ) from None
    images, labels = torch.from_numpy(whole.data), torch.tensor(whole.targets)
    kept, held_out = stratified(labels, (validation,))
    parts = {
        "train": (images[kept], labels[kept]),
        "validation": (images[held_out], labels[held_out]),
        "test": (torch.from_numpy(test.data), torch.tensor(test.targets)),
    }
    stored = {}
    for split, (rows, targets) in parts.items():
        check_labels(targets, classes, f"{name}, {split}")
        stored[split] = (rows.permute(0, 3, 1, 2).contiguous(), targets)
    return ImageSource(stored, classes, mean, std, config.data.augmentation, flip=True, seed=config.run.seed)


def tiny_imagenet(config: Config, size: int = 32, validation: float = 0.1) -> ImageSource:
    """Tiny ImageNet: 200 classes, 100,000 training images, resized to `size`; its "val" folder is the test part."""
    root = Path(config.data.root) / "tiny-imagenet-200"
    if not (root / "train").is_dir() or not (root / "val").is_dir():
        raise ValueError(
            f"data.root = {config.data.root!r}: there is no {root / 'train'} or {root / 'val'}: get "
            f"http://cs231n.stanford.edu/tiny-imagenet-200.zip and unpack it in {config.data.root}"
        )
    names = _classes(root / "train")
    table = root / "val" / "val_annotations.txt"
    if table.is_file():
        rows = [line.split("\t")[:2] for line in table.read_text(encoding="utf-8").splitlines()]
        test = [(root / "val" / "images" / file, _index(names, name, root / "val")) for file, name in rows]
    else:
        test = _samples(root / "val", names)
    return _source(
        config,
        {"train": _samples(root / "train", names), "test": test},
        names,
        size=size,
        validation=validation,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
    )


def image_folder(
    config: Config,
    size: int | None = None,
    channels: int = 3,
    flip: bool = True,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    validation: float = 0.1,
) -> ImageSource:
    """Any folder with images: ``train/CLASS/*.png``, ``val/...`` and ``test/...``, or just ``CLASS/*.png``.

    Without a test folder, "val" is the test part; without any parts, a fifth of the images of each class is.
    Without a validation part, `validation` of the training images are.

    Args:
        config: the run; ``data.root`` is the folder.
        size: height and width to resize and crop to; None takes images as they are, if all have one size.
        channels: 3 for RGB, 1 for grey.
        flip: whether augmentation may mirror the images.
        mean: mean of each channel, or of all channels, for images in [0, 1].
        std: standard deviation likewise.
        validation: share of the training images.

    Raises:
        ValueError: no folders or images, a class that only a later part has, images of several sizes.
    """
    root = Path(config.data.root)
    if not root.is_dir():
        raise ValueError(f"data.root = {config.data.root!r}: there is no such folder; put the images there")
    if channels not in (1, 3):
        raise ValueError(f"data.args: channels = {channels!r}: give 3 for RGB or 1 for grey")
    found = {
        split: next((root / name for name in names if (root / name).is_dir()), None)
        for split, names in _PARTS.items()
    }
    if found["train"] is None:
        classes = _classes(root)
        parts = {"train": _samples(root, classes)}
    else:
        classes = _classes(found["train"])
        parts = {split: _samples(folder, classes) for split, folder in found.items() if folder is not None}
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return _source(
        config, parts, classes, size, validation, _each(mean, channels), _each(std, channels), flip
    )


Samples = list[tuple[Path, int]]


def _source(
    config: Config,
    parts: Mapping[str, Samples],
    classes: Sequence[str],
    size: int | None,
    validation: float,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool = True,
) -> ImageSource:
    """Hold out the parts that are missing and make a source of all."""
    check_share(validation)
    train = parts["train"]
    labels = torch.tensor([label for _, label in train]).long()
    missing = {"validation": validation, "test": 0.2}
    missing = {split: share for split, share in missing.items() if split not in parts}
    positions = stratified(labels, list(missing.values()))
    chosen = {
        split: [train[index] for index in rows.tolist()]
        for split, rows in zip(["train", *missing], positions, strict=True)
    }
    stored: dict[str, tuple[Any, torch.Tensor]] = {}
    for split, samples in {**parts, **chosen}.items():
        targets = torch.tensor([label for _, label in samples]).long()
        check_labels(targets, len(classes), f"data.root = {config.data.root!r}, {split}")
        stored[split] = (ImageFiles([path for path, _ in samples], size, len(mean)), targets)
    shapes = {files.shape[2:] for files, _ in stored.values()}
    if len(shapes) > 1:
        raise ValueError(
            f"data.root = {config.data.root!r}: the parts have images of {sorted(shapes)} pixels; "
            "set data.args.size to resize them"
        )
    return ImageSource(
        stored, len(classes), mean, std, config.data.augmentation, flip=flip, seed=config.run.seed
    )


class ImageFiles:
    """Image files that are read like a tensor ``(N, C, H, W)`` of uint8, decoded when first needed.

    Args:
        paths: the files.
        size: height and width after resizing the shorter side and cropping the centre; None for images as they are.
        channels: 3 or 1.

    Raises:
        ValueError: with `size` None, images of several sizes, or a file that is no image.
    """

    def __init__(self, paths: Sequence[Path], size: int | None, channels: int) -> None:
        self._paths = list(paths)
        self._size = size
        self._mode = "RGB" if channels == 3 else "L"
        height, width = (size, size) if size is not None else self._common_size()
        self.shape = (len(self._paths), channels, height, width)
        self._cached = torch.empty(0)
        if np.prod(self.shape) <= CACHE_BYTES:
            self._cached = torch.empty(self.shape, dtype=torch.uint8)
        self._done = torch.zeros(len(self._paths), dtype=torch.bool)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._paths)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        """Images at `indices` (int64, ``(B,)``): ``(B, C, H, W)`` uint8.

        Raises:
            ValueError: a file that is no image.
        """
        if len(self._cached) == 0:
            return torch.stack([self._decode(index) for index in indices.tolist()])
        for index in indices[~self._done[indices]].tolist():
            self._cached[index] = self._decode(index)  # two threads that meet here write the same bytes
            self._done[index] = True
        return self._cached[indices]

    def _decode(self, index: int) -> torch.Tensor:
        with _open(self._paths[index]) as image:
            try:
                pixels = image.convert(self._mode)
            except OSError as error:
                raise ValueError(f"{self._paths[index]}: the image is damaged: {error}") from None
        if self._size is not None:
            pixels = _resize(pixels, self._size)
        array = np.array(pixels)
        return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))

    def _common_size(self) -> tuple[int, int]:
        first: tuple[int, int] | None = None
        for path in self._paths:
            with _open(path) as image:  # reads the header only
                first = first or image.size
                if image.size != first:
                    raise ValueError(
                        f"{path} has {image.size[0]}x{image.size[1]} pixels, {self._paths[0]} has "
                        f"{first[0]}x{first[1]}: set data.args.size to resize all images to one size"
                    )
        assert first is not None
        return first[1], first[0]


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None


def _resize(image: Image.Image, size: int) -> Image.Image:
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _classes(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(names) < 2:
        raise ValueError(
            f"{folder}: has {len(names)} folders of classes, a classifier needs at least 2: "
            "put the images of each class in a folder of its own"
        )
    return names


def _samples(folder: Path, classes: Sequence[str]) -> Samples:
    samples: Samples = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            label = _index(classes, entry.name, folder)
            files = sorted(path for path in entry.rglob("*") if path.suffix.lower() in _EXTENSIONS)
            if not files:
                raise ValueError(f"{entry}: has no images ({', '.join(sorted(_EXTENSIONS))})")
            samples += [(path, label) for path in files]
    return samples


def _index(classes: Sequence[str], name: str, folder: Path) -> int:
    try:
        return classes.index(name)
    except ValueError:
        raise ValueError(
            f"{folder}: class {name!r} is not among the {len(classes)} of the training part"
        ) from None


def _each(values: Sequence[float], channels: int) -> list[float]:
    listed = [float(value) for value in values]
    if channels == 1 and len(listed) == 3:
        return [sum(listed) / 3]
    if len(listed) != channels:
        raise ValueError(
            f"data.args: mean and std {listed} have {len(listed)} values for {channels} channels"
        )
    return listed
