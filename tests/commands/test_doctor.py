"""What keeps a run from starting is found, with the fix."""

from __future__ import annotations

import socket
from pathlib import Path

from scpl_dist.commands.doctor import examine
from scpl_dist.run import config
from tests.support.command import scpl_dist


def test_doctor_has_a_line_for_everything_and_a_fix_for_what_is_wrong(tmp_path: Path) -> None:
    good = list(examine(config.load(values={"metrics.port": 0}), tmp_path))
    assert not [finding for finding in good if finding.state == "fail"]
    names = {finding.name for finding in good}
    wanted = {
        "versions",
        "device",
        "backends",
        "names",
        "interface",
        "ports",
        "keys",
        "run folder",
        "open files",
        "clock",
    }
    assert wanted <= names

    values = {
        "control.host": "no-such-host.invalid",
        "control.keys": str(tmp_path),
        "runtime.interface": "eth77",
    }
    (tmp_path / "file").write_text("")
    bad = {
        f.name: f.text for f in examine(config.load(values=values), tmp_path / "file") if f.state == "fail"
    }
    assert "does not resolve" in bad["names"]
    assert "scpl-dist keys new" in bad["keys"]
    assert "choose another --run-dir" in bad["run folder"]
    values = {"runtime.interface": "eth77"}
    bad = {f.name: f.text for f in examine(config.load(values=values), tmp_path) if f.state == "fail"}
    assert bad.keys() == {"interface"}
    assert "runtime.interface = 'eth77': not an interface of" in bad["interface"]


def test_what_may_be_wanted_is_a_warning(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = {"metrics.port": taken.getsockname()[1], "runtime.threads": 10_000}
        found = {f.text for f in examine(config.load(values=settings), tmp_path) if f.state == "warn"}
    assert any("something answers at 127.0.0.1" in text for text in found)
    assert any("runtime.threads = 10000 is more: lower it" in text for text in found)


def test_the_command_prints_a_line_for_each_check_and_fails_if_one_does(tmp_path: Path) -> None:
    done = scpl_dist("doctor", "-o", "runtime.interface=eth77", "--run-dir", tmp_path, code=1)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if "eth77" in line] == ["fail"]
    assert all(line.split()[0] in ("ok", "warn", "fail") for line in lines[1:])
