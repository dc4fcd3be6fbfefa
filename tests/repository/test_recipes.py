"""The recipes are the published experiments, can be run, and use what every user may use."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from recipes.make import MODELS as NETWORKS
from recipes.make import TEXT, VISION, recipes
from scpl_dist import data, models
from scpl_dist.launch.preflight import preflight
from scpl_dist.run.config import load
from scpl_dist.run.imports import load_object
from tests.support.programs import ROOT

FOLDER = ROOT / "recipes"
SETS = {"vision": list(VISION), "text": list(TEXT)}
PUBLIC = {
    "scpl_dist.data": data.__all__,
    "scpl_dist.data.table_files": ["EXTENSIONS", "Row", "find", "read_table", "rows"],
    "scpl_dist.models": [*models.__all__, "hub"],
    "scpl_dist.run.config": ["Config"],
}


def test_the_files_are_those_of_the_table_and_can_be_loaded() -> None:
    files = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.glob("*/*.toml")}
    assert {name: path.read_text() for name, path in files.items()} == recipes()
    assert len(files) == 70
    for name, path in files.items():
        config = load(path)
        assert name == f"{config.data.name}/{config.model.name}-{config.run.method}.toml"


def one_of_each() -> list[str]:
    """Every model with every method, and each data set with some of them."""
    pairs = sorted({Path(name).name for name in recipes()})
    kinds = {model: kind for kind, found in NETWORKS.items() for model in found}
    sets = [SETS[kinds[pair.split("-")[0]]] for pair in pairs]
    return [
        f"{found[index % len(found)]}/{pair}"
        for index, (pair, found) in enumerate(zip(pairs, sets, strict=True))
    ]


def test_one_of_each_has_every_data_set() -> None:
    assert len(one_of_each()) == 20
    assert {name.split("/")[0] for name in one_of_each()} == VISION.keys() | TEXT.keys()


@pytest.mark.parametrize("name", one_of_each())
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


def test_every_entry_point_is_found_by_its_name() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for registry in (models.MODELS, data.DATA):
        for name, target in points[f"scpl_dist.{registry.kind}"].items():
            found = load_object(target, name)
            if name.endswith(":"):
                assert f"{name}NAME" in registry.names()
            else:
                assert registry.find(name) is found
                assert name in registry.names()


def test_recipes_use_public_names_only() -> None:
    for path in (FOLDER / "scpl_dist_recipes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("scpl_dist") for alias in node.names), path
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "scpl_dist":
                assert {alias.name for alias in node.names} <= set(PUBLIC[str(node.module)]), path
