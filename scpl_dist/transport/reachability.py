"""Workers meet before torch connects them: each rings at every other one's door.

torch's libraries wait, for minutes or for ever, when a peer's address leads nowhere: a wrong interface, a firewall,
two hosts with the same address. A plain connection with a deadline finds that out first and can say what is wrong.

    rank 0: listens on its interface        rank 1: the same
    hello {address, port, token} -> coordinator -> start {endpoints of all}
    connects to rank 1, reads its token     connects to rank 0, reads its token
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_TOKEN_BYTES = 16


class Unreached(Exception):
    """Another worker cannot be reached; `peer` is its rank if its process may be gone, as nothing is at its door."""

    def __init__(self, text: str, peer: int | None) -> None:
        super().__init__(text)
        self.peer = peer


class ReachabilityCheck:
    """This worker's door: at ``address`` of ``interface``, for the worker ``name`` on ``device``."""

    def __init__(self, address: str, interface: str, name: str, device: torch.device) -> None:
        self.interface = interface
        self._token = secrets.token_hex(_TOKEN_BYTES // 2)
        self._door = socket.create_server((address, 0), backlog=128)
        self.endpoint: dict[str, Any] = {  # what the others need to know
            "name": name,
            "host": socket.gethostname(),
            "address": address,
            "port": self._door.getsockname()[1],
            "token": self._token,
            "device": str(device),
            "gpu": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "",
        }
        threading.Thread(target=self._answer, name="door", daemon=True).start()

    def visit(self, rank: int, endpoints: Sequence[Mapping[str, Any]], timeout_s: float) -> None:
        """Ring at every other worker's door; `Unreached` if one does not answer in time, or somebody else does."""
        for other, endpoint in enumerate(endpoints):
            if other == rank:
                continue
            problem, gone = _ring(endpoint, timeout_s)
            if problem:
                mine = self.endpoint
                raise Unreached(
                    f"{endpoint['name']} on {endpoint['host']} ({endpoint['address']}) cannot be reached from "
                    f"{mine['name']} on {mine['host']} ({mine['address']}, interface {self.interface}): {problem}; set "
                    "runtime.interface to the interface that all hosts share, and let the hosts of the run reach "
                    "each other on all ports",
                    other if gone else None,
                )

    def close(self) -> None:
        """Close the door; call it when all workers have met."""
        with contextlib.suppress(OSError):  # the thread may be waiting in accept: shutdown wakes it
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _answer(self) -> None:
        while True:
            try:
                visitor, _ = self._door.accept()
            except OSError:
                return
            with visitor, contextlib.suppress(OSError):
                visitor.sendall(self._token.encode())


def _ring(endpoint: Mapping[str, Any], timeout_s: float) -> tuple[str, bool]:
    """What is wrong, if anything; and whether the process may be gone."""
    try:
        with socket.create_connection((endpoint["address"], endpoint["port"]), timeout_s) as connection:
            token = connection.makefile("rb").read(_TOKEN_BYTES)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s", False
    except OSError as error:
        gone = isinstance(error, ConnectionResetError | ConnectionRefusedError)
        return str(error.strerror or error).lower(), gone
    if not token:
        return "the connection was closed", True
    if token.decode(errors="replace") != endpoint["token"]:
        return "another process answers at this address, so two hosts have the same one there", False
    return "", False
