"""A run as a module in Python: what it answers, how it is cut, and what it needs."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.nn import functional

import scpl_dist
from scpl_dist.commands import saved as saved_run
from scpl_dist.commands.evaluate import evaluate
from scpl_dist.data import complete
from scpl_dist.run.imports import name_of
from tests.support.files import picture, write_image
from tests.support.saved_runs import saved

TABLE = load_digits()
TEST = complete({"train": torch.tensor(TABLE.target)}, 10, "digits")["test"]


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("early") / "run", **{"run.method": "early_exit"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def digits() -> list[torch.Tensor]:
    """The test images of the embedded data, (1, 16, 16) in [0, 1]."""
    images = torch.tensor(TABLE.images, dtype=torch.float32)[:, None] / 16
    images = functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return list(images[TEST.positions])


def right(found: Sequence[Any]) -> int:
    """How many of the predictions for the test images have the right class."""
    return sum(answer.label == str(label) for answer, label in zip(found, TEST.labels.tolist(), strict=True))


def test_what_it_answers_is_what_an_evaluation_counts(early: Path, digits: list[torch.Tensor]) -> None:
    model = scpl_dist.load(early)
    assert isinstance(model, torch.nn.Module)
    assert not model.training
    assert model.classes == [str(digit) for digit in range(10)]
    sure = sorted(answer.probability for answer in scpl_dist.load(early, depth=1).predict(digits))
    for threshold in (None, sure[len(sure) // 2]):
        found = model.predict(digits, exit_threshold=threshold, batch_size=128)
        counted = evaluate(early, threshold=threshold)
        assert right(found) == sum(counted.correct)
        assert [sum(answer.block == block for answer in found) for block in range(4)] == counted.left
        assert (counted.left[0] == 0) == (threshold is None)


def test_called_it_gives_scores_and_predictions_their_probabilities(
    early: Path, digits: list[torch.Tensor]
) -> None:
    model = scpl_dist.load(early)
    assert model.preprocessing is not None
    with torch.no_grad():
        scores = model(model.preprocessing.batch(digits[:3]))
    found = model.predict(digits[:3])
    assert torch.equal(torch.tensor([answer.probabilities for answer in found]), scores.softmax(1))
    assert [answer.probability for answer in found] == [max(answer.probabilities) for answer in found]


def test_a_model_that_is_cut_has_the_blocks_before_and_their_answer(
    early: Path, digits: list[torch.Tensor], tmp_path: Path
) -> None:
    model = scpl_dist.load(early, depth=2)
    assert {answer.block for answer in model.predict(digits[:5])} == {1}
    scpl_dist.export(early, tmp_path / "two.safetensors", depth=2)
    exported = load_file(tmp_path / "two.safetensors")
    state = model.state_dict()
    assert state.keys() == exported.keys()
    assert {key.split(".")[1] for key in exported} == {"0", "1"}
    assert all(torch.equal(state[key], exported[key]) for key in exported)
    again = scpl_dist.load(early, str(tmp_path / "two.safetensors"), depth=2)
    assert again.predict(digits[:5]) == model.predict(digits[:5])
    assert right(model.predict(digits)) == sum(evaluate(early, block=1).correct)


def test_a_cut_where_no_block_can_answer_and_a_depth_that_is_none_are_refused(
    early: Path, plain: Path
) -> None:
    with pytest.raises(ValueError, match=r"--depth 2: no block before the last one can answer .* train with"):
        scpl_dist.load(plain, depth=2)
    with pytest.raises(ValueError, match=r"exit_threshold = 0\.5: no block before the last one can answer"):
        scpl_dist.load(plain).predict([torch.zeros(1, 16, 16)], exit_threshold=0.5)
    for depth in (0, 5):
        with pytest.raises(
            ValueError, match=f"--depth {depth}: the model has 4 blocks; give a number from 1"
        ):
            scpl_dist.load(early, depth=depth)


def test_associated_learning_answers_over_its_decoders(digits: list[torch.Tensor], tmp_path: Path) -> None:
    run = saved(tmp_path / "run", **{"run.method": "al"})
    for depth in (2, 4):
        found = scpl_dist.load(run, depth=depth).predict(digits)
        assert right(found) == sum(evaluate(run, block=depth - 1).correct)


def test_weights_of_another_model_are_told_by_their_tensors(early: Path, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"step-8 is of another model: block 0 differs: 4 missing \(heads\.projector\.layers\.1\.bias, .*, "
        r"\.\.\.\); 4 unknown \(heads\.classifier\.",
    ):
        scpl_dist.load(plain, str(early / "checkpoints" / "step-8"))
    wide = tmp_path / "wide.safetensors"
    scpl_dist.export(early, wide)
    tensors = load_file(wide)
    tensors["blocks.2.0.weight"] = torch.zeros(96, 40, 3, 3)
    save_file(tensors, wide)
    with pytest.raises(
        RuntimeError,
        match=r"block 2 differs: 1 of another shape \(0\.weight \(96, 40, 3, 3\) instead of \(96, 48, 3, 3\)\)$",
    ):
        scpl_dist.load(early, str(wide))


def test_the_training_data_may_be_gone_but_for_runs_of_earlier_versions(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for index in range(15):
            write_image(tmp_path / "photos" / label / f"{index}.png", picture(index, (20, 18)))
    values = {"data.name": "image_folder", "data.root": str(tmp_path / "photos"), "data.args": {"size": 16}}
    new = saved(tmp_path / "new", **values)
    old = saved(tmp_path / "old", **values)
    (old / "preprocessing.json").unlink()
    photo = tmp_path / "one.png"
    write_image(photo, picture(1, (40, 30)))
    expected = scpl_dist.load(old).predict(photo)
    assert expected[0].label in ("cat", "dog")
    shutil.rmtree(tmp_path / "photos")
    assert scpl_dist.load(new).predict([photo]) == expected
    with pytest.raises(
        ValueError,
        match=r"old has no preprocessing.json, .* cannot be read: data.root = .*there is no such folder",
    ):
        scpl_dist.load(old)


def own_data(root: str) -> tuple[torch.utils.data.TensorDataset, torch.utils.data.TensorDataset]:
    x = torch.randn(200, 1, 16, 16)
    y = (x.mean((1, 2, 3)) > 0).long()
    return torch.utils.data.TensorDataset(x[:150], y[:150]), torch.utils.data.TensorDataset(x[150:], y[150:])


def test_a_data_set_of_your_own_takes_tensors(tmp_path: Path) -> None:
    run = saved(tmp_path / "run", **{"data.name": name_of(own_data)})
    model = scpl_dist.load(run)
    assert model.classes == ["0", "1"]
    inputs = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        scores = model(inputs)
    labels = [answer.label for answer in model.predict(inputs)]
    assert labels == [str(label) for label in scores.argmax(1).tolist()]


def test_of_blocks_that_are_read_one_at_a_time_one_is_in_memory(early: Path) -> None:
    blocks = saved_run.find(early).blocks(one_at_a_time=True)
    first = weakref.ref(blocks[0])
    assert first() is not None
    blocks[1]
    gc.collect()
    assert first() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_answers_as_the_cpu(early: Path, digits: list[torch.Tensor]) -> None:
    there = scpl_dist.load(early, device="cuda").predict(digits[:50])
    here = scpl_dist.load(early, device="cpu").predict(digits[:50])
    for one, other in zip(there, here, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-3)
