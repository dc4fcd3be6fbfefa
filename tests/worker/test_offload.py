"""Blocks that are away while others compute: the same bits, and never more than two of them in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.methods.block import TrainableBlock
from scpl_dist.run.config import load
from scpl_dist.worker.offload import Disk, Host, Offload
from scpl_dist.worker.updater import Updater
from tests.support import dense, in_threads, reference
from tests.support.command import called

CPU = torch.device("cpu")
SMALL = (
    "run.epochs=2",
    "data.batch_size=512",
    "data.augmentation=none",
    "pipeline.stages=1",
    "loss.projector=m,32,16",
    *dense.settings(depth=4, width=24),
)


class Watching(Disk):
    """A disk that counts, and looks at who is in memory."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.gettempdir()))
        self.offload: Offload
        self.written = self.read_back = self.most = 0
        self.at_work = True

    def write(self, block: int, parts: list[Tensor]) -> None:
        super().write(block, parts)
        self.written += 1

    def read(self, block: int, parts: list[Tensor]) -> None:
        super().read(block, parts)
        self.read_back += 1
        weights = [next(one.trainable.parameters()) for one in self.offload.updaters.values()]
        if self.at_work:
            self.most = max(self.most, sum(one.untyped_storage().nbytes() > 0 for one in weights))


def run(*settings: str, place: Disk | Host | None = None) -> in_threads.Run:
    offload = None if place is None else Offload(place, CPU)
    if isinstance(place, Watching) and offload is not None:
        place.offload = offload
    made = in_threads.Run(load(None, [*SMALL, *settings]), offload=offload)
    if isinstance(place, Watching):
        place.at_work = False
    if offload is not None:
        for block in made.result.trainables:
            offload.have(block)
            offload.updaters[block].train(True)  # as at a checkpoint: no averages
        offload.close()
    return made


def same(offloaded: in_threads.Run, usual: in_threads.Run) -> None:
    assert offloaded.result.losses == usual.result.losses
    assert offloaded.result.metrics == usual.result.metrics
    ours, theirs = (reference.tensors(one.result.trainables) for one in (offloaded, usual))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize(
    "settings",
    [
        ("run.method=scpl", "optimizer.ema=0.9", "optimizer.clip_norm=0.5"),
        ("run.method=scpl", "optimizer.name=adamw", "optimizer.accumulate=2", "loss.local_predictors=true"),
        ("run.method=early_exit", "optimizer.accumulate=2", "pipeline.micro_batches=2"),
        ("run.method=early_exit", "optimizer.name=rmsprop", "runtime.precision=bfloat16"),
        ("run.method=al", "optimizer.name=sgd", "optimizer.args.momentum=0.9", "optimizer.ema=0.5"),
    ],
    ids=" ".join,
)
def test_the_bits_are_those_of_a_run_whose_blocks_stay(settings: tuple[str, ...]) -> None:
    watching = Watching()
    same(run(*settings, place=watching), run(*settings))
    assert watching.most == 2
    assert watching.written > 4


def test_a_loss_of_all_micro_batches_needs_each_block_once() -> None:
    settings = (
        "pipeline.micro_batches=2",
        "data.batch_size=500",
        f"model.name={__file__}:without_norms",
        "model.args={}",
    )
    watching = Watching()
    same(run(*settings, place=watching), run(*settings))
    steps = 6
    assert watching.written == 3 * (1 + steps)
    assert watching.most == 2


def without_norms(classes: int) -> list[nn.Module]:
    """Three blocks that the method scpl can compute in parts."""
    return [nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU()), nn.Linear(16, 16), nn.Linear(16, 16)]


def test_a_frozen_block_and_an_evaluation_are_read_and_not_written() -> None:
    frozen = ("block=[{index=1,freeze=true},{index=2,freeze_after_epoch=1}]", "optimizer.ema=0.5")
    watching = Watching()
    same(run(*frozen, place=watching), run(*frozen))
    steps, epochs = 3, 2
    first = 4
    learning = 2 * steps * epochs + steps  # blocks 0 and 3, and 2 in the first epoch
    freezing = 1 + 1  # 1 and 2 lose what only learning needs
    exchanged = 3 * epochs + 1  # weights and their averages, before an evaluation, and back in a frozen block
    assert watching.written <= first + learning + freezing + exchanged
    assert watching.read_back > watching.written


def test_the_memory_of_the_host_is_a_place_like_a_file() -> None:
    same(run("optimizer.ema=0.9", place=Host()), run("optimizer.ema=0.9"))


def test_a_block_that_passes_a_weight_on_passes_on_a_copy() -> None:
    linear = nn.Linear(3, 3)
    offload = Offload(Disk(Path(tempfile.gettempdir())), CPU)
    offload.add(0, Updater(TrainableBlock(linear, {}), load()))
    weight = linear.weight
    before = weight.detach().clone()
    other = torch.ones(2)
    kept, untouched = offload.apart(0, (weight.detach()[1:], other))
    offload.put(0, wait=True)
    assert weight.untyped_storage().nbytes() == 0
    assert torch.equal(kept, before[1:])
    assert untouched is other
    offload.have(0)
    assert torch.equal(weight, before)
    offload.close()


def test_what_the_device_does_not_hold_stays_where_it_is() -> None:
    linear = nn.Linear(3, 3)
    updater = Updater(TrainableBlock(linear, {}), load())
    # As that of a GPU's block, which is on the host.
    updater.optimizers[0].state[linear.weight]["step"] = torch.ones((), device="meta")
    offload = Offload(Disk(Path(tempfile.gettempdir())), CPU)
    offload.add(0, updater)
    offload.put(0, wait=True)
    offload.have(0)
    assert linear.weight.untyped_storage().nbytes() == 36
    offload.close()


def test_what_goes_wrong_on_the_disk_is_heard_of_when_the_block_is_needed(tmp_path: Path) -> None:
    offload = Offload(Disk(tmp_path / "gone"), CPU)
    offload.add(0, Updater(TrainableBlock(nn.Linear(3, 3), {}), load()))
    offload.put(0)
    with pytest.raises(FileNotFoundError, match="gone"):
        offload.have(0)
    offload.close()


def test_a_file_has_no_name_that_could_be_left_over(tmp_path: Path) -> None:
    offload = Offload(Disk(tmp_path), CPU)
    offload.add(0, Updater(TrainableBlock(nn.Linear(3, 3), {}), load()))
    offload.put(0, wait=True)
    assert list(tmp_path.iterdir()) == []
    offload.close()


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["runtime.offload=disk", "run.method=bp"], "use a method whose blocks learn alone"),
        (["runtime.offload=disk", "run.method=gpipe"], "use a method whose blocks learn alone"),
        (["runtime.offload=cpu", "runtime.device=cpu"], 'use "disk"'),
        (["runtime.offload_folder=/tmp"], 'only "disk" has a folder; leave it out'),
        (["runtime.offload=disk", "runtime.offload_folder=/not/there"], "make it, on each host"),
        (["runtime.offload=disk", "pipeline.partition=measured"], "give block counts"),
        (["runtime.offload=disk", "runtime.compile=reduce-overhead"], 'use "default"'),
    ],
)
def test_what_cannot_be_is_refused_before_any_process_starts(settings: list[str], fix: str) -> None:
    overrides = [part for text in settings for part in ("-o", text)]
    assert fix in called("train", "--dry-run", *overrides, code=2).stderr
