"""Codec and channel of the control plane: any bytes in, and real sockets."""

from __future__ import annotations

import queue
import socket as sockets
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from scpl_dist.control.channel import Channel
from scpl_dist.control.codec import MAX_BYTES, ProtocolError, decode, encode
from scpl_dist.control.messages import (
    MESSAGES,
    PROTOCOL,
    VERSION,
    Alive,
    Done,
    Failed,
    Heartbeat,
    Hello,
    Message,
    Stats,
    Work,
)
from scpl_dist.control.sockets import router

LIMIT_S = 20.0
HELLO = {
    "type": "hello",
    "protocol": PROTOCOL,
    "version": VERSION,
    "torch": "2.14.1",
    "config": "abc",
    "stage": 1,
    "stages": 2,
    "rank": 1,
    "host": "here",
    "pid": 1,
    "device": "cpu",
    "data": None,
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


@given(st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_message_or_a_protocol_error(frame: bytes) -> None:
    try:
        assert isinstance(decode(frame), Message)
    except ProtocolError:
        pass


@given(st.sampled_from(sorted(MESSAGES)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_map_of_a_known_type_is_a_message_or_a_protocol_error(name: str, data: st.DataObject) -> None:
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(MESSAGES[name].model_fields)), VALUES))
    try:
        assert decode(msgpack.packb(fields | {"type": name})).type == name
    except ProtocolError:
        pass


@given(st.floats(), st.integers(0, 2**40), st.text(alphabet="abc", max_size=5))
@settings(deadline=None)
def test_a_message_survives_the_wire_to_the_last_bit(loss: float, sequence: int, term: str) -> None:
    message = Done(
        stage=0, sequence=sequence, kind="train", losses={"0": {term: loss}}, stats=Stats(busy=0.1)
    )
    back = decode(encode(message))
    assert isinstance(back, Done)
    assert msgpack.packb(back.model_dump()) == msgpack.packb(message.model_dump())


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "unknown"}),
        msgpack.packb({"type": ["go"]}),
        msgpack.packb({"type": "go", "more": 1}),
        msgpack.packb({"type": "ready", "stage": "1"}),
        msgpack.packb({"type": "ready", "stage": True}),
        msgpack.packb({"type": "ready", "stage": -1}),
        msgpack.packb({"type": "go"}) + b"\x00",
        msgpack.packb({1: 2, "type": "go"}),
        msgpack.packb(HELLO | {"host": "\x1b[31mred"}),
        msgpack.packb({"type": "heartbeat", "stage": 0, "phase": "dancing"}),
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 elements
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 100_000,  # nested deeper than any stack
        b"\x81\xa4type" + b"\x81\xa1a" * 10_000,
        b"\x00" * (MAX_BYTES + 1),
        msgpack.packb({"type": "abort", "reason": "x" * 300_000}),
        msgpack.packb({"type": "abort", "reason": msgpack.ExtType(1, b"x")}),
    ],
    ids=lambda frame: repr(frame[:24]),
)
def test_what_is_no_message_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(frame)


def test_a_malformed_message_is_refused_where_it_is_made() -> None:
    with pytest.raises(ProtocolError, match=r"done\.sequence"):
        encode({"type": "done", "stage": 0, "sequence": "0", "kind": "train"})
    with pytest.raises(ProtocolError, match="longer than"):
        encode(Work(items=[{"kind": "x" * 100}] * 20_000))


class Peer:
    """The coordinator's end, and a channel to it."""

    def __init__(self, timeout_s: float = LIMIT_S) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket, self.address, self.gate = router(self.context, "127.0.0.1", 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        self.messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.phase = "forward"
        self.channel = self.connect(timeout_s)

    def connect(self, timeout_s: float) -> Channel:
        return Channel(self.address, HELLO, self.snapshot, self.messages.put, self.lost.put, timeout_s)

    def snapshot(self) -> dict[str, Any]:
        return {"phase": self.phase, "step": 3, "epoch": 0, "micro_batch": 1, "stats": {"busy": 1.5}}

    def receive(self) -> tuple[bytes, Message]:
        name, frame = self.socket.recv_multipart()
        return name, decode(frame)

    def expect(self, kind: type[Message]) -> tuple[bytes, Any]:
        while True:
            name, message = self.receive()
            if isinstance(message, kind):
                return name, message

    def close(self) -> None:
        self.channel.close(0.0)
        self.hang_up()
        self.context.term()

    def hang_up(self) -> None:
        """Close the coordinator's end only."""
        if not self.socket.closed:
            self.gate.close()
            self.socket.close(0)

    def come_back(self) -> None:
        """Bind the same port again, which ZeroMQ is about to close."""
        port = int(self.address.rpartition(":")[2])
        deadline = time.monotonic() + LIMIT_S
        while self.socket.closed:
            try:
                self.socket, _, self.gate = router(self.context, "127.0.0.1", port)
            except ValueError:
                assert time.monotonic() < deadline
        self.socket.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.close()


def test_hello_comes_first_and_heartbeats_follow_on_their_own(peer: Peer) -> None:
    _, first = peer.receive()
    assert isinstance(first, Hello)
    begin = time.monotonic()
    for _ in range(4):
        _, beat = peer.expect(Heartbeat)
    assert 0.5 < time.monotonic() - begin < LIMIT_S  # the first one is due at once, the others 0.5 s apart
    assert (beat.stage, beat.phase, beat.step, beat.stats.busy) == (1, "forward", 3, 1.5)


def test_messages_from_many_threads_arrive_in_the_order_of_each(peer: Peer) -> None:
    def report(step: int) -> None:
        for sequence in range(100):
            peer.channel.send({"type": "done", "sequence": sequence, "kind": "train", "step": step})

    threads = [threading.Thread(target=report, args=(step,)) for step in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {step: [] for step in range(4)}
    for _ in range(400):
        _, done = peer.expect(Done)
        seen[done.step].append(done.sequence)
    assert all(sequences == list(range(100)) for sequences in seen.values())
    for thread in threads:
        thread.join()


def test_sending_never_waits_for_a_coordinator_that_does_not_read() -> None:
    peer = Peer()
    begin = time.monotonic()
    for sequence in range(20_000):
        peer.channel.send({"type": "done", "sequence": sequence, "kind": "train"})
    assert time.monotonic() - begin < LIMIT_S
    for sequence in range(20_000):  # more than all high-water marks together, and nothing is lost
        _, done = peer.expect(Done)
        assert done.sequence == sequence
    peer.close()


def test_the_coordinators_messages_reach_the_callable(peer: Peer) -> None:
    name, _ = peer.receive()
    peer.socket.send_multipart([name, encode(Alive())])
    peer.socket.send_multipart([name, encode(Work(items=[{"kind": "stop", "sequence": 0}]))])
    assert peer.messages.get(timeout=LIMIT_S) == {"type": "alive"}
    assert peer.messages.get(timeout=LIMIT_S)["items"] == [{"kind": "stop", "sequence": 0}]


def test_close_sends_what_is_queued(peer: Peer) -> None:
    for sequence in range(100):
        peer.channel.send({"type": "done", "sequence": sequence, "kind": "train"})
    assert peer.channel.close()
    for sequence in range(100):
        assert peer.expect(Done)[1].sequence == sequence
    assert peer.lost.empty()


def test_close_ends_although_nobody_listens() -> None:
    peer = Peer()
    peer.hang_up()
    peer.channel.send({"type": "left"})
    begin = time.monotonic()
    assert peer.channel.close(flush_s=0.2)
    assert time.monotonic() - begin < LIMIT_S
    peer.close()


def test_the_end_of_a_long_traceback_is_kept(peer: Peer) -> None:
    text = "x" * 500_000 + "the cause"
    peer.channel.send({"type": "failed", "cause": "raised", "message": "m", "traceback": text})
    _, report = peer.expect(Failed)
    assert report.traceback.startswith("... ")
    assert report.traceback.endswith("the cause")


def test_a_silent_coordinator_is_noticed() -> None:
    peer = Peer(timeout_s=1.0)
    name, _ = peer.receive()
    begin = time.monotonic()
    for _ in range(6):  # as long as it says something it is there
        peer.socket.send_multipart([name, encode(Alive())])
        peer.messages.get(timeout=LIMIT_S)
        peer.expect(Heartbeat)
    assert time.monotonic() - begin > 1.0
    assert peer.lost.empty()
    assert "has been silent for 1 s" in peer.lost.get(timeout=LIMIT_S)
    peer.close()


def test_a_coordinator_that_is_not_there_is_noticed() -> None:
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        channel = Channel(
            address, HELLO, lambda: {"phase": "idle"}, lambda message: None, lost.put, timeout_s=0.5
        )
        assert "could not be reached for 0.5 s" in lost.get(timeout=LIMIT_S)
        assert channel.close(0.0)


def test_a_broken_connection_is_noticed_before_the_silence() -> None:
    peer = Peer(timeout_s=1000.0)
    peer.expect(Heartbeat)
    peer.hang_up()
    assert "broke and did not come back" in peer.lost.get(timeout=LIMIT_S)
    peer.close()


def test_a_connection_that_comes_back_is_the_same_peer() -> None:
    peer = Peer()
    name, _ = peer.receive()
    peer.hang_up()
    peer.come_back()
    again, message = peer.receive()
    assert isinstance(message, Heartbeat)
    assert again == name
    assert peer.lost.empty()
    peer.close()


def test_a_failure_in_the_control_thread_is_reported() -> None:
    peer = Peer()
    peer.phase = "dancing"  # no phase: the heartbeat cannot be encoded
    reason = peer.lost.get(timeout=LIMIT_S)
    assert "control thread failed" in reason
    assert "dancing" in reason
    peer.close()


def test_nothing_is_left_of_a_closed_channel() -> None:
    before = set(threading.enumerate())
    peer = Peer()
    assert len(set(threading.enumerate()) - before) == 1
    peer.close()
    assert set(threading.enumerate()) <= before
    peer.channel.send({"type": "left"})  # too late, and harmless


def test_a_taken_port_is_named_with_the_fix() -> None:
    peer = Peer()
    port = int(peer.address.rpartition(":")[2])
    with pytest.raises(ValueError, match=rf"control\.port = {port}.*control\.port=0"):
        router(peer.context, "127.0.0.1", port)
    peer.close()


def test_a_peer_that_is_gone_is_an_error_and_not_a_wait(peer: Peer) -> None:
    with pytest.raises(zmq.ZMQError) as caught:
        peer.socket.send_multipart([b"nobody", encode(Alive())], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH
