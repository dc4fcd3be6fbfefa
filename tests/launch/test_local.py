"""A run that a Python program starts: its launcher is another process, which nobody has to know."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.programs import until_nothing

PROGRAM = """
import sys, scpl_dist
try:
    scpl_dist.train(settings={"run.epochs": 1000}, run_dir=sys.argv[1])
except scpl_dist.RunFailed as error:
    print(error.code, error)
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that trains in tmp_path / "run"."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        rows = tmp_path / "run" / "metrics.jsonl"
        until_nothing(lambda: "" if rows.exists() and '"train"' in rows.read_text() else "a step")
        yield started
        started.kill()
    until_nothing(lambda: [process for process in psutil.process_iter() if runs(process, tmp_path)], 30)


def runs(process: psutil.Process, folder: Path) -> bool:
    try:
        return str(folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_signal_to_the_program_stops_its_run_in_order(
    program: subprocess.Popen[str], tmp_path: Path
) -> None:
    program.send_signal(signal.SIGTERM)
    said, _ = program.communicate(timeout=60)
    assert said.splitlines()[-1].startswith("143 stopped by SIGTERM")
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_launcher_that_is_killed_is_a_failed_run(program: subprocess.Popen[str], tmp_path: Path) -> None:
    (launcher,) = psutil.Process(program.pid).children()
    launcher.kill()
    said, _ = program.communicate(timeout=60)
    assert said.splitlines()[-1] == "1 the launcher of the run was killed"
    exit_json = tmp_path / "run" / "exit.json"
    until_nothing(lambda: "" if exit_json.exists() else "exit.json", 30)
    assert "the launcher is gone" in json.loads(exit_json.read_text())["reason"]


def test_a_program_that_is_killed_leaves_nothing(program: subprocess.Popen[str], tmp_path: Path) -> None:
    program.kill()
    exit_json = tmp_path / "run" / "exit.json"
    until_nothing(lambda: "" if exit_json.exists() else "exit.json", 30)
    assert "the launcher is gone" in json.loads(exit_json.read_text())["reason"]
