"""Using what a run has saved: accuracy of its weights, and its weights as one plain state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.data import DataSource
from scpl_dist.data.loader import Loader
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config
from scpl_dist.run.layout import Layout
from scpl_dist.storage import checkpoints
from scpl_dist.storage.parts import read_part
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker.executor import Context, Executor
from scpl_dist.worker.state import restore
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater


def load(run_dir: Path, name: str | None = None) -> tuple[Plan, DataSource, dict[int, TrainableBlock]]:
    """Plan, data and all units of a finished run, with the weights of a checkpoint, on the CPU.

    Args:
        run_dir: run folder.
        name: checkpoint, such as ``step-200`` or ``best``; None takes the newest.

    Raises:
        ValueError: the folder is no run folder.
        CheckpointError: no usable checkpoint.
    """
    if not (run_dir / "config.toml").is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.toml")
    configuration = config.load(run_dir / "config.toml")
    folder = checkpoints.find(run_dir, name)
    source = data.resolve(configuration)
    plan = Plan.plan(configuration, source.classes, source.example())
    trainables = plan.trainables(range(len(plan.parameters)))
    for index, trainable in trainables.items():
        restore(trainable, (), read_part(folder, index) | {"optimizers": []})
        trainable.eval()
    return plan, source, trainables


def evaluate(run_dir: Path, split: str = "test", name: str | None = None) -> dict[str, Any]:
    """Accuracy of saved weights.

    The executor of the training run does the work, as a pipeline of one stage in this process: the figures are those
    of the run itself.

    Returns:
        ``{"split", "accuracy", "correct", "total"}``.
    """
    plan, source, trainables = load(run_dir, name)
    if split not in source.sizes:
        raise ValueError(f"--split {split!r}: the data set has {', '.join(source.sizes)}")
    device, size, batch = torch.device("cpu"), source.sizes[split], plan.config.data.batch_size
    loader, alone = Loader(source, plan.config.run.seed, workers=0), Layout([1])
    counts: list[dict[str, Any]] = []
    stage = Executor(
        StageSpec(0, 1, range(len(trainables))),
        plan.method,
        {index: Updater(trainable, plan.config) for index, trainable in trainables.items()},
        Neighbours(RpcTransport(0, 1, "", 1, device), alone, alone.workers[0]),
        Context(device=device, timer=PhaseTimer(), report=counts.append, run_dir=run_dir, loader=loader),
    )
    starts = range(0, size, batch)
    loader.put(
        [
            {
                "kind": "evaluate",
                "sequence": n,
                "epoch": 0,
                "split": split,
                "micro_batches": [[a, min(a + batch, size)]],
            }
            for n, a in enumerate(starts)
        ]
        + [{"kind": "stop", "sequence": len(starts)}]
    )
    stage.run()
    correct = sum(count["correct"] or 0 for count in counts)
    total = sum(count["total"] or 0 for count in counts)
    return {"split": split, "accuracy": correct / total, "correct": correct, "total": total}


def export(run_dir: Path, target: Path, name: str | None = None) -> int:
    """Write all weights as one safetensors file with keys ``blocks.<i>.<name>`` and ``heads.<i>.<name>``.

    Returns:
        The number of tensors.
    """
    from safetensors.torch import save_file

    plan, _, trainables = load(run_dir, name)
    tensors: dict[str, torch.Tensor] = {}
    for index, trainable in trainables.items():
        for prefix, module in ((f"blocks.{index}", trainable.block), (f"heads.{index}", trainable.heads)):
            for key, tensor in module.state_dict().items():
                tensors[f"{prefix}.{key}"] = tensor.detach().clone().contiguous()
    save_file(tensors, target, metadata={"model": plan.config.model.name, "method": plan.config.run.method})
    return len(tensors)
