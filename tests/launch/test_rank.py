"""What a worker says when its launch does not fit the configuration, or nobody is there yet."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from scpl_dist.launch.rank import MARK
from tests.support.command import scpl_dist
from tests.support.ports import free_port
from tests.support.programs import Program

SEVERAL_HOSTS = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.1"}
HERE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({}, [], "the environment has no 'RANK': a worker is started by torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, [], "pipeline.stages = 2: torchrun starts 3 processes"),
        (SEVERAL_HOSTS, ["control.host=localhost"], "first host (torchrun has 10.0.0.1)"),
        (
            SEVERAL_HOSTS,
            ["control.host=no-such-host.invalid", "control.insecure=true"],
            "control.host = 'no-such-host.invalid': the name does not resolve",
        ),
    ],
)
def test_a_launch_that_cannot_work_ends_at_once_and_tells_torchrun_why(
    environment: dict[str, str],
    settings: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in SEVERAL_HOSTS:
        monkeypatch.delenv(name, raising=False)
    report = tmp_path / "error.json"
    for name, value in {**environment, "TORCHELASTIC_ERROR_FILE": str(report)}.items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "config.toml"
    config.write_text("")
    overrides = [part for text in settings for part in ("-o", text)]
    error = scpl_dist("worker", config, *overrides, "--run-dir", tmp_path / "run", code=2).stderr
    assert message in error
    assert message in json.loads(report.read_text())["message"]
    assert not (tmp_path / "run").exists()


def test_restarts_by_torchrun_need_a_folder_to_go_on_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**HERE, "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.toml").write_text("")
    error = scpl_dist("worker", "config.toml", code=2).stderr
    assert "give it with --run-dir" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_cannot_repeat_what_would_come_to_the_same(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ended = {
        "code": 1,
        "cause": "nonfinite",
        "reason": "a loss is nan",
        "stage": 0,
        "survived": [],
        "final": "",
    }
    (run / "exit.json").write_text(json.dumps(ended))
    this = psutil.Process()
    (run / MARK).write_text(f"{socket.gethostname()} {this.pid} {this.create_time()}")
    environment = {**HERE, "RANK": rank, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in {**environment, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.toml").write_text("")
    scpl_dist("worker", tmp_path / "config.toml", "--run-dir", run, code=1)
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert "not started again: the same steps would be repeated exactly" in told
    assert "a loss is nan" in told
    assert sorted(path.name for path in run.iterdir()) == [MARK, "exit.json"]


@pytest.mark.parametrize("mark", [None, "there 1 2.0"])
def test_torchrun_does_not_go_on_with_a_run_that_it_has_not_begun(
    mark: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    if mark is not None:
        (run / MARK).write_text(mark)
    environment = {**HERE, "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.toml").write_text("")
    options = ("--run-dir", run, "-o", "control.port=0", "-o", "metrics.port=0")
    assert "not empty" in scpl_dist("worker", tmp_path / "config.toml", *options, code=2).stderr


def test_a_worker_waits_longer_for_the_coordinator_than_for_its_words_and_can_be_ended_meanwhile(
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f"[runtime]\ntimeout_s = 1.0\n[control]\ninsecure = true\nport = {free_port()}\n")
    command = (sys.executable, "-m", "scpl_dist", "worker", config)
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with Program(*command, "--no-coordinator", env=environment) as worker:
        worker.wait_for("waiting for the coordinator at")
        worker.signal(signal.SIGTERM)
        assert worker.wait(10) == -signal.SIGTERM
