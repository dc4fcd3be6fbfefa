"""Names, addresses and interfaces of this host.

A wrong one is the most common reason why a run over several hosts does not start, and torch answers it with silence.
So each is checked here first, with a message that has the value and the fix.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Mapping, MutableMapping

VARIABLES = ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""What TensorPipe (torch RPC), gloo and NCCL read their interface from."""

_GET_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>


def resolve(name: str, key: str) -> str:
    """The address of a host; IPv4 if it has one.

    Args:
        name: host name or address.
        key: where the name comes from, for the message.

    Raises:
        ValueError: the name does not resolve.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(
            f"{key} = {name!r}: the name does not resolve on {socket.gethostname()} ({error}); add it to DNS or "
            "/etc/hosts, or use an address"
        ) from None
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return str(addresses[0][4][0])


def is_loopback(address: str) -> bool:
    """Whether an address reaches this host only."""
    return address.startswith("127.") or address == "::1"


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of "tcp://host:port"."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.strip("[]"), int(port)


def interfaces() -> dict[str, str | None]:
    """This host's interfaces and their IPv4 addresses; None for one without."""
    return {name: address_of(name) for _, name in socket.if_nameindex()}


def address_of(interface: str) -> str | None:
    """IPv4 address of an interface; None if it has none or does not exist. Linux only, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def interface_of(address: str) -> str | None:
    """The interface that has this IPv4 address."""
    return next((name for name, own in interfaces().items() if own == address), None)


def address_towards(host: str) -> str:
    """This host's address on the way to another one; the routing table says which. Nothing is sent.

    Raises:
        OSError: there is no route.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def loopback() -> str:
    """Name of the loopback interface: "lo" on Linux, "lo0" elsewhere."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    return names[0] if names else "lo"


def choose_interface(
    wanted: str, coordinator: str, alone: bool, environment: MutableMapping[str, str] = os.environ
) -> tuple[str, str]:
    """Settle which interface the tensors take, and tell torch's libraries.

    Args:
        wanted: ``runtime.interface``; empty leaves the choice to the environment's variables, and without them to
            the routing table: the interface that leads to the coordinator.
        coordinator: address of the coordinator.
        alone: whether all stages are on this host.
        environment: where TP_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are read and set.

    Returns:
        Name and IPv4 address of the interface.

    Raises:
        ValueError: no such interface, it has no address, or it cannot reach other hosts.
    """
    key, name = _wanted(wanted, environment)
    if not name:
        key = "runtime.interface"
        try:
            own = address_towards(coordinator)
        except OSError as error:
            raise ValueError(
                f"control.host = {coordinator!r}: {socket.gethostname()} has no route to it ({error.strerror}); "
                "check the address and the network"
            ) from None
        name = interface_of(own) or (loopback() if is_loopback(own) else "")
    address = address_of(name) if name else None
    if address is None and sys.platform.startswith("linux"):
        there = ", ".join(f"{other} ({own or 'no address'})" for other, own in interfaces().items())
        raise ValueError(
            f"{key} = {name!r}: not an interface of {socket.gethostname()} with an IPv4 address; it has {there}"
        )
    if not alone and address is not None and is_loopback(address):
        raise ValueError(
            f"{key} = {name!r}: this interface reaches {socket.gethostname()} only, and the run has stages on other "
            f"hosts; choose the interface that leads to them (launch/interface.sh {coordinator} prints it)"
        )
    for variable in VARIABLES:
        environment[variable] = name
    return name, address or "127.0.0.1"


def _wanted(wanted: str, environment: Mapping[str, str]) -> tuple[str, str]:
    if wanted:
        return "runtime.interface", wanted
    return next(((key, environment[key]) for key in VARIABLES if environment.get(key)), ("", ""))
