"""A worker's end of the control plane: msgpack maps over ZeroMQ, ROUTER at the coordinator, DEALER at the workers.

The training thread never waits for the coordinator, and the worker sounds alive while that thread computes.

    training thread --send()--> queue --> control thread === TCP === service --> Coordinator.handle
                    <--on_message, on_lost------'  every 0.5 s: heartbeat
"""

from __future__ import annotations

import math
import signal
import socket as sockets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from scpl_dist.control.codec import decode, encode
from scpl_dist.control.keys import Client
from scpl_dist.control.messages import Heartbeat, Hello, Message
from scpl_dist.control.sockets import dealer

HEARTBEAT_S = 0.5
HEAL_S = 2.0  # a connection may be gone for so long before the coordinator counts as lost
WORD_S = 10.0  # who waits for the coordinator for longer says so
STOPS = (signal.SIGTERM, signal.SIGINT)
REFUSALS = 5  # failed handshakes in a row; a single one may be a coordinator that just starts


class Channel:
    """One thread that owns the socket. The callables run in it and must not block.

    `on_lost` is called once, with the reason, when the coordinator is gone, has been silent for `timeout_s` seconds,
    or this thread fails. It may take `arrival_s` seconds to come, if that is longer: the data set is looked at before.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        heartbeat: Callable[[], Heartbeat],
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None],
        timeout_s: float,
        keys: Client | None = None,
        arrival_s: float = 0.0,
    ) -> None:
        self._heartbeat = heartbeat
        self._on_message = on_message
        self._on_lost = on_lost
        self._outbox = deque[Message]([hello])
        self._flush_s: float | None = None  # set when it shall close
        self._alarm, self._bell = sockets.socketpair()  # the bell wakes the thread up
        self._bell.setblocking(False)
        self._on_signal: Callable[[int], None] | None = None
        # Set when the coordinator has been there, or nobody looks for it any more.
        self.connected = threading.Event()
        arguments = (address, timeout_s, keys, max(timeout_s, arrival_s))
        self._thread = threading.Thread(target=self._main, args=arguments, name="control", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Queue a message, which must not be changed any more; from any thread, and returns at once."""
        self._outbox.append(message)
        self._wake()

    def watch_signals(self, on_signal: Callable[[int], None]) -> None:
        """Have the control thread call `on_signal` with the number of each SIGTERM and SIGINT; in the main thread only.

        The main thread runs no handler while it waits in native code, for example for a peer that never comes; but
        whatever it does, the interpreter writes the number of a signal to a descriptor at once.
        """
        self._on_signal = on_signal
        signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, lambda number, frame: None)

    def close(self, flush_s: float = 2.0) -> bool:
        """Send what is queued, for at most `flush_s` seconds, and end the thread; whether it has ended."""
        self._flush_s = flush_s
        self._wake()
        self._thread.join(flush_s + 1.0)
        if self._thread.is_alive():
            return False
        if self._on_signal is not None:
            signal.set_wakeup_fd(-1)
        self._alarm.close()
        self._bell.close()
        return True

    def _wake(self) -> None:
        with suppress(OSError):  # full: the thread will wake anyway; closed: it has ended
            self._bell.send(b"\0")  # no signal has this number

    def _main(self, address: str, timeout_s: float, keys: Client | None, arrival_s: float) -> None:
        try:
            reason = self._serve(address, timeout_s, keys, arrival_s)
        except BaseException:  # a silent end of this thread would look like a dead worker
            reason = f"the control thread failed:\n{traceback.format_exc()}"
        self.connected.set()
        if reason is not None:
            self._on_lost(reason)

    def _serve(self, address: str, timeout_s: float, keys: Client | None, arrival_s: float) -> str | None:
        """Until closed (None) or the coordinator is lost (why)."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = dealer(context, address, keys)
        lifeline = Lifeline(socket, address, timeout_s, arrival_s)
        socket.connect(address)
        poller = zmq.Poller()
        for source in (socket, lifeline.monitor, self._alarm):
            poller.register(source, zmq.POLLIN)
        beat = time.monotonic()
        try:
            while True:
                poller.poll(max(0, math.ceil((beat - time.monotonic()) * 1000)))
                flush_s = self._flush_s  # before the queue is emptied: what was queued by then must go
                now = time.monotonic()
                while flush_s is None and socket.poll(0):
                    self._on_message(decode(socket.recv()))
                    lifeline.spoke(now)
                reason = lifeline.check(now)
                if reason is not None:
                    return reason
                if lifeline.connected:
                    self.connected.set()
                if now >= beat:
                    self._outbox.append(self._heartbeat())
                    beat = now + HEARTBEAT_S
                self._drain(socket)
                if flush_s is not None:
                    socket.setsockopt(zmq.LINGER, int(flush_s * 1000))
                    return None
        finally:
            socket.disable_monitor()
            context.destroy()  # waits for at most LINGER

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        with suppress(BlockingIOError):
            for number in self._alarm.recv(1 << 16, sockets.MSG_DONTWAIT):
                if self._on_signal is not None and number in STOPS:  # others may have handlers of their own
                    self._on_signal(number)
        # Again: 1000 messages wait already, so the coordinator is slow or gone; the rest is sent later, in order.
        with suppress(zmq.Again):
            while self._outbox:
                socket.send(encode(self._outbox[0]), zmq.NOBLOCK)
                self._outbox.popleft()


class Lifeline:
    """Notices that the coordinator is gone or refuses this worker's key: by the connection, or by silence."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, timeout_s: float, arrival_s: float) -> None:
        self.monitor = socket.get_monitor_socket()
        self.heard = time.monotonic()
        self._checked = self.heard
        self._address = address
        self._timeout_s = timeout_s
        self._arrival_s = arrival_s
        self._told = False  # that it is waited for
        self.connected = False
        self._broken: float | None = None
        self._refusals = 0

    def spoke(self, now: float) -> None:
        """The coordinator has sent something."""
        self.heard = now
        self._broken = None

    def check(self, now: float) -> str | None:
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return (
                    f"the coordinator at {self._address} does not know the key of this worker: copy worker.key into "
                    "its folder control.keys"
                )
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:  # libzmq will not try again
                self._refusals = REFUSALS
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._refusals += 1
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
                self.heard = now
                # Another coordinator may be there now, which does not know this worker and says nothing to it.
                self._broken = self._broken and now
                self._refusals = 0
            elif event == zmq.EVENT_DISCONNECTED and self.connected:
                self._broken = self._broken or now
        if self._refusals >= REFUSALS:
            return (
                f"what listens at {self._address} does not complete the handshake: control.keys must be set "
                "at both ends or at neither, and coordinator.key here must belong to the coordinator's secret key"
            )
        pause = now - self._checked
        self._checked = now
        if pause > 5 * HEARTBEAT_S:  # this process was stopped: the coordinator is not to blame for it
            self.heard = now
            self._broken = self._broken and now
        if self._broken is not None and now - self._broken >= HEAL_S:
            return f"the connection to the coordinator at {self._address} broke and did not come back in {HEAL_S:g} s"
        silent = now - self.heard
        if self.connected:
            if silent >= self._timeout_s:
                return f"the coordinator at {self._address} has been silent for {self._timeout_s:g} s"
        elif silent >= self._arrival_s:
            return f"the coordinator at {self._address} could not be reached for {self._arrival_s:g} s"
        elif silent >= WORD_S and not self._told:
            self._told = True
            print(f"waiting for the coordinator at {self._address}", file=sys.stderr, flush=True)
        return None
