"""Checkpoints: which stay, which are found damaged, and that no damaged one is ever trained on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scpl_dist.run.faults import Fault
from tests.support import programs
from tests.support.command import called, scpl_dist
from tests.support.conduct import IMPATIENT, IMPATIENT_S, Ended, Running, conduct, halted

pytestmark = pytest.mark.timeout(400)
SETTINGS = ("checkpoint.every_steps=4", "checkpoint.keep=3", "pipeline.stages=1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = conduct(tmp_path_factory.mktemp("finished") / "run", *SETTINGS)
    assert ended.code == 0, ended.screen
    return ended


def flip(checkpoint: Path) -> str:
    path = checkpoint / "block-001.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "block-001.pt: damaged, its SHA-256 is not that of the manifest"


def truncate(checkpoint: Path) -> str:
    path = checkpoint / "block-002.pt"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    return f"block-002.pt: {size - 1} bytes instead of {size}"


def lose_part(checkpoint: Path) -> str:
    (checkpoint / "block-000.pt").unlink()
    return "block-000.pt: No such file"


def lose_manifest(checkpoint: Path) -> str:
    (checkpoint / "manifest.json").unlink()
    return "manifest.json: No such file"


def of_another_model(checkpoint: Path) -> str:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["recipe"]["model.name"] = "vgg8"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return "of another model: model.name = 'vgg8', now 'vgg_tiny'"


DAMAGES: list[Callable[[Path], str]] = [flip, truncate, lose_part, lose_manifest, of_another_model]


def test_the_newest_and_the_best_stay(finished: Ended) -> None:
    folder = finished.run / "checkpoints"
    scores = {row["epoch"]: row["accuracy"] for row in finished.rows("eval") if row["split"] == "validation"}
    best = max(scores, key=lambda epoch: (scores[epoch], -epoch))
    names = {f"step-{step}" for step in (12, 16, 20, 5 * (best + 1))}
    assert {path.name for path in folder.iterdir()} == names | {"latest", "best"}
    assert (folder / "latest").read_text() == "step-20\n"
    assert (folder / "best").read_text() == f"step-{5 * (best + 1)}\n"
    manifest = json.loads((folder / "step-12" / "manifest.json").read_text())
    position = {key: manifest["position"][key] for key in ("epoch", "step", "batch")}
    assert position == {"epoch": 2, "step": 12, "batch": 2}
    assert {file["name"] for file in manifest["files"]} == {f"block-{block:03d}.pt" for block in range(4)}
    assert all(len(file["sha256"]) == 64 for file in manifest["files"])


def test_ls_and_verify_tell_what_is_there_and_what_is_broken(finished: Ended, tmp_path: Path) -> None:
    shown = called("checkpoint", "ls", finished.run).stdout.splitlines()
    assert shown[-1].startswith("step-20")
    assert shown[-1].rstrip().endswith("latest")
    assert called("checkpoint", "verify", finished.run).stdout.count(": ok, 4 files") == len(shown) - 1
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    reason = flip(run / "checkpoints" / "step-16")
    done = called("checkpoint", "verify", run, code=1)
    assert f"step-16: DAMAGED: {run / 'checkpoints' / 'step-16'}/{reason}" in done.stdout
    called("checkpoint", "ls", tmp_path / "nothing", code=2)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: str(damage.__name__))
def test_damage_is_named_and_the_checkpoint_before_is_used(
    damage: Callable[[Path], str], finished: Ended, tmp_path: Path
) -> None:
    from scpl_dist.run import config
    from scpl_dist.storage import resume

    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    reason = damage(run / "checkpoints" / "step-20")
    warnings: list[str] = []
    chosen = resume.choose(run, "auto", warnings.append, config.load(run / "config.toml"))
    assert chosen is not None
    assert chosen[0].name == "step-16"
    assert len(warnings) == 1
    assert reason in warnings[0]
    assert "step-20 is not usable, trying the one before" in warnings[0]


def test_a_run_goes_on_before_the_damage_and_comes_to_the_same(finished: Ended, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    reason = flip(run / "checkpoints" / "step-20")
    ended = conduct(run, "pipeline.stages=2", *SETTINGS[:2], options=("--resume", "auto"))
    assert ended.code == 0, ended.screen
    assert f"warning: checkpoint step-20 is not usable, trying the one before: {run}" in ended.screen
    assert reason in ended.screen
    assert ended.losses() == finished.losses()
    assert (run / "checkpoints" / "step-20.aside").is_dir()
    called("checkpoint", "verify", run)


def test_without_a_good_checkpoint_nothing_is_trained(finished: Ended, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    reasons = [
        damage(checkpoint)
        for damage, checkpoint in zip(DAMAGES * 2, sorted((run / "checkpoints").glob("step-*")), strict=False)
    ]
    before = finished.rows("train"), finished.exit_json
    ended = conduct(run, *SETTINGS, options=("--resume", "auto"))
    assert ended.code == 1, ended.screen
    assert "never starts from the beginning" in ended.last_line
    for reason in reasons:
        assert reason in ended.last_line
    assert (ended.rows("train"), ended.exit_json) == before


def test_a_checkpoint_with_nan_which_an_earlier_version_wrote_is_named_with_the_way_on(
    finished: Ended, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    checkpoint = run / "checkpoints" / "step-20"
    part = checkpoint / "block-001.pt"
    state = torch.load(part, weights_only=True)
    name = next(name for name in state["block"] if name.endswith("weight"))
    state["block"][name].fill_(torch.nan)
    torch.save(state, part)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (entry,) = (entry for entry in manifest["files"] if entry["name"] == part.name)
    content = part.read_bytes()
    entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    ended = conduct(run, *SETTINGS, "runtime.max_restarts=3", options=("--resume", "auto"))
    assert ended.code == 1, ended.screen
    assert f"step-20: weight {name} of block 1 is NaN or infinite" in ended.last_line
    assert "move this checkpoint away, and --resume auto takes the one before" in ended.last_line
    assert not ended.rows("restart")


def resumed_without(run: Path, name: str, *settings: str) -> Running:
    """A run that goes on from step 16; its worker looks for a file that is not there any more."""
    checkpoint = run / "checkpoints" / "step-16"
    faults = (Fault(action="stop", phase="loading"),)  # the launcher has looked by then
    running = Running(run, *SETTINGS, *settings, faults=faults, options=("--resume", str(checkpoint)))
    try:
        worker = halted(running, "0", 1)
        (checkpoint / name).rename(run.with_name("away"))
        worker.send_signal(signal.SIGCONT)
    except BaseException:
        running.close()
        raise
    return running


@pytest.mark.parametrize("name", ["manifest.json", "block-002.pt"])
def test_a_worker_waits_for_files_that_its_host_shows_late(
    name: str, finished: Ended, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    late = run / "checkpoints" / "step-16" / name
    with resumed_without(run, name) as running:

        def missing() -> bool:
            assert not running.ended, running.output
            return f"waiting for {late}" not in (run / "log" / "stage0.log").read_text()

        programs.until_nothing(missing)
        run.with_name("away").rename(late)
        ended = running.end()
    assert ended.code == 0, ended.screen
    assert ended.losses() == finished.losses()


def test_a_host_that_never_shows_a_checkpoint_is_named(finished: Ended, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    with resumed_without(run, "block-002.pt", IMPATIENT) as running:
        ended = running.end()
    assert ended.code == 1, ended.screen
    assert ended.exit_json["cause"] == "checkpoint"
    assert "what to do: see to the file" in ended.screen
    for word in ("step-16/block-002.pt", socket.gethostname(), f"within {IMPATIENT_S / 2:g} s", "and resume"):
        assert word in ended.last_line


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """A limit on the size of files acts like a disk that fills up: some parts fit, the larger ones do not."""
    previous = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous)


def test_a_full_disk_ends_the_run_and_harms_no_checkpoint(finished: Ended, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.run, run)
    shutil.rmtree(run / "checkpoints" / "step-20")
    (run / "checkpoints" / "latest").write_text("step-16\n")
    with limited(1 << 20):
        running = Running(run, *SETTINGS, options=("--resume", "auto"))
    with running:
        ended = running.end()
    assert ended.code == 1, ended.screen
    assert "File too large" in ended.last_line
    assert "MB free" in ended.last_line
    assert f"{run}/checkpoints/step-20." in ended.last_line
    assert ended.exit_json["cause"] == "disk"
    assert (ended.exit_json["stage"], ended.exit_json["phase"], ended.exit_json["step"]) == (
        0,
        "checkpoint",
        20,
    )
    assert called("checkpoint", "verify", run).stdout.splitlines()[-1] == "step-16: ok, 4 files"


def test_a_restart_that_cannot_be_written_down_is_none_and_the_cause_is_said_last(tmp_path: Path) -> None:
    settings = ("run.epochs=1000", "checkpoint.every_steps=0", "checkpoint.best=false", "pipeline.stages=1")
    with limited(1 << 16):  # metrics.jsonl reaches it first
        running = Running(tmp_path / "run", *settings, "runtime.max_restarts=1")
    with running:
        ended = running.end()
    assert ended.code == 1, ended.screen
    assert "Traceback" not in ended.screen
    last = ended.screen.rstrip().splitlines()[-2:]
    assert last[0].startswith(
        f"scpl-dist: not started again: {ended.run}/metrics.jsonl cannot be written (File too"
    )
    assert "free some space" in last[0]
    assert last[1].startswith("  cause:      metrics.jsonl could not be written: ")
    assert ended.exit_json["cause"] == "disk"


@pytest.mark.parametrize("size", ["300k", "8k"], ids=["at the first checkpoint", "at the start"])
def test_on_a_disk_that_is_too_small_the_cause_is_said_and_nothing_useless_stays(
    size: str, tmp_path: Path
) -> None:
    programs.need_root()
    disk = tmp_path / "disk"
    disk.mkdir()
    programs.run("mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk, code=0)
    try:
        ended = conduct(disk / "run", *SETTINGS)
        assert ended.code == 1, ended.screen
        assert "No space left on device" in ended.screen
        assert "Traceback" not in ended.screen.partition("The run failed.")[0]
        if size == "300k":
            assert "No space left on device" in ended.last_line
            assert ended.exit_json["cause"] == "disk"
            assert not any((ended.run / "checkpoints").iterdir())
        else:
            again = scpl_dist("train", "--resume", "auto", "--run-dir", ended.run, code=2)
            assert "config.toml cannot be written (No space left on device): free some space" in again.stderr
    finally:
        programs.run("umount", disk, code=0)
