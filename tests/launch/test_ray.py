"""What of a start on Ray needs no cluster."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.launch import ray
from scpl_dist.launch.process import Order
from scpl_dist.run.config import load
from scpl_dist.run.failures import Outcome
from scpl_dist.storage.run_folder import RunFolder
from tests.support.command import called
from tests.support.ports import free_port


def test_without_the_package_the_fix_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = called("train", "--on", "ray", "--run-dir", tmp_path / "run", code=2).stderr
    assert said.strip().endswith("--on ray: the package ray is not installed: pip install 'scpl_dist[ray]'")
    assert not (tmp_path / "run").exists()


def test_without_a_cluster_the_fix_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = called("train", "--on", "ray", "--run-dir", tmp_path / "run", code=2).stderr
    assert "--on ray: no cluster answers (" in said
    assert "start one with ray start --head, or set RAY_ADDRESS" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "there", "gpus", "warns"),
    [
        ("cpu", {"CPU": 8.0, "GPU": 8.0}, 0, ""),
        ("auto", {"CPU": 8.0, "GPU": 3.0}, 1, ""),
        ("auto", {"CPU": 8.0, "GPU": 2.0}, 0, ""),
        (
            "cuda",
            {"CPU": 8.0, "GPU": 2.0},
            1,
            "the run wants 3 GPUs and the Ray cluster has 2: it waits for more",
        ),
        ("cpu", {"CPU": 4.0}, 0, "the run wants 6 CPUs and the Ray cluster has 4: it waits for more"),
    ],
)
def test_a_worker_asks_for_what_it_needs(
    device: str, there: dict[str, float], gpus: int, warns: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"pipeline.stages": 3, "runtime.threads": 2, "runtime.device": device}
    assert ray._needs(load(values=values), there) == {"num_cpus": 2, "num_gpus": gpus}
    assert capsys.readouterr().err == (f"warning: {warns}\n" if warns else "")


def test_an_actor_says_how_its_process_ended_and_whether_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    host = ray.Host(str(tmp_path))
    assert host.look() == ray.LOST
    order = {"entry": "time:sleep", "arguments": {}, "title": "test"}
    host.start({**order, "entry": "builtins:int"})
    assert host._process is not None
    assert host._process.wait(60) == 0
    assert host.look() == 0
    host.start({**order, "entry": "signal:pause"})
    assert host.look() is None
    host.send(9)
    assert host.look() == -9


class Here:
    """A place on this host, without Ray."""

    def __init__(self) -> None:
        self._host = ray.Host("")
        self.look, self.send = self._host.look, self._host.send
        self.started = 0

    def address(self) -> tuple[str, int]:
        return "127.0.0.1", free_port()

    def start(self, order: Order) -> None:
        self.started += 1
        self._host.start(asdict(order))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> ray.Cluster:
    """One that has a place for the coordinator alone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = object.__new__(ray.Cluster)
    config = load(values={"metrics.port": 0})
    vars(made).update(_config=config, _signals=[], _told=0, _coordinator=Here(), _workers={})
    return made


def test_without_a_good_checkpoint_that_is_the_cause_and_nothing_is_tried_again(
    cluster: ray.Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)  # without a manifest
    folder = RunFolder(tmp_path)
    assert cluster.train(folder, "auto") == 1
    assert (folder.read("exit.json") or {})["cause"] == "checkpoint"
    said = capsys.readouterr()
    assert "Traceback" not in said.out
    refusal, cause = said.err.splitlines()
    assert refusal == "scpl-dist: not started again: there is nothing to go on from"
    assert cause.startswith(f"  cause:      no usable checkpoint in {tmp_path}: ")
    assert vars(cluster)["_coordinator"].started == 1


def test_what_a_coordinator_says_of_its_first_start_is_the_cause(
    cluster: ray.Cluster, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".metrics.jsonl.tmp").mkdir()  # in the way of what it writes before it says that it is there
    folder = RunFolder(tmp_path)
    end = cluster._attempt(folder, "auto")
    assert (end.code, end.cause) == (1, "disk")
    assert "Is a directory" in end.reason
    assert (folder.read("exit.json") or {})["reason"] == end.reason


def test_a_coordinator_that_is_lost_may_have_written_the_end_before(
    cluster: ray.Cluster, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.finish(Outcome(0, "done"))
    before = ray._written(folder)
    folder.finish(Outcome(0, "done"))
    assert cluster._end(folder, ray.LOST, before).code == 0
    assert cluster._end(folder, ray.LOST, ray._written(folder)).cause == "coordinator_lost"
    assert (folder.read("exit.json") or {})["code"] == 1


@pytest.mark.parametrize("device", ["cuda:1", ["cpu", "cuda"]])
def test_ray_chooses_the_gpu(device: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runtime.device = .*: Ray gives each worker its GPU; use"):
        ray.train(load(values={"runtime.device": device}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
