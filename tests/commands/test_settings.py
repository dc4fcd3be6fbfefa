"""The configuration as a text to be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.commands.settings import explained, write_defaults
from scpl_dist.run.config import Config, effects, load
from tests.support.command import called


def test_a_new_file_has_every_key_with_its_meaning_and_is_the_defaults(tmp_path: Path) -> None:
    target = tmp_path / "my.toml"
    assert f"scpl-dist train {target}" in called("init", target).stdout
    assert load(target) == Config()
    lines = target.read_text().splitlines()
    assert max(map(len, lines)) <= 120
    for key in effects().keys() - {"block"}:
        name = key.partition(".")[2]
        [index] = [
            number
            for number, line in enumerate(lines)
            if line.startswith(f"{name} = ") and f"[{key.partition('.')[0]}]" == _section(lines, number)
        ] or [lines.index(f"[{key}]")]
        assert lines[index - 1].startswith("# "), key


def test_tables_of_blocks_are_there_as_a_comment_that_can_be_used(tmp_path: Path) -> None:
    text = explained(Config())
    assert "# [[block]]" in text
    used = text.replace("# [[block]]", "[[block]]").replace("# index", "index").replace("# freeze", "freeze")
    (tmp_path / "config.toml").write_text(used)
    assert load(tmp_path / "config.toml").frozen(0) == {0}
    frozen = load(
        values={"block": [{"index": [0, 1], "freeze": True}, {"index": 2, "freeze_after_epoch": 1}]}
    )
    (tmp_path / "config.toml").write_text(explained(frozen))
    assert load(tmp_path / "config.toml") == frozen


def _section(lines: list[str], number: int) -> str:
    return next(line for line in reversed(lines[:number]) if line.startswith("["))


def test_values_of_all_kinds_come_back(tmp_path: Path) -> None:
    values = {"model.args": {"a": [1, 2], "b": {"c": "text"}}, "pipeline.partition": [1, 3], "run.seed": 7}
    config = load(values=values | {"data.name": 'a "quoted" name', "loss.args": {"x": 0.5}})
    (tmp_path / "config.toml").write_text(explained(config))
    assert load(tmp_path / "config.toml") == config


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "my.toml"
    target.write_text("mine")
    assert "exists: give a new file" in called("init", target, code=2).stderr
    assert target.read_text() == "mine"
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        write_defaults(tmp_path / "missing" / "my.toml")
