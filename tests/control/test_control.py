"""Codec and channel of the control plane: any bytes in, and real sockets."""

from __future__ import annotations

import dataclasses
import queue
import socket as sockets
import threading
import time
from collections.abc import Iterator
from typing import Any, get_args

import msgpack
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from scpl_dist.control import channel
from scpl_dist.control.channel import Channel
from scpl_dist.control.codec import MAX_BYTES, ProtocolError, decode, encode, to_plain
from scpl_dist.control.items import Item, Stop, Train, from_plain
from scpl_dist.control.items import to_plain as item_to_plain
from scpl_dist.control.messages import (
    PROTOCOL,
    VERSION,
    Alive,
    AnyMessage,
    Done,
    Heartbeat,
    Hello,
    Left,
    Message,
    Stats,
    Work,
)
from scpl_dist.control.sockets import router
from scpl_dist.run.phases import Phase

LIMIT_S = 20.0
HELLO = Hello(
    protocol=PROTOCOL,
    version=VERSION,
    torch="2.14.1",
    config="abc",
    rank=1,
    host="here",
    pid=1,
    device="cpu",
)


def members(union: Any, key: str) -> dict[str, type[Any]]:
    """The classes of a discriminated union by what they are called on the wire."""
    return {
        str(field.default): model
        for model in get_args(get_args(union)[0])
        for field in dataclasses.fields(model)
        if field.name == key
    }


MESSAGES = members(AnyMessage, "type")
ITEMS = members(Item, "kind")
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


def some_of(model: type[Any], data: st.DataObject) -> dict[str, Any]:
    """Any values for some of its fields."""
    names = sorted(field.name for field in dataclasses.fields(model))
    found: dict[str, Any] = data.draw(st.dictionaries(st.sampled_from(names), VALUES))
    return found


@given(st.sampled_from(sorted(MESSAGES)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_map_of_a_known_type_is_a_message_or_a_protocol_error(name: str, data: st.DataObject) -> None:
    try:
        found = decode(msgpack.packb(some_of(MESSAGES[name], data) | {"type": name}))
    except ProtocolError:
        return
    assert type(found) is MESSAGES[name]


@given(st.sampled_from(sorted(ITEMS)), st.data())
@settings(max_examples=300, deadline=None)
def test_any_map_of_a_known_kind_is_an_item_or_a_protocol_error(kind: str, data: st.DataObject) -> None:
    fields = some_of(ITEMS[kind], data) | {"kind": kind}
    try:
        found = decode(msgpack.packb({"type": "work", "items": [fields]}))
    except ProtocolError:
        return
    assert isinstance(found, Work)
    assert [type(item) for item in found.items] == [ITEMS[kind]]


@given(st.floats(), st.integers(0, 2**40), st.text(alphabet="abc", max_size=5))
@settings(deadline=None)
def test_a_message_survives_the_wire_to_the_last_bit(loss: float, sequence: int, term: str) -> None:
    message = Done(sequence=sequence, losses={"0": {term: loss}}, stats=Stats(busy=0.1))
    back = decode(encode(message))
    assert isinstance(back, Done)
    assert msgpack.packb(to_plain(back)) == msgpack.packb(to_plain(message))


def test_sums_of_metrics_stay_integers_floats_and_lists_on_the_wire() -> None:
    sent = Done(sequence=0, metrics={"accuracy": (3, 4), "loss": (0.1, 4.0), "confusion": ([5, 0], 2)})
    found = decode(encode(sent))
    assert found == sent
    assert repr(found) == repr(sent)  # 4 == 4.0


def test_an_item_travels_as_plain_values_that_stay_equal() -> None:
    parts = ((0, 20), (20, 41))
    item = Train(sequence=3, step=2, epoch=1, schedule={"lr": 0.1 + 0.2}, micro_batches=parts)
    plain = item_to_plain(item)
    assert plain["micro_batches"] == [[0, 20], [20, 41]]
    arrived = msgpack.unpackb(msgpack.packb(plain))
    assert arrived == plain
    assert from_plain(arrived) == item
    work = decode(encode(Work(items=[item, Stop(sequence=4)])))
    assert work == Work(items=[item, Stop(sequence=4)])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb({"type": "unknown"}),
        msgpack.packb({"type": ["go"]}),
        msgpack.packb({"type": "go", "more": 1}),
        msgpack.packb({"type": "done", "sequence": "1"}),
        msgpack.packb({"type": "done", "sequence": True}),
        msgpack.packb({"type": "done", "sequence": -1}),
        msgpack.packb({"type": "done", "sequence": 1, "losses": {"0": {"local": "1"}}}),
        msgpack.packb({"type": "done", "sequence": 1, "stats": {"busy": float("nan")}}),
        msgpack.packb({"type": "work", "items": [{"kind": "stop"}]}),
        msgpack.packb({"type": "work", "items": [{"kind": "dance", "sequence": 0}]}),
        msgpack.packb({"type": "work", "items": [{"kind": "stop", "sequence": 0, "more": 1}]}),
        msgpack.packb({"type": "go"}) + b"\x00",
        msgpack.packb({1: 2, "type": "go"}),
        msgpack.packb(to_plain(HELLO) | {"host": "\x1b[31mred"}),
        msgpack.packb({"type": "heartbeat", "phase": "dancing"}),
        msgpack.packb({"type": "failed", "message": "", "cause": "boredom"}),
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


def test_the_hello_of_another_version_can_be_read_and_so_be_refused() -> None:
    hello = decode(msgpack.packb(to_plain(HELLO) | {"protocol": PROTOCOL + 1, "colour": "blue"}))
    assert hello == dataclasses.replace(HELLO, protocol=PROTOCOL + 1)


def test_what_is_wrong_with_a_message_is_said() -> None:
    with pytest.raises(ProtocolError, match=r"done\.sequence = '0': Input should be a valid integer"):
        decode(msgpack.packb({"type": "done", "sequence": "0"}))


def test_a_message_that_is_too_long_is_refused_where_it_is_made() -> None:
    with pytest.raises(ProtocolError, match="longer than"):
        encode(Work(items=[Stop(sequence=0)] * 100_000))


class Peer:
    """The coordinator's end, and a channel to it."""

    def __init__(self, timeout_s: float = LIMIT_S) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket, self.address, self.gate = router(self.context, "127.0.0.1", 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        self.messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.broken = False
        self.channel = self.connect(timeout_s)

    def connect(self, timeout_s: float) -> Channel:
        return Channel(self.address, HELLO, self.snapshot, self.messages.put, self.lost.put, timeout_s)

    def snapshot(self) -> Heartbeat:
        if self.broken:
            raise RuntimeError("no snapshot")
        return Heartbeat(phase=Phase.FORWARD, step=3, micro_batch=1, stats=Stats(busy=1.5))

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
            port = int(self.address.rpartition(":")[2])
            deadline = time.monotonic() + LIMIT_S
            while True:  # ZeroMQ stops listening a moment later
                with sockets.socket() as caller:
                    if caller.connect_ex(("127.0.0.1", port)):
                        break
                assert time.monotonic() < deadline

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
    begin = time.monotonic()
    _, first = peer.receive()
    assert isinstance(first, Hello)
    for _ in range(4):
        _, beat = peer.expect(Heartbeat)
    assert 0.5 < time.monotonic() - begin < LIMIT_S  # the first one is due at once, the others 0.5 s apart
    assert (beat.phase, beat.step, beat.stats.busy) == ("forward", 3, 1.5)


def test_messages_from_many_threads_arrive_in_the_order_of_each(peer: Peer) -> None:
    def report(thread: int) -> None:
        for sequence in range(100):
            peer.channel.send(Done(sequence=sequence, metrics={str(thread): (1, 1)}))

    threads = [threading.Thread(target=report, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {number: [] for number in range(4)}
    for _ in range(400):
        _, done = peer.expect(Done)
        (thread_name,) = done.metrics
        seen[int(thread_name)].append(done.sequence)
    assert all(sequences == list(range(100)) for sequences in seen.values())
    for thread in threads:
        thread.join()


def test_sending_never_waits_for_a_coordinator_that_does_not_read() -> None:
    peer = Peer(timeout_s=1000.0)
    begin = time.monotonic()
    for sequence in range(20_000):
        peer.channel.send(Done(sequence=sequence))
    assert time.monotonic() - begin < LIMIT_S
    for sequence in range(20_000):  # more than all high-water marks together, and nothing is lost
        _, done = peer.expect(Done)
        assert done.sequence == sequence
    peer.close()


def test_the_coordinators_messages_reach_the_callable(peer: Peer) -> None:
    name, _ = peer.receive()
    peer.socket.send_multipart([name, encode(Alive())])
    peer.socket.send_multipart([name, encode(Work(items=[Stop(sequence=0)]))])
    assert peer.messages.get(timeout=LIMIT_S) == Alive()
    assert peer.messages.get(timeout=LIMIT_S) == Work(items=[Stop(sequence=0)])


def test_close_sends_what_is_queued(peer: Peer) -> None:
    for sequence in range(100):
        peer.channel.send(Done(sequence=sequence))
    assert peer.channel.close()
    for sequence in range(100):
        assert peer.expect(Done)[1].sequence == sequence
    assert peer.lost.empty()


def test_close_ends_although_nobody_listens() -> None:
    peer = Peer()
    peer.hang_up()
    peer.channel.send(Left())
    begin = time.monotonic()
    assert peer.channel.close(flush_s=2.0)
    assert time.monotonic() - begin < LIMIT_S
    peer.close()


def test_a_silent_coordinator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HEARTBEAT_S", 0.1)
    peer = Peer(timeout_s=3.0)
    name, _ = peer.receive()
    begin = time.monotonic()
    while time.monotonic() - begin < 4.0:  # as long as it says something it is there
        peer.socket.send_multipart([name, encode(Alive())])
        peer.messages.get(timeout=LIMIT_S)
        peer.expect(Heartbeat)
    assert peer.lost.empty()
    assert "has been silent for 3 s" in peer.lost.get(timeout=LIMIT_S)
    peer.close()


def test_a_coordinator_that_is_not_there_is_noticed() -> None:
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        lost: queue.SimpleQueue[str] = queue.SimpleQueue()
        alone = Channel(
            address,
            HELLO,
            lambda: Heartbeat(phase=Phase.IDLE),
            lambda message: None,
            lost.put,
            timeout_s=0.1,
            arrival_s=0.5,
        )
        assert "could not be reached for 0.5 s" in lost.get(timeout=LIMIT_S)
        assert alone.close(0.0)


def test_a_coordinator_that_has_to_look_at_the_data_first_is_waited_for() -> None:
    peer = Peer()
    peer.channel.close(0.0)
    peer.hang_up()
    callables = (peer.snapshot, peer.messages.put, peer.lost.put)
    late = Channel(peer.address, HELLO, *callables, timeout_s=1.0, arrival_s=LIMIT_S)
    with pytest.raises(queue.Empty):
        peer.lost.get(timeout=2.0)
    peer.come_back()
    assert peer.receive()[1] == HELLO
    assert late.close(0.0)
    peer.close()


def test_a_broken_connection_is_noticed_before_the_silence() -> None:
    peer = Peer(timeout_s=1000.0)
    peer.expect(Heartbeat)
    peer.hang_up()
    assert "broke and did not come back" in peer.lost.get(timeout=LIMIT_S)
    peer.close()


def test_a_connection_that_comes_back_is_the_same_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "HEAL_S", 5.0)
    peer = Peer(timeout_s=1000.0)
    name, _ = peer.receive()
    peer.hang_up()
    peer.come_back()
    again, message = peer.receive()
    assert isinstance(message, Heartbeat)
    assert again == name
    peer.socket.send_multipart([name, encode(Alive())])
    with pytest.raises(queue.Empty):
        peer.lost.get(timeout=1.5 * channel.HEAL_S)
    peer.close()


def test_another_coordinator_at_the_same_address_knows_nothing_of_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "HEAL_S", 5.0)
    peer = Peer(timeout_s=1000.0)
    peer.expect(Heartbeat)
    peer.hang_up()
    peer.come_back()
    peer.expect(Heartbeat)  # the connection is there, but nobody answers
    assert "broke and did not come back" in peer.lost.get(timeout=LIMIT_S)
    peer.close()


def test_a_failure_in_the_control_thread_is_reported() -> None:
    peer = Peer()
    peer.broken = True
    reason = peer.lost.get(timeout=LIMIT_S)
    assert "control thread failed" in reason
    assert "no snapshot" in reason
    peer.close()


def test_nothing_is_left_of_a_closed_channel() -> None:
    before = set(threading.enumerate())
    peer = Peer()
    assert len(set(threading.enumerate()) - before) == 1
    peer.close()
    assert set(threading.enumerate()) <= before
    peer.channel.send(Left())  # too late, and harmless


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
