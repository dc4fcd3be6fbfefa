"""A run on a real Ray cluster of several nodes, all of them on this host."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from scpl_dist.run.config import load
from tests.e2e.test_exactness import FEW
from tests.support import reference
from tests.support.programs import Program, until_nothing
from tests.support.run_folder import losses, rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODE: dict[str, Any] = {"object_store_memory": 80 << 20, "include_dashboard": False}
STEADY = [*FEW, "schedule.name=constant"]  # so that a run of another length begins alike


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without room for a worker, and two nodes with room for one each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    for _ in range(2):
        made.add_node(num_cpus=1, **NODE)
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    try:
        yield made
    finally:
        made.shutdown()


def raylet(node: Any) -> int:
    """The number of the process whose children a node's are."""
    [found] = node.all_processes["raylet"]
    number: int = found.process.pid
    return number


def train(run: Path, *settings: str, resume: str = "never") -> Program:
    common = [*STEADY, "metrics.port=0", "runtime.replace_s=300", "control.insecure=true", *settings]
    overrides = [part for text in common for part in ("-o", text)]
    command = [
        sys.executable,
        "-m",
        "scpl_dist",
        "train",
        "--on",
        "ray",
        "--run-dir",
        run,
        "--resume",
        resume,
    ]
    return Program(*command, *overrides)


def test_a_run_survives_the_loss_of_a_node_and_a_stop_and_comes_to_the_same(
    cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with train(run, "run.epochs=10000", "checkpoint.every_steps=5", "runtime.max_restarts=1") as driver:

        def until(what: Any) -> None:
            until_nothing(lambda: not (driver.ended or what()), limit_s=400)
            assert not driver.ended, driver.output

        until(lambda: (run / "checkpoints" / "latest").exists() and rows(run, "train"))
        # Not the one whose child the coordinator is: Ray may have put it on any node of this host.
        coordinator = psutil.Process(json.loads((run / "run.json").read_text())["pid"])
        kept = {process.pid for process in coordinator.parents()}
        away = next(node for node in cluster.worker_nodes if raylet(node) not in kept)
        cluster.remove_node(away, allow_graceful=False)
        until(lambda: "replacing it (1 of 1)" in driver.output)
        cluster.add_node(num_cpus=1, **NODE)
        until(lambda: len(rows(run, "start")) == 2 and rows(run, "train"))
        driver.signal(signal.SIGINT)
        assert driver.wait(400) == 130, driver.output
    assert json.loads((run / "exit.json").read_text())["code"] == 130
    assert rows(run, "start")[1]["step"] > 0
    epochs = max(step for step, _ in losses(run)) // 3 + 2  # of 3 steps each
    with train(run, f"run.epochs={epochs}", resume="auto") as driver:
        assert driver.wait(400) == 0, driver.output
    assert json.loads((run / "result.json").read_text())["epochs"] == epochs
    assert losses(run) == reference.train(load(None, [*STEADY, f"run.epochs={epochs}"])).losses
