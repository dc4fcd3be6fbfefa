"""What every training method has to say: the actions of a stage, and what its blocks learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import ValidationError
from torch import Tensor, nn

from scpl_dist.methods.block import Carry, TrainableBlock
from scpl_dist.methods.metrics import Metric
from scpl_dist.methods.schedule import Action, Kind, StageSpec
from scpl_dist.methods.task import Task
from scpl_dist.run.config import Config, Section

OWN = ("loss.", "al.", "task.compared")  # beginnings of keys that only some methods read
SCHEDULING = ("pipeline.schedule", "pipeline.deferred_batch_norm")  # what only some methods' schedules have


class Method(ABC):
    """A training method, made for a run, the number of blocks of its model, and what that is trained for.

    ValueError if the configuration asks for something that the method cannot do.
    """

    name: ClassVar[str]
    local: ClassVar[bool]  # gradients end at every block; if False, they are handed on from block to block
    schedules: ClassVar[bool] = False  # the keys in `SCHEDULING` mean something here
    reads: ClassVar[tuple[str, ...]] = OWN  # beginnings of those keys of `OWN` that do
    Settings: ClassVar[type[Section]] = Section  # what run.args may hold, with defaults; see `settings`

    def __init__(self, config: Config, num_blocks: int, task: Task) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.task = task
        try:
            self.settings = self.Settings.model_validate(config.run.args)
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(["run.args", *map(str, problem["loc"])])
            known = ", ".join(self.Settings.model_fields) or "no arguments"
            raise ValueError(
                f"{key} = {problem['input']!r}: {problem['msg'].lower()}; {self.name} takes {known}"
            ) from None
        parts = config.pipeline.micro_batches
        if parts != 1 and self.whole:
            raise ValueError(
                f"pipeline.micro_batches = {parts}: {self.whole}; use pipeline.micro_batches = 1"
            )
        if self.clips_together and max(config.layout.replicas) > 1:
            raise ValueError(
                f"optimizer.clip_norm = {config.optimizer.clip_norm} and pipeline.replicas = "
                f"{config.pipeline.replicas}: with {self.name} all stages clip by one length, which replicas do not "
                "pass on; use optimizer.clip_value, or pipeline.replicas = 1"
            )
        if config.runtime.offload != "off" and not self.local:
            raise ValueError(
                f'runtime.offload = "{config.runtime.offload}": {self.name} needs all blocks of a stage for each '
                "backward pass, so none could be put away; use a method whose blocks learn alone, such as scpl, or "
                '"off" and more stages'
            )
        means = parts != 1 and not self.compares
        if means and task.per_token and config.layout.replicas[0] > 1:
            raise ValueError(
                f'task.name = "lm", pipeline.micro_batches = {parts} and pipeline.replicas = '
                f"{config.pipeline.replicas}: parts of a batch are weighed by their tokens, of which the replicas of "
                "the first stage know their own only; use one of the two"
            )
        if means and config.task.class_weights != "none":
            raise ValueError(
                f"task.class_weights = {config.task.class_weights!r} and pipeline.micro_batches = {parts}: a weighted "
                "mean over a part of a batch is not that over the whole; use pipeline.micro_batches = 1"
            )

    @classmethod
    def unread(cls, config: Config) -> dict[str, Any]:
        """Keys that were changed though they mean nothing to this method, with their defaults."""
        usual, given = dict(Config()), dict(config)
        read = cls.reads + (SCHEDULING if cls.schedules else ())
        return {
            f"{section}.{key}": value
            for section in ("loss", "al", "task", "pipeline")
            for key, value in usual[section]
            if getattr(given[section], key) != value
            and f"{section}.{key}".startswith(OWN + SCHEDULING)
            and not f"{section}.{key}".startswith(read)
        }

    @property
    def whole(self) -> str:
        """Why a batch must stay whole; empty if it may be split into micro-batches."""
        return ""

    @property
    def compares(self) -> bool:
        """Whether an objective is more than a mean over samples, and has to see those of all micro-batches."""
        return False

    @property
    def clips_together(self) -> bool:
        """Whether gradients are clipped by the length of that of the whole model; else each block by its own."""
        return not self.local and self.config.optimizer.clip_norm > 0

    @abstractmethod
    def trainable(self, index: int, block: nn.Module, before: Any, after: Any) -> TrainableBlock:
        """Block ``index`` with its heads; its input and output are pytrees of meta tensors here, batch 2."""

    @abstractmethod
    def train(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        """What one stage computes and passes on in one training step; see `scpl_dist.methods.lowering` for the rest."""

    def evaluate(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        """The same for one batch of an evaluation: forward only, prediction at the last block."""
        for m in range(micro_batches):
            yield from forward(spec, m)
            if spec.last:
                yield Action(Kind.PREDICT, spec.blocks[-1], m)
                yield Action(Kind.COUNT, micro_batch=m)

    def carry(self, inputs: Any, labels: Tensor) -> Carry:
        """What the first block is given for a batch."""
        return inputs

    def scores(self, trainables: Mapping[int, TrainableBlock], block: int, carry: Carry) -> Tensor | None:
        """Scores (N, ..., classes) of an answer from `block`, which gave this carry; None if it cannot give one.

        All blocks are there, in evaluation mode.
        """
        if block == self.num_blocks - 1:
            return trainables[block].predict(carry)
        return trainables[block].local_scores(carry)

    def metrics(self, scores: Tensor, labels: Tensor) -> dict[str, Metric]:
        """Of an evaluation's answers; see `scpl_dist.methods.task.Task.metrics`."""
        return self.task.metrics(scores, labels)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probabilities of the classes, of the shape of `scores`."""
        return self.task.probabilities(scores)


def forward(spec: StageSpec, m: int) -> Iterator[Action]:
    """Micro-batch `m` through the blocks of a stage."""
    yield Action(Kind.LOAD if spec.first else Kind.RECV_F, micro_batch=m)
    for block in spec.blocks:
        yield Action(Kind.FORWARD, block, m)
    if not spec.last:
        yield Action(Kind.SEND_F, micro_batch=m)


class LocalMethod(Method):
    """Methods whose blocks learn from losses of their own: nothing ever comes back.

        time       ------------------------------------------------->
        stage 0    LOAD F0 LOSS0 B0 STEP0 F1 SEND_F LOSS1 B1 STEP1 | LOAD F0 ...
        stage 1                                   RECV_F F2 LOSS2 B2 STEP2 ...

    A block inside a stage finishes its update before the next one starts, so only one block's activations are alive;
    the last one sends its output first, so that the next stage works while this one goes backward. With several
    micro-batches the update follows the last one.

    An objective that compares samples sees those of all micro-batches, and each is then computed again to go backward,
    so that the activations of one are alive:

        F0.0 E0.0 F0.1 E0.1 LOSS0 R0.0 B0.0 R0.1 B0.1 STEP0 F1.0 ...
    """

    local = True

    def train(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        if self.compares and micro_batches > 1:
            yield from self._twice(spec, micro_batches)
            return
        for m in range(micro_batches):
            yield Action(Kind.LOAD if spec.first else Kind.RECV_F, micro_batch=m)
            for block in spec.blocks:
                yield Action(Kind.FORWARD, block, m)
                if block == spec.blocks[-1] and not spec.last:
                    yield Action(Kind.SEND_F, micro_batch=m)
                yield Action(Kind.LOSS, block, m)
                yield Action(Kind.BACKWARD, block, m)
                if m == micro_batches - 1:
                    yield Action(Kind.STEP, block)

    def _twice(self, spec: StageSpec, micro_batches: int) -> Iterator[Action]:
        """All micro-batches forward through a block, and then each forward and backward."""
        for block in spec.blocks:
            for m in range(micro_batches):
                if block == spec.blocks[0]:
                    yield Action(Kind.LOAD if spec.first else Kind.RECV_F, micro_batch=m)
                yield Action(Kind.FORWARD, block, m)
                if block == spec.blocks[-1] and not spec.last:
                    yield Action(Kind.SEND_F, micro_batch=m)
                yield Action(Kind.EMBED, block, m)
            yield Action(Kind.LOSS, block)
            for m in range(micro_batches):
                yield Action(Kind.RECOMPUTE, block, m)
                yield Action(Kind.BACKWARD, block, m)
            yield Action(Kind.STEP, block)
