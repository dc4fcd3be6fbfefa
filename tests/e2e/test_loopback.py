"""A run on this machine listens on loopback only: nobody on the network can reach what torch runs unasked."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.conduct import Running


@pytest.mark.parametrize("transport", ["rpc", "gloo"])
def test_all_processes_listen_on_loopback_only(transport: str, tmp_path: Path) -> None:
    with Running(tmp_path / "run", "run.epochs=1000", f"pipeline.transport={transport}") as running:
        running.wait_for_rows("train", 4)
        launcher = psutil.Process(running.process.pid)
        processes = [launcher, *launcher.children(recursive=True)]
        assert len(processes) == 4  # launcher, coordinator, two stages
        listening = [
            connection
            for process in processes
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert (
            len(listening) >= 4
        )  # control plane, metrics, the store, and the doors or the transport of the stages
        assert {connection.laddr.ip for connection in listening} <= {"127.0.0.1", "::1"}
