"""Whole runs whose stages have several workers.

The first loss is that of one worker with the whole batch up to float32 sums in another order (relative 1e-5). Each
update then carries such differences on, and Adam, which divides by the size of a gradient, makes small ones larger,
by as much as the machine and the learning rate will have it: at the small one here losses differ by up to 1 part in
10,000 after 10 steps, and 1 part in 1,000 is asked for.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scpl_dist.run.config import load
from scpl_dist.run.faults import Fault
from tests.e2e.test_exactness import plain
from tests.support import reference
from tests.support.command import called
from tests.support.conduct import IMPATIENT, SMALL, Ended, Running, conduct, halted

RUNS = {
    "scpl": ["pipeline.replicas=2", "data.augmentation=strong"],
    "scpl, other numbers": ["pipeline.stages=3", "pipeline.replicas=[2,1,3]", "optimizer.accumulate=2"],
    "scpl, parts": [
        f"model.name={plain.__module__}:plain",
        "pipeline.micro_batches=3",
        "pipeline.replicas=[2,1]",
    ],
    "bp": ["run.method=bp", "pipeline.replicas=[1,2]", "pipeline.transport=gloo"],
    "gpipe": ["run.method=gpipe", "pipeline.micro_batches=3", "pipeline.replicas=[2,3]"],
    "early_exit": ["run.method=early_exit", "pipeline.replicas=[2,1]", "pipeline.transport=gloo"],
    "al": ["run.method=al", "pipeline.replicas=[3,2]"],
}


@pytest.mark.parametrize("name", RUNS)
def test_replicas_learn_what_one_worker_with_the_whole_batch_learns(name: str, tmp_path: Path) -> None:
    settings = ["run.epochs=2", "optimizer.lr=0.0001", *RUNS[name]]
    ended = conduct(tmp_path / "run", *settings)
    assert ended.code == 0, ended.screen
    wanted = reference.train(load(None, [*SMALL, *settings]))
    assert ended.losses().keys() == wanted.losses.keys()
    for (step, block), terms in ended.losses().items():
        expected = wanted.losses[step, block]
        assert terms == pytest.approx(expected, rel=1e-5 if step == 0 else 1e-3), (step, block)
    test = [row for row in ended.rows("eval") if row["split"] == "test"]
    assert [row["accuracy"] for row in test] == pytest.approx(wanted.accuracy, abs=0.03)
    assert {row["total"] for row in test} == {355}


# Checkpoints fall between two batches of an update too: an epoch has 5 steps.
SAVING = ("pipeline.replicas=[1,2]", "checkpoint.every_steps=3", "optimizer.accumulate=2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = conduct(tmp_path_factory.mktemp("undisturbed") / "run", *SAVING)
    assert ended.code == 0, ended.screen
    return ended


def test_a_killed_replica_costs_a_restart_and_no_bit(undisturbed: Ended, tmp_path: Path) -> None:
    fault = Fault(action="kill", stage=1, replica=1, step=7, phase="backward")
    ended = conduct(tmp_path / "run", *SAVING, "runtime.max_restarts=1", faults=(fault,))
    assert ended.code == 0, ended.screen
    assert ended.losses() == undisturbed.losses()
    assert [row["cause"] for row in ended.rows("restart")] == ["died"]
    assert "stage 1.1" in ended.rows("restart")[0]["reason"]


@pytest.mark.parametrize("phase", ["forward", "sync"])
def test_a_lost_replica_only_shrinks_its_stage(phase: str, tmp_path: Path) -> None:
    settings = ["run.epochs=2", "optimizer.lr=0.0001", "pipeline.replicas=[1,2]", "pipeline.elastic=[2,2]"]
    faults = (
        Fault(action="kill", stage=1, replica=1, step=5, phase=phase),
        Fault(
            action="delay", stage=0, step=8, phase="forward", seconds=5
        ),  # so that the others can be looked at
    )
    with Running(tmp_path / "run", *settings, "checkpoint.every_steps=2", faults=faults) as running:
        running.wait_for_rows("start", 1)
        before = [running.role(role) for role in ("0", "1.0", "coordinator")]
        running.wait_for_rows("start", 2)
        assert all(process.is_running() for process in before)
        ended = running.end()
    assert ended.code == 0, ended.screen
    assert [row["workers"] for row in ended.rows("start")] == [3, 2]
    wanted = reference.train(load(None, [*SMALL, *settings]))
    assert ended.losses().keys() == wanted.losses.keys()
    for place, terms in ended.losses().items():
        assert terms == pytest.approx(wanted.losses[place], rel=1e-3), place


@pytest.mark.parametrize("missing", [0, 1])
def test_who_was_started_as_a_replica_and_begins_alone_has_all_samples(missing: int, tmp_path: Path) -> None:
    settings = ["run.epochs=2", "pipeline.replicas=[2,1]", "pipeline.elastic=[2,2]", "runtime.replace_s=1"]
    never = Fault(action="stop", stage=0, replica=missing, phase="loading")
    with Running(tmp_path / "run", *settings, faults=(never,)) as running:
        absent = halted(running, f"0.{missing}", 1)
        running.wait_for_rows("start", 1)
        absent.kill()
        ended = running.end()
    assert ended.code == 0, ended.screen
    assert [row["workers"] for row in ended.rows("start")] == [2]
    wanted = reference.train(load(None, [*SMALL, *settings]))
    assert ended.losses() == wanted.losses
    test = [row for row in ended.rows("eval") if row["split"] == "test"]
    assert [row["accuracy"] for row in test] == wanted.accuracy
    assert {row["total"] for row in test} == {355}


def test_a_checkpoint_of_replicas_is_that_of_a_run_without(undisturbed: Ended) -> None:
    called("checkpoint", "verify", undisturbed.run)
    names = sorted(path.name for path in (undisturbed.run / "checkpoints" / "step-20").iterdir())
    assert names == [*(f"block-{block:03d}.pt" for block in range(4)), "manifest.json"]
    ended = conduct(undisturbed.run, "pipeline.replicas=1", "run.epochs=5", options=("--resume", "auto"))
    assert ended.code == 0, ended.screen
    assert max(step for step, _ in ended.losses()) == 24


def test_a_replica_that_hangs_is_named(tmp_path: Path) -> None:
    fault = Fault(action="hang", stage=1, replica=1, step=3, phase="forward")
    settings = ("pipeline.replicas=2", IMPATIENT)
    ended = conduct(tmp_path / "run", *settings, faults=(fault,))
    assert ended.code == 1, ended.screen
    found = ended.exit_json
    assert (found["stage"], found["replica"], found["rank"]) == (1, 1, 3)
    assert ended.last_line.startswith("  cause:      stage 1.1 has made no progress for")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["pipeline.replicas=[1,2,1]"],
            "pipeline.replicas = [1, 2, 1] has 3 entries for pipeline.stages = 2",
        ),
        (["pipeline.replicas=0"], "pipeline.replicas = 0: input should be greater than 0"),
        (["pipeline.replicas=two"], "pipeline.replicas = 'two': input should be a valid integer"),
        (["pipeline.replicas=2", "data.batch_size=253"], "the last micro-batch of an epoch has 1 sample(s)"),
        (
            ["pipeline.replicas=2", "run.method=gpipe", "pipeline.deferred_batch_norm=true"],
            "replicas share BatchNorm's statistics of each micro-batch",
        ),
    ],
)
def test_what_replicas_cannot_do_is_said_before_anything_starts(settings: list[str], message: str) -> None:
    overrides = [part for text in settings for part in ("-o", text)]
    assert message in called("train", "--dry-run", *overrides, code=2).stderr
