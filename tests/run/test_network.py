"""Which interface the tensors take."""

from __future__ import annotations

import socket

import pytest

from scpl_dist.run import network


@pytest.mark.parametrize(
    ("interface", "message"),
    [
        (
            "eth99",
            f"runtime.interface = 'eth99': not an interface of {socket.gethostname()} with an IPv4 address",
        ),
        (
            network.loopback(),
            f"this interface reaches {socket.gethostname()} only, and the run has stages on other",
        ),
    ],
)
def test_an_interface_that_cannot_reach_other_hosts_is_refused(interface: str, message: str) -> None:
    environment: dict[str, str] = {}
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        network.choose_interface(interface, "192.0.2.1", alone=False, environment=environment)
    assert environment == {}


def test_on_one_host_the_loopback_interface_is_found_and_told_to_torchs_libraries() -> None:
    environment: dict[str, str] = {}
    found = network.choose_interface("", "127.0.0.1", alone=True, environment=environment)
    assert found == (network.loopback(), "127.0.0.1")
    variables = ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    assert environment == dict.fromkeys(variables, network.loopback())
