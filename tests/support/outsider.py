"""A program for a host that is not part of a run: tries to talk to its coordinator, prints what it found as JSON.

usage: python -m tests.support.outsider CONTROL_ADDRESS METRICS_URL OPEN_ADDRESS PORT,PORT,...
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import zmq

LIMIT_MS = 5000


def knock(address: str, keys: tuple[bytes, bytes, bytes] | None) -> str:
    """Send a message as a ZeroMQ peer; the name of the event that ended the handshake."""
    from zmq.utils.monitor import recv_monitor_message

    context: zmq.Context[Any] = zmq.Context()
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    if keys is not None:
        peer.curve_serverkey, peer.curve_publickey, peer.curve_secretkey = keys
    monitor = peer.get_monitor_socket()
    peer.connect(address)
    peer.send(b"\x81\xa4type\xa5alive")
    name = "nothing"
    while monitor.poll(LIMIT_MS):
        name = str(zmq.Event(recv_monitor_message(monitor)["event"]).name)
        if name.startswith("HANDSHAKE"):
            break
    peer.disable_monitor()
    monitor.close(0)
    peer.close(0)
    context.term()
    return name


def throw(address: tuple[str, int], content: bytes, after_s: float = 0.0) -> str:
    """Send bytes over a plain connection, after some silence, until the other end hangs up."""
    with socket.create_connection(address, LIMIT_MS / 1000) as connection:
        time.sleep(after_s)
        try:
            connection.sendall(content)
            while connection.recv(1 << 16):
                pass
        except TimeoutError:
            return "kept open"
        except OSError:
            pass
    return "closed"


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def rejected(metrics: str) -> dict[str, float]:
    """How many were turned away, by reason."""
    with urllib.request.urlopen(metrics, timeout=5) as answer:
        text = answer.read().decode()
    pattern = r'scpl_control_rejected_total\{reason="(\w+)"\} (\S+)'
    return {reason: float(value) for reason, value in re.findall(pattern, text)}


def main(control: str, metrics: str, there: str, ports: str) -> None:
    host, _, port = control.removeprefix("tcp://").rpartition(":")
    place = (host, int(port))
    server, _ = zmq.curve_keypair()
    mine = zmq.curve_keypair()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
    attacks: dict[str, Callable[[], str]] = {
        "no key": lambda: knock(control, None),
        "wrong key": lambda: knock(control, (server, *mine)),
        # So long that the coordinator, however busy, sees who it is; of others it may say "?".
        "garbage": lambda: throw(place, b"GET / HTTP/1.1\r\n\r\n" + b"x" * 4096, after_s=2.0),
        "huge frame": lambda: throw(
            place, greeting + b"\x06" + (1 << 40).to_bytes(8, "big") + bytes(1 << 22)
        ),
    }
    found: dict[str, Any] = {name: attack() for name, attack in attacks.items()}
    found["ports"] = [number for number in map(int, ports.split(",")) if answers(there, number)]
    deadline = time.monotonic() + LIMIT_MS / 1000
    while True:  # the coordinator counts a moment later
        found["rejected"] = rejected(metrics)
        if found["rejected"].get("handshake", 0) >= len(attacks) or time.monotonic() > deadline:
            break
    print("FOUND " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
