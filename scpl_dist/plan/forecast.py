"""What a model costs block by block on this machine, and what cutting it into stages would bring.

The stream is as fast as its slowest stage, so one measurement of each block says how many stages are worth having,
where to cut, and what the links between them must carry, before anything is started on a cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scpl_dist.data import DataSource
from scpl_dist.methods import arithmetic
from scpl_dist.models.trace import spec
from scpl_dist.plan.plan import Plan
from scpl_dist.run import partition
from scpl_dist.transport.tensors import narrow, nbytes


@dataclass(frozen=True)
class Cut:
    """One way to cut the model."""

    counts: list[int]
    seconds: float  # a step of the slowest stage, its replicas considered: the stream's seconds a step
    speedup: float  # against the same blocks in one process
    bytes: int  # the most that a step sends from one stage to the next; 0 with one stage


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Forecast:
    plan: Plan
    seconds: list[float]  # a training step of each block: forward, loss, backward, update
    sent: list[int]  # bytes of each block's output for one batch
    cuts: list[Cut]  # the best one for each number of stages, from 1
    present: Cut  # the one of the configuration
    at_once: float  # workers that this machine can keep busy: its GPUs, or its cores by `runtime.threads`

    def text(self) -> str:
        plan = self.plan
        rows = ["block   ms a step   share  parameters  with heads  MB a step sent on"]
        for block, seconds in enumerate(self.seconds):
            own, heads = plan.parameters[block], plan.head_parameters[block]
            share = 100 * seconds / sum(self.seconds)
            sent = f"{self.sent[block] / 1e6:.3f}" if block < len(self.seconds) - 1 else ""
            cost = f"{1000 * seconds:10.2f}  {share:4.0f} %"
            rows.append(f"{block:5}  {cost}  {own:10,}  {own + heads:10,}  {sent:>17}".rstrip())
        rows += ["", "stages  speed-up  here  samples/s  ms a step  MB/s on a link  pipeline.partition"]
        rows += [self._row(cut) for cut in self.cuts]
        replicas = plan.config.pipeline.replicas
        rows += [self._row(self.present) + f"  now, with pipeline.replicas = {replicas}", ""]
        rows.append(
            "All but 'here' assume a GPU, or runtime.threads cores, for each worker alone; this machine can keep "
            f"{self.at_once:g}\nof them busy, and 'here' is the most that it can come to."
        )
        return "\n".join(rows)

    def _row(self, cut: Cut) -> str:
        speed = self.plan.config.data.batch_size / cut.seconds
        link = cut.bytes / cut.seconds / 1e6
        times = f"{cut.speedup:8.2f}  {min(cut.speedup, self.at_once):4.2f}  {speed:9.0f}  {1000 * cut.seconds:9.2f}"
        return f"{len(cut.counts):6}  {times}  {link:14.1f}  {cut.counts}"


def forecast(plan: Plan, source: DataSource, measure: Callable[[Plan, DataSource], list[float]]) -> Forecast:
    """Measure the blocks of a run by ``measure``, which gives the seconds of a training step of each, and cut them.

    Times hold for this machine, one process, ``runtime.threads`` threads. What the links cost is not in them: a stage
    sends while it computes. ValueError if the stages of this method wait for each other.
    """
    if not plan.method.local:
        raise ValueError(
            f"run.method = {plan.config.run.method!r}: its stages wait for each other, so the slowest one does not "
            "tell the speed; plan with scpl, early_exit or al"
        )
    seconds = measure(plan, source)
    batch = min(plan.config.data.batch_size, source.sizes["train"])
    views = len(source.batch("train", 0, torch.arange(2))[1]) // 2
    sent = [_bytes_of_two(plan, output) * batch * views // 2 for output in _outputs(plan)]
    numbers = range(1, len(seconds) + 1)
    cuts = [_cut(partition.balanced(seconds, stages), [1] * stages, seconds, sent) for stages in numbers]
    present = [len(spec.blocks) for spec in plan.specs]
    runtime = plan.config.runtime
    cuda = arithmetic.on_gpu(plan.config)
    at_once = torch.cuda.device_count() if cuda else max(1.0, cores() / runtime.threads)
    now = _cut(present, plan.config.layout.replicas, seconds, sent)
    return Forecast(plan, seconds, sent, cuts, now, at_once)


def _outputs(plan: Plan) -> list[Any]:
    """What each block gives for two samples, in the types in which it computes."""
    precision = plan.config.runtime.precision
    if precision == "float32":
        return plan.shapes[1:]
    kind = "cuda" if arithmetic.on_gpu(plan.config) else "cpu"
    found = [spec(plan.shapes[0], kind)]
    with torch.no_grad(), torch.autocast(kind, getattr(torch, precision)):
        for index in range(len(plan.parameters)):
            block = plan.trainables([index])[index].block.eval().to(kind)
            found.append(block(found[-1]))
    return found[1:]


def _bytes_of_two(plan: Plan, output: Any) -> int:
    """Bytes on the wire of a block's output for two samples, without labels."""
    return nbytes(narrow(output, getattr(torch, plan.config.pipeline.wire_dtype))[0])


def _cut(counts: list[int], replicas: Sequence[int], seconds: list[float], sent: list[int]) -> Cut:
    ranges = partition.split(counts)
    held = zip(ranges, replicas, strict=True)
    stages = [sum(seconds[block] for block in blocks) / number for blocks, number in held]
    links = [sent[blocks[-1]] for blocks in ranges[:-1]]
    return Cut(counts, max(stages), sum(seconds) / max(stages), max(links, default=0))
