"""The launcher as the coordinator sees it."""

from __future__ import annotations

import json
import socket

import pytest

from scpl_dist.coordinator.events import Exited, LauncherLost, Signal
from scpl_dist.coordinator.launcher import Launcher


@pytest.mark.parametrize("wish", [False, True])
def test_the_end_of_a_launcher_is_its_last_word_whether_it_had_read_all_wishes_or_not(wish: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        launcher = Launcher(ours.fileno())
        said = [{"event": "signal", "number": 15}, {"event": "exited", "rank": 1, "code": -9, "pid": 7}]
        theirs.sendall(b"".join(json.dumps(event).encode() + b"\n" for event in said))
        assert launcher.events() == [Signal("launcher", 15), Exited(1, -9, 7)]
        assert launcher.events() == []
        if wish:
            launcher.replace(1, 7)
        theirs.close()
        assert launcher.events() == [LauncherLost()]
