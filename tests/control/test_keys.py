"""Keys, and the gate that lets nobody else in."""

from __future__ import annotations

import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from scpl_dist.control import keys
from scpl_dist.control.admission import TurnedAway
from scpl_dist.control.channel import Channel
from scpl_dist.control.messages import Heartbeat, Hello
from scpl_dist.control.sockets import dealer, router
from scpl_dist.run import config
from scpl_dist.run.phases import Phase
from tests.support.command import called
from tests.support.outsider import knock, throw

LIMIT_S = 20.0
HELLO = Hello(
    protocol=1,
    version="0",
    torch="0",
    config="",
    rank=0,
    host="here",
    pid=1,
    device="cpu",
)


def test_new_keys_are_for_their_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    output = called("keys", "new", folder).stdout
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "coordinator.key",
        "coordinator.key_secret",
        "worker.key",
        "worker.key_secret",
    ]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    server = keys.load_server(str(folder))
    assert server is not None
    assert server.secret.decode() not in output + repr(server)
    assert "exists: choose another folder" in called("keys", "new", folder, code=2).stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "worker.key").unlink(), "no worker's key is there"),
        (lambda folder: (folder / "coordinator.key_secret").unlink(), "is no readable key file"),
        (
            lambda folder: (folder / "coordinator.key_secret").chmod(0o640),
            "can be read by others .mode 640.: run chmod",
        ),
        (
            lambda folder: (folder / "worker.key").write_text('public-key = "short"\n'),
            "is no readable key file",
        ),
    ],
)
def test_unusable_keys_are_refused_with_the_fix(change: Any, message: str, tmp_path: Path) -> None:
    keys.create(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        keys.load_server(str(tmp_path))


def test_beyond_loopback_a_control_plane_needs_keys() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        config.load(values={"control.host": host})
    with pytest.raises(ValueError, match=r"control.host = '10.0.0.1': beyond loopback .* scpl-dist keys new"):
        config.load(values={"control.host": "10.0.0.1"})
    config.load(values={"control.host": "10.0.0.1", "control.keys": "keys"})
    config.load(values={"control.host": "10.0.0.1", "control.insecure": True})


class Guarded:
    """A coordinator's socket with its gate."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket, self.address, self.gate = router(self.context, "localhost", 0, keys.load_server(folder))
        self.turned_away: list[TurnedAway] = []
        self.frames: list[bytes] = []

    def serve(self, seconds: float = 0.05) -> None:
        """Answer for a while."""
        poller = zmq.Poller()
        for source in (self.socket, *self.gate.sockets):
            poller.register(source, zmq.POLLIN)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            poller.poll(int(left * 1000) + 1)
            self.turned_away += self.gate.events()
            while self.socket.poll(0):
                self.frames.append(self.socket.recv_multipart()[-1])

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, (self.turned_away, self.frames)
            self.serve()


def guard(folder: str) -> Iterator[Guarded]:
    made = Guarded(folder)
    yield made
    made.gate.close()
    made.socket.close(0)
    made.context.term()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    keys.create(tmp_path / "keys")
    yield from guard(str(tmp_path / "keys"))


@pytest.fixture
def open_to_all() -> Iterator[Guarded]:
    yield from guard("")


def run(guarded: Guarded, work: Any) -> Any:
    """Do something while the gate is served."""
    import threading

    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    guarded.until(lambda: not thread.is_alive())
    return result[0]


def test_an_allowed_key_is_let_in_and_nobody_else(guarded: Guarded, tmp_path: Path) -> None:
    worker = keys.load_client(guarded.folder)
    assert worker is not None
    other = zmq.curve_keypair()
    context: zmq.Context[Any] = zmq.Context()
    peer = dealer(context, guarded.address, worker)
    peer.connect(guarded.address)
    peer.send(b"hello")
    guarded.until(lambda: guarded.frames == [b"hello"])
    assert guarded.turned_away == []

    host, port = guarded.address.removeprefix("tcp://").split(":")
    place = (host, int(port))
    assert run(guarded, lambda: knock(guarded.address, (worker.server, *other))) == "HANDSHAKE_FAILED_AUTH"
    assert run(guarded, lambda: knock(guarded.address, (other[0], worker.public, worker.secret))).startswith(
        "HANDSHAKE_F"
    )
    assert run(guarded, lambda: knock(guarded.address, None)).startswith("HANDSHAKE_FAILED")
    before = len(guarded.turned_away)
    assert run(guarded, lambda: throw(place, b"GET / HTTP/1.1\r\n\r\n" + bytes(4096))) == "closed"
    guarded.until(lambda: len(guarded.turned_away) > before)

    reasons = Counter(event.reason for event in guarded.turned_away)
    assert reasons["key"] == 1
    assert reasons["handshake"] >= 3
    reports = [event.report for event in guarded.turned_away if event.report is not None]
    # One for each reason and address, however often; the address of a connection that is gone already is "?".
    assert len(reports) == len(set(reports)) <= 3
    assert reports[0] == (
        "turned away a connection from 127.0.0.1: its key is not in the folder control.keys of the coordinator"
    )
    assert guarded.frames == [b"hello"]
    peer.send(b"still here")
    guarded.until(lambda: guarded.frames == [b"hello", b"still here"])
    peer.close(0)
    context.term()


def test_without_keys_who_speaks_no_zeromq_is_counted(open_to_all: Guarded) -> None:
    host, port = open_to_all.address.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\xff" + b"x" * 100)
    open_to_all.until(lambda: open_to_all.turned_away)
    assert {event.reason for event in open_to_all.turned_away} == {"handshake"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("worker", "does not know the key of this worker: copy worker.key into its folder"),
        ("coordinator", "does not complete the handshake: control.keys must be set at both ends"),
        ("none", "does not complete the handshake: control.keys must be set at both ends"),
    ],
)
def test_a_worker_that_is_not_let_in_says_why(wrong: str, message: str, guarded: Guarded) -> None:
    mine = keys.load_client(guarded.folder)
    assert mine is not None
    public, secret = zmq.curve_keypair()
    used = {
        "worker": keys.Client(public, secret, mine.server),
        "coordinator": keys.Client(mine.public, mine.secret, public),
        "none": None,
    }[wrong]
    lost: list[str] = []
    beat = Heartbeat(phase=Phase.IDLE)
    channel = Channel(guarded.address, HELLO, lambda: beat, print, lost.append, timeout_s=60, keys=used)
    guarded.until(lambda: lost)
    channel.close()
    assert message in lost[0]
    assert guarded.address in lost[0]
    assert guarded.frames == []
