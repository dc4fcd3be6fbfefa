"""Decoupled training: every stage learns from a loss of its own, so no stage waits for another's backward pass.

`train` runs a network of your own blocks on your own data in several processes; `evaluate` and `export` use what it
has saved. Everything else is the command ``scpl-dist``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RunFailed", "__version__", "evaluate", "export", "train"]

__version__ = "0.1.0"


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
) -> dict[str, Any]:
    """Train on this machine, one process a stage, and wait for the end.

    The worker processes import ``blocks`` and ``data`` by name, so both are functions at the top level of a file, and
    the call itself stands under ``if __name__ == "__main__":``.

    Args:
        blocks: function ``(classes) -> list`` of `torch.nn.Module` (or of functions that build one), each a block
            that learns from a loss of its own; or a name as in ``model.name``.
        data: function ``(root) -> (train, validation, test)`` or ``(train, test)`` of map-style data sets of (tensor,
            label); or a name as in ``data.name``.
        settings: configuration keys and values, such as ``{"pipeline.stages": 2, "run.epochs": 5}``.
        run_dir: run folder; None makes ``runs/<time>-<method>``.

    Returns:
        The content of ``result.json``, and the run folder as ``"run_dir"``.

    Raises:
        ValueError: a setting, the blocks or the data cannot be used; nothing was started.
        RunFailed: the run failed or was stopped.
    """
    from scpl_dist.launch import local
    from scpl_dist.run import config, imports

    if imports.in_progress:
        raise ValueError(
            f"scpl_dist.train() was called while a process of a run imported {imports.in_progress[0]}: write the call "
            'under if __name__ == "__main__":'
        )
    values: dict[str, Any] = {"metrics.port": 0, **(settings or {})}
    for key, given in (("model.name", blocks), ("data.name", data)):
        if given is not None:
            values[key] = given if isinstance(given, str) else imports.name_of(given)
    ended = local.train_apart(config.load(values=values), run_dir)
    if ended is None:
        raise RunFailed(1, {"reason": "the launcher of the run was killed"})
    code, folder = ended
    if code != 0:
        raise RunFailed(code, folder.read("exit.json") or {})
    return {**(folder.read("result.json") or {}), "run_dir": str(folder.path)}


def evaluate(
    run_dir: str | Path,
    split: str = "test",
    checkpoint: str | None = None,
    *,
    threshold: float | None = None,
    block: int | None = None,
) -> dict[str, Any]:
    """Metrics of the weights that a run has saved, computed in this process.

    It computes where the run's ``runtime.device`` says, and on the CPU if there is no GPU here. Blocks and data of your
    own are imported by the names that the run's ``config.toml`` has.

    Args:
        run_dir: run folder.
        split: part of the data: "train", "validation" or "test".
        checkpoint: such as "step-200", "best" or "latest"; None takes the newest.
        threshold: let a sample leave at the first block that gives one class at least this probability, in (0, 1].
            None lets all samples go through all blocks, as in the run itself.
        block: let all samples leave behind this block instead; blocks count from 0.

    Returns:
        ``{"split", "accuracy", "total", "mean_depth", "left", "correct"}``: the share of right answers, the number of
        samples, the blocks that a sample passed on average, and by block the samples that left there and how many of
        them got a right answer. Also "loss", but for the method al, and what the run's ``task.metrics`` names.

    Raises:
        ValueError: no run folder, or a checkpoint, a split, a threshold or a block that this run does not have.
        RuntimeError: there is no checkpoint, or it is damaged, or has weights that are NaN or infinite.
    """
    from scpl_dist.commands.evaluate import evaluate

    found = evaluate(Path(run_dir), split, checkpoint, threshold, block)
    numbers = {**found.metrics, "total": found.total, "mean_depth": found.mean_depth}
    return {"split": split, **numbers, "left": found.left, "correct": found.correct}


def export(run_dir: str | Path, target: str | Path, checkpoint: str | None = None) -> int:
    """Write the weights that a run has saved as one plain state dict, which needs nothing of this package.

    Args:
        run_dir: run folder.
        target: file to write, whose name ends in ".safetensors". Its keys are ``blocks.<i>.<name>``, and
            ``heads.<i>.<name>`` for what the local objective of block ``i`` added; dtypes and shapes are those of the
            modules.
        checkpoint: such as "step-200", "best" or "latest"; None takes the newest.

    Returns:
        The number of tensors.

    Raises:
        ValueError: no run folder, no such checkpoint, or a file that cannot be written or is not called so.
        RuntimeError: there is no checkpoint, or it is damaged, or has weights that are NaN or infinite.
    """
    from scpl_dist.commands import saved

    return saved.export(Path(run_dir), Path(target), checkpoint)
