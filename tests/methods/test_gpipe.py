"""GPipe's gradients against torch's own implementation, in real processes over gloo."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from scpl_dist.methods import resolve
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.methods.task import Classification
from scpl_dist.run.config import load
from tests.support.pipelines import run

WIDTH, CLASSES, SAMPLES, PARTS = 12, 5, 48, 4

ORACLE = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn import functional

folder, rank, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
store = dist.FileStore(folder + "/store", 2)
dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
modules, x, y = torch.load(folder + "/problem.pt", weights_only=False)
half = torch.nn.Sequential(*modules[2 * rank : 2 * rank + 2])
stage = PipelineStage(half, rank, 2, torch.device("cpu"))
schedule = ScheduleGPipe(stage, parts, loss_fn=functional.cross_entropy)
schedule.step(x) if rank == 0 else schedule.step(target=y)
torch.save([parameter.grad for parameter in half.parameters()], f"{folder}/gradients-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def blocks() -> list[nn.Module]:
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]


def problem() -> tuple[list[nn.Module], nn.Module, Tensor, Tensor]:
    """Three blocks and the predictor as the fourth, a batch and its labels."""
    modules = blocks()
    predictor = nn.Linear(WIDTH, CLASSES)
    return modules, predictor, torch.randn(SAMPLES, WIDTH), torch.randint(CLASSES, (SAMPLES,))


def ours(
    modules: list[nn.Module], predictor: nn.Module, x: Tensor, y: Tensor, stages: int = 2, **pipeline: object
) -> tuple[dict[int, TrainableBlock], dict[int, list[Tensor]]]:
    """Gradients by block of one step of the executor, the first block on a stage of its own if there are two."""
    values: dict[str, object] = {f"pipeline.{key}": value for key, value in pipeline.items()}
    config = load(values=values | {"run.method": "gpipe", "pipeline.micro_batches": PARTS})
    method = resolve("gpipe")(config, len(modules), Classification(CLASSES))
    shape = torch.empty(2, WIDTH, device="meta")
    trainables = {
        k: method.trainable(k, copy.deepcopy(block), shape, shape) for k, block in enumerate(modules)
    }
    head = trainables[len(modules) - 1].heads["predictor"]
    for mine, given in zip(head.parameters(), predictor.parameters(), strict=True):
        mine.data.copy_(given)
    held = [range(1), range(1, len(modules))] if stages == 2 else [range(len(modules))]
    return trainables, run(method, trainables, held, x, y, PARTS)


def test_gradients_equal_those_of_torch(tmp_path: Path) -> None:
    modules, predictor, x, y = problem()
    torch.save(([*modules, predictor], x, y), tmp_path / "problem.pt")
    (tmp_path / "oracle.py").write_text(ORACLE)
    processes = [
        subprocess.Popen([sys.executable, tmp_path / "oracle.py", tmp_path, str(rank), str(PARTS)])
        for rank in range(2)
    ]
    _, gradients = ours(modules, predictor, x, y)
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    theirs = [tensor for rank in range(2) for tensor in torch.load(tmp_path / f"gradients-{rank}.pt")]
    mine = [tensor for block in range(3) for tensor in gradients[block]]
    assert len(mine) == len(theirs) == 8
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_the_whole_batch(schedule: str, recompute: bool) -> None:
    modules, predictor, x, y = problem()
    _, gradients = ours(modules, predictor, x, y, schedule=schedule, recompute=recompute)
    functional.cross_entropy(nn.Sequential(*modules, predictor)(x), y).backward()  # type: ignore[no-untyped-call]
    parameters = [*nn.Sequential(*modules).parameters(), *predictor.parameters()]
    mine = [tensor for block in range(3) for tensor in gradients[block]]
    for parameter, gradient in zip(parameters, mine, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-7)


def test_recomputation_changes_no_bit_even_with_dropout_and_batch_norm() -> None:
    modules, predictor, x, y = problem()
    for k in range(3):
        modules[k] = nn.Sequential(modules[k], nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))
    trainables, kept = ours(modules, predictor, x, y, stages=1)
    others, again = ours(modules, predictor, x, y, stages=1, recompute=True)
    for block in range(3):
        assert all(map(torch.equal, kept[block], again[block]))
        assert all(
            map(torch.equal, trainables[block].state_dict().values(), others[block].state_dict().values())
        )


def test_deferred_batch_norm_has_the_running_statistics_of_the_whole_batch() -> None:
    _, predictor, x, y = problem()
    norm = nn.BatchNorm1d(WIDTH)
    whole = copy.deepcopy(norm)
    whole(x)
    trainables, _ = ours([norm, nn.Tanh()], predictor, x, y, deferred_batch_norm=True, recompute=True)
    state = trainables[0].block.state_dict()
    assert list(state) == list(whole.state_dict())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    usual, _ = ours([norm, nn.Tanh()], predictor, x, y)
    assert usual[0].block.state_dict()["num_batches_tracked"] == PARTS
