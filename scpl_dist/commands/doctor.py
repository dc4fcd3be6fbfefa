"""``scpl-dist doctor``: what usually keeps a run from starting, one line each, with the fix.

Every check is one that a user has once needed hours to find. Run it on each host with the configuration of the run.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from scpl_dist.control import keys
from scpl_dist.control.messages import VERSION
from scpl_dist.run import network
from scpl_dist.run.config import Config

SHARED_MEMORY = 256 << 20
OPEN_FILES = 1024
CLOCK_S = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok", "warn" (may be wanted) or "fail" (the run cannot work).
        name: what was looked at.
        text: the value, and what to do about it.
    """

    state: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:4}  {self.name:12}  {self.text}"


def examine(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Look at this host.

    Args:
        config: the run.
        run_dir: where run folders are made, shared by all hosts of a run.
    """
    checks: list[Callable[[Config, Path], Iterator[Finding]]] = [
        *(_versions, _device, _backends, _names, _interface, _ports, _keys),
        *(_folder, _shared_memory, _files, _clock),
    ]
    for check in checks:
        try:
            yield from check(config, run_dir)
        except (ValueError, OSError) as error:
            yield Finding("fail", check.__name__.strip("_").replace("_", " "), str(error))


def _versions(config: Config, run_dir: Path) -> Iterator[Finding]:
    import torch
    import zmq

    text = f"scpl_dist {VERSION}, torch {torch.__version__}, Python {platform.python_version()}"
    yield Finding("ok", "versions", f"{text}, pyzmq {zmq.__version__}; must be equal on all hosts")
    yield Finding("ok", "config", f"digest {config.digest()}; must be equal on all hosts")


def _device(config: Config, run_dir: Path) -> Iterator[Finding]:
    import torch

    count = torch.cuda.device_count()
    wanted = config.runtime.device
    if wanted == "cuda" and count == 0:
        yield Finding(
            "fail", "device", 'runtime.device = "cuda", but torch sees no GPU here; use "auto" or "cpu"'
        )
        return
    gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    state = "ok" if config.runtime.threads <= cores else "warn"
    fix = "" if state == "ok" else f"; runtime.threads = {config.runtime.threads} is more: lower it"
    yield Finding(state, "device", f"{gpus or 'no GPU'}; {cores} CPU cores{fix}")


def _backends(config: Config, run_dir: Path) -> Iterator[Finding]:
    import torch.distributed as dist
    import zmq
    from torch.distributed import rpc

    have = {"rpc": rpc.is_available(), "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(name for name, there in have.items() if there)
    wanted = config.pipeline.transport
    if not have.get(wanted, True):
        yield Finding(
            "fail", "backends", f'pipeline.transport = "{wanted}": this torch has {text} only; choose one'
        )
    else:
        yield Finding("ok", "backends", f"{text}; pipeline.transport = {wanted}")
    if config.control.keys and not zmq.has("curve"):
        yield Finding("fail", "CURVE", "this pyzmq has no CURVE; install the wheel from the package index")


def _names(config: Config, run_dir: Path) -> Iterator[Finding]:
    address = network.resolve(config.control.host, "control.host")
    yield Finding("ok", "names", f"control.host = {config.control.host} is {address}")
    host = socket.gethostname()
    try:
        own = network.resolve(host, "host name")
    except ValueError:
        yield Finding("warn", "names", f"{host} does not resolve to itself; add it to /etc/hosts")
        return
    yield Finding("ok", "names", f"this host {host} is {own}")


def _interface(config: Config, run_dir: Path) -> Iterator[Finding]:
    coordinator = network.resolve(config.control.host, "control.host")
    alone = network.is_loopback(coordinator)
    name, address = network.choose_interface(config.runtime.interface, coordinator, alone, dict(os.environ))
    text = f"tensors take {name} ({address}), which leads to the coordinator"
    yield Finding("ok", "interface", text + ("; this host only" if alone else ""))


def _ports(config: Config, run_dir: Path) -> Iterator[Finding]:
    control = config.control.fixed() if config.control.host != "127.0.0.1" else config.control
    for section, host, port in (
        ("control", control.host, control.port),
        ("metrics", config.metrics.host, config.metrics.port),
    ):
        address = network.resolve(host, f"{section}.host")
        key = f"{section}.port = {port}"
        if port == 0:
            yield Finding("ok", "ports", f"{key}: any free one")
        elif _listening(address, port):
            yield Finding(
                "warn",
                "ports",
                f"{key}: something answers at {address}; unless it is your run, choose another",
            )
        elif network.is_loopback(address) or network.interface_of(address) is not None:
            yield Finding("ok", "ports", f"{key} is free on {address}")
        else:
            yield Finding(
                "warn", "ports", f"{key}: nothing answers at {address} yet; start the coordinator there"
            )


def _listening(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def _keys(config: Config, run_dir: Path) -> Iterator[Finding]:
    folder = config.control.keys
    if not folder:
        where = "loopback only" if network.is_loopback(config.control.host) else "control.insecure = true"
        yield Finding("ok" if where == "loopback only" else "warn", "keys", f"none ({where})")
        return
    roles = []
    if Path(folder, f"{keys.COORDINATOR}.key_secret").exists():
        keys.load_server(folder)
        roles.append(keys.COORDINATOR)
    if Path(folder, f"{keys.WORKER}.key_secret").exists() or not roles:
        keys.load_client(folder)
        roles.append(keys.WORKER)
    yield Finding("ok", "keys", f"{folder} makes this host a {' and a '.join(roles)}")


def _folder(config: Config, run_dir: Path) -> Iterator[Finding]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=run_dir) as file:
            file.write(b"written")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            "fail", "run folder", f"{run_dir} cannot be written ({error.strerror}); choose another --run-dir"
        )
        return
    free = shutil.disk_usage(run_dir).free
    state, fix = ("ok", "") if free > 1 << 30 else ("warn", "; free some for the checkpoints")
    yield Finding(
        state,
        "run folder",
        f"{run_dir.resolve()} is writable, {free >> 20} MiB free{fix}; all hosts need this one",
    )


def _shared_memory(config: Config, run_dir: Path) -> Iterator[Finding]:
    path = Path("/dev/shm")
    if not path.is_dir():
        yield Finding(
            "warn", "/dev/shm", "is missing: stages of one host will use TCP instead; mount it, or go on"
        )
        return
    size = shutil.disk_usage(path).total
    fix = "" if size >= SHARED_MEMORY else "; in a container raise --shm-size (shm_size in Compose) to 1 GiB"
    yield Finding("warn" if fix else "ok", "/dev/shm", f"{size >> 20} MiB{fix}")


def _files(config: Config, run_dir: Path) -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = "" if soft >= OPEN_FILES or soft == resource.RLIM_INFINITY else f"; run ulimit -n {OPEN_FILES}"
    yield Finding("warn" if fix else "ok", "open files", f"limit {soft}{fix}")


def _clock(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Against the clock of the run folder's file server, which all hosts have in common."""
    if not os.access(run_dir, os.W_OK):
        return  # reported already
    with tempfile.NamedTemporaryFile(dir=run_dir) as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        offset = time.time() - os.stat(file.name).st_mtime
    fix = (
        ""
        if abs(offset) < CLOCK_S
        else "; start a time service (chrony), or times of different hosts do not compare"
    )
    yield Finding("warn" if fix else "ok", "clock", f"{offset:+.2f} s from the run folder's file system{fix}")
