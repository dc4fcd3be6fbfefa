from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes.make import recipes
from scpl_dist.launch.preflight import preflight
from scpl_dist.run.config import load

FOLDER = Path(__file__).parents[2] / "recipes"


def test_the_files_are_those_of_the_table() -> None:
    files = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.glob("*/*.toml")}
    assert files == recipes()
    assert len(files) == 70


@pytest.mark.parametrize("name", sorted(recipes()))
def test_a_dry_run_accepts_the_recipe_without_data(name: str, tmp_path: Path) -> None:
    config = load(FOLDER / name, [f"data.root={tmp_path}", "metrics.port=0"])
    missing: list[str] = []
    plan = preflight(config, absent=missing.append)
    assert len(missing) == 1
    assert re.search("data.root = .*(missing|there is no)", missing[0])
    assert len(plan.specs) == 4
    assert plan.head_parameters[-1] > 0


def test_without_leave_to_go_on_missing_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.root = .* there is no"):
        preflight(load(FOLDER / "ag_news" / "lstm-scpl.toml", [f"data.root={tmp_path}", "metrics.port=0"]))
