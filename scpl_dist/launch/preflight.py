"""Finds the user's mistakes before any process starts."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from scpl_dist import data
from scpl_dist.coordinator import loggers
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data import DataSource, Labels
from scpl_dist.data.sampling import weights_of
from scpl_dist.methods import arithmetic
from scpl_dist.methods.task import TASKS
from scpl_dist.plan.forecast import cores
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config
from scpl_dist.run.imports import blaming
from scpl_dist.run.network import resolve, workers_here
from scpl_dist.worker import optimizers


def preflight(
    config: Config,
    absent: Callable[[str], None] | None = None,
    position: Mapping[str, Any] | None = None,
    labels: Callable[[Labels], None] | None = None,
) -> Plan:
    """The plan of a run without mistakes; with the configuration to run, where a measured partition has its counts.

    `absent` is called with the reason if the files of a published data set cannot be used; everything else is checked
    then. None makes that a ValueError, as is any other mistake. `position` is that of the checkpoint to go on from.
    `labels` is called with those of `DataSource.labels`.
    """
    loggers.check(config)
    try:
        source = data.resolve(config)
    except data.MissingFiles as error:
        if absent is None or config.pipeline.partition == "measured":
            raise
        absent(str(error))
        return _plan(config, error.classes, error.example, position)
    if labels is not None:
        labels(source.labels)
    return examine(config, source, position)


def examine(config: Config, source: DataSource, position: Mapping[str, Any] | None = None) -> Plan:
    """`preflight` of a run whose data set has been read."""
    size = source.sizes["train"]
    if config.data.batch_size > size:
        raise ValueError(
            f"data.batch_size = {config.data.batch_size}: the training set of {config.data.name!r} has {size} "
            f"samples; use at most {size}"
        )
    weights_of(config, source)  # raises if they are no weights
    ItemSequence(config, source.sizes, position)  # raises if they do not fit together
    shape = source.batch("train", 0, torch.arange(2))[1].shape[1:]
    if len(shape) != TASKS[config.task.name].label_dimensions:
        raise ValueError(
            f"task.name = {config.task.name!r} and data.name = {config.data.name!r}: the label of a sample has shape "
            f'{tuple(shape)}; use task.name = "lm" where each token has a label, and "classification" where each '
            "sample has one class, an integer from 0"
        )
    if config.pipeline.partition == "measured":
        config = _measured(config, source)
    with blaming("data.name", config.data.name):
        example = source.example()
    plan = _plan(config, source.classes, example, position, data.counts(config, source))
    world = config.layout.world
    for stage in range(config.pipeline.stages if workers_here(world) == world else 1):
        arithmetic.device(config.at(stage))
    _check_folder(config.runtime.offload_folder)
    _check_port("metrics", config.metrics.host, config.metrics.port)
    _check_port("control", config.control.host, config.control.port)
    return plan


def _plan(
    config: Config,
    classes: int,
    example: Any,
    position: Mapping[str, Any] | None,
    counts: Sequence[int] = (),
) -> Plan:
    """The plan after all checks that need no data; what is only doubtful is said."""
    plan = Plan.plan(config, classes, example, counts)
    plan.check()
    unread = type(plan.method).unread(config)
    if unread and position is None:
        given, reason = config.recipe(), f"the method {plan.method.name} does not read it; leave it out"
        raise ValueError("\n".join(f"{key} = {given[key]!r}: {reason}" for key in unread))
    optimizers.check(plan)
    unfit = plan.unfit() if position is None else ()  # a run that goes on has its weights from its checkpoint
    for text in [*unfit, *plan.doubts(), *_crowd(config)]:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    return plan


def _crowd(config: Config) -> Iterator[str]:
    """Whether the workers of this host get in each other's way, which they do less on GPUs."""
    workers = workers_here(config.layout.world)
    threads, there = config.runtime.threads, cores()
    gpu = arithmetic.on_gpu(config)
    if workers * threads > there and not gpu:
        fix = f"use runtime.threads = {there // workers}" if workers <= there else "use fewer workers here"
        yield f"runtime.threads = {threads} for each of {workers} workers, on {there} CPU core(s): {fix}"


def checked(config: dict[str, Any], position: dict[str, Any] | None) -> dict[str, Any]:
    """The configuration to run and the labels found, as `scpl_dist.launch.process.call` takes and gives them."""
    labels: dict[str, list[int]] = {}
    plan = preflight(Config.model_validate(config), position=position, labels=labels.update)
    return {"config": plan.config.model_dump(mode="json"), "labels": labels}


def _measured(config: Config, source: DataSource) -> Config:
    from scpl_dist.worker import costs  # with all that a worker needs, which takes its time

    def partitioned(partition: str | list[int]) -> Config:
        pipeline = config.pipeline.model_copy(update={"partition": partition})
        return config.model_copy(update={"pipeline": pipeline})

    plan = Plan.plan(partitioned("uniform"), source.classes, source.example())
    optimizers.check(plan)
    return partitioned(costs.counts(plan, source))


def _check_folder(folder: str) -> None:
    if folder and not (Path(folder).is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(
            f"runtime.offload_folder = {folder!r}: is no folder that can be written; make it, on each host, or leave "
            "the key out for the run folder"
        )


def _check_port(section: str, host: str, port: int | Literal["auto"]) -> None:
    if port == 0:
        return
    address = resolve(host, f"{section}.host")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, 0 if port == "auto" else port))
        except OSError as error:
            raise ValueError(
                f"{section}.port = {port}: cannot listen on {host}:{port} ({error.strerror}); choose another one, "
                f"or -o {section}.port=0 for any free one"
            ) from None
