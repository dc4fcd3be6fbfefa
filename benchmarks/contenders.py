"""What is compared: the product, a plain loop, and torch's own pipeline, each timed in processes of its own."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import scpl_dist
from scpl_dist import data
from scpl_dist.methods.heads import Predictor, feature
from scpl_dist.plan.plan import Plan
from scpl_dist.run import config as configuration
from scpl_dist.run.config import Config
from scpl_dist.worker.updater import Updater

NETWORKS = Path(__file__).with_name("networks.py")
LIMIT_S = 300
WARM_UP = 4
"""Steps that are not timed: first allocations, and the filling of the pipeline."""


def settings(model: str, dataset: str, batch: int, steps: int, **model_args: Any) -> dict[str, Any]:
    """Configuration values that all contenders share: one thread a worker, no augmentation, one epoch."""
    return {
        "run.epochs": 1,
        "model.name": f"{NETWORKS}:{model}",
        "model.args": model_args,
        "data.name": f"{NETWORKS}:{dataset}",
        "data.args": {"size": batch * steps},
        "data.batch_size": batch,
        "data.augmentation": "none",
        "metrics.port": 0,
        "runtime.device": "cpu",
    }


def product(values: dict[str, Any], stages: int, method: str = "scpl", micro_batches: int = 1) -> float:
    """Seconds a step of a real run, from the coordinator's record of what the last stage finished."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        chosen = {"pipeline.stages": stages, "run.method": method, "pipeline.micro_batches": micro_batches}
        scpl_dist.train(settings=values | chosen, run_dir=run)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(row["block"] for row in rows if row["event"] == "train")
    times = [row["time"] for row in rows if row["event"] == "train" and row["block"] == last]
    return float(times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)


def plain_scpl(values: dict[str, Any]) -> float:
    """Seconds a step of SCPL as a loop over the blocks in one process, with one thread."""
    return _in_process(_plain_scpl, values)


def plain_bp(values: dict[str, Any], threads: int = 1) -> float:
    """Seconds a step of end-to-end training in one process."""
    return _in_process(_plain_bp, values, threads)


def torch_gpipe(values: dict[str, Any], micro_batches: int) -> float:
    """Seconds a step of end-to-end training by torch's ScheduleGPipe on two stages over gloo; M = 1 is naive."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    processes = [
        context.Process(target=_torch_gpipe, args=(rank, port, values, micro_batches, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    seconds = max(float(results.get(timeout=LIMIT_S)) for _ in processes)
    for process in processes:
        process.join()
    return seconds


def two_at_once(values: dict[str, Any]) -> float:
    """Seconds a step of two independent plain loops that run at the same time."""
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    processes = [context.Process(target=_plain_scpl, args=(values, results)) for _ in range(2)]
    for process in processes:
        process.start()
    seconds = max(float(results.get(timeout=LIMIT_S)) for _ in processes)
    for process in processes:
        process.join()
    return seconds


def _in_process(target: Any, *arguments: Any) -> float:
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    process = context.Process(target=target, args=(*arguments, results))
    process.start()
    seconds = float(results.get(timeout=LIMIT_S))
    process.join()
    return seconds


def _batches(config: Config, source: data.DataSource) -> list[Tensor]:
    return list(torch.arange(source.sizes["train"]).split(config.data.batch_size))  # type: ignore[no-untyped-call]


def _plan(values: dict[str, Any]) -> tuple[Config, data.DataSource, Plan]:
    config = configuration.load(values=values)
    source = data.resolve(config)
    return config, source, Plan.plan(config, source.classes, source.example())


def _plain_scpl(values: dict[str, Any], results: Any) -> None:
    torch.set_num_threads(1)
    config, source, plan = _plan(values)
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
            x = output.detach()
        times.append(time.perf_counter())
    results.put((times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP))


class _WithPredictor(nn.Module):
    """A model, or the part of it in a stage; the last part has the predictor."""

    def __init__(self, plan: Plan, held: range) -> None:
        super().__init__()
        trainables = plan.trainables(held)
        self.blocks = nn.Sequential(*(trainable.block for trainable in trainables.values()))
        self.predictor: nn.Module | None = None
        if held[-1] == len(plan.parameters) - 1:
            self.predictor = Predictor(self.blocks[-1], plan.shapes[-1], plan.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.predictor is None:
            return x
        scores: Tensor = self.predictor(feature(self.blocks[-1], x))
        return scores


def _plain_bp(values: dict[str, Any], threads: int, results: Any) -> None:
    torch.set_num_threads(threads)
    config, source, plan = _plan(values)
    model = _WithPredictor(plan, range(len(plan.parameters)))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    times = []
    for indices in _batches(config, source):
        x, labels = source.batch("train", 0, indices)
        loss = nn.functional.cross_entropy(model(x), labels)
        torch.autograd.backward(loss)
        loss.item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    results.put((times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP))


def _torch_gpipe(rank: int, port: int, values: dict[str, Any], micro_batches: int, results: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    config, source, plan = _plan(values | {"pipeline.stages": 2})
    part = _WithPredictor(plan, plan.specs[rank].blocks)
    optimizer = torch.optim.Adam(part.parameters(), fused=True)
    rows = config.data.batch_size // micro_batches
    x, labels = source.batch("train", 0, torch.arange(rows))
    entering = x if rank == 0 else _WithPredictor(plan, plan.specs[0].blocks)(x).detach().requires_grad_()
    leaving = part(entering)
    device = torch.device("cpu")
    stage = PipelineStage(part, rank, 2, device, input_args=(entering,), output_args=(leaving,))
    schedule = ScheduleGPipe(stage, micro_batches, loss_fn=nn.functional.cross_entropy)
    times = []
    for indices in _batches(config, source):
        x, labels = source.batch("train", 0, indices)
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=labels, losses=losses)
            torch.stack(losses).mean().item()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    results.put((times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP))
    dist.barrier()
    dist.destroy_process_group()
