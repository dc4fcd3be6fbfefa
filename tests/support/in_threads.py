"""A whole run in one process, with a thread a stage and queues instead of a network: its result without its processes.

Dropout draws from a generator that all threads share, so models with dropout take one stage here.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch

from scpl_dist import data
from scpl_dist.coordinator.item_sequence import ItemSequence
from scpl_dist.data.loader import Loader
from scpl_dist.methods.block import make_optimizers
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config
from scpl_dist.transport import Envelope
from scpl_dist.transport.neighbours import Neighbours
from scpl_dist.worker.executor import Executor
from scpl_dist.worker.timer import PhaseTimer
from tests.support.pipelines import Lane, QueueTransport
from tests.support.reference import Reference


class Run:
    """One run; what it has come to is in `result`."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.runtime.threads)
        self.config = config
        self.source = data.resolve(config)
        self.plan = Plan.plan(config, self.source.classes, self.source.example())
        self.result = Reference()
        self._correct: Counter[int] = Counter()
        self._errors: list[BaseException] = []
        loader = Loader(self.source, config.run.seed, workers=0)
        items = ItemSequence(config, self.source.sizes)
        loader.put(list(iter(items.next, None)))
        lanes = defaultdict[tuple[int, int], queue.Queue[Envelope]](lambda: queue.Queue(2))
        for spec in self.plan.specs:  # blocks are drawn before the threads begin, from that same generator
            self.result.trainables |= self.plan.trainables(spec.blocks)
        self.source.prepare(self.result.trainables[0].block)
        executors = [self._executor(number, lanes, loader) for number in range(len(self.plan.specs))]
        threads = [threading.Thread(target=self._run, args=(executor,)) for executor in executors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]
        size = self.source.sizes["test"]
        self.result.accuracy = [self._correct[epoch] / size for epoch in range(config.run.epochs)]

    def _executor(self, number: int, lanes: dict[Lane, queue.Queue[Envelope]], loader: Loader) -> Executor:
        spec, layout = self.plan.specs[number], self.config.layout
        trainables = {block: self.result.trainables[block] for block in spec.blocks}
        return Executor(
            spec,
            self.plan.method,
            trainables,
            {block: make_optimizers(trainable, self.config) for block, trainable in trainables.items()},
            Neighbours(QueueTransport(number, lanes), layout, layout.workers[number]),
            loader if number == 0 else None,
            seed=self.config.run.seed,
            device=torch.device("cpu"),
            timer=PhaseTimer(),
            report=self._report,
            run_dir=Path("unused"),
        )

    def _run(self, executor: Executor) -> None:
        try:
            executor.run()
        except BaseException as error:
            self._errors.append(error)
            raise

    def _report(self, done: dict[str, Any]) -> None:
        for block, terms in (done["losses"] or {}).items():
            self.result.losses[done["step"], int(block)] = terms
        if done["split"] == "test" and done["correct"] is not None:
            self._correct[done["epoch"]] += done["correct"]
