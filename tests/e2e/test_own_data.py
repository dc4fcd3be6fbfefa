"""Files of a user's own, trained on through the command line."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from scpl_dist.run.config import load
from tests.support import random_data, reference
from tests.support.command import called, scpl_dist
from tests.support.run_folder import accuracies, losses


def accuracy(run: Path) -> float:
    result = json.loads((run / "result.json").read_text())
    return float(result["accuracy_last"])


def options(**settings: object) -> list[str]:
    return [part for key, value in settings.items() for part in ("-o", f"{key.replace('__', '.')}={value}")]


def test_a_csv_of_two_columns_is_learnt(tmp_path: Path) -> None:
    chance = random.Random(0)
    words = {"weather": ["rain", "wind", "cloud", "storm"], "kitchen": ["pan", "salt", "oven", "spoon"]}
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "sentence"])
        for _ in range(300):
            subject = chance.choice(list(words))
            noise = [chance.choice(["thing", "place", "person", "hour"]) for _ in range(4)]
            sentence = [*chance.choices(words[subject], k=2), *noise]
            chance.shuffle(sentence)
            writer.writerow([subject, " ".join(sentence)])
    run = tmp_path / "run"
    scpl_dist(
        *("train", "--run-dir", run),
        *options(
            data__name="csv", data__root=tmp_path, data__text_column="sentence", data__label_column="subject"
        ),
        *options(model__name="transformer_tiny", data__batch_size=32, run__epochs=6, metrics__port=0),
    )
    assert accuracy(run) > 0.9  # chance is about 0.5


def test_a_folder_of_png_files_is_learnt(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(0)
    for name, axis in (("rows", 0), ("columns", 1)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(100):
            stripes = (np.indices((16, 16))[axis] // 2 % 2) * 150
            picture = (stripes + random_numbers.integers(0, 100, (16, 16))).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{number}.png")
    run = tmp_path / "run"
    scpl_dist(
        *("train", "--run-dir", run),
        *options(data__name="image_folder", data__root=tmp_path / "images", data__args__channels=1),
        *options(data__args__flip="false", data__batch_size=32, run__epochs=6, metrics__port=0),
        *options(data__args__mean="[0.5]", data__args__std="[0.25]"),
    )
    assert accuracy(run) > 0.9  # chance is 0.5


def test_a_data_set_that_draws_is_read_once_for_its_labels_and_trains_to_the_same_bits(
    tmp_path: Path,
) -> None:
    run, source = tmp_path / "run", random_data.__name__
    overrides = [f"data.name={source}:noisy", f"model.name={source}:moody", f"data.root={tmp_path}"]
    overrides += ["data.args.record=true", "data.batch_size=16", "run.epochs=2"]
    settings = [part for text in overrides for part in ("-o", text)]
    scpl_dist("train", "--run-dir", run, *settings, *options(data__workers=2, metrics__port=0))
    assert (tmp_path / "test").stat().st_size == 3 * 20  # for the labels, and in two evaluations
    evaluated = called("evaluate", run).stdout
    assert (tmp_path / "test").stat().st_size == 4 * 20
    wanted = reference.train(load(None, overrides))
    assert losses(run) == wanted.losses
    assert [accuracy for _, split, accuracy in accuracies(run) if split == "test"] == wanted.accuracy
    assert f"test accuracy {wanted.accuracy[-1]:.4f}" in evaluated
