"""Decoupled training: every stage learns from a loss of its own, so no stage waits for another's backward pass.

`train` runs a network of your own blocks on your own data in several processes; everything else is the command
``scpl-dist``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RunFailed", "__version__", "train"]

__version__ = "0.1.0"


class RunFailed(RuntimeError):
    """A run ended with an error.

    Attributes:
        code: exit code of the run.
        details: content of ``exit.json``: reason, stage, host, step, micro-batch and traceback.
    """

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

    values: dict[str, Any] = dict(settings or {})
    if blocks is not None:
        values["model.name"] = blocks if isinstance(blocks, str) else imports.name_of(blocks)
    if data is not None:
        values["data.name"] = data if isinstance(data, str) else imports.name_of(data)
    values.setdefault("metrics.port", 0)
    configuration = config.load(values=values)
    code, folder = local.train(configuration, run_dir)
    if code != 0:
        raise RunFailed(code, folder.read("exit.json") or {})
    return {**(folder.read("result.json") or {}), "run_dir": str(folder.path)}
