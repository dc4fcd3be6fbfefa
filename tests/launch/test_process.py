"""The processes of a run: a real launcher, real forks and programs, real deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from scpl_dist.launch import local
from scpl_dist.launch.process import Order, call, ended, kill, safe_to_fork, start
from scpl_dist.run.config import Config
from scpl_dist.run.errors import PreflightError
from tests.support.programs import until_nothing

HERE = "tests.launch.test_process"
A_THREAD = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"


def code(number: int) -> int:
    return number


def say(text: str) -> int:
    print(text)
    return 0


def asleep() -> int:
    signal.pause()
    return 0


def fail(kind: str) -> int:
    raise {"mistake": ValueError, "other": LookupError}[kind]("on purpose")


def describe() -> dict[str, Any]:
    me, parent = psutil.Process(), os.getppid()
    alone = os.getsid(0) == me.pid
    return {
        "title": me.cmdline(),
        "path": sys.path,
        "parent": parent,
        "alone": alone,
        "torch": "torch" in sys.modules,
    }


def order(function: str, **options: Any) -> Order:
    return Order(f"{HERE}:{function}", options.pop("arguments", {}), f"scpl-dist: {function}", **options)


def call_here(function: str, **arguments: Any) -> Any:
    return call(f"{HERE}:{function}", arguments, f"scpl-dist: {function}")


def error_of(kind: str) -> list[str]:
    try:
        call_here("fail", kind=kind)
    except (ValueError, PreflightError) as error:
        return [type(error).__name__, str(error)]
    return []


def launcher(folder: Path) -> None:
    """Start processes of every kind, and print what came of them."""
    sleeper, other = start(order("asleep")), start(order("asleep"))
    before = ended(sleeper)
    sleeper.terminate()
    kill([other, other])
    words = start(order("say", arguments={"text": "hello"}, log=str(folder / "log" / "words.log")))
    wrong = start(order("fail", arguments={"kind": "other"}, log=str(folder / "log" / "wrong.log")))
    found = {
        "forks": safe_to_fork(),
        "codes": [start(order("code", arguments={"number": 7})).wait(), before, sleeper.wait(), ended(other)],
        "logged": [words.wait(), wrong.wait()],
        "described": call_here("describe"),
        "own": {"pid": os.getpid(), "path": sys.path},
        "errors": [error_of("mistake"), error_of("other")],
        "killed": call_here("asleep_until_killed"),
    }
    print(json.dumps(found))


def asleep_until_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module", params=["fork", "spawn"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a launcher has seen; where it has a thread, which may hold a lock at the moment of a fork, it spawns."""
    folder = tmp_path_factory.mktemp(request.param)
    program = f"from pathlib import Path; from {HERE} import *; launcher(Path({str(folder)!r}))"
    if request.param == "spawn":
        program = f"{A_THREAD}; {program}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["forks"] == (request.param == "fork")
    return result | {"folder": folder, "stderr": done.stderr}


def test_exit_codes_and_signals_come_back(found: dict[str, Any]) -> None:
    assert found["codes"] == [7, None, -signal.SIGTERM, -signal.SIGKILL]


def test_what_a_child_prints_goes_to_its_log_and_an_exception_is_exit_code_1(found: dict[str, Any]) -> None:
    assert found["logged"] == [0, 1]
    assert (found["folder"] / "log" / "words.log").read_text() == "hello\n"
    assert "LookupError: on purpose" in (found["folder"] / "log" / "wrong.log").read_text()


def test_a_call_returns_what_the_function_returns(found: dict[str, Any]) -> None:
    child, own = found["described"], found["own"]
    assert child["title"][0] == "scpl-dist: describe"
    assert set(own["path"]) <= {*child["path"], ""}, "what can be imported here is found there"
    assert child["parent"] == own["pid"]
    assert child["alone"], "Ctrl-C must reach the launcher only"


def test_errors_of_a_call_come_back_and_only_what_is_no_mistake_has_a_traceback(
    found: dict[str, Any],
) -> None:
    assert found["errors"] == [["ValueError", "on purpose"], ["PreflightError", "LookupError: on purpose"]]
    assert found["stderr"].count("Traceback") == 1


def test_a_call_that_was_killed_has_no_result(found: dict[str, Any]) -> None:
    assert found["killed"] is None


def test_everything_but_an_orphan_dies_with_the_launcher() -> None:
    program = (
        f"from {HERE} import *; children = [start(order('asleep', orphan=orphan)) for orphan in (False, True)];"
        "print(*(child.pid for child in children), flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker, orphan = (psutil.Process(int(text)) for text in parent.stdout.readline().split())
        parent.kill()
    until_nothing(lambda: lives(worker), 20)
    assert lives(orphan)
    orphan.kill()


def lives(process: psutil.Process) -> bool:
    """One that nobody has waited for does not."""
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def prepared() -> None:
    local._set_environment(Config())
    local._import([*local._FOR_CHECK, *local._FOR_RUN])
    print(json.dumps([safe_to_fork(), call_here("describe")["torch"]]))


def test_torch_is_imported_once_for_all() -> None:
    program = f"from {HERE} import *; prepared()"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=150, check=True
    )
    assert json.loads(done.stdout) == [True, True]
