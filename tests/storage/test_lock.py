"""One run at a time in a folder, also where file locks end at the host."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from scpl_dist.run.config import Config
from scpl_dist.storage.lock import locked, touch
from scpl_dist.storage.run_folder import RunFolder


def test_the_lease_of_a_host_that_lives_is_respected(tmp_path: Path) -> None:
    lease = tmp_path / ".lease"
    lease.write_text("elsewhere")
    ended = threading.Event()

    def other_host() -> None:
        while not ended.wait(0.02):
            touch(tmp_path)

    thread = threading.Thread(target=other_host)
    thread.start()
    try:
        with (
            pytest.raises(ValueError, match="a run is in progress in this folder on elsewhere"),
            locked(tmp_path),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert lease.read_text() == "elsewhere"


def test_the_lease_of_a_host_that_has_died_expires(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".lease").write_text("elsewhere")
    with locked(tmp_path, expired_after_s=0.1):
        assert (tmp_path / ".lease").read_text() == socket.gethostname()
    assert "belongs to a run on elsewhere: waiting up to" in capsys.readouterr().err
    assert not (tmp_path / ".lease").exists()


def test_a_lease_that_is_given_back_is_free_at_once(tmp_path: Path) -> None:
    lease = tmp_path / ".lease"
    lease.write_text("elsewhere")
    giving_back = threading.Timer(0.2, lease.unlink)
    giving_back.start()
    begin = time.monotonic()
    with locked(tmp_path, expired_after_s=60):
        assert time.monotonic() - begin < 30
    giving_back.join()


def test_on_the_own_host_the_lock_alone_decides(tmp_path: Path) -> None:
    """A lease that a killed run has left costs no time."""
    (tmp_path / ".lease").write_text(socket.gethostname())
    with locked(tmp_path, expired_after_s=3600):
        pass


def test_a_touch_needs_no_folder(tmp_path: Path) -> None:
    touch(tmp_path / "gone")
    assert os.listdir(tmp_path) == []


def test_what_another_run_has_written_meanwhile_is_not_lost(tmp_path: Path) -> None:
    """It ended between the choice of a checkpoint here and the lock."""
    (tmp_path / "checkpoints" / "step-40").mkdir(parents=True)
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another run has written step-40 while this one started"):
        folder.taken(Config()).__enter__()
    assert not (tmp_path / "config.toml").exists()
    with folder.taken(Config(), seen=[tmp_path / "checkpoints" / "step-40"]):
        pass
