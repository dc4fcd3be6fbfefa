"""What is said of a run before it starts: mistakes, and what is hardly meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from scpl_dist import data
from scpl_dist.data import DataSource
from scpl_dist.data.source import Split
from scpl_dist.launch import preflight as preflights
from scpl_dist.launch.preflight import examine, preflight
from scpl_dist.run.config import load

MODEL = """
from torch import nn

def plain(classes):
    return [nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), nn.Sequential(nn.Tanh(), nn.Linear(8, 8))]

def empty(classes):
    return [nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), nn.Tanh()]

def overwriting(classes):
    return [nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))]

def headless(classes):
    blocks = plain(classes)
    blocks[1].predictor = lambda classes: 1 / 0
    return blocks
"""
METHODS = """
from scpl_dist.methods.base import LocalMethod
from scpl_dist.methods.block import TrainableBlock

class NoBlocks(LocalMethod):
    name = "own"
    def trainable(self, index, block, before, after):
        raise RuntimeError("not yet")

class Blocks(NoBlocks):
    def trainable(self, index, block, before, after):
        return TrainableBlock(block, {})

class NoPlan(Blocks):
    def train(self, spec, micro_batches):
        return self.missing

class NoStart(Blocks):
    def __init__(self, *args):
        super().__init__(*args)
        {}["setting"]

class Nothing(NoBlocks):
    def trainable(self, index, block, before, after):
        pass
"""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Checks a run of one of these models on a host with 4 cores."""
    monkeypatch.setattr(preflights, "cores", lambda: 4)
    file = tmp_path / "model.py"
    file.write_text(MODEL)

    def run(model: str = "plain", position: dict[str, int] | None = None, **values: Any) -> None:
        named = {key.replace("__", "."): value for key, value in values.items()}
        preflight(load(values={"model.name": f"{file}:{model}"} | named), position=position)

    return run


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("bp", "loss.temperature", 0.2),
        ("gpipe", "loss.name", "ce"),
        ("al", "loss.projector", "i"),
        ("early_exit", "loss.name", "predsim"),
        ("early_exit", "al.code", 64),
        ("scpl", "al.bridge", 0),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(
    method: str, key: str, value: Any, check: Any
) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"{key} = {value!r}: the method {method} does not read it")
    ):
        check(**{"run.method": method, key: value})


def test_a_run_that_goes_on_is_not_asked_again(check: Any) -> None:
    position = {"epoch": 0, "step": 0, "batch": 0}
    check(position=position, run__method="bp", loss__temperature=0.2, model__weights="gone.pt")


def test_first_weights_are_compared_with_the_model(
    check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"model.weights = 'gone.pt': there is no gone.pt; check the path"):
        check(model__weights="gone.pt")
    path = str(tmp_path / "first.pt")
    torch.save({"0.1.weight": torch.zeros(8, 256), "0.1.bias": torch.zeros(8)}, path)
    with pytest.raises(ValueError, match=r"does not fit the model: 2 missing \(.*1.weight, .*1.bias\)"):
        check(model__weights=path)
    check(model__weights=path, model__weights_strict=False)
    assert "warning: model.weights = " in capsys.readouterr().err


def test_what_a_task_cannot_be_told_is_refused(check: Any) -> None:
    for values, problem in (
        ({"task__metrics": ["f2"]}, "task.metrics = 'f2': unknown"),
        ({"task__class_weights": [1.0]}, "1 weights for 10 classes"),
        (
            {"run__watch": "top5"},
            "run.watch = 'top5': the evaluations of this run have accuracy, loss; take one",
        ),
        ({"run__watch": "loss", "run__method": "al"}, "the evaluations of this run have accuracy; take one"),
    ):
        with pytest.raises(ValueError, match=problem):
            check(**values)


def test_a_checkpoint_of_other_batches_is_refused(check: Any) -> None:
    position = {"epoch": 1, "step": 11, "batch": 1}
    check(position=position, data__batch_size=128)
    with pytest.raises(
        ValueError, match=r"does not fit 20 epochs of 13 steps: resume with .* data\.batch_size"
    ):
        check(position=position, data__batch_size=100)


@pytest.mark.parametrize(
    ("host", "reason"), [("nowhere.invalid", "does not resolve"), ("192.0.2.1", "listen")]
)
def test_a_host_of_the_metrics_that_is_not_this_one_is_refused(host: str, reason: str, check: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        check(metrics__host=host)


def test_a_run_without_doubts_is_checked_in_silence(check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("scpl", "bp"):
        check(run__method=method, runtime__threads=2)
    check("empty", run__method="bp")
    check("overwriting")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "values", "text"),
    [
        ("empty", {}, "block 1 (Tanh) has no parameters: its loss trains its own heads only; join it"),
        ("overwriting", {"run__method": "bp"}, "use inplace=False in its first layer"),
        ("plain", {"runtime__threads": 3}, "2 workers, on 4 CPU core(s): use runtime.threads = 2"),
        ("plain", {"pipeline__replicas": 3}, "6 workers, on 4 CPU core(s): use fewer workers here"),
    ],
)
def test_what_is_hardly_meant_is_a_warning_with_the_fix(
    model: str, values: dict[str, Any], text: str, check: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    check(model, **values)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert text in warning


class SequenceLabels(DataSource):
    """The digits, with labels as a data set of an installed package may give them."""

    def __init__(self) -> None:
        self._digits = data.resolve(load())
        self.classes, self.sizes = self._digits.classes, self._digits.sizes

    def batch(self, split: Split, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        inputs, labels = self._digits.batch(split, epoch, indices)
        return inputs, labels[:, None].expand(-1, 5)


def test_labels_that_no_head_can_learn_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"data.name = 'digits': the label of a sample has shape \(5,\)"):
        examine(load(values={"metrics.port": 0}), SequenceLabels())


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("NoBlocks", "{file}, line 8: RuntimeError: not yet"),
        ("NoPlan", "{file}, line 16: AttributeError: 'NoPlan' object has no attribute 'missing'"),
        ("NoStart", "{file}, line 21: KeyError: 'setting'"),
        ("Nothing", "trainable() gave NoneType for block 0; give a TrainableBlock"),
    ],
)
def test_a_method_of_the_user_that_fails_is_told_with_its_line(
    method: str, what: str, check: Any, tmp_path: Path
) -> None:
    file = tmp_path / "methods.py"
    file.write_text(METHODS)
    told = f"run.method = '{file}:{method}': {what.format(file=file)}"
    with pytest.raises(ValueError, match=re.escape(told)):
        check(run__method=f"{file}:{method}")


def test_a_head_that_the_model_asks_for_and_that_fails_is_told_with_its_line(
    check: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.py"
    with pytest.raises(
        ValueError, match=re.escape(f"model.name = '{file}:headless': {file}, line 15: ZeroDivisionError")
    ):
        check(model="headless")


def test_a_model_takes_its_channels_from_the_data(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for index in range(12):
            Image.new("RGB", (16, 16)).save(tmp_path / label / f"{index}.png")
    values = {"data.name": "image_folder", "data.root": str(tmp_path), "data.batch_size": 4}
    plan = preflight(load(values=values))
    [first, *_] = plan.trainables([0]).values()
    assert next(first.parameters()).shape == (16, 3, 3, 3)
    with pytest.raises(ValueError, match=r"cannot take \(2, 3, 16, 16\) from the data \(see docs/models.md"):
        preflight(load(values=values | {"model.args": {"channels": 1}}))
