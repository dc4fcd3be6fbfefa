"""Decoupled training: every stage learns from a loss of its own, so no stage waits for another's backward pass.

`train` runs a network of your own blocks on your own data in several processes; `evaluate`, `load` and `export` use
what it has saved. Everything else is the command ``scpl-dist``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scpl_dist.commands.history import RunResult
    from scpl_dist.commands.trained import TrainedModel

__all__ = ["RunFailed", "__version__", "evaluate", "export", "load", "train"]

__version__ = "0.2.0"


class RunFailed(RuntimeError):
    """A run ended with an error: its exit ``code``, and as ``details`` what ``exit.json`` says of reason and place."""

    def __init__(self, code: int, details: dict[str, Any]) -> None:
        super().__init__(details.get("reason", f"exit code {code}"))
        self.code = code
        self.details = details


def train(
    blocks: Callable[..., Any] | str | None = None,
    data: Callable[..., Any] | str | None = None,
    settings: Mapping[str, Any] | None = None,
    run_dir: str | Path | None = None,
) -> RunResult:
    """Train on this machine, one process a stage, and wait for the end.

    The worker processes import ``blocks`` and ``data`` by name, so both are functions at the top level of a file, and
    the call itself stands under ``if __name__ == "__main__":``. In a notebook, a cell that begins with ``%%writefile``
    makes such a file; the cell that trains shows the table of the run.

    Args:
        blocks: function ``(classes) -> list`` of `torch.nn.Module` (or of functions that build one), each a block
            that learns from a loss of its own; or a name as in ``model.name``.
        data: function ``(root) -> (train, validation, test)`` or ``(train, test)`` of map-style data sets of (tensor,
            label); or a name as in ``data.name``.
        settings: configuration keys and values, such as ``{"pipeline.stages": 2, "run.epochs": 5}``.
        run_dir: run folder; None makes ``runs/<time>-<run.name>``, or the method in place of the name.

    Returns:
        The content of ``result.json`` by key, with the run folder as ``run_dir``, and as ``history`` the rows of
        ``history.steps`` and ``history.epochs``, which ``pandas.DataFrame`` takes.

    Raises:
        ValueError: a setting, the blocks or the data cannot be used; nothing was started.
        RunFailed: the run failed or was stopped.
    """
    from scpl_dist.commands import history, notebook
    from scpl_dist.launch import local
    from scpl_dist.run import config, imports

    if imports.in_progress:
        raise ValueError(
            f"scpl_dist.train() was called while a process of a run imported {imports.in_progress[0]}: write the call "
            'under if __name__ == "__main__":'
        )
    values: dict[str, Any] = {"metrics.port": 0, **(settings or {})}
    with notebook.one_line():
        for key, given in (("model.name", blocks), ("data.name", data)):
            if given is not None:
                values[key] = given if isinstance(given, str) else imports.name_of(given)
        settled = config.load(values=values)
        with notebook.live_table() as begun:
            ended = local.train_apart(settled, run_dir, begun)
        if ended is None:
            raise RunFailed(1, {"reason": "the launcher of the run was killed"})
        code, folder = ended
        if code != 0:
            raise RunFailed(code, folder.read("exit.json") or {})
    return history.RunResult({**(folder.read("result.json") or {}), "run_dir": str(folder.path)})


def evaluate(
    run_dir: str | Path,
    split: str = "test",
    checkpoint: str | None = None,
    *,
    threshold: float | None = None,
    block: int | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    low_memory: bool = False,
) -> dict[str, Any]:
    """Metrics of the weights that a run has saved, computed in this process.

    Blocks and data of your own are imported by the names that the run's ``config.toml`` has.

    Args:
        run_dir: run folder.
        split: part of the data: "train", "validation" or "test".
        checkpoint: such as "step-200", "best" or "last", or a path; None takes the newest.
        threshold: let a sample leave at the first block that gives one class at least this probability, in (0, 1].
            None lets all samples go through all blocks, as in the run itself.
        block: let all samples leave behind this block instead; blocks count from 0.
        device: "auto" computes where the run's ``runtime.device`` says, and on the CPU if there is no GPU here; or
            "cpu", "cuda", "cuda:1".
        batch_size: samples that are computed at once; None takes that of the training.
        low_memory: hold the weights of one block at a time, for a model that is larger than the memory.

    Returns:
        ``{"split", "accuracy", "total", "mean_depth", "left", "correct"}``: the share of right answers, the number of
        samples, the blocks that a sample passed on average, and by block the samples that left there and how many of
        them got a right answer. Also "loss", but for the method al, and what the run's ``task.metrics`` names.

    Raises:
        ValueError: no run folder, or a checkpoint, a split, a threshold or a block that this run does not have.
        RuntimeError: there is no checkpoint, or it is damaged, or has weights that are NaN or infinite.
    """
    from scpl_dist.commands.evaluate import evaluate

    found = evaluate(Path(run_dir), split, checkpoint, threshold, block, device, batch_size, low_memory)
    numbers = {**found.metrics, "total": found.total, "mean_depth": found.mean_depth}
    return {"split": split, **numbers, "left": found.left, "correct": found.correct}


def load(
    run_dir: str | Path, checkpoint: str | None = None, *, depth: int | None = None, device: str = "auto"
) -> TrainedModel:
    """A trained model as a `torch.nn.Module`, ready to answer: ``load(run_dir).predict(["cat.jpg", "dog.jpg"])``.

    Nothing of the data set is needed but for runs of earlier versions, whose folder does not have what makes inputs of
    raw ones. Blocks of your own are imported by the names that the run's ``config.toml`` has.

    Args:
        run_dir: run folder.
        checkpoint: such as "step-200", "best" or "last", or the path of a checkpoint or of an exported
            ``.safetensors``; None takes the newest.
        depth: cut the model behind so many blocks, of which the last one must have a classifier; None takes all.
        device: "auto" is where the run's ``runtime.device`` says, and the CPU if there is no GPU here; or "cpu",
            "cuda", "cuda:1".

    Returns:
        The module: called with a batch of preprocessed tensors, it gives class scores (N, classes); ``predict`` takes
        raw inputs; ``classes`` has the names, ``preprocessing.batch`` makes tensors of raw inputs.

    Raises:
        ValueError: no run folder, or a checkpoint, a depth or a device that is not there.
        RuntimeError: there is no checkpoint, or it is damaged, of another model, or has weights that are not finite.
    """
    from scpl_dist.commands import saved
    from scpl_dist.commands.trained import TrainedModel

    return TrainedModel(saved.find(Path(run_dir), checkpoint, device), depth)


def export(
    run_dir: str | Path,
    target: str | Path,
    checkpoint: str | None = None,
    *,
    format: str | None = None,
    depth: int | None = None,
) -> int:
    """Write a model that a run has saved in a form that needs nothing of this package.

    Args:
        run_dir: run folder.
        target: file or folder to write, in one step.
        checkpoint: such as "step-200", "best" or "last", or a path; None takes the newest.
        format: None goes by how the name of the file ends. "safetensors" is one plain state dict with the keys
            ``blocks.<i>.<name>``, and ``heads.<i>.<name>`` for what the local objective of block ``i`` added. "onnx"
            and "torch_export" (``.pt2``) are graphs from a batch of preprocessed inputs to class scores. "hf" is a
            folder that transformers loads, of a model ``hf:PATH_OR_NAME``.
        depth: cut the model behind so many blocks; None takes all.

    Returns:
        The number of tensors.

    Raises:
        ValueError: no run folder, no such checkpoint or depth, a file that cannot be written or is not called so, or a
            model that cannot be made a graph.
        RuntimeError: there is no checkpoint, or it is damaged, or has weights that are NaN or infinite.
    """
    from scpl_dist.commands.export import export

    return export(Path(run_dir), Path(target), checkpoint, format, depth)
