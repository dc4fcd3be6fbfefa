"""What a user types, and what the user sees: the contract of the command, run for real."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scpl_dist.run.config import load
from tests.support import programs
from tests.support.command import called, scpl_dist
from tests.support.run_folder import rows

SMALL = ["-o", "run.epochs=2", "-o", "data.batch_size=256", "-o", "metrics.port=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A finished run of the main job, shortened, and what it printed."""
    run = tmp_path_factory.mktemp("command") / "run"
    return run, scpl_dist("train", "--run-dir", run, *SMALL)


def test_the_end_of_a_run_says_accuracy_time_and_folder(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, done = finished
    result = json.loads((run / "result.json").read_text())
    assert f"{result['accuracy_last']:.4f}" in done.stdout
    assert f"run folder {run}" in done.stdout
    assert "steps in" in done.stdout


def test_the_run_folder_has_everything_of_the_contract(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, _ = finished
    assert load(run / "config.toml").run.epochs == 2
    assert json.loads((run / "exit.json").read_text())["code"] == 0
    result = json.loads((run / "result.json").read_text())
    assert result["method"] == "scpl"
    assert result["stages"] == 2
    assert result["steps"] == 10
    assert 0 <= result["accuracy_best"] <= 1
    assert result["samples_per_second"] > 0
    for stage in result["per_stage"]:
        assert stage["busy_seconds"] > 0
        assert stage["peak_memory_bytes"] > 0
    assert result["per_stage"][0]["bytes_sent"] == result["per_stage"][1]["bytes_received"] > 0
    train = rows(run, "train")
    assert {(row["step"], row["block"]) for row in train} == {(s, b) for s in range(10) for b in range(4)}
    assert {row["stage"] for row in train if row["block"] < 2} == {0}
    assert (run / "checkpoints" / "step-10" / "manifest.json").is_file()
    assert (run / "log" / "stage1.log").is_file()


def test_evaluate_gives_the_accuracy_of_the_run_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, _ = finished
    result = json.loads((run / "result.json").read_text())
    said = scpl_dist("evaluate", run).stdout.splitlines()[0]
    assert f"{result['accuracy_last']:.4f}" in said
    assert said.endswith("with the weights of step-10")


def test_plain_pytorch_runs_the_exported_weights(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run, _ = finished
    scpl_dist("export", run, tmp_path / "out.safetensors")
    script = programs.ROOT / "examples" / "load_export.py"
    done = programs.run(sys.executable, script, tmp_path / "out.safetensors", code=0)
    assert "accuracy on all 1797 images" in done.stdout


def test_ten_lines_train_own_blocks_on_own_data(tmp_path: Path) -> None:
    script = programs.ROOT / "examples" / "own_model.py"
    done = programs.run(sys.executable, script, cwd=tmp_path, code=0, limit_s=150)
    accuracy = float(done.stdout.rsplit("test accuracy ", 1)[1])
    assert accuracy > 0.97  # chance is 0.5


def test_a_dry_run_shows_configuration_and_stages_and_starts_nothing(tmp_path: Path) -> None:
    done = called("train", "--dry-run", "-o", "pipeline.stages=3", "--run-dir", tmp_path / "run")
    assert "stages = 3" in done.stdout
    assert "output of a sample" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (["pipeline.stages=0"], ["pipeline.stages = 0", "greater than 0"]),
        (["pipeline.stages=5"], ["pipeline.stages = 5", "has 4 blocks", "at most 4"]),
        (["data.batch_size=5000"], ["data.batch_size = 5000", "use at most"]),
        (["optimizer.lr=-1.0"], ["optimizer.lr = -1.0", "greater than 0"]),
        (["model.name=vgg99"], ["model.name = 'vgg99'", "vgg_tiny"]),
        (["data.name=mnist99"], ["data.name = 'mnist99'", "digits"]),
        (["run.method=magic"], ["run.method = 'magic'", "scpl"]),
    ],
)
def test_a_users_mistake_is_exit_2_before_any_process_starts(
    overrides: list[str], texts: list[str], tmp_path: Path
) -> None:
    options = [part for text in overrides for part in ("-o", text)]
    done = called("train", "--run-dir", tmp_path / "run", *options, code=2)
    assert all(text in done.stderr for text in texts), done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistyped_key_is_named_without_a_traceback(tmp_path: Path) -> None:
    done = scpl_dist("train", "--run-dir", tmp_path / "run", "-o", "pipeline.stagse=2", code=2)
    assert "pipeline.stagse" in done.stderr
    assert "unknown key" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_taken_port_is_exit_2_with_the_fix(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = called("train", "--run-dir", tmp_path / "run", "-o", f"metrics.port={port}", code=2)
    assert f"metrics.port = {port}" in done.stderr
    assert "-o metrics.port=0" in done.stderr


def test_an_unwritable_run_folder_is_exit_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = scpl_dist("train", "--run-dir", tmp_path / "file" / "run", *SMALL, code=2)
    assert str(tmp_path / "file" / "run") in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option_is_exit_2() -> None:
    said = called("train", "--epochs", "3", code=2).stderr
    assert "No such option" in said
    assert said.endswith("scpl-dist: settings are given as -o run.epochs=VALUE\n")


def test_a_run_folder_given_as_configuration_is_exit_2_with_what_was_meant(tmp_path: Path) -> None:
    said = called("train", tmp_path, code=2).stderr
    assert f"a run goes on with --run-dir {tmp_path} --resume auto" in said
