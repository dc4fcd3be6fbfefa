"""What a start of a run leaves behind, however its coordinator came to its end."""

from __future__ import annotations

from pathlib import Path

from scpl_dist.launch.attempt import Attempt
from scpl_dist.run.config import load
from scpl_dist.run.failures import Outcome
from scpl_dist.storage.run_folder import RunFolder


def test_the_end_that_a_coordinator_has_written_is_believed_though_it_has_not_ended(tmp_path: Path) -> None:
    config = load(values={"metrics.port": 0})
    folder = RunFolder.create(tmp_path / "run", config)
    with folder.taken(config):
        attempt = Attempt(config, folder, "", [], True, [])
        assert attempt._coordinator.endpoint(lambda: True) is not None
        folder.finish(Outcome(0, "done"))
        end = attempt._conclude()
        attempt._coordinator.close()
    assert (end.code, end.reason) == (0, "done")
    assert (folder.read("exit.json") or {})["code"] == 0
    assert not attempt._coordinator.process.is_running()  # nothing is left of it
