"""``--help`` and completion: what a user who has read nothing finds out by the command alone."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from scpl_dist import cli
from scpl_dist.run import config
from tests.support.command import called
from tests.support.programs import run


def commands(group: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, with the words that call them."""
    for name, command in group.commands.items():
        yield (*path, name), command
        yield from commands(command, *path, name) if hasattr(command, "commands") else ()


ROOT_COMMAND: Any = typer.main.get_command(cli.app)
COMMANDS = dict(commands(ROOT_COMMAND))


def test_every_command_stands_under_one_heading() -> None:
    text = called("--help").stdout
    parts = re.split(r"^(Train|Look|Use the result|Clusters):$", text, flags=re.MULTILINE)
    assert parts[1::2] == ["Train", "Look", "Use the result", "Clusters"]
    found = [name for part in parts[2::2] for name in re.findall(r"^  ([a-z]+)  ", part, re.MULTILINE)]
    assert sorted(found) == sorted(ROOT_COMMAND.commands)


@pytest.mark.parametrize("words", [(), *COMMANDS], ids=" ".join)
def test_help_fits_into_80_columns(words: tuple[str, ...]) -> None:
    lines = called(*words, "--help").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith("...") for line in lines[1:]), "a sentence is cut off"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example_that_the_command_takes(words: tuple[str, ...]) -> None:
    [example] = re.findall(r"^  Example: (.*)$", called(*words, "--help").stdout, re.MULTILINE)
    _, typed = re.split(rf"\bscpl[-_]dist {' '.join(words)}\b", example)
    context = ROOT_COMMAND.make_context("scpl-dist", ["ls"])
    own = COMMANDS[words].make_context(words[-1], shlex.split(typed), parent=context)
    assert own.command is COMMANDS[words]


def completed(words: str, folder: Path) -> list[str]:
    """What bash offers for the last of some words, with the script that the command gives it."""
    script = 'eval "$(_SCPL_DIST_COMPLETE=source_bash scpl-dist)"\n' + (
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n_scpl_dist_completion scpl-dist\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return run("bash", "-c", script, "bash", *words.split(" "), cwd=folder, env={"PATH": path}).stdout.split()


def test_bash_completes_commands_options_run_folders_and_keys(tmp_path: Path) -> None:
    for name in ("runs/first", "runs/second", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text("")
    (tmp_path / "runs" / "none").mkdir()
    assert completed("scpl-dist ev", tmp_path) == ["evaluate"]
    assert completed("scpl-dist evaluate --exit", tmp_path) == ["--exit-threshold"]
    assert completed("scpl-dist evaluate ", tmp_path) == ["elsewhere", "runs/first", "runs/second"]
    assert completed("scpl-dist report runs/f", tmp_path) == ["runs/first"]
    keys = [f"{key}=" for key in config.effects() if key.startswith("run.")]
    assert completed("scpl-dist train -o run.", tmp_path) == keys
    assert "run.epochs=" in keys
