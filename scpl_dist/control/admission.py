"""Who may talk to the coordinator, and a report about everybody who was turned away.

    connection --> ZMTP greeting --> CURVE --> ZAP request: is the key in the allow-list? --> Coordinator
                       |               |                     |
                    garbage         no key,               unknown key          each is an event and is counted
                                   wrong key

libzmq drops a stranger without a word to the application. What happened is pieced together from the socket's monitor
and from ZAP, ZeroMQ's question about a key (rfc.zeromq.org/spec/27).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import zmq
import zmq.utils.z85
from zmq.utils.monitor import recv_monitor_message

from scpl_dist.control.keys import Server

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_BURST = 200
"""What is handled at a time: who knocks without end must not hide a timeout."""
_REPORTED = 20
"""Strangers that are reported, each once; the others are counted, so that nobody can fill the disk."""
FAILED_HANDSHAKES = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_WATCHED = FAILED_HANDSHAKES | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A connection was not let in; `reason` is "key" or "handshake", `report` is for the user, if it is news."""

    reason: str
    report: str | None


class Admission:
    """The guard of one ROUTER socket. Make it before the socket binds; all calls belong to the socket's thread.

    A context has one with keys. Without keys everybody is let in, and only who speaks no ZeroMQ is counted.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], keys: Server | None
    ) -> None:
        self._router = router
        self._monitor = router.get_monitor_socket(_WATCHED)
        self._allowed = {zmq.utils.z85.decode(key) for key in keys.allowed} if keys else set()
        self._zap: zmq.Socket[bytes] | None = None
        self._pending: dict[int, str] = {}
        self._failing = False
        self._denied = "?"
        self._reported: set[tuple[str, str]] = set()
        if keys is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.setsockopt(zmq.LINGER, 0)
            self._zap.bind(_ZAP_ENDPOINT)
            router.curve_server = True
            router.curve_publickey = keys.public
            router.curve_secretkey = keys.secret
            router.zap_domain = b"scpl"
        self.sockets = [self._monitor] if self._zap is None else [self._monitor, self._zap]
        """Poll these; call `events` when one is readable."""

    def events(self) -> list[TurnedAway]:
        """Answer what is asked, and say who was turned away since the last call."""
        found: list[TurnedAway] = []
        for _ in range(_BURST):
            if self._zap is None or not self._zap.poll(0):
                break
            self._answer(self._zap)
        for _ in range(_BURST):
            if not self._monitor.poll(0):
                break
            message = recv_monitor_message(self._monitor)
            found.extend(self._observe(message["event"], message["value"]))
        return found

    def close(self) -> None:
        """Give the sockets back; the guarded one stays open."""
        self._router.disable_monitor()
        for guard in self.sockets:
            guard.close(0)

    def _turned_away(self, reason: str, address: str, text: str) -> TurnedAway:
        stranger = (reason, address)
        if stranger in self._reported or len(self._reported) >= _REPORTED:
            return TurnedAway(reason, None)
        self._reported.add(stranger)
        return TurnedAway(reason, f"turned away a connection from {address}: {text}")

    def _answer(self, zap: zmq.Socket[bytes]) -> None:
        """One ZAP request: version, request id, domain, address, identity, mechanism, credentials."""
        version, request, _, address, _, mechanism, *credentials = zap.recv_multipart()
        good = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._allowed
        if not good:
            self._denied = address.decode(errors="replace")
        status = (b"200", b"OK") if good else (b"400", b"the key is not allowed")
        zap.send_multipart([version, request, *status, b"", b""])

    def _observe(self, event: int, value: int) -> Iterator[TurnedAway]:
        """One event of the monitor. Only ACCEPTED and DISCONNECTED name the connection (its descriptor)."""
        if event == zmq.EVENT_ACCEPTED:
            self._pending[value] = _peer(value)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if self._pending:  # the oldest, most likely
                del self._pending[next(iter(self._pending))]
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._failing = True
            yield self._turned_away(
                "key", self._denied, "its key is not in the folder control.keys of the coordinator"
            )
        elif event & FAILED_HANDSHAKES:
            self._failing = True
            address = next(reversed(self._pending.values()), "?")
            what = "no ZeroMQ, or with a key where none is used"
            if self._zap is not None:
                what = "no key, or another coordinator's key"
            yield self._turned_away("handshake", address, f"its handshake failed: {what}")
        else:
            pending = self._pending.pop(value, None)
            if pending is not None and not self._failing:
                yield self._turned_away("handshake", pending, "it spoke no ZeroMQ")
            self._failing = False


def _peer(descriptor: int) -> str:
    """Address at the other end of a connection of libzmq; "?" if it is gone already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return str(connection.getpeername()[0])
    except (OSError, IndexError):
        return "?"
