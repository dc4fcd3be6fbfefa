"""What an item costs beside the model: processor time of a worker, by phase, and of the coordinator, for each stage.

    python -m benchmarks.overhead worker --items 2000 --transport rpc
    python -m benchmarks.overhead worker --items 300 --profile 25
    python -m benchmarks.overhead coordinator --stages 2 16 64 --items 400
    python -m benchmarks.overhead coordinator --stages 2 16 64 --items 100 --apart 0.5

A worker is the middle one of three stages in a process each, with blocks of one small layer. Its phases forward, loss
and backward are the model; all others are what an item costs in any case. The coordinator is the real process; workers
that only speak its protocol are simulated in this one: as fast as they can, or with messages so many milliseconds
apart, each of which wakes the coordinator up. Processor time means something on a busy machine, too.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.distributed as dist
import zmq
from torch import Tensor, nn

from scpl_dist.control.codec import encode
from scpl_dist.control.items import Item, Stop, Train
from scpl_dist.control.messages import PROTOCOL, VERSION, Done
from scpl_dist.data.loader import Loader
from scpl_dist.data.source import DataSource, Split
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config, load
from scpl_dist.run.phases import Phase
from scpl_dist.transport import Transport
from scpl_dist.transport.c10d import C10dTransport
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.transport.rpc import RpcTransport
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater

STAGES, WARM = 3, 50  # items that nobody counts
MODEL = (Phase.FORWARD, Phase.LOSS, Phase.BACKWARD)


def blocks(classes: int) -> list[nn.Module]:
    """One small layer each."""
    return [nn.Linear(8, 8) for _ in range(STAGES)]


class Nothing(DataSource):
    """Samples of eight zeros."""

    classes = 2
    sizes = {"train": 8, "validation": 8, "test": 8}  # noqa: RUF012

    def batch(self, split: Split, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Any samples."""
        return torch.zeros(len(indices), 8), indices % 2


class ProcessorTimer(PhaseTimer):
    """Sums up processor time of the training thread by phase, and counts changes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.processor: dict[Phase, float] = defaultdict(float)
        self.changes: Counter[Phase] = Counter()
        self._used = time.thread_time()

    def enter(self, phase: Phase) -> None:
        """As `PhaseTimer.enter`."""
        used = time.thread_time()
        self.processor[self.phase] += used - self._used
        self.changes[self.phase] += 1
        self._used = used
        super().enter(phase)


def work(rank: int, port: int, items: int, transport: str, profile: int) -> None:
    """Be one of the three workers; the middle one prints what it took."""
    torch.set_num_threads(1)
    settings = {"run.method": "early_exit", "model.name": f"{__file__}:blocks", "pipeline.stages": STAGES}
    config = load(values=settings | {"loss.classifier": "l"})
    source = Nothing()
    plan = Plan.plan(config, source.classes, source.example())
    device = torch.device("cpu")
    common: dict[str, Any] = {"rank": rank, "world": STAGES, "max_in_flight": 2, "device": device}
    connection: Transport = RpcTransport(generation="1", devices=[device] * STAGES, **common)
    if transport == "gloo":
        connection = C10dTransport(backend="gloo", links=config.layout.links(), **common)
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch has no types here
        "127.0.0.1", port, STAGES, is_master=rank == 0
    )
    connection.connect(store)
    loader: Loader[Item] | None = Loader(source, 0, workers=0) if rank == 0 else None
    if loader is not None:
        trains = (
            Train(sequence=number, step=number, epoch=0, schedule={"lr": 1e-3}, micro_batches=((0, 8),))
            for number in range(WARM + items)
        )
        feed(loader, [*trains, Stop(sequence=WARM + items)])
    timer, frames = ProcessorTimer(), [0, 0.0]
    whole = [0.0]
    profiler = cProfile.Profile()

    def report(done: Done) -> None:
        if done.sequence == WARM - 1:
            timer.processor.clear()
            timer.changes.clear()
            frames[:] = [0, 0.0]
            whole[0] = time.process_time()
            if profile and rank == 1:
                profiler.enable()
        begin = time.thread_time()
        frames[0] += len(encode(done))
        frames[1] += time.thread_time() - begin

    spec = plan.specs[rank]
    executor = Executor(
        spec=spec,
        method=plan.method,
        updaters={block: Updater(own, config) for block, own in plan.trainables(spec.blocks).items()},
        neighbours=Neighbours(connection, config.layout, config.layout.workers[rank]),
        device=device,
        timer=timer,
        report=report,
        run_dir=Path(),
        loader=loader,
    )
    executor.run()
    profiler.disable()
    if rank == 1:
        whole[0] = time.process_time() - whole[0]
        _show(timer, frames, whole[0], items)
        if profile:
            found = pstats.Stats(profiler)
            print(f"{found.total_calls / items:.0f} Python calls an item")  # type: ignore[attr-defined]
            found.sort_stats("tottime").print_stats(profile)
    for key in (
        ("done", "left") if rank == 0 else ("done",)
    ):  # all stay for their neighbours, and rank 0 for the store
        store.add(key, 1)
        while store.add(key, 0) < STAGES:
            time.sleep(0.01)
    if rank:
        store.add("left", 1)
    os._exit(0)  # threads of the transport may wait for ever


def _show(timer: ProcessorTimer, frames: list[Any], whole: float, items: int) -> None:
    begin = time.thread_time()
    for _ in range(1000):
        time.thread_time()
    look = (time.thread_time() - begin) / 1000  # what it costs to look at the time, once a change of phase
    encoded = 1e3 * (frames[1] / items - look)
    other = 0.0
    for phase, seconds in sorted(timer.processor.items(), key=lambda pair: -pair[1]):
        looks = timer.changes[phase] + (2 * items if phase is Phase.OPTIMIZER else 0)  # two for the report
        shown = 1e3 * (seconds - looks * look) / items
        other += 0.0 if phase in MODEL else shown
        print(f"{phase:10} {shown:.3f} ms an item, entered {timer.changes[phase] / items:.2f} times")
    print(
        f"report     {encoded:.3f} ms an item to encode {frames[0] / items:.0f} bytes, by the control thread in a run"
    )
    print(f"training thread beside the model, without report: {other - encoded:.3f} ms an item")
    print(f"whole process, all threads: {1e3 * whole / items:.3f} ms an item", flush=True)


# Coordinator ----------------------------------------------------------------------------------------------------


PROGRAM = """
import json, sys
from scpl_dist.coordinator.service import serve
sys.exit(serve(**json.loads(sys.argv[1])))
"""


class Simulated:
    """A worker that says what a real one says, and computes nothing."""

    def __init__(
        self, socket: zmq.Socket[bytes], stage: int, config: Config, sizes: dict[str, int], apart_s: float
    ) -> None:
        self.socket, self.stage, self.done, self.apart_s = socket, stage, -1, apart_s
        self.say(
            "hello",
            protocol=PROTOCOL,
            version=VERSION,
            torch=torch.__version__,
            config=config.digest(),
            rank=stage,
            host="here",
            pid=1000 + stage,
            device="cpu",
        )
        if stage == 0:
            self.say("described", data={"classes": 10, "sizes": sizes})
        self.phases = {str(phase): 1.0 for phase in (*MODEL, Phase.RECEIVE, Phase.SEND, Phase.OPTIMIZER)}

    def say(self, name: str, **fields: Any) -> None:
        """Send a message."""
        self.socket.send(msgpack.packb({"type": name, **fields}))

    def handle(self, item: dict[str, Any]) -> None:
        """Be done with an item."""
        self.done = item["sequence"]
        losses = {str(self.stage): {"local": 0.5}} if item["kind"] == "train" else {}
        stats = {"begun": self.done, "phases": self.phases, "blocks": {str(self.stage): 0.1 * self.done}}
        self.say("done", sequence=self.done, losses=losses, stats=stats)
        if self.apart_s:
            time.sleep(self.apart_s)


def coordinate(stages: int, items: int, apart_s: float = 0.0) -> float:
    """Processor seconds of the coordinator for an item and stage, whose messages come `apart_s` seconds apart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"train": 8 * (items + WARM), "validation": 0, "test": 8}
        values = {"control.port": 0, "metrics.port": 0, "run.epochs": 1, "data.batch_size": 8}
        config = load(values=values | {"pipeline.stages": stages})
        (folder / "config.toml").write_text(config.to_toml())
        arguments = {"run_dir": str(folder), "generation": "g1"}
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, json.dumps(arguments)])
        context: zmq.Context[Any] = zmq.Context()
        try:
            while not (folder / "run.json").exists():
                if process.poll() is not None:
                    raise RuntimeError("the coordinator has ended")
                time.sleep(0.01)
            address = json.loads((folder / "run.json").read_text())["control"]
            poller, workers = zmq.Poller(), {}
            for stage in range(stages):
                connection: zmq.Socket[bytes] = context.socket(zmq.DEALER)
                connection.connect(address)
                workers[connection] = Simulated(connection, stage, config, sizes, apart_s)
                poller.register(connection, zmq.POLLIN)
            return _drive(workers, poller, process.pid, items)
        finally:
            process.kill()
            process.wait()
            context.destroy(linger=0)


def _drive(workers: dict[Any, Simulated], poller: zmq.Poller, pid: int, items: int) -> float:
    """All stages handle all items as fast as they come."""
    known: dict[int, dict[str, Any]] = {}
    begin = 0.0
    while True:
        for connection, _ in poller.poll(1000):
            worker = workers[connection]
            while connection.poll(0):
                message = msgpack.unpackb(connection.recv())
                answer = {"start": "built", "join": "ready"}.get(message["type"])
                if answer is not None:
                    worker.say(answer, **({"blocks": [worker.stage]} if answer == "built" else {}))
                elif message["type"] == "work":
                    known |= {item["sequence"]: item for item in message["items"]}
        for sequence in sorted(known):
            item = known.pop(sequence)
            for worker in workers.values():
                worker.handle(item)
            if item["sequence"] == WARM:
                begin = used(pid)
            if item["sequence"] == items + WARM - 1:
                time.sleep(0.5)  # what it has been sent is handled
                return (used(pid) - begin) / items / len(workers)


def used(pid: int) -> float:
    """Processor seconds of another process so far, which Linux alone says."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("of", choices=["worker", "coordinator"])
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--transport", choices=["rpc", "gloo"], default="rpc")
    parser.add_argument("--profile", type=int, default=0, help="print so many functions by their own time")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--apart", type=float, default=0.0, help="milliseconds between two messages")
    options = parser.parse_args()
    if options.of == "coordinator":
        for stages in options.stages:
            taken = coordinate(stages, options.items, options.apart / 1e3)
            print(f"{stages} stages: {1e3 * taken:.3f} ms an item and stage", flush=True)
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    start = multiprocessing.get_context("spawn").Process
    arguments = (port, options.items, options.transport, options.profile)
    processes = [start(target=work, args=(rank, *arguments)) for rank in range(STAGES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
