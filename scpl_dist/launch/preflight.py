"""Finds the user's mistakes before any process starts."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data import DataSource, Labels
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config
from scpl_dist.run.network import resolve


def preflight(
    config: Config,
    absent: Callable[[str], None] | None = None,
    labels: Callable[[Labels], None] | None = None,
) -> Plan:
    """The plan of a run without mistakes; with the configuration to run, where a measured partition has its counts.

    `absent` is called with the reason if the files of a published data set cannot be used; everything else is checked
    then. None makes that a ValueError, as is any other mistake. `labels` is called with those of `DataSource.labels`.
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
    if labels is not None:
        labels(source.labels)
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
    if config.runtime.device == "cuda" and not torch.cuda.is_available():
        raise ValueError('runtime.device = "cuda": torch sees no GPU here; use "auto" or "cpu"')
    _check_port("metrics", config.metrics.host, config.metrics.port)
    _check_port("control", config.control.host, config.control.port)
    return plan


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration to run and the labels found, as `scpl_dist.launch.process.call` takes and gives them."""
    labels: dict[str, list[int]] = {}
    plan = preflight(Config.model_validate(config), labels=labels.update)
    return {"config": plan.config.model_dump(mode="json"), "labels": labels}


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
