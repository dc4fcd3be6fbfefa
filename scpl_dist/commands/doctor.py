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
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import zmq
from torch.distributed import rpc

from scpl_dist.control import keys
from scpl_dist.control.messages import VERSION
from scpl_dist.methods import arithmetic
from scpl_dist.plan.forecast import cores
from scpl_dist.run import network
from scpl_dist.run.config import USUAL_PORT, Config, Control, Metrics


class Finding(NamedTuple):
    state: Literal["ok", "warn", "fail"]  # "warn" may be wanted; with "fail" the run cannot work
    name: str
    text: str


class Doubt(str):
    """What a check found, and what is to be done unless it is wanted."""


def _wanted(good: bool, text: str, fix: str) -> str:
    return text if good else Doubt(f"{text}; {fix}")


def examine(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Look at this host for a run whose folder is made in `run_dir`, which all its hosts share."""
    for name, check in CHECKS:
        try:
            text = check(config, run_dir)
        except (ValueError, OSError) as error:
            yield Finding("fail", name, str(error))
        else:
            yield Finding("warn" if isinstance(text, Doubt) else "ok", name, text)


def _versions(config: Config, run_dir: Path) -> str:
    text = f"scpl_dist {VERSION}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{text}, pyzmq {zmq.__version__}; must be equal on all hosts"


def _device(config: Config, run_dir: Path) -> str:
    count = torch.cuda.device_count()
    for stage in range(config.pipeline.stages):
        arithmetic.device(config.at(stage))
    gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
    threads = config.runtime.threads
    fix = f"runtime.threads = {threads} is more: lower it"
    return _wanted(threads <= cores(), f"{gpus or 'no GPU'}; {cores()} CPU cores", fix)


def _backends(config: Config, run_dir: Path) -> str:
    have = {"rpc": rpc.is_available(), "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
    text = ", ".join(name for name, there in have.items() if there)
    wanted = config.pipeline.transport
    if not have.get(wanted, True):
        raise ValueError(f'pipeline.transport = "{wanted}": this torch has {text} only; choose one')
    if config.control.keys and not zmq.has("curve"):
        raise ValueError("this pyzmq has no CURVE; install the wheel from the package index")
    return f"{text}; pipeline.transport = {wanted}"


def _coordinator(config: Config, run_dir: Path) -> str:
    host = config.control.host
    return f"control.host = {host} is {network.resolve(host, 'control.host')}"


def _host(config: Config, run_dir: Path) -> str:
    host = socket.gethostname()
    try:
        return f"this host {host} is {network.resolve(host, 'host name')}"
    except ValueError:
        return Doubt(f"{host} does not resolve to itself; add it to /etc/hosts")


def _interface(config: Config, run_dir: Path) -> str:
    coordinator = network.resolve(config.control.host, "control.host")
    alone = network.is_loopback(coordinator)
    name, address = network.choose_interface(config.runtime.interface, coordinator, alone, dict(os.environ))
    where = "; this host only" if alone else ""
    return f"tensors take {name} ({address}), which leads to the coordinator{where}"


def _control_port(config: Config, run_dir: Path) -> str:
    return _port("control", config.control if config.control.host == "127.0.0.1" else config.control.fixed())


def _port(section: str, listening: Control | Metrics) -> str:
    address, port = network.resolve(listening.host, f"{section}.host"), listening.port
    key = f"{section}.port = {port}"
    if port == "auto":
        return f"{key}: {USUAL_PORT}, or any free one if that is taken"
    if port == 0:
        return f"{key}: any free one"
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        if network.is_loopback(address) or network.interface_of(address) is not None:
            return f"{key} is free on {address}"
        return Doubt(f"{key}: nothing answers at {address} yet; start the coordinator there")
    return Doubt(f"{key}: something answers at {address}; unless it is your run, choose another")


def _keys(config: Config, run_dir: Path) -> str:
    folder = config.control.keys
    if not folder:
        if network.is_loopback(config.control.host):
            return "none (loopback only)"
        return Doubt("none (control.insecure = true)")
    loaders = {keys.COORDINATOR: keys.load_server, keys.WORKER: keys.load_client}
    roles = [role for role in loaders if Path(folder, f"{role}.key_secret").exists()] or [keys.WORKER]
    for role in roles:
        loaders[role](folder)
    return f"{folder} makes this host a {' and a '.join(roles)}"


def _folder(config: Config, run_dir: Path) -> str:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _age_of_a_new_file(run_dir)
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise ValueError(f"{run_dir} {reason}; choose another --run-dir") from None
    free = shutil.disk_usage(run_dir).free
    text = f"{run_dir.resolve()} is writable, and all hosts need this one; {free >> 20} MiB free"
    return _wanted(free > 1 << 30, text, "free some for the checkpoints")


def _files(config: Config, run_dir: Path) -> str:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # which a run raises its own limit to
    enough = hard >= 1024 or hard == resource.RLIM_INFINITY
    return _wanted(enough, f"limit {hard}", "raise the hard limit, ulimit -Hn, to 1024")


def _clock(config: Config, run_dir: Path) -> str:
    """Against the clock of the run folder's file server, which all hosts have in common."""
    if not os.access(run_dir, os.W_OK):
        return Doubt("not compared, as the run folder cannot be written")
    offset = _age_of_a_new_file(run_dir)
    fix = "start a time service (chrony), or times of different hosts do not compare"
    return _wanted(abs(offset) < 1.0, f"{offset:+.2f} s from the run folder's file system", fix)


def _age_of_a_new_file(folder: Path) -> float:
    """Seconds by this host's clock."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        return time.time() - os.stat(file.name).st_mtime


# Each gives what it found, as a `Doubt` if it may be wanted, and raises what keeps a run from starting.
CHECKS: tuple[tuple[str, Callable[[Config, Path], str]], ...] = (
    ("versions", _versions),
    ("config", lambda config, run_dir: f"digest {config.digest()}; must be equal on all hosts"),
    ("device", _device),
    ("backends", _backends),
    ("names", _coordinator),
    ("names", _host),
    ("interface", _interface),
    ("ports", _control_port),
    ("ports", lambda config, run_dir: _port("metrics", config.metrics)),
    ("keys", _keys),
    ("run folder", _folder),
    ("open files", _files),
    ("clock", _clock),
)
