"""What ``checkpoint ls`` and ``verify`` say of the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.commands.checkpoints import check, listing
from scpl_dist.storage.checkpoints import CheckpointError, commit, folder_for
from scpl_dist.storage.parts import part_name, write_part


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints of one part each, of which the first is the best."""
    for step in (9, 10):
        folder = folder_for(tmp_path, step)
        files = [write_part(folder / part_name(0), {"step": step})]
        position = {"epoch": 1, "step": step, "batch": 0}
        manifest = {"step": step, "epoch": 1, "stages": 2, "created": 0.0, "position": position}
        commit(folder, manifest | {"files": files, "best": step == 9}, keep=2)
    return tmp_path


def test_the_oldest_comes_first_and_names_stand_behind(run: Path) -> None:
    rows = listing(run)
    assert [(row[0], row[1], row[2], row[5]) for row in rows] == [
        ("step-9", "1", "2", "best"),
        ("step-10", "1", "2", "latest"),
    ]


def test_a_damaged_one_is_named_with_its_reason(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run) == 0
    (run / "checkpoints" / "step-9" / "manifest.json").write_text("{")
    assert listing(run)[0][4] == "damaged"
    assert "manifest.json" in listing(run)[0][5]
    capsys.readouterr()
    assert check(run) == 1
    damaged, whole = capsys.readouterr().out.splitlines()
    assert damaged.startswith(f"step-9: DAMAGED: {run}")
    assert whole == "step-10: ok, 1 files"


def test_a_run_without_checkpoints_is_said(tmp_path: Path) -> None:
    for look in (listing, check):
        with pytest.raises(ValueError, match="is no run folder"):
            look(tmp_path)
    (tmp_path / "config.toml").touch()
    for look in (listing, check):
        with pytest.raises(CheckpointError, match="has no checkpoints"):
            look(tmp_path)
