"""The programs in examples/ that bring data of their own run, in a short form; the others are run in tests/e2e."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.files import write_csv
from tests.support.programs import ROOT, run

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("own_images.py", r"^test/\d/\d{4}\.png: \d, \d+% sure$"),
        ("own_texts.py", r"^\w+, \d+% sure after block \d: "),
    ],
)
def test_an_example_trains_and_answers(name: str, answers: str, tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / name, "--epochs", 1, cwd=tmp_path, code=0, limit_s=150)
    assert re.search(r"^test accuracy 0\.\d{3}$", done.stdout, re.MULTILINE)
    assert len(re.findall(answers, done.stdout, re.MULTILINE)) >= 3
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_hugging_face_is_tuned_and_loaded_by_transformers(tmp_path: Path) -> None:
    few = [(f"{('bad', 'good')[n % 2]} film {n}", ("bad", "good")[n % 2]) for n in range(64)]
    write_csv(tmp_path / "few.csv", few)
    options = ("--data", "csv", "--root", "few.csv")
    done = run(sys.executable, EXAMPLES / "hugging_face.py", *options, cwd=tmp_path, code=0, limit_s=150)
    assert len(re.findall(r"^(?:bad|good): .+\.$", done.stdout, re.MULTILINE)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["few.csv"]
