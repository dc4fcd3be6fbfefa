"""What the version before has written, `data/run_of_0.1.0` and its export, is read by this one.

Written once, by 0.1.0: ``scpl-dist train -o run.method=early_exit -o model.name=tests/storage/data/tiny.py:blocks
-o run.epochs=4 -o data.batch_size=128 -o data.augmentation=none -o optimizer.lr=0.03 -o loss.classifier=l
-o checkpoint.every_steps=30 -o metrics.port=0``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import scpl_dist
from scpl_dist.commands import checkpoints
from scpl_dist.commands.report import report
from tests.support.command import called
from tests.support.command import scpl_dist as command
from tests.support.programs import ROOT

DATA = Path(__file__).parent / "data"
RUN = DATA / "run_of_0.1.0"


@pytest.fixture(autouse=True)
def where_the_run_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # its configuration names the model's file from here


def losses(run: Path) -> dict[tuple[int, int], float]:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    return {(row["step"], row["block"]): row["loss"] for row in rows if row["event"] == "train"}


def test_its_accuracy_is_found_again_with_and_without_early_exit() -> None:
    found = scpl_dist.evaluate(RUN)
    assert found["accuracy"] == json.loads((RUN / "result.json").read_text())["accuracy_last"]
    assert (found["total"], found["left"]) == (355, [0, 0, 355])
    assert scpl_dist.evaluate(RUN, threshold=0.5)["left"] == [106, 13, 236]


def test_its_weights_are_exported_as_they_were(tmp_path: Path) -> None:
    assert scpl_dist.export(RUN, tmp_path / "out.safetensors") == 19
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(DATA / "export.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_its_checkpoints_are_listed_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row[0] for row in checkpoints.listing(RUN)]
    called = [row[-1] for row in checkpoints.listing(RUN)]
    assert (names, called) == (["step-30", "step-40"], ["", "best, latest"])
    assert checkpoints.check(RUN) == 0
    assert capsys.readouterr().out == "step-30: ok, 3 files\nstep-40: ok, 3 files\n"


def test_it_is_drawn_and_only_read(tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (RUN, *RUN.rglob("*"))}
    assert report(RUN, tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    scpl_dist.evaluate(RUN, "validation")
    assert {path: path.stat().st_mtime_ns for path in (RUN, *RUN.rglob("*"))} == before


def test_it_goes_on_from_its_checkpoint_to_the_same_end(tmp_path: Path) -> None:
    """Within rounding: another machine may add up in another order."""
    command("train", "--resume", RUN / "checkpoints" / "step-30", "--run-dir", tmp_path / "run")
    found, expected = losses(tmp_path / "run"), losses(RUN)
    assert found.keys() == {(step, block) for step in range(30, 40) for block in range(3)}
    assert found == pytest.approx({place: expected[place] for place in found}, rel=1e-3)


def test_a_model_that_only_the_weights_tell_apart_is_refused_at_once(tmp_path: Path) -> None:
    run = shutil.copytree(RUN, tmp_path / "run")
    for path in run.glob("checkpoints/*/manifest.json"):  # as if it knew nothing of this key
        manifest = json.loads(path.read_text())
        del manifest["recipe"]["loss.classifier"]
        path.write_text(json.dumps(manifest))
    settings = ("-o", "loss.classifier=m", "-o", "runtime.max_restarts=5")
    said = command("train", "--resume", "auto", "--run-dir", run, *settings, code=2).stderr
    assert "the checkpoint belongs to another model" in said
    assert "restart 1" not in said


def test_its_adam_is_known_though_it_does_not_name_it() -> None:
    checkpoint = RUN / "checkpoints" / "step-30"
    said = called("train", "--resume", checkpoint, "-o", "optimizer.name=sgd", code=1).stderr
    assert "of another model: optimizer.name = 'adam', now 'sgd'" in said


def test_its_own_folder_goes_on(tmp_path: Path) -> None:
    run = shutil.copytree(RUN, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-40")
    (run / "checkpoints" / "latest").write_text("step-30\n")
    done = command("train", "--resume", "auto", "--run-dir", run)
    assert "40 steps in" in done.stdout
    assert losses(run).keys() == losses(RUN).keys()
