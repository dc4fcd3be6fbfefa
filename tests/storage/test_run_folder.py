"""The run folder on a real file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.run.failures import Cause, Failure, Outcome
from scpl_dist.storage.run_folder import RunFolder


def test_a_new_folder_has_its_configuration_and_a_place_for_logs(tmp_path: Path) -> None:
    config = configuration.load(values={"run.epochs": 7})
    folder = RunFolder.create(tmp_path / "deep" / "run", config)
    with folder.taken(config):
        pass
    assert configuration.load(folder.path / "config.toml") == config
    assert folder.log.is_dir()


def test_a_run_with_a_name_has_it_in_that_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create(None, configuration.load(values={"run.name": "small lr"}))
    assert folder.path.name.endswith("-small lr")
    assert Path("runs", "latest").resolve() == folder.path.resolve()
    for name in ("../elsewhere", ".hidden", "a/b"):
        with pytest.raises(ValueError, match=r"^run\.name = .*: give a word such as baseline"):
            configuration.load(values={"run.name": name})


def test_a_folder_without_a_name_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder.create(None, Config()), RunFolder.create(None, Config())
    assert first.path.parent == Path("runs")
    assert first.path.name.endswith("-scpl")
    assert first.path != second.path, "two runs that start in the same second are two runs"
    assert Path("runs", "latest").resolve() == second.path.resolve()
    (tmp_path / "runs" / "latest").unlink()
    (tmp_path / "runs" / "latest").mkdir()  # somebody's own
    third = RunFolder.create(None, Config())
    assert sorted(path.name for path in third.path.parent.iterdir() if path.is_symlink()) == []


def test_a_folder_with_another_run_is_kept_unless_that_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, Config())
    with folder.taken(Config()):
        pass
    RunFolder.create(tmp_path, Config())  # nothing has happened in there yet
    folder.metrics.append({"event": "start"})
    folder.metrics.close()
    with pytest.raises(ValueError, match=r"not empty \(.*metrics\.jsonl.*--resume auto"):
        RunFolder.create(tmp_path, Config())
    RunFolder.create(tmp_path, Config(), resume=True)
    assert folder.metrics.rows() == [{"event": "start"}]


def test_a_path_that_is_no_folder_is_an_error_with_the_fix(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run"):
        with pytest.raises(ValueError, match="choose another"):
            RunFolder.create(path, Config())
        with pytest.raises(ValueError, match="choose another"):
            RunFolder.open_for_writing(path)


def test_a_read_only_file_system_is_an_error_with_the_fix_for_who_wants_to_write() -> None:
    with pytest.raises(ValueError, match="not writable"):
        RunFolder.open_for_writing(Path("/proc/run"))
    assert RunFolder(Path("/proc/run")).read("result.json") is None


def test_reading_makes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.read("result.json") is None
    assert folder.metrics.rows() == []
    assert not (tmp_path / "run").exists()


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    first, second = (configuration.load(values={"run.epochs": epochs}) for epochs in (7, 8))
    with RunFolder(tmp_path).taken(first):
        with pytest.raises(ValueError, match="a run is in progress"):
            RunFolder.create(tmp_path, second, resume=True).taken(second).__enter__()
        assert configuration.load(tmp_path / "config.toml") == first
    with RunFolder(tmp_path).taken(second):
        assert configuration.load(tmp_path / "config.toml") == second


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    """A reader in another process never sees half of a file, however often it is replaced."""
    folder = RunFolder(tmp_path)
    folder.write("run.json", {"rows": [0] * 5000})
    code = (
        "import json, sys, pathlib\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while (value := json.loads(path.read_text()))['rows'][0] < 200:\n"
        "    assert len(set(value['rows'])) == 1 and len(value['rows']) == 5000\n"
    )
    reader = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run.json")], stdout=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for number in range(201):
        folder.write("run.json", {"rows": [number] * 5000})
    reader.stdout.close()
    assert reader.wait(60) == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["run.json"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write("result.json", {"accuracy": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.write("result.json", {"accuracy": float("nan")})
    assert folder.read("result.json") == {"accuracy": 1}
    (tmp_path / "exit.json").mkdir()
    with pytest.raises(OSError, match=r"exit\.json"):
        folder.write("exit.json", {"code": 0})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["exit.json", "result.json"]


def test_a_missing_file_is_none_and_a_broken_one_an_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.read("run.json") is None
    for text in ("{", "[1]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json"):
            folder.read("run.json")
    folder.clear()
    assert not os.path.exists(tmp_path / "run.json")


def test_the_end_of_a_run_is_written_down(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish(Outcome(0, "done", result={"accuracy_last": 0.5}))
    assert folder.read("result.json") == {"accuracy_last": 0.5}
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["code"], found["reason"], found["stage"]) == (0, "done", None)


def test_the_failure_of_a_run_is_written_down_with_its_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    failure = Failure(Cause.RAISED, "it broke", "mend it", 1, "here", 1, 42, "loss", 7, 0, "Traceback")
    folder.finish(Outcome(1, "raised", failure))
    found = folder.read("exit.json")
    assert found == {
        "code": 1,
        "reason": "it broke",
        "cause": "raised",
        "advice": "mend it",
        "stage": 1,
        "replica": None,
        "host": "here",
        "step": 7,
        "micro_batch": 0,
        "pid": 42,
        "rank": 1,
        "phase": "loss",
        "traceback": "Traceback",
        "survived": [],
        "final": "",
        "log": str(folder.log),
    }
    assert folder.read("result.json") is None
    folder.fail(1, "no coordinator")
    assert (folder.read("exit.json") or {})["reason"] == "no coordinator"


def test_processes_of_one_id_may_open_and_write_a_folder_at_once(tmp_path: Path) -> None:
    """Workers in containers share the run folder and often the process id, as threads do here."""

    def work(number: int) -> None:
        folder = RunFolder.open_for_writing(tmp_path)
        folder.write("run.json", {"number": number})
        assert folder.read("run.json") is not None

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(100)))
    assert not list(tmp_path.glob(".*"))
