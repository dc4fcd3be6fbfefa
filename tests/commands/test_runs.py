"""``scpl-dist ls``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scpl_dist.commands.runs import HEADINGS, listing
from scpl_dist.run import config as configuration
from scpl_dist.run.failures import Outcome
from scpl_dist.storage.run_folder import RunFolder
from tests.support.command import called


def begin(path: Path, minute: int, **values: object) -> RunFolder:
    config = configuration.load(values={key.replace("__", "."): value for key, value in values.items()})
    folder = RunFolder.create(path, config)
    with folder.taken(config):
        pass
    os.utime(path / "config.toml", (60 * minute, 60 * minute))
    return folder


def test_every_run_is_a_row_with_its_state(tmp_path: Path) -> None:
    result = {"steps": 200, "accuracy_last": 0.75, "accuracy_best": None, "wall_seconds": 21.84}
    begin(tmp_path / "deep" / "good", 3, run__method="bp").finish(Outcome(0, "done", result=result))
    begin(tmp_path / "bad", 1).finish(Outcome(1, "the disk is full"))
    begin(tmp_path / "stopped", 2, pipeline__replicas=2).finish(Outcome(143, "stopped by SIGTERM"))
    begin(tmp_path / "killed", 4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.toml").write_text("[tool]\nname = 1\n")
    going_on = RunFolder.create(tmp_path / "going on", configuration.load())
    with going_on.taken(configuration.load()):
        rows = [dict(zip(HEADINGS, row, strict=True)) for row in listing(tmp_path)]
    assert [(row["run"], row["state"]) for row in rows] == [
        ("bad", "failed: the disk is full"),
        ("stopped", "stopped"),
        ("deep/good", "done"),
        ("killed", "killed"),
        ("going on", "running"),
    ]
    good = rows[2]
    assert (good["method"], good["model"], good["data"]) == ("bp", "vgg_tiny", "digits")
    assert (good["steps"], good["accuracy"], good["best"], good["seconds"]) == ("200", "0.7500", "", "21.8")
    assert rows[1]["stages"] == "2 by 4"


def test_the_table_is_printed_and_a_wrong_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "runs: no such folder" in called("ls", code=2).stderr
    assert called("ls", tmp_path).stdout == f"no runs in {tmp_path}; train one with: scpl-dist train\n"
    begin(tmp_path / "runs" / "first", 1).finish(Outcome(0, "done"))
    heading, row = called("ls").stdout.splitlines()
    assert heading.split() == list(HEADINGS)
    assert (row.split()[0], row.split()[-1]) == ("first", "done")
