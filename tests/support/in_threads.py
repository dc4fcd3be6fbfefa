"""A whole run in one process, with a thread a stage and no network: its result without its processes.

Dropout draws from a generator that all threads share, so models with dropout take one stage here.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import torch

from scpl_dist import data
from scpl_dist.control.items import Evaluate, Item, Stop, Train
from scpl_dist.control.messages import Done
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data.loader import Loader
from scpl_dist.data.sampling import weights_of
from scpl_dist.methods.schedule import StageSpec
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config
from scpl_dist.run.errors import Aborted
from scpl_dist.run.scores import Sum, add, values
from scpl_dist.storage.writer import CheckpointWriter
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.worker.executor import Executor, feed
from scpl_dist.worker.offload import Offload
from scpl_dist.worker.timer import PhaseTimer
from scpl_dist.worker.updater import Updater
from tests.support.pipelines import LocalTransport
from tests.support.reference import Reference


class Run:
    """One run; what it has come to is in `result`, which may be given, as may the sequence numbers that are reported.

    On "meta", where tensors have no values, it only trains. `delay` is that of `Executor`; checkpoints are written if a
    `run_dir` is given, and an `offload` may have the blocks of one stage.
    """

    def __init__(
        self,
        config: Config,
        device: str = "cpu",
        delay: int | None = None,
        result: Reference | None = None,
        reported: dict[int, list[int]] | None = None,
        run_dir: Path | None = None,
        offload: Offload | None = None,
    ) -> None:
        torch.set_num_threads(config.runtime.threads)
        self.config, self._device, self._delay, self._run_dir = config, device, delay, run_dir
        self._offload = offload
        self.result = result or Reference()
        self._reported = {} if reported is None else reported
        source = data.resolve(config)
        self.plan = Plan.plan(config, source.classes, source.example())
        self.items: list[Item] = list(iter(ItemSequence(config, source.sizes).next, None))
        if device == "meta":
            self.items = [item for item in self.items if isinstance(item, Train | Stop)]
        weights = weights_of(config, source)
        loader: Loader[Item] = Loader(source, config.run.seed, workers=0, weights=weights)
        feed(loader, self.items)
        for spec in self.plan.specs:  # blocks are drawn before the threads begin, from that same generator
            self.result.trainables |= self.plan.trainables(spec.blocks)
        source.prepare(self.result.trainables[0].block)
        self.plan.load_weights(self.result.trainables)
        for trainable in self.result.trainables.values():
            trainable.to(device)
        self._sums: dict[int, dict[str, Sum]] = {}
        self._errors: list[BaseException] = []
        self._ends: list[LocalTransport] = []
        wire = config.pipeline.wire_dtype
        self._ends += (LocalTransport(spec.stage, self._ends, device, wire) for spec in self.plan.specs)
        executors = [self._executor(spec, loader if spec.stage == 0 else None) for spec in self.plan.specs]
        threads = [threading.Thread(target=self._run, args=(executor,)) for executor in executors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        metrics = [
            values(sums, source.classes, config.task.metrics) for _, sums in sorted(self._sums.items())
        ]
        self.result.metrics = metrics
        self.result.accuracy = [found["accuracy"] for found in metrics]

    def _executor(self, spec: StageSpec, loader: Loader[Item] | None) -> Executor:
        layout = self.config.layout
        updaters = {block: Updater(self.result.trainables[block], self.config) for block in spec.blocks}
        if self._offload is not None:
            for block, updater in updaters.items():
                self._offload.add(block, updater)
                self._offload.put(block)
        return Executor(
            spec=spec,
            method=self.plan.method,
            updaters=updaters,
            neighbours=Neighbours(self._ends[spec.stage], layout, layout.workers[spec.stage]),
            device=torch.device(self._device),
            timer=PhaseTimer(),
            report=partial(self._report, spec.stage),
            delay=self._delay,
            run_dir=self._run_dir or Path("unused"),
            writer=self._writer() if self._run_dir else None,
            loader=loader,
            offload=self._offload,
        )

    def _writer(self) -> CheckpointWriter:
        return CheckpointWriter(lambda *_: None, lambda error, _: self._errors.append(error))

    def _run(self, executor: Executor) -> None:
        torch.set_num_threads(self.config.runtime.threads)  # it holds for the thread that calls it
        try:
            executor.run()
        except BaseException as error:
            self._errors.append(error)
            for end in self._ends:
                end.abort(Aborted("another stage failed"))

    def _report(self, stage: int, done: Done) -> None:
        self._reported.setdefault(stage, []).append(done.sequence)
        item = next(item for item in self.items if item.sequence == done.sequence)
        if isinstance(item, Train):
            for block, terms in done.losses.items():
                self.result.losses[item.step, int(block)] = terms
        elif isinstance(item, Evaluate) and item.split == "test" and done.metrics:
            self._sums[item.epoch] = add([self._sums.get(item.epoch, {}), done.metrics])
