"""The writer: a checkpoint is what the state was at the marker, and what goes wrong with it is heard of."""

from __future__ import annotations

import hashlib
import os
import queue
from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_dist.run.errors import Aborted
from scpl_dist.storage.writer import CheckpointWriter

LIMIT_S = 30.0


def state(value: float) -> dict[int, Any]:
    return {3: {"block": {"weight": torch.full((4, 5), value)}, "optimizers": [{"step": 7}]}}


class Log:
    """Collects what the writer says."""

    def __init__(self) -> None:
        self.written: queue.Queue[tuple[int, list[dict[str, Any]]]] = queue.Queue()
        self.errors: queue.Queue[tuple[Exception, int]] = queue.Queue()

    def writer(self, watch: Any = None) -> CheckpointWriter:
        return CheckpointWriter(self._report, lambda error, step: self.errors.put((error, step)), watch=watch)

    def _report(self, sequence: int, files: list[dict[str, Any]], seconds: float) -> None:
        assert seconds > 0
        self.written.put((sequence, files))


def test_parts_have_the_state_of_the_marker_and_their_digest(tmp_path: Path) -> None:
    log = Log()
    writer = log.writer()
    live = state(1.0)
    writer.submit(5, 10, tmp_path / "a", live)
    live[3]["block"]["weight"].fill_(2.0)  # training goes on
    writer.submit(6, 20, tmp_path / "b", live)
    live[3]["block"]["weight"].fill_(3.0)
    writer.drain()
    for folder, value, sequence in (("a", 1.0, 5), ("b", 2.0, 6)):
        path = tmp_path / folder / "block-003.pt"
        written, (file,) = log.written.get(timeout=LIMIT_S)
        assert written == sequence
        content = path.read_bytes()
        assert file == {
            "name": path.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        found = torch.load(path, weights_only=True)
        assert torch.equal(found["block"]["weight"], torch.full((4, 5), value))
        assert found["optimizers"] == [{"step": 7}]


def test_memory_is_bounded_by_one_copy(tmp_path: Path) -> None:
    """A second checkpoint waits for the first to be on disk, and uses its buffers."""
    reader, pipe = os.pipe()
    log = Log()
    writer = log.writer(lambda phase, step: phase == "write" and step == 10 and os.read(reader, 1))
    writer.submit(0, 10, tmp_path / "a", state(1.0))
    assert writer._buffers is not None
    buffer = writer._buffers[1][0]
    assert log.written.empty()
    os.write(pipe, b"!")
    writer.submit(1, 20, tmp_path / "b", state(2.0))
    assert log.written.get(timeout=LIMIT_S)[0] == 0  # was on disk before the second was taken
    writer.drain()
    assert writer._buffers[1][0] is buffer
    os.close(pipe)
    os.close(reader)


def test_a_failed_write_is_reported_with_its_path_and_ends_the_training(tmp_path: Path) -> None:
    log = Log()
    writer = log.writer()
    (tmp_path / "file").write_bytes(b"")
    writer.submit(0, 10, tmp_path / "file" / "folder", state(1.0))
    error, step = log.errors.get(timeout=LIMIT_S)
    assert isinstance(error, OSError)
    assert step == 10
    assert "MB free" in str(error)
    assert "block-003.pt" in str(error)
    with pytest.raises(OSError, match="MB free"):
        writer.submit(1, 20, tmp_path / "b", state(2.0))


def test_a_full_disk_is_called_by_its_name(tmp_path: Path) -> None:
    from scpl_dist.storage.parts import write_part

    (tmp_path / "block-003.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_part(tmp_path / "block-003.pt", {"weight": torch.zeros(1 << 16)})


def test_an_abort_ends_the_wait_for_a_disk_that_does_not_answer(tmp_path: Path) -> None:
    reader, pipe = os.pipe()
    writer = Log().writer(lambda phase, step: os.read(reader, 1))
    writer.submit(0, 10, tmp_path / "a", state(1.0))
    writer.abort(Aborted("the run is over"))
    with pytest.raises(Aborted, match="the run is over"):
        writer.drain()
    os.close(pipe)  # the thread reads the end of the pipe and goes on
