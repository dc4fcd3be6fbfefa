"""Children as the kernel knows them, with real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from scpl_dist.launch import processes

SLEEP = [sys.executable, "-c", "print(flush=True); import time; time.sleep(600)"]


def test_a_child_is_found_with_its_environment_and_state_and_its_end_is_seen_without_taking_it() -> None:
    child = subprocess.Popen(SLEEP, stdout=subprocess.PIPE, env=os.environ | {"RANK": "7"})
    try:
        assert child.stdout is not None
        child.stdout.readline()  # it runs its own program, and not the one that it was forked from
        assert child.pid in processes.children()
        assert processes.environment(child.pid)["RANK"] == "7"
        assert processes.state(child.pid) is None
        processes.send([child.pid], signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while processes.state(child.pid) is None:
            assert time.monotonic() < deadline
        assert "SIGSTOP" in str(processes.state(child.pid))
        processes.send([child.pid], signal.SIGKILL)
        assert processes.exit_code(child.pid) == -signal.SIGKILL
        assert child.pid not in processes.children()  # a zombie is no child any more
        assert child.wait(30) == -signal.SIGKILL  # its status is still there for whoever started it
        assert processes.exit_code(child.pid) is None
        processes.send([child.pid], signal.SIGKILL)  # it is gone, which is no error
        assert processes.environment(child.pid) == {}
    finally:
        child.kill()
        child.communicate()


def test_an_exit_code_is_told_apart_from_a_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as child:
        assert processes.exit_code(child.pid) == 3
