"""The claim of the project: the number of processes does not change a bit of the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scpl_dist.config import load
from tests import reference
from tests.command import scpl_dist

SETTINGS = ["run.epochs=2", "data.batch_size=256", "data.augmentation=strong", "metrics.port=0"]


@pytest.fixture(scope="module")
def expected() -> reference.Reference:
    return reference.train(load(None, SETTINGS))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_losses_weights_and_accuracy_equal_a_plain_loop(
    stages: int, expected: reference.Reference, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    scpl_dist("train", "--run-dir", run, *settings(f"pipeline.stages={stages}"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {(row["step"], row["block"]): row["terms"] for row in rows if row["event"] == "train"}
    assert losses == expected.losses
    accuracy = [row["accuracy"] for row in rows if row["event"] == "eval" and row["split"] == "test"]
    assert accuracy == expected.accuracy

    scpl_dist("export", run, tmp_path / "out.safetensors")
    exported = load_file(tmp_path / "out.safetensors")
    wanted = reference.tensors(expected.units)
    assert exported.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(exported[name], tensor), name


def settings(*more: str) -> list[str]:
    return [part for text in (*SETTINGS, *more) for part in ("-o", text)]
