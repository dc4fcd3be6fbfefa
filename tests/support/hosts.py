"""Hosts for tests: network namespaces with addresses, names and process trees of their own, joined by a switch.

    host a (10.77.0.1, eth0) --.
    host b (10.77.0.2, eth0) --+-- bridge in a namespace of its own
    host c (10.77.0.3, eth0) --'

A host's first process waits for the command, then for everything that the command has left behind, and says what
did not end. Processes of different hosts share files, but neither memory nor process numbers, so torch's libraries
use the network between them, as between real hosts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.programs import ROOT, Program, find, need_root, run

NETWORK = "10.77.0"
_NUMBERS = itertools.count()
"""Of clusters, which may be there at the same time."""
# $0 is the host's name, $1 a folder to hide behind an empty one, the rest the command.
FIRST_PROCESS = r"""
hostname "$0"; hidden=$1; shift
[[ -z $hidden ]] || mount -t tmpfs none "$hidden"
"$@" & child=$!
code=0; wait "$child" || code=$?
for _ in {1..100}; do
    alive=(/proc/[0-9]*)
    ((${#alive[@]} > 1)) || exit "$code"
    read -r -t 0.1 <> <(:) || true
done
for process in "${alive[@]}"; do
    [[ $process == /proc/1 || ! -e $process/cmdline ]] || echo "left behind: $(tr '\0' ' ' <"$process/cmdline")" >&2
done
exit 99
"""


def ip(*arguments: str) -> str:
    """Run iproute2's ip."""
    return run("ip", *arguments, code=0, limit_s=30).stdout


class Host:
    """One host; see the module."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.name = f"host-{'abcdefgh'[number]}"
        self.address = f"{NETWORK}.{number + 1}"
        self.namespace = f"{cluster.prefix}-{number}"
        self.switch = cluster.switch
        self.port = f"port{number}"
        self.programs: list[Program] = []

    def start(
        self, *command: object, env: Mapping[str, str] | None = None, hide: Path | None = None
    ) -> Program:
        """Start a command on this host, in the project's folder."""
        isolated = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--ipc", "--pid", "--fork"]
        isolated += ["--kill-child", "--mount-proc", "bash", "-c", FIRST_PROCESS, self.name, str(hide or "")]
        self.programs.append(Program(*isolated, *command, cwd=ROOT, env=env))
        return self.programs[-1]

    def torchrun(
        self, nodes: int, rank: int, *arguments: object, conf: str = "timeout=60", hide: Path | None = None
    ) -> Program:
        """Start this host's part of a run with one stage a host; host-a has the rendezvous."""
        command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={rank}"]
        command += [
            "--nproc-per-node=1",
            "--master-addr=host-a",
            "--master-port=29500",
            f"--rdzv-conf={conf}",
        ]
        return self.start(*command, "-m", "scpl_dist", "worker", *arguments, hide=hide)

    def cable(self, other: Host, network: str) -> None:
        """Connect two hosts directly, at eth1: NETWORK.1 here and NETWORK.2 there."""
        peer = ["peer", "name", "eth1", "netns", other.namespace]
        ip("-n", self.namespace, "link", "add", "eth1", "type", "veth", *peer)
        for host, number in ((self, 1), (other, 2)):
            ip("-n", host.namespace, "address", "add", f"{network}.{number}/24", "dev", "eth1")
            ip("-n", host.namespace, "link", "set", "eth1", "up")

    def dead_end(self, address: str) -> None:
        """Give this host an eth1 with this address that leads to nobody."""
        ip("-n", self.namespace, "link", "add", "eth1", "type", "veth", "peer", "name", "nobody")
        ip("-n", self.namespace, "address", "add", f"{address}/24", "dev", "eth1")
        for end in ("eth1", "nobody"):
            ip("-n", self.namespace, "link", "set", end, "up")

    def ports(self) -> set[int]:
        """TCP ports that something on this host listens on."""
        inside = ("ip", "netns", "exec", self.namespace)
        done = run(*inside, "cat", "/proc/net/tcp", "/proc/net/tcp6", code=0, limit_s=30)
        rows = [line.split() for line in done.stdout.splitlines() if ":" in line]
        listening = "0A"
        return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == listening}

    def unplug(self) -> None:
        """Take the link down at the switch: nothing arrives any more, and nobody is told."""
        ip("-n", self.switch, "link", "set", self.port, "down")

    def plug_in(self) -> None:
        """Take the link up again."""
        ip("-n", self.switch, "link", "set", self.port, "up")

    def reset(self) -> None:
        """End what was started here, and take the link up again."""
        for program in self.programs:
            program.close()  # the host's first process dies with it, and all others with that
        self.programs.clear()
        self.plug_in()


class Cluster:
    """Hosts on one switch."""

    def __init__(self, count: int) -> None:
        find("ip", "apt-get install iproute2")
        need_root()
        self.prefix = f"scpl{os.getpid()}-{next(_NUMBERS)}"
        self.switch = f"{self.prefix}-switch"
        self.hosts = [Host(self, number) for number in range(count)]

    def build(self) -> None:
        """Make namespaces, links, addresses and names."""
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        names = "".join(f"{host.address} {host.name}\n" for host in self.hosts)
        for host in self.hosts:
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            peer = ["peer", "name", host.port, "netns", self.switch]
            ip("-n", host.namespace, "link", "add", "eth0", "type", "veth", *peer)
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", self.switch, "link", "set", host.port, "master", "bridge", "up")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
            # `ip netns exec` shows these files as /etc/...
            folder = Path("/etc/netns", host.namespace)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (folder / "resolv.conf").write_text("")

    def remove(self) -> None:
        """End what was started and remove what was made."""
        for program in (program for host in self.hosts for program in host.programs):
            program.close()
        for name in (*(host.namespace for host in self.hosts), self.switch):
            with contextlib.suppress(AssertionError):  # it was not made yet
                ip("netns", "delete", name)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@contextlib.contextmanager
def cluster(count: int) -> Iterator[list[Host]]:
    """Hosts that exist as long as the block runs."""
    made = Cluster(count)
    try:
        made.build()
        yield made.hosts
    finally:
        made.remove()
