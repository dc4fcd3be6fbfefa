"""What is compared: the product, a plain loop, and torch's own pipelines, each timed in processes of its own.

All of them get the same configuration values, from which they take blocks, heads, first weights, data, optimizer,
precision, order of memory, and whether freed memory is kept.
"""

from __future__ import annotations

import itertools
import os
import queue
import resource
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import scpl_dist
from scpl_dist import data
from scpl_dist.methods.block import detached
from scpl_dist.methods.heads import Predictor, feature
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.storage.metrics_log import MetricsLog
from scpl_dist.worker.allocator import keep_freed_memory
from scpl_dist.worker.updater import Updater

NETWORKS = Path(__file__).with_name("networks.py")
LIMIT_S = 600
ONE_MESSAGE_S = 1e-3
"""So far apart may be the times of rows that the coordinator makes of one message."""
WARM_UP = 4
"""Steps that are not timed: first allocations, and the filling of the pipeline."""


def lead(stages: int, max_in_flight: int = 2) -> int:
    """Steps that the first stage may be ahead of the last one: those in flight, and the one that each computes."""
    return (max_in_flight + 1) * (stages - 1)


@dataclass(frozen=True)
class Figures:
    """Of one contender: seconds a step, and the peak of resident memory of its largest process, in MiB."""

    seconds: float
    peak: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Figures:
        """What this process has taken, by the ends of its steps."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return cls((times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP), peak)

    @classmethod
    def slowest(cls, found: Sequence[Figures]) -> Figures:
        """Of processes that work together."""
        return cls(max(one.seconds for one in found), max(one.peak for one in found))


def settings(model: str, dataset: str, batch: int, steps: int, **model_args: Any) -> dict[str, Any]:
    """Configuration values that all contenders share: one thread a worker, no augmentation, one epoch.

    `model` is a function of `benchmarks.networks`, or a model's name with a colon before it.
    """
    return {
        "run.epochs": 1,
        "model.name": model.removeprefix(":") if model.startswith(":") else f"{NETWORKS}:{model}",
        "model.args": model_args,
        "data.name": f"{NETWORKS}:{dataset}",
        "data.args": {"size": batch * steps},
        "data.batch_size": batch,
        "data.augmentation": "none",
        "metrics.port": 0,
        "runtime.device": "cpu",
    }


def product(values: dict[str, Any], stages: int, method: str = "scpl", micro_batches: int = 1) -> Figures:
    """A real run, by the coordinator's record of what the last stage finished."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        chosen = {"pipeline.stages": stages, "run.method": method, "pipeline.micro_batches": micro_batches}
        scpl_dist.train(settings=values | chosen, run_dir=run)
        return recorded(run)


def recorded(run: Path) -> Figures:
    """Of a run that has ended, by its rows."""
    rows = MetricsLog(run / "metrics.jsonl").rows()
    peak = max(one["peak_memory"] for row in rows if row["event"] == "usage" for one in row["workers"])
    return Figures(seconds_a_step(run), peak / 2**20)


def seconds_a_step(run: Path, warm_up: int = WARM_UP) -> float:
    """While all stages train: what the last one has left when the first one is done, it has the cores for itself.

    The first `warm_up` steps are not timed, nor are those at the end.
    """
    ends: dict[int, list[float]] = {}  # of steps, by block; of back-propagation there is the last one only
    for row in MetricsLog(run / "metrics.jsonl").rows():
        if row["event"] == "train":
            ends.setdefault(row["block"], []).append(row["time"])
    until = min(times[-1] for times in ends.values())
    times = [time for time in ends[max(ends)][warm_up:] if time <= until + ONE_MESSAGE_S]
    return (times[-1] - times[0]) / (len(times) - 1)


def waits(stages: int, seconds: float, steps: int) -> dict[str, Any]:
    """Values of a run with a block for each stage that does nothing but wait for so long with each batch."""
    values = settings("delays", "small_data", 16, steps + lead(stages), stages=stages, seconds=seconds)
    values |= {"loss.name": f"{NETWORKS}:nothing", "loss.projector": "i", "pipeline.stages": stages}
    values["runtime.timeout_s"] = 300.0  # many processes import torch on few cores
    return values


def waiting(stages: int, seconds: float, steps: int) -> Figures:
    """A real run of stages that only wait."""
    return product(waits(stages, seconds, steps), stages)


def plain_scpl(values: dict[str, Any]) -> Figures:
    """SCPL as a loop over the blocks in one process, with one thread."""
    return _together(_plain_scpl, [(values,)])


def plain_bp(values: dict[str, Any], threads: int = 1) -> Figures:
    """End-to-end training in one process."""
    return _together(_plain_bp, [(values, threads)])


def torch_pipeline(values: dict[str, Any], schedule: str, micro_batches: int) -> Figures:
    """End-to-end training by one of torch's schedules on two processes over gloo.

    GPipe with one micro-batch is naive model parallelism. ZBVZeroBubble has two stages a process, and ValueError
    says that a model cannot be cut in four for it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return _together(_torch_pipeline, [(rank, port, values, schedule, micro_batches) for rank in range(2)])


def two_at_once(values: dict[str, Any]) -> Figures:
    """Two independent plain loops that run at the same time."""
    return _together(_plain_scpl, [(values,)] * 2)


def _together(target: Any, arguments: Sequence[tuple[Any, ...]]) -> Figures:
    """Processes that run at the same time, each with arguments of its own."""
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=target, args=(*own, results)) for own in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    found: list[Figures] = []
    try:
        while len(found) < len(processes):
            try:
                found.append(results.get(timeout=1))
            except queue.Empty:
                if time.monotonic() > deadline or any(process.exitcode for process in processes):
                    raise RuntimeError("one of the processes has ended, or is too slow") from None
        return Figures.slowest(found)
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _prepared(values: dict[str, Any], threads: int = 1) -> tuple[Config, data.DataSource, Plan]:
    config = configuration.load(values=values)
    torch.set_num_threads(threads)
    if config.runtime.keep_memory:
        keep_freed_memory()
    source = data.resolve(config)
    return config, source, Plan.plan(config, source.classes, source.example())


def _batches(config: Config, source: data.DataSource) -> list[Tensor]:
    return list(torch.arange(source.sizes["train"]).split(config.data.batch_size))  # type: ignore[no-untyped-call]


def _plain_scpl(values: dict[str, Any], results: Any) -> None:
    config, source, plan = _prepared(values)
    trainables = plan.trainables(range(len(plan.parameters)))
    updaters = {index: Updater(trainable, config) for index, trainable in trainables.items()}
    times = []
    for indices in _batches(config, source):
        x, labels = source.batch("train", 0, indices)
        for index, trainable in trainables.items():
            output = trainable(x)
            loss = torch.stack(list(trainable.losses(x, output, labels).values())).sum()
            updaters[index].backward(loss)
            loss.item()
            updaters[index].step({"lr": config.optimizer.lr})
            x = detached(output)
        times.append(time.perf_counter())
    results.put(Figures.of(times))


class _WithPredictor(nn.Module):
    """A model, or a part of it; the last part has the predictor. Computes as the configuration says."""

    def __init__(self, plan: Plan, held: range, config: Config) -> None:
        super().__init__()
        trainables = plan.trainables(held)
        # Each computes in the precision and with the kernels that it has in the product; its heads are left out.
        self._parts = [trainable.forward for trainable in trainables.values()]
        self.blocks = nn.Sequential(*(trainable.block for trainable in trainables.values()))
        self.predictor: nn.Module | None = None
        if held[-1] == len(plan.parameters) - 1:
            self.predictor = Predictor(self.blocks[-1], plan.shapes[-1], plan.classes)
        self._narrow = config.runtime.precision == "bfloat16"

    def forward(self, x: Tensor) -> Tensor:
        for part in self._parts:
            x = part(x)
        if self.predictor is None:
            return x.contiguous()  # torch's pipelines send nothing else
        with torch.autocast("cpu", torch.bfloat16, enabled=self._narrow):
            scores: Tensor = self.predictor(feature(self.blocks[-1], x))
        return scores.float()


def _optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=config.optimizer.lr, fused=True)


def _plain_bp(values: dict[str, Any], threads: int, results: Any) -> None:
    config, source, plan = _prepared(values, threads)
    model = _WithPredictor(plan, range(len(plan.parameters)), config)
    optimizer = _optimizer(model, config)
    times = []
    for indices in _batches(config, source):
        x, labels = source.batch("train", 0, indices)
        loss = nn.functional.cross_entropy(model(x), labels)
        torch.autograd.backward(loss)
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    results.put(Figures.of(times))


def quarters(blocks: int) -> list[range]:
    """Four parts of which the first and the last one together have as many blocks as the other two."""
    if blocks < 4 or blocks % 2:
        raise ValueError(f"{blocks} blocks cannot be cut in four with equal halves")
    half = blocks // 2
    ends = [0, half // 2, half, half + half // 2, blocks]
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def _torch_pipeline(
    rank: int, port: int, values: dict[str, Any], name: str, micro_batches: int, results: Any
) -> None:
    import torch.distributed as dist
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config, source, plan = _prepared(values | {"pipeline.stages": 2})
    parts = [spec.blocks for spec in plan.specs]
    mine = [rank]
    if name == "ZBVZeroBubble":
        parts = quarters(len(plan.parameters))
        mine = [rank, 3 - rank]
    x, _ = source.batch("train", 0, torch.arange(config.data.batch_size // micro_batches))
    held: list[_WithPredictor] = []
    stages = []
    for index, part in enumerate(parts):
        model = _WithPredictor(plan, part, config)
        after = model(x)
        if index in mine:
            entering = x if index == 0 else x.detach().requires_grad_()
            held.append(model)
            stages.append(
                pipelining.PipelineStage(
                    model,
                    index,
                    len(parts),
                    torch.device("cpu"),
                    input_args=(entering,),
                    output_args=(model(entering),),
                )
            )
        x = after.detach()
    kind = schedules.get_schedule_class(name)
    schedule: Any = kind(
        stages[0] if len(stages) == 1 else stages,
        micro_batches,
        loss_fn=nn.functional.cross_entropy,
    )
    optimizer = _optimizer(nn.ModuleList(held), config)
    first, last = 0 in mine, len(parts) - 1 in mine
    times = []
    for indices in _batches(config, source):
        x, labels = source.batch("train", 0, indices)
        losses: list[Tensor] = []
        schedule.step(*([x] if first else []), **({"target": labels, "losses": losses} if last else {}))
        if losses:
            torch.stack(losses).mean().item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    results.put(Figures.of(times))
    dist.barrier()
    dist.destroy_process_group()
