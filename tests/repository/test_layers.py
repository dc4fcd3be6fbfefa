"""Arrows point down only: which package of the house may import which, and who may not need torch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.support.programs import ROOT, run

GROUND = {"run"}
FIVE = dict.fromkeys(("methods", "models", "transport", "storage", "control"), GROUND)
DATA = {"models", "run"}
PLAN = {"data", "methods", "models", "transport", "run"}
ALLOWED = FIVE | {
    "run": set(),
    "data": DATA,
    "plan": PLAN,
    "worker": {"plan", "data", "methods", "transport", "storage", "control", "run"},
    "coordinator": {"control", "storage", "run"},
}
ALLOWED["launch"] = {*ALLOWED, "worker", "coordinator"}
ALLOWED["commands"] = {*ALLOWED, "launch"}
WITHOUT_TORCH = ("run", "control", "coordinator")
PACKAGE = ROOT / "scpl_dist"


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


FILES = {
    ".".join(["scpl_dist", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def package(name: str) -> str:
    """Such as "worker" of "scpl_dist.worker.timer"."""
    return [*name.split("."), ""][1]


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def test_every_package_has_its_place() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == ALLOWED.keys()


def test_arrows_point_down_only() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others & FILES.keys() - {"scpl_dist"}
        if (own := package(name)) in ALLOWED and package(other) not in (own, *ALLOWED[own])
    ]
    assert not wrong, "\n".join(wrong)


def test_what_runs_without_torch_reaches_no_module_that_imports_it() -> None:
    todo = [name for name in FILES if package(name) in WITHOUT_TORCH]
    reached: set[str] = set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += IMPORTS[name] & FILES.keys() - {
                "scpl_dist"
            }  # its face imports nothing before it is asked
    wrong = [name for name in reached if any(other.split(".")[0] == "torch" for other in IMPORTS[name])]
    assert not wrong, wrong
    assert "scpl_dist.storage.run_folder" in reached


def test_the_command_is_there_before_torch() -> None:
    # A launcher that has imported numpy with its threads could not fork.
    code = "import sys, scpl_dist.cli; print({'torch', 'numpy'} & sys.modules.keys())"
    assert run(sys.executable, "-c", code).stdout == "set()\n"
