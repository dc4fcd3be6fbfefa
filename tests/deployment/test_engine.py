"""The services of docker-compose.yml on a real container engine: one image and one project for all tests."""

from __future__ import annotations

import errno
import http.client
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.compose import PROCESSES, STAGES
from tests.support.engine import Project, need_engine
from tests.support.programs import ROOT, until_nothing
from tests.support.run_folder import Losses

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

EPOCHS = 25
"""250 steps, some 8 s: time to disturb a run in."""

ORACLE = f"""
import json
from scpl_dist.run.config import load
from tests.support import reference
losses = reference.train(load(values={{"run.epochs": {EPOCHS}}})).losses
print(json.dumps(list(losses.items())))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The image, and keys that its user has made with it, as docs/cluster.md says."""
    need_engine()
    folder = tmp_path_factory.mktemp("engine")
    configuration = folder / "cluster.toml"
    text = (ROOT / "docker" / "cluster.toml").read_text()
    configuration.write_text(f"{text}\n[run]\nepochs = {EPOCHS}\n")
    with Project(folder, configuration) as made:
        made.build()
        make_keys(made, folder / "keys", made.user)
        yield made


@pytest.fixture
def cluster(project: Project) -> Iterator[Project]:
    """The project; a test's containers and networks are gone after it."""
    try:
        yield project
    finally:
        project.down()


@pytest.fixture(scope="module")
def wanted(project: Project) -> Losses:
    """Losses of one process that uses neither executor nor schedules, with the libraries of the image."""
    tests = ("--volume", f"{ROOT / 'tests'}:/project/tests:ro", "--env", "PYTHONPATH=/project")
    options = (*tests, "--env", "OMP_NUM_THREADS=1", "--entrypoint", "python")
    printed = project.container("-c", ORACLE, options=options, limit_s=600).stdout
    return {(step, block): terms for (step, block), terms in json.loads(printed)}


def make_keys(project: Project, folder: Path, user: int) -> None:
    """Keys that belong to a user, whoever runs the tests."""
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, user, -1)
    options = ("--user", user, "--volume", f"{folder}:/host")
    project.container("keys", "new", "/host", options=options)


def test_images_of_all_users_share_the_large_layers(project: Project) -> None:
    other = f"{project.image}-root"
    project.build({"SCPL_TAG": other.rpartition(":")[2], "SCPL_UID": "0"})
    layers = [
        json.loads(project.docker("image", "inspect", "--format", "{{json .RootFS.Layers}}", image).stdout)
        for image in (project.image, other)
    ]
    different = [mine for mine, its in zip(*layers, strict=True) if mine != its]
    sizes = project.docker("image", "history", "--human=false", "--format", "{{.Size}}", other).stdout.split()
    assert len(different) == 1
    assert sorted(map(int, sizes))[-1] > 100 * 2**20  # the environment's; all that is not shared is smaller:
    assert sum(map(int, sizes[: sizes.index(max(sizes, key=int))])) < 20 * 2**20
    for image, user in ((project.image, project.user), (other, 0)):
        assert project.docker("run", "--rm", "--entrypoint", "id", image, "-u").stdout == f"{user}\n"


def test_run_trains_to_its_end_with_the_losses_of_one_process(
    cluster: Project, wanted: Losses, tmp_path: Path
) -> None:
    cluster.up("whole")
    cluster.compose("wait", "coordinator", limit_s=600)
    assert cluster.codes() == dict.fromkeys(PROCESSES, 0), cluster.logs()
    assert cluster.losses("whole", tmp_path / "run") == wanted
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 0


def test_killed_stage_comes_back_and_no_bit_changes(cluster: Project, wanted: Losses, tmp_path: Path) -> None:
    cluster.up("replaced")
    cluster.until_step(55)  # there is a checkpoint to go back to
    before = {name: cluster.inspect(name)["State"]["StartedAt"] for name in PROCESSES}
    cluster.kill("stage-1")
    assert cluster.codes() == dict.fromkeys(PROCESSES, 0), cluster.logs()
    after = {name: cluster.inspect(name) for name in PROCESSES}
    assert {name for name in PROCESSES if after[name]["State"]["StartedAt"] != before[name]} == {"stage-1"}
    assert {name: found["RestartCount"] for name, found in after.items()} == {
        name: int(name == "stage-1") for name in PROCESSES
    }
    assert "replacing it (1 of 10)" in cluster.logs("coordinator")
    assert cluster.losses("replaced", tmp_path / "run") == wanted


def test_killed_coordinator_ends_the_run_which_the_next_up_goes_on_with(
    cluster: Project, wanted: Losses, tmp_path: Path
) -> None:
    cluster.up("resumed")
    cluster.until_step(55)
    cluster.kill("coordinator")
    until_nothing(lambda: cluster.inspect("coordinator")["State"]["Running"])
    assert cluster.inspect("coordinator")["State"]["ExitCode"] == 137
    until_nothing(lambda: "connection to the coordinator" not in cluster.logs("stage-0"))
    cluster.up("resumed")  # its stages are started again and again, and look for it
    assert cluster.codes() == dict.fromkeys(PROCESSES, 0), cluster.logs()
    assert "going on after step" in cluster.logs("coordinator")
    assert cluster.losses("resumed", tmp_path / "run") == wanted


def test_stop_leaves_a_checkpoint_that_the_next_up_goes_on_from(
    cluster: Project, wanted: Losses, tmp_path: Path
) -> None:
    cluster.up("stopped")
    cluster.until_step(20)  # before the first checkpoint of the configuration
    cluster.compose("stop")
    assert cluster.codes() == {"coordinator": 143, **dict.fromkeys(STAGES, 0)}, cluster.logs()
    stopped = cluster.run_folder("stopped", tmp_path / "stopped")
    assert json.loads((stopped / "exit.json").read_text())["code"] == 143
    [*_, newest] = sorted(
        int(path.name.removeprefix("step-")) for path in (stopped / "checkpoints").glob("step-*")
    )
    cluster.up("stopped")
    assert cluster.codes() == dict.fromkeys(PROCESSES, 0), cluster.logs()
    assert f"going on after step {newest}" in cluster.logs("coordinator")
    assert cluster.losses("stopped", tmp_path / "run") == wanted


LISTENING = """
for family in ("tcp", "tcp6"):
    with open(f"/proc/net/{family}") as table:
        for line in list(table)[1:]:
            address, _, state = line.split()[1:4]
            if state == "0A" and not address.startswith("0B00007F"):  # not the engine's name server
                print(int(address.rpartition(":")[2], 16))
"""

REACHED = """
import socket, sys
for place in sys.argv[1:]:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 2).close()
    except OSError:
        continue
    print(place)
"""

OUTWARDS = """
import socket
for family, place in ((socket.AF_INET, "198.51.100.1"), (socket.AF_INET6, "2001:db8::1")):
    with socket.socket(family) as probe:
        probe.settimeout(5)
        print(probe.connect_ex((place, 80)))
"""


@pytest.fixture
def long(cluster: Project, tmp_path: Path) -> Project:
    """A run that goes on until the test is over."""
    configuration = tmp_path / "long.toml"
    text = (cluster.folder / "cluster.toml").read_text()
    configuration.write_text(text.replace(f"epochs = {EPOCHS}", "epochs = 100000"))
    cluster.up(tmp_path.name, "prometheus", variables={"SCPL_CONFIG": str(configuration)})
    cluster.until_step(1)
    return cluster


def address(cluster: Project, service: str, network: str) -> str:
    found = cluster.inspect(service)["NetworkSettings"]["Networks"][f"{cluster.name}_{network}"]
    return str(found["IPAddress"])


def reached(places: Iterable[tuple[str, int]], device: str) -> list[tuple[str, int]]:
    """Which addresses and ports answer this host over one of its devices, which no packet leaves it by."""
    found = []
    for place in places:
        with socket.socket() as probe:
            probe.settimeout(2)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            if probe.connect_ex(place) == 0:
                found.append(place)
    return found


def test_ports_from_inside_from_outside_and_from_the_host(long: Project) -> None:
    ports = {name: set(map(int, long.python(name, LISTENING).split())) for name in PROCESSES}
    assert {4711, 9400} <= ports["coordinator"]
    assert all(ports[name] for name in STAGES)

    # From a stage: the coordinator, but not its metrics, and nothing outside.
    places = ("control:4711", "metrics:9400", "prometheus:9090")
    assert long.python("stage-0", REACHED, *places).split() == ["control:4711"]
    assert long.python("stage-0", OUTWARDS).split() == [str(errno.ENETUNREACH)] * 2

    # From the network of Prometheus, and from that of all containers that name none: the metrics and nothing else.
    metrics = address(long, "coordinator", "monitoring")
    host = json.loads(long.docker("network", "inspect", "bridge").stdout)[0]["IPAM"]["Config"][0]["Gateway"]
    published = [f"{host}:{port}" for port in (long.metrics_port, long.prometheus_port)]
    probes = [f"{metrics}:{port}" for port in ports["coordinator"]] + published
    for network, expected in ((f"{long.name}_monitoring", [f"{metrics}:9400"]), ("bridge", [])):
        options = ("--network", network, "--entrypoint", "python")
        assert long.container("-c", REACHED, *probes, options=options).stdout.split() == expected

    # From the host: what is published there.
    for port, path in ((long.metrics_port, "/healthz"), (long.prometheus_port, "/-/healthy")):
        assert answer(port, path)


def test_no_user_of_the_host_reaches_the_network_of_the_stages(long: Project) -> None:
    bridges = {}
    for network in ("stages", "monitoring"):
        [shown] = json.loads(long.docker("network", "inspect", f"{long.name}_{network}").stdout)
        bridges[network] = f"br-{shown['Id'][:12]}"
        if not Path("/sys/class/net", bridges[network]).exists():
            pytest.skip("the engine's bridges are not on this host")
    routes = [line.split()[0] for line in Path("/proc/net/route").read_text().splitlines()]
    assert bridges["monitoring"] in routes
    assert bridges["stages"] not in routes
    # Also not by a packet that goes there without a route.
    stages = [
        (address(long, name, "stages"), int(port))
        for name in PROCESSES
        for port in sorted(long.python(name, LISTENING).split())[:2]
    ]
    assert len(stages) == 2 * len(PROCESSES)
    assert reached(stages, bridges["stages"]) == []
    # The same probe finds what is open to this host.
    metrics = address(long, "coordinator", "monitoring")
    assert reached([(metrics, 9400), (metrics, 4711)], bridges["monitoring"]) == [(metrics, 9400)]


def answer(port: int, path: str) -> bytes:
    """What is at a place of this host.

    Raises:
        AssertionError: nothing good is.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == http.HTTPStatus.OK
        return response.read()


def test_prometheus_scrapes_the_run_and_its_rules_are_healthy(long: Project) -> None:
    def ask(what: str) -> Any:
        return json.loads(answer(long.prometheus_port, f"/api/v1/{what}"))["data"]

    def missing() -> list[Any]:
        targets = ask("targets")["activeTargets"]
        assert [target["scrapeUrl"] for target in targets] == ["http://metrics:9400/metrics"]
        rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        assert len(rules) == 8
        up = [target for target in targets if target["health"] == "up"]
        return [rule for rule in rules if rule["health"] != "ok"] + [*targets][len(up) :]

    until_nothing(missing)
    assert [alert for alert in ask("alerts")["alerts"] if alert["state"] == "firing"] == []


def test_keys_of_another_user_are_refused_before_a_stage_starts(cluster: Project, tmp_path: Path) -> None:
    make_keys(cluster, tmp_path / "keys", 0)
    try:
        cluster.up("refused", variables={"SCPL_KEYS": str(tmp_path / "keys")}, code=1)
        assert cluster.inspect("coordinator")["State"]["ExitCode"] == 2
        assert "control.keys: /run/secrets/coordinator.key_secret" in cluster.logs("coordinator")
        assert {cluster.inspect(name)["State"]["Status"] for name in STAGES} == {"created"}
    finally:  # whoever runs the tests cannot remove them
        options = ("--user", 0, "--volume", f"{tmp_path}:/host", "--entrypoint", "rm")
        cluster.container("-r", "/host/keys", options=options)
