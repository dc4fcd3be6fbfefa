"""Names, addresses and interfaces of this host.

A wrong one is the most common reason why a run over several hosts does not start, and torch answers it with silence.
So each is checked here first, with a message that has the value and the fix.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import psutil

# What TensorPipe (torch RPC), gloo and NCCL read their interface from.
VARIABLES = ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def resolve(name: str, key: str) -> str:
    """The address of a host, IPv4 if it has one; a name that has none is an error of this key."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"{key} = {name!r}: the name does not resolve on {socket.gethostname()} ({error}); add it to DNS or "
            "/etc/hosts, or use an address"
        ) from None
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(addresses[0][4][0])


def workers_here(world: int) -> int:
    """How many of a run's workers are on this host: all, unless whoever started this one says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world))


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "tcp://host:port"."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def interfaces() -> dict[str, str | None]:
    """This host's interfaces and their first IPv4 address."""
    return {
        name: next((entry.address for entry in addresses if entry.family == socket.AF_INET), None)
        for name, addresses in psutil.net_if_addrs().items()
    }


def interface_of(address: str) -> str | None:
    return next((name for name, own in interfaces().items() if own == address), None)


def loopback() -> str:
    """Name of the loopback interface: "lo" on Linux, "lo0" elsewhere."""
    return interface_of("127.0.0.1") or "lo"


def choose_interface(
    wanted: str, coordinator: str, alone: bool, environment: MutableMapping[str, str] = os.environ
) -> tuple[str, str]:
    """Settle which interface the tensors take, and tell torch's libraries; its name and IPv4 address.

    If ``runtime.interface`` is empty the environment's `VARIABLES` choose, and without them the routing table: the
    interface that leads to the coordinator's address. Only with all stages on this host (`alone`) it may be loopback.
    """
    choices = {"runtime.interface": wanted} | {key: environment.get(key, "") for key in VARIABLES}
    key, name = next((choice for choice in choices.items() if choice[1]), ("runtime.interface", ""))
    there = interfaces()
    if not name:
        own = _address_towards(coordinator)
        name = interface_of(own) or (loopback() if is_loopback(own) else "")
    address = there.get(name)
    if address is None:
        has = ", ".join(f"{other} ({found or 'no address'})" for other, found in there.items())
        here = socket.gethostname()
        raise ValueError(f"{key} = {name!r}: not an interface of {here} with an IPv4 address; it has {has}")
    if not alone and is_loopback(address):
        raise ValueError(
            f"{key} = {name!r}: this interface reaches {socket.gethostname()} only, and the run has stages on other "
            f"hosts; choose the interface that leads to them (launch/interface.sh {coordinator} prints it)"
        )
    environment.update(dict.fromkeys(VARIABLES, name))
    return name, address


def _address_towards(host: str) -> str:
    """This host's address on the way to another one; the routing table says which. Nothing is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ValueError(
            f"control.host = {host!r}: {socket.gethostname()} has no route to it ({error.strerror}); "
            "check the address and the network"
        ) from None
