"""What runs that fail are compared with."""

from __future__ import annotations

import pytest

from tests.support.conduct import Ended, conduct


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The embedded job without a failure, in one process."""
    ended = conduct(tmp_path_factory.mktemp("undisturbed") / "run", "pipeline.stages=1")
    assert ended.code == 0, ended.screen
    return ended
