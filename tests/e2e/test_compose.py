"""The services of docker-compose.yml, run in name spaces in the same topology: start, result, stop, outsiders."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import called
from tests.support.compose import COMPOSE, PROCESSES, STAGES, model
from tests.support.containers import Containers
from tests.support.programs import ROOT, until_nothing
from tests.support.run_folder import losses, rows

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
    called("keys", "new", tmp_path / "keys")
    cluster = model(COMPOSE, env={"SCPL_KEYS": str(tmp_path / "keys")})
    folder = tmp_path / "work"
    folder.mkdir()
    replacements = {"/etc/scpl/cluster.toml": str(configuration)}
    made = Containers(cluster, PROCESSES, folder, replacements, outsiders=["monitoring"])
    try:
        yield made
    finally:
        made.close()


def trains(containers: Containers) -> bool:
    """Whether the last stage has finished a step."""
    ended = [name for name in PROCESSES if containers.programs[name].ended]
    assert not ended, "\n".join(f"{name}: {containers.log(name)}" for name in PROCESSES)
    return bool(rows(containers.folder / "runs/cluster", "train"))


def test_services_train_and_end_with_the_losses_of_one_process(containers: Containers) -> None:
    for name in PROCESSES:
        containers.start(name)
    codes = {name: containers.wait(name, 120) for name in PROCESSES}
    assert codes == dict.fromkeys(PROCESSES, 0), "\n".join(map(containers.log, PROCESSES))
    result = json.loads((containers.folder / "runs/cluster/result.json").read_text())
    assert result["epochs"] == 2
    wanted = reference.train(load(values={"run.epochs": 2}))
    assert losses(containers.folder / "runs/cluster") == wanted.losses


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
    places = [
        (name, address, port)
        for name in PROCESSES
        for port in listening(containers, name)
        for address in containers.addresses[name].values()
    ]
    found = {(name, port) for name, _, port in places}
    assert {("coordinator", "4711"), ("coordinator", "9400")} <= found, "\n".join(
        map(containers.log, PROCESSES)
    )
    assert {name for name, _ in found} == set(PROCESSES)
    assert len(found) > 5  # those of the tensors too
    probe = [f"{address}:{port}" for _, address, port in places]
    done = containers.execute("outsider-monitoring", sys.executable, "-c", PROBE, *probe)
    assert trains(containers)  # all of them still listened
    assert done.stdout.split() == [f"{containers.addresses['coordinator']['monitoring']}:9400"]


PROBE = """
import socket, sys
for place in sys.argv[1:]:
    host, port = place.split(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        continue
    print(place)
"""


def listening(containers: Containers, name: str) -> set[str]:
    """TCP ports that a service listens on."""
    shown = containers.execute(name, "ss", "-ltnH")
    assert shown.returncode == 0, shown.stderr
    return {line.split()[3].rpartition(":")[2] for line in shown.stdout.splitlines()}
