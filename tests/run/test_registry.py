"""What a configuration names is found in the package, in installed packages and in the user's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.run.registry import Registry

SHAPES = Registry("shapes", "shape.name", {"dumps": "json:dumps", "loads": "json:loads"})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with entry points, as pip installs one."""
    (tmp_path / "their_shapes.py").write_text("def circle():\n    return 3\n")
    metadata = tmp_path / "their_shapes-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their_shapes\nVersion: 1.0\n")
    points = ["circle = their_shapes:circle", "dumps = their_shapes:circle", "getter: = operator:attrgetter"]
    (metadata / "entry_points.txt").write_text("\n".join(["[scpl_dist.shapes]", *points]))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_names_of_the_package_come_first(installed: None) -> None:
    import json

    assert SHAPES.find("dumps") is json.dumps


def test_an_entry_point_of_an_installed_package_is_a_name(installed: None) -> None:
    assert SHAPES.find("circle")() == 3
    assert SHAPES.names() == ["dumps", "loads", "getter:NAME", "circle"]


def test_an_entry_point_with_a_colon_makes_what_follows_it(installed: None) -> None:
    assert SHAPES.find("getter:real")(3) == 3


def test_everything_else_with_a_colon_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def square():\n    return 4\n")
    assert SHAPES.find(f"{tmp_path}/own.py:square")() == 4


def test_an_unknown_name_is_refused_with_all_that_there_are(installed: None) -> None:
    with pytest.raises(
        ValueError,
        match=r"^shape\.name = 'oval': unknown; use one of dumps, loads, getter:NAME, circle, or your own as package",
    ):
        SHAPES.find("oval")
