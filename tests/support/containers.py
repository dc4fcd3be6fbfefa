"""The services of docker-compose.yml without a container engine: what an engine does, done with the kernel's tools.

Each service gets a network, process and host name space of its own; each Compose network is a bridge that nothing
else is attached to; the names of services and their aliases resolve as Compose's name server would resolve them.
`tini` is the init process, as with `init: true`. Commands, environment and health checks are those of the Compose
file, with the paths of the image replaced by paths on this machine. The file system is not separated.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.programs import Program, find, need_root, run, until_nothing

# $0 is the host name, $1 the folder with secrets or empty, the rest the command. Mounts are the service's own.
_FIRST = """
hostname "$0"; secrets=$1; shift
if [ -n "$secrets" ]; then
    mount -t tmpfs none /run; mkdir /run/secrets; mount --bind "$secrets" /run/secrets
fi
exec "$@"
"""


def _ip(*arguments: str) -> None:
    run("ip", *arguments, code=0, limit_s=30)


class Containers:
    """Some services of a Compose model, and bare hosts beside them.

    Args:
        model: what ``docker compose config --format json`` prints.
        services: the services to have.
        folder: where processes work and write; its ``runs`` folder is the volume of that name.
        replacements: texts of commands to replace, such as paths of the image.
        outsiders: networks to attach a further host to, named "outsider-NETWORK".
    """

    def __init__(
        self,
        model: dict[str, Any],
        services: Sequence[str],
        folder: Path,
        replacements: dict[str, str],
        outsiders: Iterable[str] = (),
    ) -> None:
        find("ip", "apt-get install iproute2")
        find("tini", "apt-get install tini")
        need_root()
        self.model = model
        self.folder = folder
        self.replacements = {"python": sys.executable, **replacements}
        self.programs: dict[str, Program] = {}
        self._prefix = f"scpl{os.getpid()}-"
        networks = {name: model["services"][name]["networks"] for name in services}
        networks |= {f"outsider-{network}": {network: None} for network in outsiders}
        self.addresses: dict[str, dict[str, str]] = {name: {} for name in networks}
        (folder / "runs").mkdir()
        try:
            self._connect(networks)
        except BaseException:
            self.close()
            raise

    def _connect(self, networks: dict[str, dict[str, Any]]) -> None:
        switch = self._prefix + "switch"
        _ip("netns", "add", switch)
        names = sorted({network for joined in networks.values() for network in joined})
        for network in names:
            _ip("-n", switch, "link", "add", network, "type", "bridge")
            _ip("-n", switch, "link", "set", network, "up")
        for number, (host, joined) in enumerate(networks.items()):
            _ip("netns", "add", self._prefix + host)
            _ip("-n", self._prefix + host, "link", "set", "lo", "up")
            for position, network in enumerate(sorted(joined)):
                self._plug(host, f"eth{position}", network, f"10.89.{names.index(network)}.{number + 2}")
        for host, joined in networks.items():
            self._write_hosts(host, joined, networks)

    def _plug(self, host: str, interface: str, network: str, address: str) -> None:
        switch, port = self._prefix + "switch", f"p{address.replace('.', '')}"
        inside = ["link", "add", interface, "netns", self._prefix + host]
        _ip("-n", switch, *inside, "type", "veth", "peer", "name", port)
        _ip("-n", switch, "link", "set", port, "master", network, "up")
        _ip("-n", self._prefix + host, "address", "add", f"{address}/24", "dev", interface)
        _ip("-n", self._prefix + host, "link", "set", interface, "up")
        self.addresses[host][network] = address

    def _write_hosts(self, host: str, joined: dict[str, Any], networks: dict[str, dict[str, Any]]) -> None:
        lines = ["127.0.0.1 localhost"]
        for network in joined:
            for other, its in networks.items():
                if network in its:
                    aliases = (its[network] or {}).get("aliases", [])
                    lines.append(" ".join([self.addresses[other][network], other, *aliases]))
        # `ip netns exec` mounts these files over those in /etc. No name server is there: other names fail at once.
        folder = Path("/etc/netns", self._prefix + host)
        folder.mkdir(parents=True)
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")

    def _secrets(self, name: str) -> str:
        """A folder with the secrets of a service under the names that it knows them by; empty if it has none."""
        secrets = self.model["services"][name].get("secrets", [])
        folder = self.folder / f"{name}.secrets"
        for secret in secrets:
            folder.mkdir(exist_ok=True)
            shutil.copy(self.model["secrets"][secret["source"]]["file"], folder / secret["target"])
        return str(folder) if secrets else ""

    def _replaced(self, words: Iterable[str]) -> list[str]:
        return [self.replacements.get(word, word) for word in words]

    def _environment(self, name: str) -> list[str]:
        values = {"PATH": os.environ["PATH"], **self.model["services"][name].get("environment", {})}
        return [f"{key}={value}" for key, value in values.items()]

    def on(self, host: str, *command: str) -> list[str]:
        """The command line that runs a command in the network of a host."""
        return ["ip", "netns", "exec", self._prefix + host, *command]

    def execute(self, host: str, *command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the network of a host to its end."""
        return run(*self.on(host, *command), limit_s=timeout_s, cwd=self.folder)

    def start(self, name: str) -> None:
        """Start a service as soon as the services that it depends on are healthy."""
        service = self.model["services"][name]
        for needed in service.get("depends_on", {}):
            self._await_health(needed)
        command = self._replaced(
            [*(service.get("entrypoint") or ["python", "-m", "scpl_dist"]), *service["command"]]
        )
        isolated = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL"]
        inside = ["sh", "-e", "-c", _FIRST, service.get("hostname", name), self._secrets(name)]
        if name in self.programs:  # an earlier start of it
            self.programs[name].close()
        self.programs[name] = Program(
            *self.on(name, *isolated, *inside, "tini", "--", "env", "-i", *self._environment(name), *command),
            cwd=self.folder,
            log=self.folder / f"{name}.log",
        )

    def _await_health(self, name: str) -> None:
        test = self._replaced(self.model["services"][name]["healthcheck"]["test"][1:])

        def failed() -> int:
            assert not self.programs[name].ended, f"{name} ended:\n{self.log(name)}"
            return self.execute(name, *test).returncode

        until_nothing(failed)

    def signal(self, name: str, number: signal.Signals) -> None:
        """What an engine does at `docker stop`, or `docker kill`: a signal to the init process."""
        with contextlib.suppress(
            psutil.NoSuchProcess
        ):  # as an engine, which does nothing to one that has ended
            for init in psutil.Process(self.programs[name].pid).children():
                init.send_signal(number)

    def wait(self, name: str, timeout_s: float) -> int:
        """The exit code of a service."""
        return self.programs[name].wait(timeout_s)

    def log(self, name: str) -> str:
        """What a service has printed."""
        return self.programs[name].output

    def close(self) -> None:
        """End everything that is left and remove all traces."""
        for program in self.programs.values():
            program.close()
        for host in [*self.addresses, "switch"]:
            run("ip", "netns", "delete", self._prefix + host, limit_s=30)  # it may not have been made
            shutil.rmtree(Path("/etc/netns", self._prefix + host), ignore_errors=True)
