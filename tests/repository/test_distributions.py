"""A wheel and a source distribution have all files of the packages, and each trains where nothing else of us is."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from scpl_dist import __version__
from tests.support.programs import ROOT, run

ALONE = {"PYTHONPATH": "", "PYTHONSAFEPATH": "1"}  # nothing of the checkout can be imported


def in_git() -> list[str]:
    """Files of the repository, also new ones of its folders that are not ignored; a log may lie beside the folders."""
    known = run("git", "ls-files", cwd=ROOT, code=0).stdout.splitlines()
    new = run("git", "ls-files", "--others", "--exclude-standard", cwd=ROOT, code=0).stdout.splitlines()
    return [name for name in known + [name for name in new if "/" in name] if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of a copy of the repository; the wheel is made of the source distribution, as `python -m build` does it."""
    folder = tmp_path_factory.mktemp("built")
    for name in in_git():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "tree")
    run(*command, cwd=folder, env=ALONE, code=0, limit_s=170)
    return {
        "wheel": folder / f"scpl_dist-{__version__}-py3-none-any.whl",
        "sdist": folder / f"scpl_dist-{__version__}.tar.gz",
    }


def test_they_have_all_files_of_the_packages_and_no_others(built: dict[str, Path]) -> None:
    tracked = in_git()
    packages = {name.removeprefix("recipes/") for name in tracked if "scpl_dist" in Path(name).parts[0]} | {
        name.removeprefix("recipes/") for name in tracked if name.startswith("recipes/scpl_dist_recipes/")
    }
    with zipfile.ZipFile(built["wheel"]) as wheel:
        found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == packages
    assert {"scpl_dist/page/live.html", "scpl_dist/py.typed", "scpl_dist_recipes/words.py"} <= packages
    with tarfile.open(built["sdist"]) as sources:
        held = {name.partition("/")[2] for name in sources.getnames()}
    assert {name for name in tracked if not name.startswith(".")} <= held


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_each_is_installed_into_a_fresh_environment_and_trains(
    kind: str, built: dict[str, Path], tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, env=ALONE, code=0)
    python = environment / "bin" / "python"
    [packages] = environment.glob("lib/python*/site-packages")
    # What it needs is that of this environment: torch is large. What names a path in there is not followed.
    (packages / "needed.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    options = ["--no-deps", "--no-index", "--ignore-installed", "--no-build-isolation"]
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options, built[kind])
    run(*pip, cwd=tmp_path, env=ALONE, code=0, limit_s=120)
    places = "import scpl_dist, scpl_dist_recipes as r; print(scpl_dist.__file__, r.__file__, scpl_dist.__version__)"
    said = run(python, "-c", places, cwd=tmp_path, env=ALONE, code=0).stdout.split()
    assert said == [
        str(packages / "scpl_dist" / "__init__.py"),
        str(packages / "scpl_dist_recipes" / "__init__.py"),
        __version__,
    ]
    command = environment / "bin" / "scpl-dist"
    run(command, "init", cwd=tmp_path, env=ALONE, code=0)
    comments = [line for line in (tmp_path / "config.toml").read_text().splitlines() if line.startswith("#")]
    assert "# Passes over the training set." in comments
    short = ("-o", "run.epochs=1", "-o", "data.batch_size=512", "-o", "metrics.port=0")
    run(
        command,
        "train",
        "config.toml",
        "--run-dir",
        "run",
        *short,
        cwd=tmp_path,
        env=ALONE,
        code=0,
        limit_s=120,
    )
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 3
    run(command, "report", "run", cwd=tmp_path, env=ALONE, code=0)
    page = (tmp_path / "run" / "report.html").read_text()
    assert (ROOT / "scpl_dist" / "page" / "page.css").read_text().strip() in page
