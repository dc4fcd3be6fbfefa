"""Loggers hear each number once, are never in the way, and their stores say the same as ``metrics.jsonl``."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from scpl_dist.coordinator import loggers
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.coordinator.loggers import Loggers
from scpl_dist.run.config import load
from tests.support import own_loggers
from tests.support.command import called
from tests.support.programs import run

STEPS = 4  # in an epoch
SEQUENCE = ItemSequence(load(values={"data.batch_size": 1}), {"train": STEPS, "validation": 1, "test": 1})
RESULT = {"accuracy_best": 0.5, "steps": 4}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine an import takes longer than a run waits at its end."""
    monkeypatch.setattr(loggers, "END_S", 60.0)
    monkeypatch.setattr(loggers, "FAILED_END_S", 60.0)


def trained(step: int, block: int, terms: dict[str, float] | None = None) -> dict[str, Any]:
    found = {"local": step + block / 4} if terms is None else terms
    row = {"event": "train", "step": step, "epoch": step // STEPS, "stage": block, "block": block}
    return row | {"loss": sum(found.values()), "terms": found, "lr": 0.1 / (1 + step)}


def evaluated(epoch: int) -> dict[str, Any]:
    row = {"event": "eval", "epoch": epoch, "split": "test", "accuracy": 0.5 + epoch / 8}
    return row | {"correct": 1, "total": 2, "event_number": 7}


def follow(to: str, folder: Path, steps: range, code: int = 0) -> list[str]:
    """A start of a run whose blocks finish these steps; what loggers had to say."""
    found = Loggers(load(values={"log.to": [to], "run.seed": 3}), folder, steps.start)
    for step in steps:
        found.row(trained(step, 0), SEQUENCE)
        found.row(trained(step, 1), SEQUENCE)
        if step % STEPS == STEPS - 1:
            found.row(evaluated(step // STEPS), SEQUENCE)
    found.end(code, RESULT if code == 0 else None)
    return list(found.close())


EXPECTED = {
    "train/loss/block0": [(step, float(step)) for step in range(6)],
    "train/loss/block1": [(step, step + 0.25) for step in range(6)],
    "train/lr": [(step, pytest.approx(0.1 / (1 + step))) for step in range(6)],
    "eval/test/accuracy": [(3, 0.5)],
}


def test_rows_become_numbers_with_names() -> None:
    assert loggers.values_of(trained(5, 1, {"local": 1.0, "predictor": 0.5}), STEPS) == (
        5,
        {
            "train/loss/block1": 1.5,
            "train/local/block1": 1.0,
            "train/predictor/block1": 0.5,
            "train/lr": 0.1 / 6,
        },
    )
    row = evaluated(1) | {"loss": 0.25}
    assert loggers.values_of(row, STEPS) == (7, {"eval/test/accuracy": 0.625, "eval/test/loss": 0.25})
    assert loggers.values_of({"event": "checkpoint", "step": 3, "bytes": 1, "seconds": 2.0}, STEPS) is None


def test_tensorboard_has_no_step_twice_when_a_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert follow("tensorboard", tmp_path, range(5), code=1) == []
    assert follow("tensorboard", tmp_path, range(4, 6)) == []
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert found == EXPECTED
    assert b"run.seed = 3" in events.Tensors("config")[0].tensor_proto.string_val[0]


# Its own imports warn of each other.
@pytest.mark.filterwarnings("default")
def test_mlflow_has_one_run_with_settings_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the test")
    client = mlflow.MlflowClient()
    for steps, code, status in ((range(5), 1, "FAILED"), (range(4, 6), 0, "FINISHED")):
        assert follow("mlflow", tmp_path, steps, code) == []
        experiment = client.get_experiment_by_name("of the test")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.status == status
    assert run.info.run_name == tmp_path.name
    assert run.data.params["run.seed"] == "3"
    assert run.data.params["optimizer.lr"] == "0.002"
    found = {
        name: [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert found == EXPECTED


def test_a_database_of_mlflow_is_made_to_its_end_whatever_ends_the_run(tmp_path: Path) -> None:
    pytest.importorskip("alembic")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    program = """
import os, pathlib, sys, time
from scpl_dist.coordinator.loggers import Loggers
from scpl_dist.run.config import load
folder = pathlib.Path(sys.argv[1])
Loggers(load(values={"log.to": ["mlflow"]}), folder, 0)
while not (folder / "mlflow.db").exists():
    time.sleep(0.01)
os._exit(0)
"""
    run(sys.executable, "-c", program, tmp_path, env={"MLFLOW_TRACKING_URI": uri}, limit_s=100)
    for process in psutil.process_iter(["cmdline"]):  # the one that makes it
        if uri in (process.info["cmdline"] or []):
            process.wait(100)
    found = []
    code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1])"
    for opened in (False, True):
        if opened:  # which would go on with what is half made, if it can
            run(sys.executable, "-c", code, uri, code=0, limit_s=100)
        with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            found += database.execute("SELECT version_num FROM alembic_version").fetchall()
    assert len(found) == 2
    assert found[0] == found[1]


@pytest.mark.filterwarnings("default")
def test_wandb_writes_an_offline_run_under_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow("wandb", tmp_path, range(5), code=1) == []
    assert follow("wandb", tmp_path, range(4, 6)) == []
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert files
    assert b"train/loss/block1" in b"".join(file.read_bytes() for file in files)


def test_an_evaluation_is_logged_when_it_is_whole(tmp_path: Path) -> None:
    found = Loggers(load(values={"log.to": [f"{own_loggers.__name__}:Noting"]}), tmp_path, 0)
    for epoch, split in (
        (0, "validation"),
        (0, "test"),
        (1, "validation"),
    ):  # and a stop, after which 1 is repeated
        found.row(evaluated(epoch) | {"split": split}, SEQUENCE)
    found.end(143, None)
    assert list(found.close()) == []
    heard = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert heard[1:-1] == [[3, {"eval/validation/accuracy": 0.5, "eval/test/accuracy": 0.5}]]


def test_a_logger_of_the_users_hears_all_in_order(tmp_path: Path) -> None:
    assert follow(f"{own_loggers.__name__}:Noting", tmp_path, range(4, 8)) == []
    first, *parts, last = (json.loads(line) for line in (tmp_path / "heard").read_text().splitlines())
    assert first == [3, 4]
    assert last == [0, RESULT]
    found: dict[int, dict[str, float]] = {}
    for step, values in parts:
        assert not found.get(step, {}).keys() & values.keys()
        found.setdefault(step, {}).update(values)
    assert found[4] == {"train/loss/block0": 4.0, "train/loss/block1": 4.25, "train/lr": 0.02}
    assert found[7]["eval/test/accuracy"] == 0.625
    assert list(found) == [4, 5, 6, 7]


def test_a_logger_that_fails_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    (problem,) = follow(f"{own_loggers.__name__}:Failing", tmp_path, range(4))
    assert problem.startswith(f"log.to = '{own_loggers.__name__}:Failing'")
    assert "the server is gone" in problem
    assert problem.endswith("; the run goes on without this logger")
    assert "\n" not in problem
    assert len((tmp_path / "heard").read_text().splitlines()) == 1


def test_a_logger_that_hangs_costs_neither_time_nor_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "END_S", 0.05)
    monkeypatch.setattr(loggers, "STEPS_WAITING", 3)
    own_loggers.GATE.clear()
    found = Loggers(load(values={"log.to": [f"{own_loggers.__name__}:Hanging"]}), tmp_path, 0)
    try:
        for step in range(100):
            found.row(trained(step, 0), SEQUENCE)
        found.end(0, RESULT)
        late, dropped = found.close()
    finally:
        own_loggers.GATE.set()
    assert "did not end in time" in late
    assert dropped.endswith("rows were left out")
    assert 90 <= int(dropped.split()[-5]) <= 97
    for follower in found._followers:
        follower.join(60)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        (
            "tensorbored",
            "log.to = 'tensorbored': unknown; use one of tensorboard, mlflow, wandb, or your own",
        ),
        (
            "json:dumps",
            "log.to = 'json:dumps': has no started: give a class with the methods started, metrics,",
        ),
        ("absent.py:Logger", "log.to = 'absent.py:Logger': there is no file"),
    ],
)
def test_what_is_no_logger_is_refused(to: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        loggers.check(load(values={"log.to": [to]}))


def test_a_logger_is_looked_for_before_anything_starts(tmp_path: Path) -> None:
    arguments = ("--run-dir", tmp_path / "run", "-o", 'log.to=["unknown"]')
    (tmp_path / "defaults.toml").touch()
    for command in (["train", "--dry-run"], ["coordinator", tmp_path / "defaults.toml"]):
        assert "log.to = 'unknown'" in called(*command, *arguments, code=2).stderr
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # W&B leaves such a folder
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("tensorboard", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ValueError, match=rf"pip install 'scpl_dist\[{name}\]'"):
            loggers.check(load(values={"log.to": [name]}))


def test_a_logger_is_named_once() -> None:
    with pytest.raises(ValueError, match="one is named twice"):
        load(values={"log.to": ["tensorboard", "tensorboard"]})
