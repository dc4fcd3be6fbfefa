"""Finds the user's mistakes before any process starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data import DataSource
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config
from scpl_dist.run.network import resolve


def preflight(config: Config, absent: Callable[[str], None] | None = None) -> Plan:
    """The plan of a run without mistakes; with the configuration to run, where a measured partition has its counts.

    `absent` is called with the reason if the files of a published data set cannot be used; everything else is checked
    then. None makes that a ValueError, as is any other mistake.
    """
    try:
        source = data.resolve(config)
    except data.MissingFiles as error:
        if absent is None or config.pipeline.partition == "measured":
            raise
        absent(str(error))
        plan = Plan.plan(config, error.classes, error.example)
        plan.check()
        return plan
    return examine(config, source)


def examine(config: Config, source: DataSource) -> Plan:
    """`preflight` of a run whose data set has been read."""
    size = source.sizes["train"]
    if config.data.batch_size > size:
        raise ValueError(
            f"data.batch_size = {config.data.batch_size}: the training set of {config.data.name!r} has {size} "
            f"samples; use at most {size}"
        )
    ItemSequence(config, source.sizes)  # raises if replicas cannot share the batches
    if config.pipeline.partition == "measured":
        config = _measured(config, source)
    plan = Plan.plan(config, source.classes, source.example())
    plan.check()
    shape, wanted = source.batch("train", 0, torch.arange(2))[1].shape[1:], plan.method.task.label_shape
    if shape != wanted:
        raise ValueError(
            f"data.name = {config.data.name!r}: the label of a sample has shape {tuple(shape)}, and the heads learn "
            f"labels of shape {wanted}: give each sample one class, an integer from 0"
        )
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError('runtime.device = "cuda": torch sees no GPU here; use "auto" or "cpu"')
    _check_port("metrics", config.metrics.host, config.metrics.port)
    _check_port("control", config.control.host, config.control.port)
    return plan


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration to run, as `scpl_dist.launch.process.call` takes and gives it."""
    return preflight(Config.model_validate(config)).config.model_dump(mode="json")


def _measured(config: Config, source: DataSource) -> Config:
    from scpl_dist.worker import costs  # with all that a worker needs, which takes its time

    def partitioned(partition: str | list[int]) -> Config:
        pipeline = config.pipeline.model_copy(update={"partition": partition})
        return config.model_copy(update={"pipeline": pipeline})

    plan = Plan.plan(partitioned("uniform"), source.classes, source.example())
    return partitioned(costs.counts(plan, source))


def _check_port(section: str, host: str, port: int) -> None:
    if port == 0:
        return
    address = resolve(host, f"{section}.host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ValueError(
                f"{section}.port = {port}: cannot listen on {host}:{port} ({error.strerror}); choose another one, "
                f"or -o {section}.port=0 for any free one"
            ) from None
