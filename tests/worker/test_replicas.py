"""Three replicas, real processes over gloo, against one worker that has the whole micro-batch.

Float32 sums are taken in another order, so gradients are equal to 1e-5 of the largest entry; what is computed in
float64 is equal to 1e-10.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore
from torch.utils import _pytree as pytree

from scpl_dist.methods import objectives
from scpl_dist.methods.batchnorm import SharedBatchNorm
from scpl_dist.methods.scpl import LocalUnit
from scpl_dist.methods.task import Classification
from scpl_dist.run import config
from scpl_dist.run.config import TaskSettings
from scpl_dist.run.errors import PeerLost
from scpl_dist.run.layout import Layout, share
from scpl_dist.worker.replicas import Replicas
from scpl_dist.worker.timer import PhaseTimer

REPLICAS = 3
SIZE = 8  # shares of 2, 3 and 3 samples
LOSSES = ("supcon", "ce", "predsim", "deinforeg")


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 3, 6, 6, generator=generator), torch.tensor([0, 1, 0, 2, 1, 0, 2, 1])


def trainable(loss: str) -> LocalUnit:
    """A block with BatchNorm in it and in its projector."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    settings = config.load(values={"loss.name": loss, "loss.projector": "mb,16,8"}).loss
    after = torch.empty(2, 5, 4, 4, device="meta")
    # Replicas see the whole micro-batch's labels, so that a weighted mean is that of one worker.
    task = Classification(3, TaskSettings(class_weights=[1.0, 2.0, 0.5], label_smoothing=0.1))
    return LocalUnit(block, objectives.make(settings, block, after, task), task)


def step(loss: str, replicas: Replicas | None, begin: int, end: int) -> dict[str, Any]:
    """Loss, gradients and running averages after one step on these samples."""
    one, (x, y) = trainable(loss), batch()
    if replicas is not None:
        replicas.share_statistics(one)
    seen, labels = one.embed(x[begin:end], one(x[begin:end])), y[begin:end]
    if replicas is not None:
        seen, labels = replicas.gather(seen, labels, SIZE)
    total = torch.stack(list(one.loss_terms(seen, labels).values())).sum()
    torch.autograd.backward(total)
    if replicas is not None:
        replicas.sum_gradients(one.parameters()).finish()
    gradients = {name: parameter.grad for name, parameter in one.named_parameters()}
    return {"loss": total.detach(), **gradients, **dict(one.named_buffers())}


def norm(replicas: Replicas | None, momentum: float | None, begin: int, end: int) -> dict[str, Any]:
    """Output, gradients and running averages of a BatchNorm in float64 after two batches."""
    module: nn.Module = nn.BatchNorm2d(3, momentum=momentum).double()
    if replicas is not None:
        replicas.share_statistics(holder := nn.Sequential(module))
        module = holder[0]
        assert isinstance(module, SharedBatchNorm)
    x = (10 + batch()[0][begin:end].double()).requires_grad_()
    module(x)
    output = module(2 * x)
    torch.autograd.backward((output * torch.arange(6.0)).square().sum())
    if replicas is not None:
        replicas.sum_gradients(module.parameters()).finish()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **gradients, **dict(module.named_buffers())}


def partly_used(replicas: Replicas, replica: int) -> list[Tensor | None]:
    """Gradients of a parameter that all use, one that a single replica uses, one that none uses, one that is frozen."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[0].grad = torch.full((2,), float(replica))
    if replica == 1:
        parameters[1].grad = torch.tensor([5.0, 7.0])
    parameters[3].requires_grad_(False)
    replicas.sum_gradients(parameters).finish()
    return [parameter.grad for parameter in parameters]


def worker(rank: int, file: str, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    layout, timer = Layout([REPLICAS]), PhaseTimer()
    worker_id = layout.workers[rank]
    replicas = Replicas.join(
        layout,
        worker_id,
        [{"device": "cpu", "gpu": ""}] * REPLICAS,
        timer,
        FileStore(file, REPLICAS),
        140,
    )
    assert replicas is not None
    begin, end = share(SIZE, REPLICAS, worker_id.replica)
    found: dict[str, Any] = {loss: step(loss, replicas, begin, end) for loss in LOSSES}
    found |= {f"norm {momentum}": norm(replicas, momentum, begin, end) for momentum in (0.1, None)}
    found["partly used"] = partly_used(replicas, rank)
    found["waited"] = timer.stats().waiting > 0 and timer.phase == "starting"
    # As arrays: a tensor would need its process to stay alive.
    results.put((rank, pytree.tree_map_only(Tensor, lambda tensor: tensor.numpy(), found)))
    if rank == 2:
        results.close()
        results.join_thread()
        os._exit(9)
    try:
        while True:
            replicas.sum_gradients([nn.Parameter(torch.zeros(2))]).finish()
    except PeerLost as error:
        results.put((rank, error.peer))
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[int, Any]]]:
    """What the workers found, and then what the survivors of a death say."""
    file = str(tmp_path_factory.mktemp("store") / "store")
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, file, results)) for rank in range(REPLICAS)]
    for process in processes:
        process.start()
    try:
        yield [results.get(timeout=150) for _ in range(2 * REPLICAS - 1)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def of_rank(found: list[tuple[int, Any]], rank: int) -> dict[str, Any]:
    value = next(value for who, value in found if who == rank and isinstance(value, dict))
    arrays: dict[str, Any] = pytree.tree_map_only(np.ndarray, torch.from_numpy, value)
    return arrays


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_is_that_of_one_worker_with_the_whole_batch(found: list[tuple[int, Any]], loss: str) -> None:
    wanted = step(loss, None, 0, SIZE)
    # A bias in front of a BatchNorm has a gradient of 0, which rounding makes small numbers of.
    scale = max(float(value.abs().max()) for value in wanted.values())
    for rank in range(REPLICAS):
        got = of_rank(found, rank)[loss]
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5 * scale, msg=f"{loss}: {name}")


def test_all_replicas_have_the_same_gradients_to_the_last_bit(found: list[tuple[int, Any]]) -> None:
    first, *others = (of_rank(found, rank) for rank in range(REPLICAS))
    for loss in LOSSES:
        for name, value in first[loss].items():
            assert all(torch.equal(other[loss][name], value) for other in others), (loss, name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_batch_norm_is_batch_norm_of_the_whole_batch(
    found: list[tuple[int, Any]], momentum: float | None
) -> None:
    wanted = norm(None, momentum, 0, SIZE)
    for rank in range(REPLICAS):
        begin, end = share(SIZE, REPLICAS, rank)
        for name, value in of_rank(found, rank)[f"norm {momentum}"].items():
            own = wanted[name][begin:end] if name in ("output", "input") else wanted[name]
            torch.testing.assert_close(value, own, rtol=1e-10, atol=1e-10, msg=name)


def test_a_gradient_that_no_replica_has_stays_away(found: list[tuple[int, Any]]) -> None:
    for rank in range(REPLICAS):
        everywhere, somewhere, nowhere, frozen = of_rank(found, rank)["partly used"]
        assert torch.equal(everywhere, torch.full((2,), 3.0))  # 0 + 1 + 2
        assert torch.equal(somewhere, torch.tensor([5.0, 7.0]))
        assert (nowhere, frozen) == (None, None)


def test_waiting_for_the_others_is_no_work(found: list[tuple[int, Any]]) -> None:
    assert all(of_rank(found, rank)["waited"] for rank in range(REPLICAS))


def test_a_dead_replica_ends_the_wait_of_the_others(found: list[tuple[int, Any]]) -> None:
    assert [value for _, value in found if not isinstance(value, dict)] == [None, None]  # one of two others


def test_a_stage_of_one_worker_has_no_replicas() -> None:
    layout = Layout([1, 1])
    assert Replicas.join(layout, layout.workers[0], [], PhaseTimer(), None, 1) is None
    assert not torch.distributed.is_initialized()
