"""Batches are prepared ahead in order, within bounds, and an abort ends every wait with its own error."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from scpl_dist.control.items import Item
from scpl_dist.data.loader import Loader
from scpl_dist.data.source import DataSource
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.run.config import load
from scpl_dist.run.errors import Aborted
from scpl_dist.worker.executor import Executor
from tests.support.in_threads import Run


class Gated(DataSource):
    """Batches of 1,000 bytes; one is made when `gate` is open, and `begun` counts them."""

    def __init__(self) -> None:
        self.classes, self.sizes = 2, {"train": 100}
        self.gate = threading.Event()
        self.begun = threading.Semaphore(0)

    def batch(self, split: Any, epoch: int, indices: torch.Tensor) -> tuple[Any, torch.Tensor]:
        self.begun.release()
        self.gate.wait(10)
        return {"x": torch.zeros(len(indices), 992, dtype=torch.uint8)}, indices


def begun(source: Gated, count: int) -> bool:
    """Whether so many batches are begun, and no more."""
    return all(source.begun.acquire(timeout=10) for _ in range(count)) and not source.begun.acquire(
        timeout=0.05
    )


def test_memory_bounds_what_is_prepared_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scpl_dist.data.loader.AHEAD_BYTES", 3500)
    source = Gated()
    loader: Loader[int] = Loader(source, 0, workers=2)
    for number in range(8):
        loader.put(number, parts=[(number, number + 1)])
    assert begun(source, 2)  # one for each thread, as long as nobody knows how large they are
    source.gate.set()
    assert begun(source, 1)
    for number in range(8):
        item, batches = loader.next()
        assert (item, next(batches)[1].item()) == (number, number)
        assert begun(source, 1 if number < 5 else 0)
    loader.abort(Aborted("the test is over"))


def test_every_thread_has_a_batch_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scpl_dist.data.loader.AHEAD_BYTES", 1)
    source = Gated()
    source.gate.set()
    loader: Loader[int] = Loader(source, 0, workers=2)
    loader.put(0, parts=[(number, number + 1) for number in range(5)])
    _, batches = loader.next()
    assert begun(source, 2)
    assert [labels.item() for _, labels in batches] == [0, 1, 2, 3, 4]
    loader.abort(Aborted("the test is over"))


def test_an_abort_ends_the_wait_for_a_batch_with_its_own_error() -> None:
    source = Gated()
    loader: Loader[int] = Loader(source, 0, workers=1)
    loader.put(0, parts=[(0, 1)])
    loader.put(1, parts=[(1, 2)])
    assert begun(source, 1)
    being_made, not_begun = (loader.next()[1] for _ in range(2))
    loader.abort(Aborted("stage 1 is gone"))
    loader.put(2, parts=[(2, 3)])
    for batches in (being_made, not_begun):
        with pytest.raises(Aborted, match="stage 1 is gone"):
            next(batches)
    with pytest.raises(Aborted, match="stage 1 is gone"):
        loader.next()
    source.gate.set()


@pytest.mark.parametrize("workers", [0, 1])
def test_every_tensor_of_a_pinned_batch_is_where_a_gpu_may_read_it(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # without a GPU torch refuses
    source = Gated()
    source.gate.set()
    loader: Loader[int] = Loader(source, 0, workers, pinned=True)
    loader.put(0, parts=[(3, 5)])
    [(inputs, labels)] = loader.next()[1]
    assert inputs["x"].eq(1).all()
    assert labels.tolist() == [4, 5]
    loader.abort(Aborted("the test is over"))


class Halved(Run):
    """A run whose loader has the share of one of two replicas, and whose stage knows of none."""

    def _executor(self, spec: StageSpec, loader: Loader[Item] | None) -> Executor:
        if loader is not None:
            loader.share = (2, 1)
        return super()._executor(spec, loader)


@pytest.mark.parametrize("augmentation", ["none", "strong"])
def test_no_sample_is_left_out_unseen(augmentation: str) -> None:
    with pytest.raises(AssertionError, match="samples would be left out"):
        Halved(load(None, ["pipeline.stages=1", f"data.augmentation={augmentation}"]))
