"""Every example of docs/training.md runs as it stands there, for one epoch."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.command import scpl_dist
from tests.support.programs import ROOT, run

TEXT = (ROOT / "docs" / "training.md").read_text()
CONFIGURATIONS = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
# The first line of a program is its name, such as "# own_metric.py"; configurations may name it.
PROGRAMS = {text.split()[1]: text for text in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)}


def _files(folder: Path) -> None:
    for name, text in PROGRAMS.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("text", CONFIGURATIONS, ids=lambda text: text.splitlines()[0].strip("# []"))
def test_a_configuration_of_the_document_trains(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _files(tmp_path)
    (tmp_path / "example.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    scpl_dist("train", "example.toml", "--run-dir", "run", "-o", "run.epochs=1", "-o", "metrics.port=0")
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_document_runs(name: str, tmp_path: Path) -> None:
    _files(tmp_path)
    run(sys.executable, name, cwd=tmp_path, code=0, limit_s=150)
