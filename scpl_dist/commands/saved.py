"""A run as it was saved: its plan, what makes inputs of raw ones, and its blocks with the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scpl_dist import data
from scpl_dist.data import DataSource, Preprocessing
from scpl_dist.data.preprocessing import restore
from scpl_dist.methods import arithmetic
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.run.config import Config
from scpl_dist.storage import checkpoints
from scpl_dist.storage.checkpoints import CheckpointError
from scpl_dist.storage.parts import read_part
from scpl_dist.storage.run_folder import RunFolder
from scpl_dist.transport import tensors
from scpl_dist.worker.updater import nonfinite, restore_answering

_SHOWN = 3  # names in a message


class SavedBlocks(Mapping[int, TrainableBlock]):
    """All blocks of a plan as a checkpoint has them, ready to answer.

    The first `depth`, by default all, are read at once, or with `one_at_a_time` each when it is asked for, and the one
    before is dropped then. `choose` gives the checkpoint, a folder or an export ``.safetensors``. It is asked again if
    a run that goes on has removed the one before meanwhile, so that all blocks are of one. CheckpointError if it is
    damaged, of another model, or not finite.
    """

    def __init__(
        self,
        plan: Plan,
        choose: Callable[[], Path],
        device: torch.device | str = "cpu",
        one_at_a_time: bool = False,
        depth: int | None = None,
    ) -> None:
        self._plan = plan
        self._device = device
        self._one_at_a_time = one_at_a_time
        self._held: dict[int, TrainableBlock] = {}
        self.checkpoint = choose()
        wanted = range(1 if one_at_a_time else depth or len(self))
        while True:
            try:
                self._held = {index: self._read(index) for index in wanted}
                return
            except CheckpointError:
                another = choose()
                if another == self.checkpoint:
                    raise
                self.checkpoint = another

    def __len__(self) -> int:
        return len(self._plan.parameters)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __getitem__(self, index: int) -> TrainableBlock:
        if index not in self._held:
            if self._one_at_a_time:
                self._held.clear()
            try:
                self._held[index] = self._read(index)
            except CheckpointError:
                if self.checkpoint.exists():
                    raise
                raise CheckpointError(
                    f"{self.checkpoint} was removed by the run, which goes on, while its blocks were read one by one: "
                    "try again, with a copy of a checkpoint as --checkpoint, or without --low-memory"
                ) from None
        return self._held[index]

    def _read(self, index: int) -> TrainableBlock:
        [trainable] = self._plan.trainables([index]).values()
        spoilt = _restore(trainable, self.checkpoint, index)
        if spoilt is not None:
            raise CheckpointError(f"{self.checkpoint}: {spoilt} is NaN or infinite: {self._fix()}")
        return trainable.eval().to(self._device)

    def _fix(self) -> str:
        there = checkpoints.steps(self.checkpoint.parent.parent)
        good = [each.name for each in there if self._is_sound(each)]
        return f"take --checkpoint {good[-1]}, the last that is finite" if good else "no other one is finite"

    def _is_sound(self, checkpoint: Path) -> bool:
        try:
            return all(
                _restore(self._plan.trainables([index])[index], checkpoint, index) is None for index in self
            )
        except CheckpointError:
            return False


@dataclass(frozen=True)
class SavedRun:
    plan: Plan
    choose: Callable[[], Path]  # the checkpoint: another one later, if the run goes on
    preprocessing: Preprocessing | None  # None if it is not known
    device: torch.device
    source: DataSource | None = None  # None if the run folder has all that is needed

    @property
    def classes(self) -> list[str]:
        """Their names, or numbers where they have none."""
        if self.preprocessing is not None and self.preprocessing.classes:
            return self.preprocessing.classes
        return [str(number) for number in range(self.plan.classes)]

    def blocks(self, one_at_a_time: bool = False, depth: int | None = None) -> SavedBlocks:
        return SavedBlocks(self.plan, self.choose, self.device, one_at_a_time, depth)


def find(
    run_dir: Path,
    checkpoint: str | None = None,
    device: str = "auto",
    with_data: bool = False,
    plain: bool = False,
) -> SavedRun:
    """A run and one of its checkpoints, or another one by its path; None takes the newest.

    `device` "auto" is where ``runtime.device`` says, and the CPU if there is no GPU here. `with_data` opens the data
    set, too; in any case if the run is of before and has not kept what is needed. `plain` computes in float32 and in
    the usual order of memory, whatever the run did.
    """
    folder = RunFolder(run_dir)
    folder.check()
    choose = partial(_checkpoint, run_dir, checkpoint)
    choose()  # a name that is not there is a mistake, which is told before anything is read
    answering, where = _answering(config.load(run_dir / "config.toml"), device, plain)
    kept = folder.preprocessing()
    source = None
    if with_data or kept is None:
        source = _source(answering, folder, kept is None)
    if source is None:
        assert kept is not None
        made = restore(kept, folder.tokenizer) if "kind" in kept else None
        plan = Plan.plan(answering, kept["classes"], tensors.imagine(kept["input"], "meta"), kept["counts"])
    else:
        made = source.preprocessing
        plan = Plan.plan(answering, source.classes, source.example(), data.counts(answering, source))
    return SavedRun(plan, choose, made, where, source)


def _source(answering: Config, folder: RunFolder, old: bool) -> DataSource:
    try:
        return data.resolve(answering, folder.labels())
    except ValueError as error:
        if not old:
            raise
        raise ValueError(
            f"{folder.path} has no preprocessing.json, as it is a run of an earlier version, and its data set, which "
            f"would tell the same, cannot be read: {error}"
        ) from None


def _answering(given: Config, device: str, plain: bool) -> tuple[Config, torch.device]:
    """The configuration without what is for training alone, and the device."""
    where = device
    if device == "auto":
        where = "cuda" if arithmetic.on_gpu(given) else "cpu"
    try:
        chosen = torch.device(where)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: unknown; use auto, cpu, cuda, or cuda:1 for the second GPU")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: torch sees {torch.cuda.device_count()} GPUs here; use auto or cpu"
        )
    changes: dict[str, Any] = {"device": chosen.type, "compile": False}
    if plain:
        changes |= {"precision": "float32", "memory_format": "contiguous"}
    runtime = given.runtime.model_copy(update=changes)
    pipeline = given.pipeline.model_copy(update={"recompute": False})
    made = given.model_copy(update={"runtime": runtime, "pipeline": pipeline})
    arithmetic.settle(made)
    return made, chosen


def _checkpoint(run_dir: Path, name: str | None) -> Path:
    if name is not None and (run_dir / "checkpoints" / name / "manifest.json").is_file():
        return run_dir / "checkpoints" / name
    path = Path(name or "")
    if name is not None and (path.suffix == ".safetensors" or (path / "manifest.json").is_file()):
        return path
    return checkpoints.find(run_dir, "latest" if name == "last" else name)


def _restore(trainable: TrainableBlock, checkpoint: Path, index: int) -> str | None:
    """Take the weights of a checkpoint; returns what is NaN or infinite in them, such as "weight 0.bias of block 1"."""
    state = _state(checkpoint, index) | {"optimizers": [], "gradients": {}}
    try:
        restore_answering(trainable, state)
    except CheckpointError as error:
        differing = [
            text
            for key, module in (("block", trainable.block), ("heads", trainable.heads))
            for text in _differing(key, module, state.get(key, {}))
        ]
        what = f"{checkpoint} is of another model: block {index} differs: {'; '.join(differing)}"
        raise CheckpointError(what if differing else f"{checkpoint}: {error}") from None
    name = nonfinite(trainable, state)
    return name and f"{name} of block {index}"


def _differing(key: str, module: nn.Module, saved: Mapping[str, Any]) -> Iterator[str]:
    own = module.state_dict()
    shapes = [
        f"{name} {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & saved.keys()
        if isinstance(own[name], Tensor) and saved[name].shape != own[name].shape
    ]
    prefix = "" if key == "block" else "heads."
    for what, names in (
        ("missing", sorted(own.keys() - saved.keys())),
        ("unknown", sorted(saved.keys() - own.keys())),
        ("of another shape", sorted(shapes)),
    ):
        if names:
            more = ", ..." if len(names) > _SHOWN else ""
            yield f"{len(names)} {what} ({', '.join(prefix + name for name in names[:_SHOWN])}{more})"


def _state(checkpoint: Path, index: int) -> dict[str, Any]:
    """What a checkpoint, or an export, has of a block."""
    if checkpoint.suffix != ".safetensors":
        return read_part(checkpoint, index)
    parts: dict[str, dict[str, Tensor]] = {"blocks": {}, "heads": {}}
    try:
        with safe_open(checkpoint, "pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                part, number, own = [*name.split(".", 2), "", ""][:3]
                if part in parts and number == str(index):
                    parts[part][own] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read: {error}") from None
    return {"block": parts["blocks"], "heads": parts["heads"]}
