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


def test_a_wish_waits_for_a_launcher_that_does_not_read_and_signs_of_life_do_not_pile_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        launcher = Launcher(ours.fileno())
        for _ in range(10_000):
            launcher.working()
        launcher.replace(1, 7)
        said = theirs.recv(1 << 20)
        launcher.working()
        said += theirs.recv(1 << 20)
        *signs, wish = map(json.loads, said.splitlines())
        assert wish == {"event": "replace", "rank": 1, "pid": 7}
        assert 0 < len(signs) < 10_000
        assert all(sign == {"event": "working"} for sign in signs)
