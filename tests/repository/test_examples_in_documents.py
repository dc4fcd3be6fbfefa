"""The examples in the documents run as they stand there, and a table of numbers is right."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from scpl_dist import models
from tests.support.command import scpl_dist
from tests.support.programs import ROOT, run

DOCUMENTS = ["data.md", "models.md", "training.md"]
TEXT = "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")) if path.name in DOCUMENTS)
# The first line of a block is its name, such as "# own_metric.py"; others may name it.
CONFIGURATIONS, PROGRAMS = (
    {text.split()[1]: text for text in re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)}
    for kind in ("toml", "python")
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all examples, which is the working directory."""
    for name, text in (CONFIGURATIONS | PROGRAMS).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_trains_for_an_epoch(name: str, folder: Path) -> None:
    scpl_dist("train", name, "--run-dir", "run", "-o", "run.epochs=1", "-o", "metrics.port=0")
    assert (folder / "run" / "result.json").exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs(name: str, folder: Path) -> None:
    run(sys.executable, name, cwd=folder, code=0, limit_s=150)


@pytest.mark.parametrize("data", ["image_folder", "csv"])
def test_a_command_for_data_of_your_own_trains(data: str, folder: Path) -> None:
    commands = re.findall(r"^    (scpl-dist train .*)$", TEXT.replace("\\\n", " "), re.MULTILINE)
    [command] = [shlex.split(command)[1:] for command in commands if f"data.name={data}" in command]
    for part, number in (("train", 40), ("val", 10)):
        for label in ("cat", "dog"):
            (folder / "photos" / part / label).mkdir(parents=True)
            for index in range(number):
                image = Image.new("RGB", (40, 48), "black" if label == "cat" else "white")
                image.save(folder / "photos" / part / label / f"{index:03}.jpg")
    rows = ["text,label", *['"thin plot, good music",good', '"two lost hours",bad'] * 40]
    (folder / "reviews.csv").write_text("\n".join(rows))
    scpl_dist(*command, "--run-dir", "run", "-o", "run.epochs=1", "-o", "metrics.port=0")
    assert (folder / "run" / "result.json").exists()


def test_the_table_of_models_is_right() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| (images|texts) \| (\S+)(?: words)? \| (\d+) \| ([\d,]+) \|$", TEXT, re.MULTILINE
    )
    assert {name for name, *_ in rows} >= {
        name for name in models.MODELS.names() if not name.endswith("NAME")
    }
    for name, kind, size, blocks, parameters in rows:
        shape, dtype = [2, *map(int, size.split("x"))], torch.float32 if kind == "images" else torch.int64
        made, _ = models.outline(name, {}, 1000, torch.ones(shape, dtype=dtype, device="meta"))
        counted = sum(parameter.numel() for block in made for parameter in block.parameters())
        assert (len(made), f"{counted:,}") == (int(blocks), parameters), name
