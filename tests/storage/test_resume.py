"""Which checkpoint a run goes on from, with damaged files on a real file system."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scpl_dist.run.config import Config, load
from scpl_dist.storage.checkpoints import CheckpointError, commit, folder_for, manifest_of, steps, verify
from scpl_dist.storage.resume import begin, choose


def write(run_dir: Path, step: int, keep: int = 10, **values: Any) -> Path:
    """A committed checkpoint of two parts, of a run with these settings."""
    folder = folder_for(run_dir, step)
    folder.mkdir(parents=True)
    files = []
    for block in range(2):
        content = f"{step} {block}".encode() * 1000
        (folder / f"block-00{block}.pt").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append({"name": f"block-00{block}.pt", "bytes": len(content), "sha256": digest, "stage": block})
    position = {"epoch": 0, "step": step, "batch": step}
    recipe = load(values={key.replace("__", "."): value for key, value in values.items()}).recipe()
    manifest = {"step": step, "epoch": 0, "position": position, "files": files, "recipe": recipe}
    return commit(folder, manifest, keep=keep)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "a flipped bit": lambda folder: flip(folder / "block-001.pt"),
    "a cut file": lambda folder: (folder / "block-001.pt").write_bytes(b"1"),
    "a missing file": lambda folder: (folder / "block-001.pt").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"step": 1, "fi'),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a manifest of something else": lambda folder: (folder / "manifest.json").write_text(
        '{"files": [], "position": {}}'
    ),
    "files without names": lambda folder: (folder / "manifest.json").write_text(
        '{"files": [1], "position": {}}'
    ),
}


@pytest.mark.parametrize("damage", ["a cut file", "a missing file"])
def test_what_is_not_there_as_a_whole_is_not_committed(tmp_path: Path, damage: str) -> None:
    good = write(tmp_path, 1)
    again = folder_for(tmp_path, 1, "again")
    shutil.copytree(good, again)
    DAMAGES[damage](again)
    with pytest.raises(CheckpointError, match=r"block-001\.pt"):
        commit(again, manifest_of(good), keep=1)
    assert steps(tmp_path) == [good]
    verify(good)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    old, new = write(tmp_path, 1), write(tmp_path, 2)
    DAMAGES[damage](new)
    warnings: list[str] = []
    chosen = choose(tmp_path, "auto", warnings.append, Config())
    assert chosen is not None
    assert (chosen[0], chosen[1]["step"]) == (old, 1)
    (warning,) = warnings
    assert "step-2" in warning


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        write(tmp_path, step)
    folder_for(tmp_path, 11).mkdir()  # one that was never finished
    chosen = choose(tmp_path, "auto", pytest.fail, Config())
    assert chosen is not None
    assert chosen[0].name == "step-10"


def test_without_a_whole_checkpoint_nothing_starts_silently(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(write(tmp_path, step) / "block-000.pt")
    with pytest.raises(CheckpointError, match=r"step-2.*block-000.*step-1.*block-000"):
        choose(tmp_path, "auto", lambda text: None, Config())


def test_a_first_start_has_nothing_to_go_on_from(tmp_path: Path) -> None:
    assert choose(tmp_path, "auto", pytest.fail, Config()) is None
    write(tmp_path, 1)
    assert choose(tmp_path, "never", pytest.fail, Config()) is None


def test_who_asks_for_a_checkpoint_hears_that_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin(tmp_path, "auto", Config()) == ("", {}, [])
    assert f"nothing to resume in {tmp_path}" in capsys.readouterr().err
    assert begin(tmp_path, "never", Config()) == ("", {}, [])
    checkpoint = write(tmp_path, 1)
    assert begin(tmp_path, "auto", Config()) == (str(checkpoint.resolve()), verify(checkpoint), [checkpoint])
    assert capsys.readouterr().err == ""


def test_a_run_of_another_model_does_not_go_on(tmp_path: Path) -> None:
    write(tmp_path, 1, run__method="al")
    config = load(values={"run.method": "al", "al.code": 64})
    with pytest.raises(CheckpointError, match=r"of another model: al\.code = 128, now 64"):
        choose(tmp_path, "auto", lambda text: None, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("al.autoencoder_lr", 2.0),
        ("data.batch_size", 64),
        ("block", [{"index": 1, "freeze": False, "freeze_after_epoch": 3}]),
        ("loss.temperature", 0.2),
        ("pipeline.deferred_batch_norm", True),
        ("pipeline.replicas", 2),
        ("pipeline.schedule", "1f1b"),
        ("pipeline.wire_dtype", "bfloat16"),
        ("runtime.threads", 2),
    ],
)
def test_what_changes_the_result_is_warned_of(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, 1)
    warnings: list[str] = []
    assert choose(tmp_path, "auto", warnings.append, load(values={key: value})) is not None
    (warning,) = warnings
    assert f"{key} = " in warning
    assert f", now {value!r}; the result will not be that of an undisturbed run" in warning


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pipeline.stages", 3),
        ("pipeline.recompute", True),
        ("checkpoint.every_steps", 7),
        ("metrics.port", 0),
        ("runtime.timeout_s", 5.0),
    ],
)
def test_what_does_not_change_the_result_is_not(tmp_path: Path, key: str, value: Any) -> None:
    write(tmp_path, 1)
    assert choose(tmp_path, "auto", pytest.fail, load(values={key: value})) is not None


def test_a_folder_can_be_asked_for(tmp_path: Path) -> None:
    first = write(tmp_path / "other", 1)
    write(tmp_path / "other", 2)
    run_dir = tmp_path / "new"
    assert choose(run_dir, str(first), pytest.fail, Config()) == (first, verify(first))
    chosen = choose(run_dir, str(tmp_path / "other"), pytest.fail, Config())
    assert chosen is not None
    assert chosen[0].name == "step-2"
    with pytest.raises(CheckpointError, match="none"):
        choose(run_dir, str(tmp_path / "nowhere"), pytest.fail, Config())


def test_a_checkpoint_that_was_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    write(tmp_path, 1)
    asked = write(tmp_path, 2)
    flip(asked / "block-000.pt")
    with pytest.raises(CheckpointError, match="SHA-256"):
        choose(tmp_path, str(asked), pytest.fail, Config())


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][0]["name"] = "../../../etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        verify(folder)


def test_a_checkpoint_that_somebody_reads_while_it_is_dropped_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system the files that a reader holds stay in the folder, which cannot be removed then."""

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", refuse)
    newest = write(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [newest]
