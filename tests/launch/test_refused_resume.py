"""A start that is refused leaves the folder of a finished run as it was, so that a right one goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command import called, scpl_dist
from tests.support.programs import ROOT

RUN = ROOT / "tests" / "storage" / "data" / "run_of_0.1.0"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has all that this version writes."""
    monkeypatch.chdir(ROOT)  # the configuration names the model's file from here
    run = shutil.copytree(RUN, tmp_path / "run")
    (run / "log").mkdir()
    (run / ".lock").touch()
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sizes": {"train": 1266, "test": 355}}))
    return run


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def under_torchrun(*arguments: str | Path, code: int) -> str:
    """Rank 0 in a process of its own, which is to die with its parent."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            patch.setitem(os.environ, name, value)
        return scpl_dist("worker", RUN / "config.toml", *arguments, code=code).stderr


def by_the_service(*arguments: str | Path, code: int) -> str:
    return called("coordinator", RUN / "config.toml", *arguments, code=code).stderr


def by_the_launcher(*arguments: str | Path, code: int) -> str:
    return called("train", *arguments, code=code).stderr


@pytest.mark.parametrize("start", [by_the_launcher, under_torchrun, by_the_service])
@pytest.mark.parametrize(
    ("setting", "code", "reason"),
    [
        ("data.batch_size=100", 2, "the checkpoint's position (epoch 4, step 40, batch 0) does not fit"),
        ("loss.classifier=m", 1, "step-40/manifest.json: of another model: loss.classifier = 'l', now 'm'"),
    ],
)
def test_a_refused_start_changes_nothing(
    start: Callable[..., str], setting: str, code: int, reason: str, run: Path
) -> None:
    before = contents(run)
    assert reason in start("--run-dir", run, "--resume", "auto", "-o", setting, code=code)
    assert contents(run) == before


def test_without_a_whole_checkpoint_nothing_changes_either(run: Path) -> None:
    for path in run.glob("checkpoints/*/block-000.pt"):
        path.write_bytes(bytes(path.stat().st_size))
    before = contents(run)
    said = by_the_launcher("--run-dir", run, "--resume", "auto", code=1)
    assert "never starts from the beginning" in said
    assert said.count("block-000.pt: damaged, its SHA-256 is not that of the manifest") == 4
    assert contents(run) == before
