"""What ``import scpl_dist`` offers: these names, complete, and nothing heavy before it is asked for."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import scpl_dist
from tests.support.command import scpl_dist as command
from tests.support.programs import run


def test_the_exported_names_are_exactly_these() -> None:
    assert set(scpl_dist.__all__) == {"RunFailed", "__version__", "evaluate", "export", "load", "train"}
    public = {name for name, value in vars(scpl_dist).items() if callable(value) and not name.startswith("_")}
    assert public - {"Any", "Callable", "Mapping", "Path"} == set(scpl_dist.__all__) - {"__version__"}


@pytest.mark.parametrize("name", ["evaluate", "export", "load", "train"])
def test_every_argument_result_and_error_is_documented(name: str) -> None:
    function = getattr(scpl_dist, name)
    text = inspect.getdoc(function) or ""
    assert all(f"\n    {argument}: " in text for argument in inspect.signature(function).parameters)
    assert "\nReturns:" in text
    assert "\nRaises:" in text


def test_importing_it_imports_nothing_else() -> None:
    code = "import sys, scpl_dist; print(sorted({'torch', 'rich', 'pydantic'} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"


def test_what_is_no_run_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder"):
        scpl_dist.evaluate(tmp_path)
    with pytest.raises(ValueError, match="is no run folder"):
        scpl_dist.export(tmp_path, tmp_path / "out.safetensors")


def test_the_version_is_one_line() -> None:
    assert command("--version").stdout == f"scpl-dist {scpl_dist.__version__}\n"


def test_a_script_without_a_guard_is_told_so_instead_of_starting_runs_without_end(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import scpl_dist\n"
        "from torch import nn\n"
        "def blocks(classes):\n"
        "    return [nn.Flatten(), nn.LazyLinear(8)]\n"
        "scpl_dist.train(blocks, settings={'run.epochs': 1})\n"
    )
    done = run(sys.executable, script, cwd=tmp_path, code=1)
    assert done.stderr.splitlines()[-1].endswith('write the call under if __name__ == "__main__":')
    assert not (tmp_path / "runs").exists()
