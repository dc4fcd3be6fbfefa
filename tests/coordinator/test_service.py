"""The coordinator's real process, with plain DEALER sockets in the place of workers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from scpl_dist.control.items import from_plain
from scpl_dist.control.messages import PROTOCOL, VERSION
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.run.faults import VARIABLE, Fault
from scpl_dist.storage.checkpoints import folder_for
from scpl_dist.storage.resume import begin
from tests.support import own_loggers
from tests.support.programs import until_nothing

LIMIT_S = 20.0
SIZES = {"train": 40, "validation": 10, "test": 10}


class Worker:
    """A worker that says what the test tells it to say."""

    def __init__(self, socket: zmq.Socket[bytes], stage: int, config: Config) -> None:
        self.socket = socket
        self.stage = stage
        self.config = config

    def hello(self, **changes: Any) -> None:
        fields = {
            "protocol": PROTOCOL,
            "version": VERSION,
            "torch": "2.14.1",
            "config": self.config.digest(),
            "rank": self.stage,
            "host": "here",
            "pid": 1000 + self.stage,
            "device": "cpu",
        }
        self.say("hello", **fields | changes)
        if self.stage == 0:
            self.say("described", data={"classes": 10, "sizes": SIZES})

    def say(self, name: str, **fields: Any) -> None:
        self.socket.send(msgpack.packb({"type": name, **fields}))

    def expect(self, kind: str) -> dict[str, Any]:
        """The next message of this type; heartbeats of the coordinator are skipped."""
        while True:
            message: dict[str, Any] = msgpack.unpackb(self.socket.recv())
            if message["type"] == kind:
                return message
            assert message["type"] == "alive", message


PROGRAM = """
import json, sys
from scpl_dist.coordinator.service import serve
sys.exit(serve(**json.loads(sys.argv[1])))
"""


class Coordinator:
    """The process under test."""

    def __init__(
        self,
        folder: Path,
        restore: str = "",
        launcher: bool = True,
        stdin: int = subprocess.PIPE,
        **values: Any,
    ) -> None:
        settings = {"control.port": 0, "metrics.port": 0, "run.epochs": 1, "data.batch_size": 20}
        named = {key.replace("__", "."): value for key, value in values.items()}
        self.config = configuration.load(values=settings | named)
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(self.config.to_toml())
        arguments = {"run_dir": str(folder), "generation": "g1", "restore": restore, "launched": launcher}
        command = [sys.executable, "-c", PROGRAM, json.dumps(arguments)]
        self.process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.context: zmq.Context[Any] = zmq.Context()
        self.sockets: list[zmq.Socket[bytes]] = []

    def run_json(self) -> dict[str, Any]:
        deadline = time.monotonic() + LIMIT_S
        while not (self.folder / "run.json").exists():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text())
        return found

    def socket(self) -> zmq.Socket[bytes]:
        """A socket that is connected to the coordinator."""
        socket: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        self.sockets.append(socket)
        socket.setsockopt(zmq.RCVTIMEO, int(LIMIT_S * 1000))
        socket.connect(self.run_json()["control"])
        return socket

    def workers(self) -> list[Worker]:
        return [Worker(self.socket(), k, self.config) for k in range(self.config.pipeline.stages)]

    def started(self) -> list[Worker]:
        """Workers that have been told to go."""
        workers = self.workers()
        for worker in workers:
            worker.hello()
        for worker in workers:
            worker.expect("start")
            worker.say("built", blocks=[0])
        for worker in workers:
            worker.expect("join")
            worker.say("ready")
        for worker in workers:
            worker.expect("go")
        return workers

    def close_stdin(self) -> None:
        """What happens when the launcher dies."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.stdin = None

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.process.wait(LIMIT_S)  # before communicate(), which closes standard input
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, err

    def exit_json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "exit.json").read_text())
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for peer in self.sockets:
            peer.close(0)
        self.context.term()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts coordinators and leaves none behind."""
    found: list[Coordinator] = []

    def begin(**values: Any) -> Coordinator:
        found.append(Coordinator(tmp_path / "run", **values))
        return found[-1]

    yield begin
    for coordinator in found:
        coordinator.close()


def play(coordinator: Coordinator, workers: list[Worker], items: list[dict[str, Any]]) -> None:
    """Let all stages finish these items, as real stages would."""
    for item in items:
        for worker in workers:
            fields: dict[str, Any] = {"sequence": item["sequence"]}
            if item["kind"] == "train":
                fields |= {"losses": {str(worker.stage): {"local": 0.1 + 0.2}}}
            elif item["kind"] == "evaluate":
                (begin, end), *_ = item["micro_batches"]
                fields |= {"metrics": {"accuracy": (8, end - begin)}} if worker is workers[-1] else {}
            elif item["kind"] == "checkpoint":
                folder = folder_for(coordinator.folder, item["step"], item["unique"])
                folder.mkdir(parents=True, exist_ok=True)
                name = f"block-{worker.stage:03d}.pt"
                (folder / name).write_bytes(b"12345")
                digest = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
                part = {"name": name, "bytes": 5, "sha256": digest}
            worker.say("done", **fields)
            if item["kind"] == "checkpoint":
                worker.say("written", sequence=item["sequence"], files=[part], seconds=0.5)


def finish(coordinator: Coordinator, workers: list[Worker], hear: bool = True) -> None:
    """Play until the stop item, then hear that all is over, or not."""
    items: list[dict[str, Any]] = []
    while not items or items[-1]["kind"] != "stop":
        new = workers[0].expect("work")["items"]
        play(coordinator, workers, new)
        items += new
    for worker in workers:
        worker.say("left")
    for worker in workers:
        worker.expect("close")
        if hear:
            worker.say("closed")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_tiny_run_ends_with_a_result_rows_and_a_checkpoint(start: Any) -> None:
    coordinator = start()
    workers = coordinator.started()
    finish(coordinator, workers)
    code, out, err = coordinator.end()
    assert code == 0, err
    assert "test accuracy 0.8000" in out
    assert coordinator.exit_json()["code"] == 0
    result = json.loads((coordinator.folder / "result.json").read_text())
    assert result["accuracy_last"] == result["accuracy_best"] == 0.8
    assert (result["steps"], result["epochs"], result["samples"]) == (2, 1, 40)
    assert [row["stage"] for row in result["per_stage"]] == [0, 1]
    rows = [json.loads(line) for line in (coordinator.folder / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["event"] == "train"]
    assert {(row["step"], row["stage"], row["block"]) for row in train} == {
        (s, k, k) for s in (0, 1) for k in (0, 1)
    }
    assert {row["loss"] for row in train} == {0.1 + 0.2}  # to the last bit
    told = [row["event"] for row in rows if row["event"] not in ("train", "usage", "warning")]
    assert told == ["start", "eval", "eval", "checkpoint"]
    assert rows[-1]["event"] == "usage"  # there are more of them where the test takes seconds
    manifest = json.loads((coordinator.folder / "checkpoints" / "step-2" / "manifest.json").read_text())
    assert [(file["name"], file["stage"]) for file in manifest["files"]] == [
        ("block-000.pt", 0),
        ("block-001.pt", 1),
    ]
    assert (manifest["position"]["epoch"], manifest["sizes"]) == (1, SIZES)
    assert manifest["config"] == coordinator.config.digest()


def test_the_end_waits_for_a_distant_worker_to_hear_of_it(start: Any) -> None:
    coordinator = start(control__host="0.0.0.0", control__insecure=True)
    workers = coordinator.started()
    finish(coordinator, workers, hear=False)
    workers[0].say("closed")
    with pytest.raises(subprocess.TimeoutExpired):  # the last word to the other one may still be on its way
        coordinator.process.wait(3)
    assert coordinator.exit_json()["code"] == 0
    workers[1].expect("close")  # again, as the connection may have broken
    workers[1].say("closed")
    code, _, err = coordinator.end()
    assert code == 0
    assert "may not have heard" not in err


def test_a_worker_that_does_not_hear_of_the_end_is_named(start: Any) -> None:
    coordinator = start()
    finish(coordinator, coordinator.started(), hear=False)
    code, _, err = coordinator.end()
    assert code == 0
    for stage in (0, 1):
        assert f"stage {stage} on here may not have heard that the run is over" in err


@pytest.mark.parametrize("back", [True, False])
def test_who_comes_when_all_is_over_hears_of_it_and_so_does_who_comes_back_under_another_name(
    start: Any, back: bool
) -> None:
    coordinator = start(launcher=False, control__host="0.0.0.0", control__insecure=True)
    workers = coordinator.started()
    finish(coordinator, workers, hear=False)
    newcomer = Worker(coordinator.socket(), 1, coordinator.config)
    if back:
        workers.pop().socket.close()
        newcomer.hello()
    else:
        newcomer.hello(rank=None, pid=2000)
    for worker in (newcomer, *workers):
        worker.expect("close")
        worker.say("closed")
    code, _, err = coordinator.end()
    assert code == 0
    assert "may not have heard" not in err


def test_a_slow_logger_does_not_keep_the_end_from_who_missed_it(start: Any) -> None:
    coordinator = start(log__to=[f"{own_loggers.__name__}:Waiting"])
    workers = coordinator.started()
    finish(coordinator, workers, hear=False)
    for worker in workers:
        worker.expect("close")  # again: the connection may have broken with the first one in it
        worker.say("closed")
    (coordinator.folder / "enough").touch()
    code, _, err = coordinator.end()
    assert code == 0
    assert "did not end in time" not in err


def test_a_second_signal_ends_the_wait_for_workers_that_do_not_hear_of_the_end(start: Any) -> None:
    coordinator = start(control__host="0.0.0.0", control__insecure=True)
    finish(coordinator, coordinator.started(), hear=False)
    coordinator.process.stdin.write('{"event":"signal","number":2}\n')
    coordinator.process.stdin.flush()
    assert coordinator.end()[0] == 0


def test_a_launcher_without_workers_hears_that_the_end_waits_for_one(start: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            coordinator = start(stdin=theirs.fileno(), control__host="0.0.0.0", control__insecure=True)
            workers = coordinator.started()
        finish(coordinator, workers, hear=False)
        until_nothing(lambda: "" if (coordinator.folder / "exit.json").exists() else "exit.json")
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # what it has said before
            ours.recv(1 << 20)
        ours.settimeout(LIMIT_S)
        assert json.loads(ours.recv(1 << 20).splitlines()[0]) == {"event": "working"}
        for worker in workers:
            worker.say("closed")
        assert coordinator.end()[0] == 0


def test_loggers_hear_of_a_run_and_one_that_fails_does_not_end_it(start: Any) -> None:
    named = [f"{own_loggers.__name__}:{name}" for name in ("Noting", "Failing")]
    coordinator = start(log__to=named)
    finish(coordinator, coordinator.started())
    code, _, err = coordinator.end()
    assert code == 0, err
    heard = [json.loads(line) for line in (coordinator.folder / "heard").read_text().splitlines()]
    values: dict[str, Any] = {}
    for step, part in (words for words in heard if isinstance(words[1], dict)):
        values |= {f"{step} {name}": value for name, value in part.items()}
    assert values["1 train/loss/block1"] == 0.1 + 0.2
    assert values["1 eval/test/accuracy"] == 0.8
    result = json.loads((coordinator.folder / "result.json").read_text())
    assert [0, result] in heard
    (warning,) = (line for line in err.splitlines() if line.startswith("warning: log.to"))
    assert "is gone" in warning
    rows = [json.loads(line) for line in (coordinator.folder / "metrics.jsonl").read_text().splitlines()]
    assert [f"warning: {row['text']}" for row in rows if row["event"] == "warning"] == [warning]


def test_rows_of_steps_are_on_disk_before_their_checkpoint_is(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(action="kill", role="coordinator", phase="commit", step=2)
    monkeypatch.setenv(VARIABLE, json.dumps([fault.model_dump(exclude_none=True)]))
    coordinator = start(checkpoint__every_steps=2)
    workers = coordinator.started()
    play(coordinator, workers, workers[0].expect("work")["items"])
    assert coordinator.end()[0] == -signal.SIGKILL
    rows = [json.loads(line) for line in (coordinator.folder / "metrics.jsonl").read_text().splitlines()]
    train = {(row["step"], row["stage"]) for row in rows if row["event"] == "train"}
    assert train == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_a_resumed_run_goes_on_where_the_checkpoint_is(start: Any) -> None:
    first = start(run__epochs=500)
    workers = first.started()
    items = workers[0].expect("work")["items"]
    play(first, workers, items[:1])
    first.process.send_signal(signal.SIGTERM)
    play(first, workers, items[1:])
    finish(first, workers)
    assert first.end()[0] == 143
    (first.folder / "run.json").unlink()
    restore = begin(first.folder, "auto", first.config).restore
    second = start(restore=restore, run__epochs=500)
    workers = second.workers()
    for worker in workers:
        worker.hello()
    assert workers[0].expect("start")["restore"] == restore
    manifest = json.loads((Path(restore) / "manifest.json").read_text())
    for worker in workers:
        worker.say("built", blocks=[0])
    workers[0].expect("join")
    for worker in workers:
        worker.say("ready")
    workers[0].expect("go")
    sequence = ItemSequence(second.config, SIZES, manifest["position"], "g1")
    for item in workers[0].expect("work")["items"]:
        assert from_plain(item) == sequence.next()


def test_a_running_coordinator_touches_the_lease_of_its_folder(start: Any) -> None:
    coordinator = start()
    lease = coordinator.folder / ".lease"
    lease.touch()
    os.utime(lease, (0, 0))
    deadline = time.monotonic() + LIMIT_S
    while lease.stat().st_mtime == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_wrong_peer_is_refused_with_both_values_and_ends_the_start(start: Any) -> None:
    coordinator = start()
    worker = coordinator.workers()[1]
    worker.hello(version="9.9.9")
    reason = worker.expect("refuse")["reason"]
    assert "9.9.9" in reason
    assert VERSION in reason
    code, _, err = coordinator.end()
    assert code == 2
    assert "9.9.9" in err.splitlines()[-1]
    assert coordinator.exit_json()["stage"] == 1


def test_garbage_is_counted_and_harms_nobody(start: Any) -> None:
    coordinator = start()
    stranger = coordinator.socket()
    frames = [b"", b"\xc1", b"\x81\xa4type\xa5hello", os.urandom(1000), msgpack.packb({"type": "go"})]
    for frame in frames:
        stranger.send(frame)
    stranger.send_multipart([b"two", b"frames"])
    workers = coordinator.started()
    workers[0].socket.send(b"\x00")
    finish(coordinator, workers)
    assert coordinator.end()[0] == 0


def test_raw_bytes_on_the_real_socket_neither_stall_nor_harm_the_coordinator(start: Any) -> None:
    coordinator = start()
    run = coordinator.run_json()
    address = ("127.0.0.1", int(run["control"].rpartition(":")[2]))
    draw = random.Random(0)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)  # of ZMTP 3.0
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    beginnings = [b"", b"GET / HTTP/1.1\r\n\r\n", greeting[:10], greeting, greeting + ready]
    endings = [b"", b"\x02" + b"\xff" * 8, b"\x06" + b"\x7f" * 40]  # frames that claim to be of 2^64 bytes
    workers = coordinator.started()
    peers = []
    for number in range(300):
        content = draw.choice(beginnings) + draw.choice(endings) + draw.randbytes(draw.randrange(2000))
        peer = socket.create_connection(address, LIMIT_S)
        peer.sendall(content)
        peers.append(peer)
        if number % 2:
            peer.close()
        if number % 50 == 0:
            begin = time.monotonic()
            assert get(run["metrics"].removesuffix("metrics") + "healthz")[0] == 200
            assert time.monotonic() - begin < LIMIT_S / 2
    stranger = coordinator.socket()
    for _ in range(200):
        stranger.send(draw.randbytes(draw.randrange(300)))
    deadline = time.monotonic() + LIMIT_S
    while True:
        text = get(run["metrics"])[1]
        count = float(text.split('scpl_control_rejected_total{reason="garbage"} ')[1].split("\n")[0])
        if count >= 200:  # frames inside the raw bytes count, too
            break
        assert time.monotonic() < deadline
    finish(coordinator, workers)
    assert coordinator.end()[0] == 0
    for peer in peers:
        peer.close()


def test_metrics_and_health_are_served_while_the_run_goes_on(start: Any) -> None:
    coordinator = start()
    base = coordinator.run_json()["metrics"].removesuffix("/metrics")
    assert get(base + "/healthz")[0] == 200
    code, text = get(base + "/readyz")
    assert code == 503
    assert "0 of 2 workers" in text
    stranger = coordinator.socket()
    stranger.send(b"garbage")
    workers = coordinator.started()
    play(coordinator, workers, workers[0].expect("work")["items"][:1])
    deadline = time.monotonic() + LIMIT_S
    while 'scpl_loss{block="1",stage="1"} 0.30000000000000004' not in (text := get(base + "/metrics")[1]):
        assert time.monotonic() < deadline, text
    assert 'scpl_stage_up{stage="0"} 1.0' in text
    assert 'scpl_control_rejected_total{reason="garbage"} 1.0' in text
    assert get(base + "/readyz") == (200, "ok\n")
    assert get(base + "/nothing")[0] == 404


def test_the_death_of_the_launcher_ends_the_run(start: Any) -> None:
    coordinator = start()
    workers = coordinator.started()
    coordinator.close_stdin()
    for worker in workers:
        worker.expect("work") if worker.stage == 0 else None
        worker.expect("abort")
    coordinator.process.wait(LIMIT_S)
    assert coordinator.process.returncode == 1
    assert "launcher" in coordinator.exit_json()["reason"]


def test_without_a_launcher_standard_input_does_not_matter(start: Any) -> None:
    coordinator = start(launcher=False)
    coordinator.close_stdin()
    workers = coordinator.started()
    finish(coordinator, workers)
    assert coordinator.process.wait(LIMIT_S) == 0


def test_a_worker_that_exits_is_reported_with_its_place(start: Any) -> None:
    coordinator = start(runtime__max_restarts=0)
    workers = coordinator.started()
    workers[1].say("heartbeat", phase="backward", step=1, micro_batch=0)
    deadline = time.monotonic() + LIMIT_S
    while 'scpl_step{stage="1"} 1.0' not in (text := get(coordinator.run_json()["metrics"])[1]):
        assert time.monotonic() < deadline, text
    workers[1].socket.close()
    coordinator.process.stdin.write('not json\n{"event":"exited","rank":1,"code":-9,"pid":1001}\n')
    coordinator.process.stdin.flush()
    code, _, err = coordinator.end()
    assert code == 1
    assert err.splitlines()[-1].startswith("  cause:      stage 1 (here, pid 1001) died without a report")
    assert "SIGKILL" in err.splitlines()[-1]
    found = coordinator.exit_json()
    assert (found["stage"], found["rank"], found["pid"], found["host"]) == (1, 1, 1001, "here")
    assert (found["phase"], found["step"], found["micro_batch"]) == ("backward", 1, 0)


def test_a_vanished_connection_is_noticed_without_a_launcher(start: Any) -> None:
    coordinator = start(launcher=False, runtime__max_restarts=0)
    workers = coordinator.started()
    workers[1].socket.close()
    workers[0].expect("work")
    workers[0].expect("abort")
    code, _, err = coordinator.end()
    assert code == 1
    assert "its connection is gone" in err.splitlines()[-1]
    assert coordinator.exit_json()["stage"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leads_to_a_checkpoint_and_its_own_exit_code(start: Any, number: signal.Signals) -> None:
    coordinator = start(run__epochs=5000, checkpoint__best=False)
    workers = coordinator.started()
    coordinator.process.send_signal(number)
    finish(coordinator, workers)
    code, out, _ = coordinator.end()
    assert code == 128 + number
    assert f"stopped by {number.name}" in out
    assert len(list((coordinator.folder / "checkpoints").glob("step-*/manifest.json"))) == 1


def test_a_signal_before_the_first_step_ends_the_run_at_once(start: Any) -> None:
    coordinator = start()
    coordinator.run_json()
    coordinator.process.stdin.write('{"event":"signal","number":15}\n')
    coordinator.process.stdin.flush()
    code, _, _ = coordinator.end()
    assert code == 143
    assert "before the first step" in coordinator.exit_json()["reason"]


@pytest.mark.parametrize("section", ["control", "metrics"])
def test_a_taken_port_is_a_usage_error_with_the_fix(start: Any, section: str) -> None:

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = start(**{f"{section}__port": port}).end()
    assert code == 2
    assert f"{section}.port = {port}" in err
    assert f"-o {section}.port=0" in err


def test_a_missing_worker_is_named_when_the_start_takes_too_long(start: Any) -> None:
    coordinator = start(runtime__timeout_s=0.5, runtime__first_step_timeout_s=2.0)
    code, _, err = coordinator.end()
    assert code == 1
    assert "no worker for stage 0, 1 within 0.5 s" in err.splitlines()[-1]
