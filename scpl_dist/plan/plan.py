"""From a configuration to blocks that train: which of them a stage holds, their heads, their initial weights.

Every process works this out for itself from the configuration and the shape of a sample, so nothing but that shape
has to be sent, and every process comes to the same result. All other blocks exist on the meta device only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from scpl_dist import methods, models
from scpl_dist.methods import arithmetic
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.lowering import lower
from scpl_dist.methods.schedule import ScheduleError, StageSpec, simulate
from scpl_dist.methods.task import Classification
from scpl_dist.models.build import seeded
from scpl_dist.models.trace import overwrites
from scpl_dist.plan import partition
from scpl_dist.run.config import Config


@dataclass(frozen=True)
class Plan:
    """The whole model as a plan. What cannot be is a ValueError with the key and the fix."""

    config: Config
    classes: int
    shapes: list[Any]  # input of block 0, then the output of every block: pytrees of meta tensors, batch 2
    parameters: list[int]  # number of parameters of each block, without heads
    specs: list[StageSpec]
    method: methods.Method

    @classmethod
    def plan(cls, config: Config, classes: int, example: Any) -> Plan:
        """Work out shapes and places from a batch of two inputs, a pytree of tensors whose values are not used."""
        method_type = methods.resolve(config.run.method)
        blocks, outputs = models.outline(config.model.name, config.model.args, classes, example)
        parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
        specs = _places(config, parameters)
        method = method_type(config, len(blocks), Classification(classes))
        return cls(config, classes, [example, *outputs], parameters, specs, method)

    def check(self) -> None:
        """Find what only building the heads and running the schedule can tell."""
        assert len(self.head_parameters) == len(self.parameters)
        arithmetic.check(self.config, self.shapes[0], self.method.local)
        pipeline = self.config.pipeline
        for program, parts in ((self.method.train, pipeline.micro_batches), (self.method.evaluate, 1)):
            try:
                simulate([lower(program(spec, parts), spec) for spec in self.specs], pipeline.max_in_flight)
            except ScheduleError as error:
                raise ValueError(
                    f"run.method = {self.config.run.method!r}: its schedule cannot run: {error}"
                ) from None

    def doubts(self) -> Iterator[str]:
        """What is hardly meant like this in the model, with the fix."""
        local, recompute = self.method.local, self.config.pipeline.recompute
        yield from arithmetic.doubts(self.config)
        for index, block in enumerate(self._outlined):
            name = f"block {index} ({type(block).__name__})"
            if local and self.parameters[index] == 0:
                yield f"{name} has no parameters: its loss trains its own heads only; join it with a neighbour"
            if local and recompute and not arithmetic.recompute_parts(block):
                yield f"{name} has no parts: pipeline.recompute changes nothing there; make it an nn.Sequential"
            if not local and index > 0 and overwrites(block, self.shapes[index]):
                yield (
                    f"{name} changes the tensor that it is given, which the method {self.method.name} needs unchanged: "
                    "training will fail; use inplace=False in its first layer"
                )

    @cached_property
    def head_parameters(self) -> list[int]:
        return [self._count_heads(index, block) for index, block in enumerate(self._outlined)]

    @cached_property
    def _outlined(self) -> list[nn.Module]:
        """All blocks, for checks only: workers do not ask for them, as they may be as large as the model."""
        model = self.config.model
        return models.outline(model.name, model.args, self.classes, self.shapes[0])[0]

    def _count_heads(self, index: int, block: nn.Module) -> int:
        try:
            with torch.device("meta"):
                made = self._trainable(index, block)
        except Exception:  # a head of the user's may need values; if it is really wrong, this raises again
            made = self._trainable(index, block)
        return sum(parameter.numel() for parameter in made.heads.parameters())

    def _trainable(self, index: int, block: nn.Module) -> TrainableBlock:
        return self.method.trainable(index, block, self.shapes[index], self.shapes[index + 1])

    def trainables(self, blocks: Iterable[int]) -> dict[int, TrainableBlock]:
        """Build blocks with their heads; weights are drawn from (seed, block)."""
        wanted = list(blocks)
        model, seed = self.config.model, self.config.run.seed
        modules = models.build(model.name, model.args, self.classes, seed, wanted)
        trainables: dict[int, TrainableBlock] = {}
        for index, module in zip(wanted, modules, strict=True):
            with seeded(seed, "heads", index):
                trainables[index] = self._trainable(index, module)
            arithmetic.arrange(trainables[index], self.config, self.method.local)
        return trainables

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
