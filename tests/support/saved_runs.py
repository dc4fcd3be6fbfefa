"""Run folders with a checkpoint, made in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.control.messages import Dataset
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import load
from scpl_dist.storage import checkpoints
from scpl_dist.storage.parts import part_name, write_part
from scpl_dist.transport import tensors
from scpl_dist.worker.preprocessing import keep
from scpl_dist.worker.updater import Updater


def saved(folder: Path, **values: Any) -> Path:
    """A run folder with a checkpoint of a model whose blocks have seen a little of the data."""
    config = load(values={"data.augmentation": "none", **values})
    source = data.resolve(config)
    example = source.example()
    plan = Plan.plan(config, source.classes, example)
    trainables = plan.trainables(range(len(plan.parameters)))
    inputs, labels = source.batch("train", 0, torch.arange(min(128, source.sizes["train"])))
    for _ in range(4):
        carry = plan.method.carry(inputs, labels)
        for trainable in trainables.values():
            after = trainable.train()(carry)
            torch.autograd.backward(torch.stack(list(trainable.losses(carry, after, labels).values())).sum())
            torch.optim.Adam(trainable.parameters(), lr=3e-3).step()
            trainable.zero_grad()
            carry = torch.utils._pytree.tree_map(torch.Tensor.detach, after)
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml())
    described = Dataset(classes=source.classes, sizes=dict(source.sizes), input=tensors.describe(example))
    keep(folder, described, source)
    target = checkpoints.folder_for(folder, 8)
    target.mkdir(parents=True)
    files = [
        write_part(target / part_name(block), Updater(trainable, config).state_dict())
        for block, trainable in trainables.items()
    ]
    position = {"epoch": 0, "step": 8, "batch": 0}
    checkpoints.commit(target, {"step": 8, "position": position, "files": files}, keep=1)
    return folder
