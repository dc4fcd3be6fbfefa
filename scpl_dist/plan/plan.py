"""From a configuration to units: which blocks a stage holds, their heads, their initial weights.

Every process works this out for itself from the configuration and the shape of a sample, so nothing but that shape
has to be sent, and every process comes to the same result. All other blocks exist on the meta device only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scpl_dist import methods, models
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.models.build import seeded
from scpl_dist.plan import partition
from scpl_dist.run.config import Config


@dataclass(frozen=True)
class Plan:
    """The whole model as a plan.

    Attributes:
        config: the run.
        classes: number of classes.
        shapes: input of block 0, then the output of every block: pytrees of meta tensors, batch 2.
        parameters: number of parameters of each block, without heads.
        head_parameters: number of parameters of each block's heads.
        places: what each stage holds.
        method: the training method.
    """

    config: Config
    classes: int
    shapes: list[Any]
    parameters: list[int]
    head_parameters: list[int]
    specs: list[StageSpec]
    method: methods.Method

    @classmethod
    def plan(cls, config: Config, classes: int, example: Any) -> Plan:
        """Work out shapes and places.

        Args:
            config: the run.
            classes: number of classes.
            example: a batch of two inputs, a pytree of tensors; their values are not used.

        Raises:
            ValueError: model, method, partition or shapes do not fit; the message has the key and the fix.
        """
        method_type = methods.resolve(config.run.method)
        blocks, outputs = models.outline(config.model.name, config.model.args, classes, example)
        parameters = [sum(p.numel() for p in block.parameters()) for block in blocks]
        specs = _places(config, parameters)
        method = method_type(config, len(blocks), classes)
        shapes = [example, *outputs]
        heads = [
            _head_parameters(method.trainable, *args)
            for args in zip(range(len(blocks)), blocks, shapes, outputs, strict=False)
        ]
        return cls(config, classes, shapes, parameters, heads, specs, method)

    def trainables(self, blocks: Iterable[int]) -> dict[int, TrainableBlock]:
        """Build blocks with their heads; weights are drawn from (seed, block)."""
        wanted = list(blocks)
        config = self.config
        modules = models.build(config.model.name, config.model.args, self.classes, config.run.seed, wanted)
        trainables: dict[int, TrainableBlock] = {}
        for index, module in zip(wanted, modules, strict=True):
            with seeded(config.run.seed, "heads", index):
                trainables[index] = self.method.trainable(
                    index, module, self.shapes[index], self.shapes[index + 1]
                )
        return trainables

    def table(self) -> str:
        """The stages as text: blocks, parameters, and the size of what one sample sends on."""
        replicas = self.config.layout.replicas
        several = max(replicas) > 1
        rows = ["stage  blocks  parameters  " + ("replicas  " if several else "") + "output of a sample"]
        for spec in self.specs:
            count = sum(self.parameters[block] for block in spec.blocks)
            blocks = f"{spec.blocks[0]}-{spec.blocks[-1]}" if len(spec.blocks) > 1 else str(spec.blocks[0])
            leaves = [
                leaf
                for leaf in pytree.tree_leaves(self.shapes[spec.blocks[-1] + 1])
                if isinstance(leaf, Tensor)
            ]
            shapes = " ".join("x".join(map(str, leaf.shape[1:])) for leaf in leaves)
            number = f"{replicas[spec.stage]:8}  " if several else ""
            rows.append(f"{spec.stage:5}  {blocks:>6}  {count:10,}  {number}{shapes}")
        return "\n".join(rows)


def _head_parameters(make: Callable[..., TrainableBlock], *args: Any) -> int:
    """Parameters of a block's heads, made without storage where that is possible."""
    try:
        with torch.device("meta"):
            trainable = make(*args)
    except ValueError:
        raise
    except Exception:  # a head of the user's may need values; if it is really wrong, this raises again
        trainable = make(*args)
    return sum(parameter.numel() for parameter in trainable.heads.parameters())


def _places(config: Config, parameters: list[int]) -> list[StageSpec]:
    stages, rule = config.pipeline.stages, config.pipeline.partition
    blocks = len(parameters)
    if stages > blocks:
        raise ValueError(
            f"pipeline.stages = {stages}: the model {config.model.name!r} has {blocks} blocks and a stage needs at "
            f"least one; use at most {blocks} stages or a model with more blocks"
        )
    if isinstance(rule, list):
        if sum(rule) != blocks:
            raise ValueError(
                f"pipeline.partition = {rule}: {sum(rule)} blocks in all, but the model {config.model.name!r} has "
                f"{blocks}; the counts must add up to {blocks}"
            )
        counts = rule
    elif rule == "measured":
        raise ValueError(
            'pipeline.partition = "measured": all processes need the same counts, so one measures for all; '
            "scpl-dist train does, and for other launchers scpl-dist train CONFIG --dry-run prints them to be set"
        )
    else:
        costs = {"uniform": [1.0] * blocks, "parameters": [float(count) for count in parameters]}
        counts = partition.balanced(costs[rule], stages)
    replicas = config.layout.replicas
    return [
        StageSpec(stage, stages, held, replicas[stage]) for stage, held in enumerate(partition.split(counts))
    ]


def describe(example: Any) -> Any:
    """A pytree of tensors as plain values that msgpack carries: shapes and dtypes only. `imagine` is its inverse."""
    if isinstance(example, Tensor):
        return {"shape": list(example.shape), "dtype": str(example.dtype).removeprefix("torch.")}
    if isinstance(example, list | tuple):
        return {type(example).__name__: [describe(part) for part in example]}
    if isinstance(example, dict):
        return {"dict": [[key, describe(part)] for key, part in example.items()]}
    raise ValueError(
        f"the data set gives a {type(example).__name__} as input: use tensors, and tuples, lists or dicts of tensors"
    )


def imagine(description: Any) -> Any:
    """A pytree of zeros on the CPU from `describe`'s description."""
    if "shape" in description:
        return torch.zeros(description["shape"], dtype=getattr(torch, description["dtype"]))
    if "dict" in description:
        return {key: imagine(part) for key, part in description["dict"]}
    if "tuple" in description:
        return tuple(imagine(part) for part in description["tuple"])
    return [imagine(part) for part in description["list"]]


def place_units(trainables: dict[int, TrainableBlock], device: torch.device) -> None:
    """Move units to the device they compute on."""
    for trainable in trainables.values():
        trainable.to(device)
