"""What the coordinator's publisher removes, and when: no checkpoint that is published or written may suffer from it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scpl_dist.control.messages import Dataset
from scpl_dist.coordinator import service
from scpl_dist.coordinator.events import Commit, Rewind
from scpl_dist.coordinator.service import Service
from scpl_dist.run.failures import Cause, Outcome, failure
from scpl_dist.storage.checkpoints import folder_for, folder_of, steps, unfinished, verify
from scpl_dist.storage.run_folder import RunFolder
from tests.support.coordinator import SIZES, small


class Publishing(Service):
    """A service that does not run, with a publisher that is held up."""

    def __init__(self, folder: Path) -> None:
        config = small(control__port=0, metrics__port=0)
        super().__init__(config, RunFolder.open_for_writing(folder), "g1", "", [], False, False)
        self._coordinator.data = Dataset(classes=10, sizes=SIZES)
        self._held = threading.Event()
        self._publisher.submit(self._held.wait, 60)

    def publish(self) -> None:
        """Let the publisher do what it has been given."""
        self._held.set()
        self._publisher.shutdown()

    def close(self) -> None:
        self.publish()
        self._progress.close()
        self._http.shutdown()
        self._http.server_close()
        self._gate.close()
        self._router.close(0)
        self._context.term()


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Publishing]:
    found = Publishing(tmp_path)
    yield found
    found.close()


def parts(run_dir: Path, step: int, unique: str) -> Commit:
    """Parts of a checkpoint, and the command to publish it."""
    folder = folder_for(run_dir, step, unique)
    folder.mkdir(parents=True)
    (folder / "block-000.pt").write_bytes(b"12345")
    digest = "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"
    position = {"epoch": 0, "step": step, "batch": step}
    files = [{"name": "block-000.pt", "bytes": 5, "sha256": digest}]
    return Commit(step=step, epoch=0, position=position, files=files, unique=unique)


def test_room_on_a_full_disk_is_made_of_nothing_that_is_being_published(
    publishing: Publishing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CLEAR_S", 0.0)
    publishing._execute(parts(tmp_path, 4, "g1"))
    parts(tmp_path, 6, "g1")
    publishing._conclude(Outcome(1, "disk", failure(Cause.DISK, "no space left")))
    publishing.publish()
    assert steps(tmp_path) == [folder_of(tmp_path, 4)]
    verify(folder_of(tmp_path, 4))
    assert unfinished(tmp_path) == []


def test_what_a_new_group_writes_is_not_taken_for_what_the_last_one_left(
    publishing: Publishing, tmp_path: Path
) -> None:
    parts(tmp_path, 4, "g1")
    publishing._execute(Rewind(0, 0))
    parts(tmp_path, 4, "g1-1")
    publishing.publish()
    assert unfinished(tmp_path) == [folder_for(tmp_path, 4, "g1-1")]
