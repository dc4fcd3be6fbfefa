"""Exports of whole models, checked by who runs them: onnxruntime, and torch without this package."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import scpl_dist
from tests.support.command import called
from tests.support.files import write_csv
from tests.support.saved_runs import saved


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # What is computed in bfloat16 in training is exported in float32.
    values = {"run.method": "early_exit", "runtime.precision": "bfloat16"}
    return saved(tmp_path_factory.mktemp("export") / "run", **values)


def texts(folder: Path) -> Path:
    rows = [
        (f"common number{index} {'fine' if index % 2 else 'dull'}", "ab"[index % 2]) for index in range(60)
    ]
    values = {"data.name": "csv", "data.root": str(write_csv(folder / "all.csv", rows))}
    return saved(
        folder / "run", **{"model.name": "transformer_tiny", "model.args": {"vocabulary": 50}, **values}
    )


def ran(file: Path, inputs: torch.Tensor) -> torch.Tensor:
    """What onnxruntime says."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [scores] = session.run(["scores"], {"input": inputs.numpy()})
    return torch.from_numpy(scores)


def scores(run: Path, inputs: torch.Tensor, depth: int | None = None) -> torch.Tensor:
    """What the module says, in float32."""
    from scpl_dist.commands.export import whole

    with torch.no_grad():
        found: torch.Tensor = whole.opened(run, None, depth)[1](inputs)
    return found


def test_onnx_of_a_cut_image_model_scores_batches_of_any_size(images: Path, tmp_path: Path) -> None:
    target = tmp_path / "cut.onnx"
    assert called("export", images, target, "--depth", "2").stdout.endswith(f"tensors in {target}\n")
    for size in (1, 5):
        inputs = torch.randn(size, 1, 16, 16)
        assert torch.allclose(ran(target, inputs), scores(images, inputs, 2), atol=1e-4)
    model = onnx.load(target)
    onnx.checker.check_model(model)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    told = json.loads({entry.key: entry.value for entry in model.metadata_props}["scpl_dist"])
    assert told["classes"] == [str(digit) for digit in range(10)]
    assert told["preprocessing"]["settings"]["mean"] == [0.3055]


def test_onnx_of_a_text_model_scores_texts_of_any_length(tmp_path: Path) -> None:
    run = texts(tmp_path)
    scpl_dist.export(run, tmp_path / "text.onnx")
    for shape in ((1, 3), (4, 9)):
        words = torch.from_numpy(np.random.default_rng(0).integers(1, 50, shape))
        assert torch.allclose(ran(tmp_path / "text.onnx", words), scores(run, words), atol=1e-4)


def test_an_exported_program_scores_as_the_module(images: Path, tmp_path: Path) -> None:
    scpl_dist.export(images, tmp_path / "whole.pt2")
    files: dict[str, Any] = {"preprocessing.json": ""}
    program = torch.export.load(tmp_path / "whole.pt2", extra_files=files).module()
    for size in (1, 5):
        inputs = torch.randn(size, 1, 16, 16)
        assert torch.allclose(program(inputs), scores(images, inputs), atol=1e-5)
    assert json.loads(files["preprocessing.json"])["preprocessing"]["kind"] == "images"


def test_without_the_extra_the_command_that_installs_it_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = called("export", images, tmp_path / "out.onnx", code=2).stderr
    assert said == 'scpl-dist: --format onnx needs onnxscript: pip install "scpl_dist[onnx]"\n'


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "out.onnx",
            ["--format", "torch_export"],
            "--format torch_export writes .pt2; call the file out.pt2",
        ),
        (
            "out.bin",
            ["--format", "keras"],
            "--format = 'keras': unknown; use one of safetensors, onnx, torch_export",
        ),
        ("out.pt2", ["--depth", "9"], "--depth 9: the model has 4 blocks; give a number from 1 to 4"),
    ],
)
def test_a_format_or_a_depth_that_is_none_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    said = called("export", images, name, *options, code=2).stderr
    assert says in said
    assert list(tmp_path.iterdir()) == []
