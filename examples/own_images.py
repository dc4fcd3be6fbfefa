"""Train on a folder of images, and ask about new ones: ``python examples/own_images.py``; about 20 seconds.

The folder has an image file for each image and a folder for each class: ``images/train/CLASS/*.png`` and
``images/test/CLASS/*.png``. Here it is written first, from the images of digits that come with scikit-learn; put your
own in its place.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import scpl_dist


def write_images(root: Path) -> None:
    """1,797 pictures of digits, 8x8, every fifth of them for the test."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("train" if number % 5 else "test") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{number:04}.png")


def main(epochs: int) -> None:
    """Write the folder, train with two processes, and let the result answer."""
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        write_images(images)
        settings = {
            "data.root": str(images),
            "data.args": {"size": 16, "channels": 1, "flip": False},  # a mirrored digit is none
            "run.epochs": epochs,
        }
        result = scpl_dist.train("vgg_tiny", "image_folder", settings, Path(folder, "run"))
        print(f"test accuracy {result['accuracy_last']:.3f}")
        files = sorted((images / "test").glob("*/*.png"))[::60]
        for file, answer in zip(files, scpl_dist.load(result["run_dir"]).predict(files), strict=True):
            print(f"{file.relative_to(images)}: {answer.label}, {answer.probability:.0%} sure")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    main(parser.parse_args().epochs)
