"""Doors of workers, and what is found where somebody should be."""

from __future__ import annotations

import socket
import threading

import pytest
import torch

from scpl_dist.transport.reachability import ReachabilityCheck, Unreached


def made(name: str) -> ReachabilityCheck:
    return ReachabilityCheck("127.0.0.1", "lo", name, torch.device("cpu"))


def test_workers_that_are_there_meet() -> None:
    first, second = made("stage 0"), made("stage 1")
    endpoints = [first.endpoint, second.endpoint]
    first.visit(0, endpoints, 5)
    second.visit(1, endpoints, 5)
    first.close()
    second.close()


def test_a_worker_whose_door_is_gone_may_have_died() -> None:
    first, second = made("stage 0"), made("stage 1")
    second.close()
    with pytest.raises(Unreached, match=r"stage 1 on .* cannot be reached from stage 0 .* refused") as caught:
        first.visit(0, [first.endpoint, second.endpoint], 5)
    assert caught.value.peer == 1
    first.close()


@pytest.mark.parametrize(
    ("answer", "text", "peer"), [(b"", "was closed", 1), (b"x" * 16, "another process", None)]
)
def test_who_closes_may_have_died_and_who_says_something_else_is_another(
    answer: bytes, text: str, peer: int | None
) -> None:
    first = made("stage 0")
    with socket.create_server(("127.0.0.1", 0)) as door:

        def serve() -> None:
            visitor, _ = door.accept()
            with visitor:
                visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        other = first.endpoint | {"name": "stage 1", "port": door.getsockname()[1]}
        with pytest.raises(Unreached, match=text) as caught:
            first.visit(0, [first.endpoint, other], 5)
        thread.join(5)
    assert caught.value.peer == peer
    first.close()
