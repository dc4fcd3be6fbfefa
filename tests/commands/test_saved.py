"""The weights that a run has saved, as ``evaluate`` and ``export`` find and write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from scpl_dist import data
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.storage import checkpoints
from scpl_dist.storage.parts import part_name, read_part, write_part
from scpl_dist.worker.updater import Updater
from tests.support.command import called
from tests.support.saved_runs import saved


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an earlier version with three checkpoints: a bias of block 1 is NaN in the newest two."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    folder.mkdir()
    config = load()
    (folder / "config.toml").write_text(config.to_toml())
    source = data.resolve(config)
    plan = Plan.plan(config, source.classes, source.example())
    trainables = plan.trainables(range(4))
    for step in (10, 20, 30):
        if step == 20:
            with torch.no_grad():
                next(iter(trainables[1].heads.parameters()))[0] = torch.nan
        states = {block: Updater(own, config).state_dict() for block, own in trainables.items()}
        commit(folder, step, states)
    return folder


def commit(folder: Path, step: int, states: Mapping[int, dict[str, object]], keep: int = 3) -> None:
    target = checkpoints.folder_for(folder, step)
    files = [write_part(target / part_name(block), state) for block, state in states.items()]
    position = {"epoch": 0, "step": step, "batch": 0}
    checkpoints.commit(target, {"step": step, "position": position, "files": files}, keep)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_weights_that_are_not_finite_are_refused_with_the_last_that_are(
    run: Path, tmp_path: Path, command: str
) -> None:
    target = [tmp_path / "out.safetensors"] if command == "export" else []
    said = called(command, run, *target, code=1).stderr
    assert said.startswith(f"scpl-dist: {run}/checkpoints/step-30: weight projector.")
    assert said.endswith(
        "of block 1 is NaN or infinite: take --checkpoint step-10, the last that is finite\n"
    )
    assert list(tmp_path.iterdir()) == []
    called(command, run, *target, "--checkpoint", "step-10")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_checkpoint_that_is_not_there_is_a_mistake_and_those_that_are_there_are_listed(
    run: Path, tmp_path: Path, command: str
) -> None:
    target = [tmp_path / "out.safetensors"] if command == "export" else []
    for name in ("step-7", "best"):
        said = called(command, run, *target, "--checkpoint", name, code=2).stderr
        wanted = f"--checkpoint {name}: {run} has no such checkpoint; it has step-10, step-20, step-30"
        assert said == f"scpl-dist: {wanted}\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("out.pt", "out.pt: end its name in .safetensors (safetensors), .onnx (onnx), .pt2 (torch_export)"),
        ("nowhere/out.safetensors", "there is no folder {folder}/nowhere; make it first"),
        ("folder.safetensors", "cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_or_would_lie_is_refused(
    run: Path, tmp_path: Path, name: str, says: str
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    said = called("export", run, tmp_path / name, "--checkpoint", "step-10", code=2).stderr
    assert says.format(folder=tmp_path) in said
    assert len(said.splitlines()) == 1


def test_whoever_only_reads_leaves_a_run_folder_as_it_is(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}
    called("evaluate", run, "--checkpoint", "step-10")
    called("export", run, tmp_path / "out.safetensors", "--checkpoint", "step-10")
    called("report", run, tmp_path / "out.png")
    called("top", run, "--once", code=2)
    called("checkpoint", "ls", run)
    # A folder's time changes with each entry that comes or goes, so a file that is tried and removed is seen, too.
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before


def test_a_picture_that_cannot_be_written_is_a_mistake(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    said = called("report", run, tmp_path / "nowhere" / "out.png", code=2).stderr
    assert "out.png cannot be written (No such file or directory): name another file" in said


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_another_checkpoint_is_chosen_if_a_run_that_goes_on_removes_the_first_one_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    run = saved(tmp_path / "run")
    states = {block: read_part(run / "checkpoints" / "step-8", block) for block in range(4)}
    read: list[tuple[str, int]] = []

    def reading(checkpoint: Path, block: int) -> dict[str, object]:
        read.append((checkpoint.name, block))
        if read[-1] == ("step-8", 2):
            commit(run, 9, states, keep=1)
        return read_part(checkpoint, block)

    monkeypatch.setattr("scpl_dist.commands.saved.read_part", reading)
    target = [tmp_path / "out.safetensors"] if command == "export" else []
    said = called(command, run, *target).stdout
    assert read == [("step-8", block) for block in range(3)] + [("step-9", block) for block in range(4)]
    assert command == "export" or "with the weights of step-9\n" in said


def test_blocks_that_are_read_one_at_a_time_are_of_one_checkpoint_or_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(tmp_path / "run")
    states = {block: read_part(run / "checkpoints" / "step-8", block) for block in range(4)}

    def reading(checkpoint: Path, block: int) -> dict[str, object]:
        if block == 2:
            commit(run, 9, states, keep=1)
        return read_part(checkpoint, block)

    monkeypatch.setattr("scpl_dist.commands.saved.read_part", reading)
    said = called("evaluate", run, "--low-memory", code=1).stderr
    assert said.startswith(f"scpl-dist: {run}/checkpoints/step-8 was removed by the run, which goes on, ")
