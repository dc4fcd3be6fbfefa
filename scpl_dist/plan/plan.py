"""From a configuration to blocks that train: which of them a stage holds, their heads, their initial weights.

Every process works this out for itself from the configuration and the shape of a sample, so nothing but that shape
has to be sent, and every process comes to the same result. All other blocks exist on the meta device only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from scpl_dist import methods, models
from scpl_dist.methods import arithmetic
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.lowering import NONE, first_learning, lower
from scpl_dist.methods.schedule import Kind, ScheduleError, StageSpec, simulate
from scpl_dist.methods.task import make, plain
from scpl_dist.models import weights
from scpl_dist.models.build import seeded
from scpl_dist.models.trace import overwrites
from scpl_dist.run import partition, scores
from scpl_dist.run.config import Config
from scpl_dist.run.imports import blaming


@dataclass(frozen=True)
class Plan:
    """The whole model as a plan. What cannot be is a ValueError with the key and the fix."""

    config: Config
    classes: int
    shapes: list[Any]  # input of block 0, then the output of every block: pytrees of meta tensors, batch 2
    parameters: list[int]  # number of parameters of each block, without heads
    specs: list[StageSpec]
    method: methods.Method
    counts: Sequence[int] = ()  # samples of each class

    @classmethod
    def plan(cls, config: Config, classes: int, example: Any, counts: Sequence[int] = ()) -> Plan:
        """Work out shapes and places from a batch of two inputs, a pytree of tensors whose values are not used.

        `counts` are the samples of each class, where the losses need them; see `scpl_dist.data.counts`.
        """
        args = models.fitted(config.model.name, config.model.args, example)
        blocks, outputs = models.outline(config.model.name, args, classes, example)
        parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
        specs = _places(config, parameters)
        _check_frozen(config, len(blocks))
        method = _method(config, len(blocks), classes, counts)
        return cls(config, classes, [example, *outputs], parameters, specs, method, counts)

    def shaped(self, config: Config) -> Plan:
        """The same model on other stages, as another configuration of the same run has them."""
        method = _method(config, len(self.parameters), self.classes, self.counts)
        return replace(self, config=config, specs=_places(config, self.parameters), method=method)

    def check(self) -> None:
        """Find what only building the heads and running the schedule can tell."""
        assert len(self.head_parameters) == len(self.parameters)
        verify = getattr(self._outlined[0], "verify_cut", None)
        if verify is not None:
            verify()
        self._check_watch()
        arithmetic.check(self.config, self.shapes[0], self.method.local)
        pipeline = self.config.pipeline
        train, evaluate = self.method.train, self.method.evaluate
        clip, local = self.method.clips_together, self.method.local
        offload = self.config.runtime.offload != "off"
        frozen = {self.config.frozen(epoch) for epoch in _changes(self.config)}
        trained = [(train, pipeline.micro_batches, clip, blocks) for blocks in frozen]
        again: set[int] = set()
        for program, parts, clips, blocks in (*trained, (evaluate, 1, False, NONE)):
            try:
                with blaming("run.method", self.config.run.method):
                    lowered = [
                        lower(program(spec, parts), spec, clips, blocks, local, offload)
                        for spec in self.specs
                    ]
                simulate(lowered, pipeline.max_in_flight)
                again |= {action.block for row in lowered for action in row if action.kind is Kind.RECOMPUTE}
            except ScheduleError as error:
                raise ValueError(
                    f"run.method = {self.config.run.method!r}: its schedule cannot run: {error}"
                ) from None

        for index in sorted(again):
            if overwrites(self._outlined[index], self.shapes[index]):
                raise ValueError(
                    f"block {index} ({type(self._outlined[index]).__name__}) changes the tensor that it is given, so "
                    "that it cannot be computed again, as pipeline.recompute or pipeline.micro_batches want it; use "
                    "inplace=False in its first layer"
                )

    def _check_watch(self) -> None:
        watch = self.config.run.watch
        samples = torch.zeros(2, self.classes), torch.tensor([0, self.classes - 1])
        sums = plain(self.method.metrics(*samples))
        found = scores.values(sums, self.classes, self.config.task.metrics)
        names = [name for name in found if name != scores.CONFUSION]
        if watch not in names:
            raise ValueError(
                f"run.watch = {watch!r}: the evaluations of this run have {', '.join(names)}; take one of them, or add "
                "another to task.metrics"
            )

    def doubts(self) -> Iterator[str]:
        """What is hardly meant like this in the model, with the fix."""
        local, recompute = self.method.local, self.config.pipeline.recompute
        frozen, epochs = self.config.frozen(0), self.config.run.epochs
        yield from arithmetic.doubts(self.config)
        for table in self.config.block:
            if table.freeze_after_epoch >= epochs:
                yield (
                    f"block.freeze_after_epoch = {table.freeze_after_epoch}, of block.index = {table.index}: the run "
                    f"has {epochs} epochs, so it is never frozen"
                )
        for index, block in enumerate(self._outlined):
            name = f"block {index} ({type(block).__name__})"
            if local and index in frozen:
                continue
            if local and self.parameters[index] == 0:
                yield f"{name} has no parameters: its loss trains its own heads only; join it with a neighbour"
            if local and recompute and not arithmetic.recompute_parts(block):
                yield f"{name} has no parts: pipeline.recompute changes nothing there; make it an nn.Sequential"
            if not local and index > first_learning(frozen) and overwrites(block, self.shapes[index]):
                yield (
                    f"{name} changes the tensor that it is given, which the method {self.method.name} needs unchanged: "
                    "training will fail; use inplace=False in its first layer"
                )

    @cached_property
    def head_parameters(self) -> list[int]:
        return [sum(weight.numel() for weight in own.heads.parameters()) for own in self.imagined]

    @cached_property
    def _outlined(self) -> list[nn.Module]:
        """All blocks, for checks only: workers do not ask for them, as they may be as large as the model."""
        model = self.config.model
        return models.outline(model.name, self._model_args, self.classes, self.shapes[0])[0]

    @property
    def _model_args(self) -> Mapping[str, Any]:
        return models.fitted(self.config.model.name, self.config.model.args, self.shapes[0])

    @cached_property
    def imagined(self) -> list[TrainableBlock]:
        """All blocks with their heads, for checks only."""
        return [self._imagine(index, block) for index, block in enumerate(self._outlined)]

    def _imagine(self, index: int, block: nn.Module) -> TrainableBlock:
        try:
            with torch.device("meta"):
                return self._trainable(index, block)
        except Exception:  # a head of the user's may need values; if it is really wrong, this raises again
            # Heads are those of the method, which may be the user's, or what the blocks of the model ask for.
            run, model = self.config.run, self.config.model
            with blaming(*(("run.method", run.method) if ":" in run.method else ("model.name", model.name))):
                return self._trainable(index, block)

    def _trainable(self, index: int, block: nn.Module) -> TrainableBlock:
        made = self.method.trainable(index, block, self.shapes[index], self.shapes[index + 1])
        if not isinstance(made, TrainableBlock):
            raise ValueError(
                f"run.method = {self.config.run.method!r}: trainable() gave {type(made).__name__} for block {index}; "
                "give a TrainableBlock of scpl_dist.methods.block"
            )
        return made

    def trainables(self, blocks: Iterable[int]) -> dict[int, TrainableBlock]:
        """Build blocks with their heads; weights are drawn from (seed, block)."""
        wanted = list(blocks)
        model, seed = self.config.model, self.config.run.seed
        modules = models.build(model.name, self._model_args, self.classes, seed, wanted)
        trainables: dict[int, TrainableBlock] = {}
        for index, module in zip(wanted, modules, strict=True):
            with seeded(seed, "heads", index):
                trainables[index] = self._trainable(index, module)
            arithmetic.arrange(trainables[index], self.config, self.method.local)
        return trainables

    def load_weights(self, trainables: Mapping[int, TrainableBlock]) -> str:
        """Give blocks their first weights, if there are some; what does not fit, as one line.

        They are ``model.weights``, or else what the blocks say with their attribute ``published_weights``.
        """
        model = self.config.model
        modules = {index: (own.block, own.heads) for index, own in trainables.items()}
        own = (getattr(block, "published_weights", "") for block, _ in modules.values())
        path = model.weights or next(own)
        if not path:
            return ""
        whole = len(trainables) == len(self.parameters)
        return weights.load(path, modules, model.weights_strict, whole)

    def unfit(self) -> Iterator[str]:
        """What of the first weights does not fit, where that is allowed; ValueError where it is not."""
        text = self.load_weights(dict(enumerate(self.imagined)))
        if text:
            yield text

    def outline(self) -> dict[str, Any]:
        """Blocks as plain values, for whoever reads the run folder: stage, parameters, shape of a sample's output."""
        stages = {block: spec.stage for spec in self.specs for block in spec.blocks}
        outputs = [pytree.tree_leaves(shape) for shape in self.shapes[1:]]
        blocks = [
            {
                "block": block,
                "stage": stages[block],
                "kind": type(module).__name__,
                "parameters": self.parameters[block],
                "head_parameters": self.head_parameters[block],
                "output": [list(leaf.shape[1:]) for leaf in outputs[block]],
            }
            for block, module in enumerate(self._outlined)
        ]
        return {"classes": self.classes, "blocks": blocks}

    def table(self) -> str:
        """The stages as text: blocks, parameters, and the size of what one sample sends on."""
        replicas = self.config.layout.replicas
        several = max(replicas) > 1
        rows = ["stage  blocks  parameters  " + ("replicas  " if several else "") + "output of a sample"]
        for spec in self.specs:
            count = sum(self.parameters[block] for block in spec.blocks)
            blocks = f"{spec.blocks[0]}-{spec.blocks[-1]}" if len(spec.blocks) > 1 else str(spec.blocks[0])
            leaves = pytree.tree_leaves(self.shapes[spec.blocks[-1] + 1])
            shapes = " ".join("x".join(map(str, leaf.shape[1:])) for leaf in leaves)
            number = f"{replicas[spec.stage]:8}  " if several else ""
            rows.append(f"{spec.stage:5}  {blocks:>6}  {count:10,}  {number}{shapes}")
        return "\n".join(rows)


def _method(config: Config, blocks: int, classes: int, counts: Sequence[int]) -> methods.Method:
    method_type = methods.resolve(config.run.method)
    with blaming("run.method", config.run.method):
        return method_type(config, blocks, make(config.task, classes, counts))


def _changes(config: Config) -> list[int]:
    """The epochs from which on other blocks are frozen, and the first one."""
    changes = {
        table.freeze_after_epoch for table in config.block if table.freeze_after_epoch < config.run.epochs
    }
    return sorted({0} | changes)


def _check_frozen(config: Config, number: int) -> None:
    for table in config.block:
        if max(table.blocks) >= number:
            raise ValueError(
                f"block.index = {table.index}: the model {config.model.name!r} has {number} blocks, 0 to {number - 1}"
            )
    for epoch in _changes(config):
        if len(config.frozen(epoch)) == number:
            fix = f"leave one out, or end the run with run.epochs = {epoch}" if epoch else "leave one out"
            raise ValueError(
                f"block: all {number} blocks of the model are frozen{f' after {epoch} epochs' if epoch else ''}, and "
                f"nothing would learn: {fix}"
            )


def _places(config: Config, parameters: list[int]) -> list[StageSpec]:
    stages, rule = config.pipeline.stages, config.pipeline.partition
    number = len(parameters)
    if stages > number:
        raise ValueError(
            f"pipeline.stages = {stages}: the model {config.model.name!r} has {number} blocks and a stage needs at "
            f"least one; use at most {number} stages or a model with more blocks"
        )
    if isinstance(rule, list):
        if sum(rule) != number:
            raise ValueError(
                f"pipeline.partition = {rule}: {sum(rule)} blocks in all, but the model {config.model.name!r} has "
                f"{number}; the counts must add up to {number}"
            )
        counts = rule
    elif rule == "measured":
        raise ValueError(
            'pipeline.partition = "measured": all processes need the same counts, so one measures for all; '
            "scpl-dist train does, and for other launchers scpl-dist train CONFIG --dry-run prints them to be set"
        )
    else:
        counts = partition.balanced(parameters if rule == "parameters" else [1.0] * number, stages)
    held = enumerate(zip(partition.split(counts), config.layout.replicas, strict=True))
    return [StageSpec(stage, stages, blocks, replicas) for stage, (blocks, replicas) in held]
