"""launch/hosts.sh with real ssh servers on three hosts, which are network and process namespaces."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from scpl_dist.run.config import load
from tests.support import reference
from tests.support.command import called
from tests.support.containers import Containers
from tests.support.programs import ROOT, Program, find, run, until_nothing
from tests.support.run_folder import losses, rows

pytestmark = pytest.mark.slow

HOSTS = ("node-0", "node-1", "node-2")
SERVER = """
Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
"""
CLIENT = """
IdentityFile {folder}/key
UserKnownHostsFile /dev/null
StrictHostKeyChecking no
LogLevel ERROR
"""


class Cluster:
    """Three hosts with ssh servers, and a fourth from which the run is started."""

    def __init__(self, folder: Path) -> None:
        server = find("sshd", "apt-get install openssh-server")
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key", code=0)
        (folder / "server").write_text(SERVER.format(folder=folder))
        (folder / "client").write_text(CLIENT.format(folder=folder))
        self.config = folder / "config.toml"
        keys = folder / "keys"
        called("keys", "new", keys)
        self.config.write_text(
            f"[pipeline]\nstages = 3\n[run]\nepochs = 2\n[control]\nkeys = {str(keys)!r}\n"
        )
        self.run = folder / "run"
        self.ssh = f"ssh -F {folder / 'client'}"
        options = ["-D", "-e", "-f", str(folder / "server")]
        services = {
            host: {"networks": {"lan": None}, "hostname": host, "entrypoint": [server], "command": options}
            for host in HOSTS
        }
        self.containers = Containers({"services": services}, HOSTS, folder, {}, outsiders=["lan"])

    def start(self) -> None:
        """Start the ssh servers."""
        for host in HOSTS:
            self.containers.start(host)
        until_nothing(lambda: [host for host in HOSTS if not self._listens(host)])

    def _listens(self, host: str) -> bool:
        return ":22 " in self.containers.execute(host, "ss", "-ltnH").stdout

    def launch(self) -> Program:
        """Start launch/hosts.sh on the fourth host."""
        hosts = ",".join(self.containers.addresses[host]["lan"] for host in HOSTS)
        script = (str(ROOT / "launch/hosts.sh"), hosts, str(self.config), f"--run-dir={self.run}")
        environment = {"SSH": self.ssh, "PYTHON": sys.executable}
        return Program(*self.containers.on("outsider-lan", *script), env=environment)

    def left(self) -> list[str]:
        """Processes on the hosts other than the init process and the ssh server that listens."""
        names: list[str] = []
        for host in HOSTS:
            for child in psutil.Process(self.containers.programs[host].pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    names.append(child.name())
        return sorted(name for name in names if name not in ("tini", "sshd", "sshd-session"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.containers.close()


def until_it_trains(cluster: Cluster, launch: Program) -> None:
    def missing() -> bool:
        assert not launch.ended, launch.output
        return not rows(cluster.run, "train")

    until_nothing(missing)


def test_three_hosts_train_with_the_losses_of_one_process(cluster: Cluster) -> None:
    with cluster.launch() as launch:
        assert launch.wait(150) == 0, launch.output
    until_nothing(cluster.left)
    assert losses(cluster.run) == reference.train(load(values={"run.epochs": 2})).losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_end_of_the_script_stops_all_hosts_with_a_checkpoint(
    cluster: Cluster, number: signal.Signals
) -> None:
    cluster.config.write_text(cluster.config.read_text().replace("epochs = 2", "epochs = 1000"))
    with cluster.launch() as launch:
        until_it_trains(cluster, launch)
        launch.signal(number)
        assert launch.wait(90) != 0
        until_nothing(cluster.left)
    assert json.loads((cluster.run / "exit.json").read_text())["code"] == 143
    assert list((cluster.run / "checkpoints").glob("step-*/manifest.json"))
