"""The documents say what is true: links lead somewhere, programs run, drawings and lists agree."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

import scpl_dist
from tests.support.programs import ROOT, run

DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.name))
def test_links_lead_to_files_that_exist(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_program_of_the_readme_runs(tmp_path: Path) -> None:
    [program] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    done = run(sys.executable, "program.py", cwd=tmp_path, code=0, limit_s=150)
    assert float(done.stdout.splitlines()[-1]) > 0.9  # chance is 0.5


def test_the_readme_opens_with_the_two_commands_and_ci_uses_the_second() -> None:
    commands = re.findall(r"^    (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)[:2]
    assert commands[0].endswith("pip install -e . && scpl-dist train")
    assert commands[1].endswith("python -m pytest")
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_the_package_takes_its_dependencies_from_the_requirements_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["dependencies", "version"]
    assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}


def test_the_version_is_that_of_the_newest_changes_and_of_the_citation() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == scpl_dist.__version__
    assert f"\nversion: {scpl_dist.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_drawings_of_the_stream_are_those_of_the_schedules() -> None:
    drawn = re.findall(r"stage \d (?:[FB.]\S* *){8,}", (ROOT / "docs" / "understand.md").read_text())
    held = (ROOT / "tests" / "methods" / "test_schedule.py").read_text()
    assert len(drawn) == 9
    assert [row for row in drawn if f'"{row.rstrip()}' not in held] == []
