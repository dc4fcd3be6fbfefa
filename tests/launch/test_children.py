"""The processes of a local run: a real server, real forks, real deaths."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from scpl_dist.launch.child import Order
from scpl_dist.launch.children import Children, lives
from tests.support.programs import until_nothing

HERE = "tests.launch.test_children"
WITHOUT_TORCH = "from scpl_dist.launch import server; server.FIRST = server.THEN = (); server.main()"
WITH_A_THREAD = (
    "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start();" + WITHOUT_TORCH
)


def code(number: int) -> int:
    return number


def say(text: str) -> int:
    print(text)
    return 0


def asleep() -> int:
    signal.pause()
    return 0


def fail() -> int:
    raise RuntimeError("on purpose")


def describe() -> int:
    torch = "torch" in sys.modules
    found = {"pid": os.getpid(), "parent": os.getppid(), "torch": torch, "rank": os.environ.get("RANK")}
    os.write(0, json.dumps(found | {"path": sys.path, "title": psutil.Process().cmdline()[0]}).encode())
    return 0


class Ends:
    """What children have told."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def __call__(self, pid: int, code: int) -> None:
        self.queue.put((pid, code))

    def next(self) -> tuple[int, int]:
        return self.queue.get(timeout=60)


@pytest.fixture(scope="module")
def ends() -> Ends:
    return Ends()


@pytest.fixture(scope="module", params=["fork", "spawn"])
def children(request: pytest.FixtureRequest, ends: Ends) -> Iterator[Children]:
    # A thread may hold a lock at the moment of a fork.
    program = WITHOUT_TORCH if request.param == "fork" else WITH_A_THREAD
    made = Children("scpl-dist: server of a test", {}, ends, [sys.executable, "-c", program])
    yield made
    made.close()


def order(function: str, **options: Any) -> Order:
    return Order(f"{HERE}:{function}", options.pop("arguments", {}), f"scpl-dist: {function}", **options)


def test_exit_codes_and_signals_come_back(children: Children, ends: Ends) -> None:
    first = children.start(order("code", arguments={"number": 7}))
    assert ends.next() == (first, 7)
    second = children.start(order("asleep"))
    children.send([second, first], signal.SIGKILL)  # the first is gone, and its number may be another's
    assert ends.next() == (second, -signal.SIGKILL)


def test_an_exception_is_exit_code_1_and_stands_in_the_log(
    children: Children, ends: Ends, tmp_path: Path
) -> None:
    pid = children.start(order("fail", log=str(tmp_path / "log" / "child.log")))
    assert ends.next() == (pid, 1)
    assert "RuntimeError: on purpose" in (tmp_path / "log" / "child.log").read_text()


def test_what_a_child_prints_goes_to_its_log(children: Children, ends: Ends, tmp_path: Path) -> None:
    children.start(order("say", arguments={"text": "hello"}, log=str(tmp_path / "child.log")))
    ends.next()
    assert (tmp_path / "child.log").read_text() == "hello\n"


def test_a_call_returns_what_the_child_answers(children: Children, ends: Ends) -> None:
    found = children.call(order("describe", environment={"RANK": "3"}))
    assert ends.next() == (found["pid"], 0)
    assert found["rank"] == "3"
    assert found["title"] == "scpl-dist: describe"
    assert set(sys.path) <= {*found["path"], ""}
    assert found["parent"] == children.pid


def test_a_child_that_gives_no_answer_is_no_answer(children: Children, ends: Ends) -> None:
    assert children.call(order("code", arguments={"number": 0})) is None
    ends.next()


def test_everything_dies_with_the_server() -> None:
    ends = Ends()
    own = Children("scpl-dist: server of a test", {}, ends, [sys.executable, "-c", WITHOUT_TORCH])
    worker, orphan = own.start(order("asleep")), own.start(order("asleep", orphan=True))
    os.kill(own.pid, signal.SIGKILL)
    assert dict([ends.next(), ends.next()]) == {worker: -signal.SIGKILL, orphan: -signal.SIGKILL}
    assert not own.alive
    with pytest.raises(RuntimeError, match="is gone"):
        own.start(order("asleep"))
    own.close()


def test_everything_dies_with_the_launcher(tmp_path: Path) -> None:
    program = (
        f"from {HERE} import *; children = Children('server', {{}}, Ends(), [sys.executable, '-c', WITHOUT_TORCH]);"
        "print(children.pid, children.start(order('asleep')), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids = [int(text) for text in launcher.stdout.readline().split()]
        launcher.kill()
    until_nothing(lambda: [pid for pid in pids if lives(pid)], 20)


def test_torch_is_imported_once_for_all() -> None:
    ends = Ends()
    own = Children("scpl-dist: server of a test", {}, ends)
    try:
        assert own.call(order("describe"))["torch"] is True
    finally:
        own.close()
