"""Who may talk to the coordinator, and a report about everybody who was turned away.

    connection --> ZMTP greeting --> CURVE --> ZAP request: is the key in the allow-list? --> Coordinator
                       |               |                     |
                    garbage         no key,               unknown key          each is an event and is counted
                                   wrong key

libzmq drops a stranger without a word to the application. What happened is pieced together from the socket's monitor,
which names connections by their descriptors: whoever leaves before its handshake was complete has been turned away,
and if ZAP, ZeroMQ's question about a key (rfc.zeromq.org/spec/27), was denied to its address, because of the key.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from scpl_dist.control.keys import Server

BURST = 200  # what is handled at a time: who knocks without end must not hide a timeout
REPORTED = 20  # strangers, each once; more are only counted, so that nobody can fill the disk


@dataclass(frozen=True, slots=True)
class TurnedAway:
    reason: str  # "key" or "handshake"
    report: str | None  # for the user, if it is news


class Admission:
    """The guard of one ROUTER socket. Make it before the socket binds; all calls belong to the socket's thread.

    Without keys everybody is let in, and only who speaks no ZeroMQ is counted.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], keys: Server | None
    ) -> None:
        watched = zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._router = router
        self._monitor = router.get_monitor_socket(watched)
        self._zap: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._allowed = keys.allowed if keys else frozenset()
        self._shaking: dict[int, str] = {}  # addresses of connections whose handshake is not complete
        self._denied = Counter[str]()
        self._reported: set[tuple[str, str]] = set()
        self.sockets = [self._monitor, self._zap]  # when one is readable, `events` shall be called
        self._mistake = "no ZeroMQ, or with a key where none is used"
        if keys is not None:
            self._mistake = "no ZeroMQ, no key, or another coordinator's key"
            self._zap.bind("inproc://zeromq.zap.01")
            router.curve_server = True
            router.curve_publickey = keys.public
            router.curve_secretkey = keys.secret
            router.zap_domain = b"scpl"

    def events(self) -> list[TurnedAway]:
        """Answer what is asked, and say who was turned away since the last call."""
        asked = self._zap.poll(0)
        found = self._observe()  # before the answer: a connection can be named as long as it waits for it
        if asked:
            self._answer(self._zap.recv_multipart())
        return found

    def close(self) -> None:
        self._router.disable_monitor()
        for guard in self.sockets:
            guard.close(0)

    def _answer(self, request: list[bytes]) -> None:
        version, number, _domain, address, _identity, mechanism, *credentials = request
        good = mechanism == b"CURVE" and len(credentials) == 1 and credentials[0] in self._allowed
        if not good:
            self._denied[address.decode(errors="replace")] += 1
        status = (b"200", b"OK") if good else (b"400", b"the key is not allowed")
        self._zap.send_multipart([version, number, *status, b"", b""])

    def _observe(self) -> list[TurnedAway]:
        found = []
        for _ in range(BURST):
            if not self._monitor.poll(0):
                break
            event = recv_monitor_message(self._monitor)
            descriptor = event["value"]
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._shaking[descriptor] = _peer(descriptor)
            elif event["event"] == zmq.EVENT_DISCONNECTED and descriptor in self._shaking:
                found.append(self._turned_away(self._shaking.pop(descriptor)))
            elif event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED and self._shaking:
                del self._shaking[next(iter(self._shaking))]  # of which is not said: the oldest, most likely
        return found

    def _turned_away(self, address: str) -> TurnedAway:
        reason = "handshake"
        text = f"its handshake failed: {self._mistake}"
        if self._denied[address]:
            self._denied[address] -= 1
            reason = "key"
            text = "its key is not in the folder control.keys of the coordinator"
        if (reason, address) in self._reported or len(self._reported) >= REPORTED:
            return TurnedAway(reason, None)
        self._reported.add((reason, address))
        return TurnedAway(reason, f"turned away a connection from {address}: {text}")


def _peer(descriptor: int) -> str:
    """Address at the other end of a connection of libzmq; "?" if it is gone already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return str(connection.getpeername()[0])
    except OSError:
        return "?"
