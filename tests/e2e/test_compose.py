"""The services of docker-compose.yml, run in name spaces in the same topology: start, result, stop, outsiders."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.test_docker import COMPOSE, PROCESSES, STAGES, model
from tests.support.command import scpl_dist
from tests.support.containers import Containers
from tests.support.programs import ROOT, until_nothing

pytestmark = pytest.mark.slow

EXTRA = """
[run]
epochs = {epochs}
"""


@pytest.fixture
def configuration(tmp_path: Path) -> Path:
    """docker/cluster.toml with fewer epochs."""
    path = tmp_path / "cluster.toml"
    path.write_text((ROOT / "docker" / "cluster.toml").read_text() + EXTRA.format(epochs=2))
    return path


@pytest.fixture
def containers(tmp_path: Path, configuration: Path) -> Iterator[Containers]:
    scpl_dist("keys", "new", tmp_path / "keys")
    cluster = model(COMPOSE, env={"SCPL_KEYS": str(tmp_path / "keys")})
    folder = tmp_path / "work"
    folder.mkdir()
    replacements = {"/etc/scpl/cluster.toml": str(configuration)}
    made = Containers(cluster, PROCESSES, folder, replacements, outsiders=["monitoring"])
    try:
        yield made
    finally:
        made.close()


def losses(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], row["block"]): row["loss"] for row in rows if row["event"] == "train"}


def trains(containers: Containers) -> bool:
    """Whether the last stage has finished a step."""
    ended = [name for name in PROCESSES if containers.programs[name].ended]
    assert not ended, "\n".join(f"{name}: {containers.log(name)}" for name in PROCESSES)
    metrics = containers.folder / "runs/cluster/metrics.jsonl"
    return metrics.exists() and '"train"' in metrics.read_text()


def test_services_train_and_end_with_the_losses_of_one_machine(
    containers: Containers, configuration: Path, tmp_path: Path
) -> None:
    for name in PROCESSES:
        containers.start(name)
    codes = {name: containers.wait(name, 120) for name in PROCESSES}
    assert codes == dict.fromkeys(PROCESSES, 0), "\n".join(map(containers.log, PROCESSES))
    result = json.loads((containers.folder / "runs/cluster/result.json").read_text())
    assert result["epochs"] == 2
    scpl_dist(
        "train",
        "-o",
        "run.epochs=2",
        "-o",
        "pipeline.stages=1",
        "-o",
        "metrics.port=0",
        "--run-dir",
        tmp_path / "one",
    )
    assert losses(containers.folder / "runs/cluster") == losses(tmp_path / "one")


def stop(containers: Containers) -> None:
    """Stop as Compose does: in the reverse order of depends_on, waiting for each level."""
    for level in (STAGES, ("coordinator",)):
        for name in level:
            if not containers.programs[name].ended:
                containers.signal(name, signal.SIGTERM)
        for name in level:
            containers.wait(name, 90)
    assert [containers.wait(name, 0) for name in PROCESSES] == [143, 0, 0, 0]


def checkpoints(containers: Containers) -> list[int]:
    manifests = (containers.folder / "runs/cluster/checkpoints").glob("step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in manifests)


def test_stop_leaves_a_checkpoint_that_the_next_start_goes_on_from(
    containers: Containers, configuration: Path
) -> None:
    configuration.write_text(configuration.read_text().replace("epochs = 2", "epochs = 1000"))
    for name in PROCESSES:
        containers.start(name)
    until_nothing(lambda: not trains(containers))
    stop(containers)
    assert json.loads((containers.folder / "runs/cluster/exit.json").read_text())["code"] == 143
    [*_, first] = checkpoints(containers)
    before = losses(containers.folder / "runs/cluster")
    for name in PROCESSES:
        containers.start(name)
    until_nothing(lambda: first not in [step for step, _ in losses(containers.folder / "runs/cluster")])
    stop(containers)
    after = losses(containers.folder / "runs/cluster")
    assert max(step for step, _ in before) == first - 1  # steps are counted from 0
    assert {key: value for key, value in after.items() if key[0] < first} == before
    assert checkpoints(containers)[-1] > first


def test_outsider_on_the_monitoring_network_reaches_the_metrics_and_nothing_else(
    containers: Containers, configuration: Path
) -> None:
    configuration.write_text(configuration.read_text().replace("epochs = 2", "epochs = 1000"))
    for name in PROCESSES:
        containers.start(name)
    until_nothing(lambda: not trains(containers))
    probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    listening = set()
    answering = set()
    for name in PROCESSES:
        for line in containers.execute(name, "ss", "-ltnH").stdout.splitlines():
            port = line.split()[3].rpartition(":")[2]
            for address in containers.addresses[name].values():
                listening.add((name, port))
                done = containers.execute("outsider-monitoring", sys.executable, "-c", probe, address, port)
                if done.returncode == 0:
                    answering.add((name, address, port))
    assert {("coordinator", "4711"), ("coordinator", "9400"), ("stage-0", "29500")} <= listening
    assert len(listening) > 5  # those of the tensors too
    assert answering == {("coordinator", containers.addresses["coordinator"]["monitoring"], "9400")}
