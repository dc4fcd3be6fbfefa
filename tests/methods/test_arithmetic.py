"""How blocks compute, against torch's own means in plain loops, and the same for any number of stages."""

from __future__ import annotations

import copy
import threading
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scpl_dist import data
from scpl_dist.data.sampling import permutation
from scpl_dist.methods import arithmetic
from scpl_dist.methods.block import TrainableBlock
from scpl_dist.plan.plan import Plan
from scpl_dist.run.config import Config, load
from scpl_dist.transport import tensors
from scpl_dist.worker.updater import Updater
from tests.e2e.test_exactness import FEW, METHODS, same
from tests.support import in_threads, reference
from tests.support.reference import Reference

ONCE = ["run.epochs=1"]


def plan_of(*settings: str) -> Plan:
    config = load(None, [*FEW, *ONCE, *settings])
    source = data.resolve(config)
    return Plan.plan(config, source.classes, source.example())


def result(*settings: str) -> Reference:
    return in_threads.Run(load(None, [*FEW, *ONCE, *settings])).result


def equal(found: Reference, wanted: Reference) -> None:
    assert found.losses == wanted.losses
    assert found.accuracy == wanted.accuracy
    same(reference.tensors(found.trainables), wanted)


@pytest.mark.parametrize("method", ["scpl", "bp", "gpipe, recomputation", "al"])
def test_any_number_of_stages_gives_the_same_bits_in_bfloat16_and_channels_last(method: str) -> None:
    settings = [*METHODS[method], "runtime.precision=bfloat16", "runtime.memory_format=channels_last"]
    wanted = result(*settings, "pipeline.stages=1")
    assert all(tensor.dtype is not torch.bfloat16 for tensor in reference.tensors(wanted.trainables).values())
    for stages in (2, 3):
        equal(result(*settings, f"pipeline.stages={stages}"), wanted)
    assert wanted.losses != result(*METHODS[method], "runtime.precision=bfloat16").losses
    assert wanted.losses != result(*METHODS[method], "runtime.memory_format=channels_last").losses


@pytest.mark.parametrize("loss", ["supcon", "ce", "predsim", "deinforeg"])
def test_bfloat16_is_autocast_around_block_and_heads_and_float32_in_the_objective(loss: str) -> None:
    """A plain loop, with blocks that know nothing of it."""
    settings = [f"loss.name={loss}", "loss.projector=m,32,32"]
    plan = plan_of(*settings)
    source, config = data.resolve(plan.config), plan.config
    blocks = plan.trainables(range(4))
    adams = {
        block: torch.optim.Adam(own.parameters(), lr=config.optimizer.lr, fused=True)
        for block, own in blocks.items()
    }
    losses = {}
    order = permutation(config.run.seed, 0, source.sizes["train"])
    for step, indices in enumerate(torch.split(order, config.data.batch_size)):
        carry, labels = source.batch("train", 0, indices)
        for block, own in blocks.items():
            with torch.autocast("cpu", torch.bfloat16):
                after = own(carry)
            with torch.autocast("cpu", torch.bfloat16):
                seen = own.embed(carry, after)
            terms = own.loss_terms({name: one.float() for name, one in seen.items()}, labels)
            assert all(term.dtype is torch.float32 for term in terms.values())
            torch.autograd.backward(torch.stack(list(terms.values())).sum())
            adams[block].step()
            adams[block].zero_grad()
            losses[step, block] = {name: term.item() for name, term in terms.items()}
            carry = after.detach()
            assert carry.dtype is torch.bfloat16
    found = result(*settings, "runtime.precision=bfloat16")
    assert found.losses == losses
    same(reference.tensors(found.trainables), Reference(trainables=blocks))


def attention(classes: int) -> list[nn.Module]:
    return [nn.Flatten(1, 2), nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)]


@pytest.mark.parametrize(("tokens", "backend"), [(16, SDPBackend.MATH), (256, SDPBackend.FLASH_ATTENTION)])
def test_the_kernel_of_narrow_attention_on_a_cpu_fits_the_number_of_tokens(
    tokens: int, backend: SDPBackend
) -> None:
    plan = plan_of(f"model.name={__name__}:attention", "runtime.precision=bfloat16", "loss.projector=i")
    [block] = plan.trainables([1]).values()
    x = torch.randn(4, tokens, 16)
    found = block(x)
    other = SDPBackend.FLASH_ATTENTION if backend is SDPBackend.MATH else SDPBackend.MATH
    with torch.autocast("cpu", torch.bfloat16):
        with sdpa_kernel(backend):
            assert torch.equal(block.block(x), found)
        with sdpa_kernel(other):
            assert not torch.equal(block.block(x), found)


def test_narrow_attention_is_computed_again_by_the_same_kernel_and_leaves_the_others_theirs() -> None:
    plan = plan_of(
        f"model.name={__name__}:deep",
        "runtime.precision=bfloat16",
        "loss.projector=i",
        "pipeline.recompute=true",
    )
    blocks = [plan.trainables([1])[1] for _ in range(4)]
    x = torch.randn(4, 16, 16)

    def step(block: nn.Module) -> None:
        for _ in range(5):
            block(x).float().sum().backward()

    threads = [threading.Thread(target=step, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *others = (
        torch.cat(
            [parameter.grad.flatten() for parameter in block.block.parameters() if parameter.grad is not None]
        )
        for block in blocks
    )
    assert len(first) == sum(parameter.numel() for parameter in blocks[0].block.parameters())
    assert all(torch.equal(first, other) for other in others)
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]


def deep(classes: int) -> list[nn.Module]:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(4)]
    return [nn.Flatten(1, 2), nn.Sequential(*layers)]


def test_what_a_block_gives_others_is_float32_but_for_its_output() -> None:
    for method in ("scpl", "al"):
        plan = plan_of(f"run.method={method}", "runtime.precision=bfloat16")
        own = plan.trainables([3])[3]
        x = torch.randn(4, *plan.shapes[3].shape[1:])
        carry: Any = {"data": x, "code": torch.rand(4, 128)} if method == "al" else x
        after = own(carry)
        assert (after["data"] if method == "al" else after).dtype is torch.bfloat16
        found = [own.predict(after), *own.embed(carry, after).values()]
        assert {one.dtype for one in found} == {torch.float32}


def test_a_narrow_wire_leaves_alone_what_is_narrow_already() -> None:
    payload = {"data": torch.ones(3, dtype=torch.bfloat16), "code": torch.ones(3)}
    found, wide = tensors.narrow(payload, torch.float16)
    assert (found["data"].dtype, found["code"].dtype) == (torch.bfloat16, torch.float16)
    assert tensors.widen(found, wide)["code"].dtype is torch.float32


def narrow(classes: int) -> list[nn.Module]:
    """Little to compute: float16 is slow on CPUs."""
    return [nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU()), nn.Linear(16, 16), nn.Linear(16, 16)]


class Images(TrainableBlock):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), {})


@pytest.mark.parametrize("formats", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_a_checkpoint_of_the_other_memory_format_goes_on_rightly(formats: tuple[str, str]) -> None:
    """Fused optimizers go through memory as it lies: moments in another order than the weights would be mixed up."""

    def updater(memory_format: str) -> Updater:
        config = load(None, [f"runtime.memory_format={memory_format}"])
        block = Images()
        arithmetic.arrange(block, config, local=True)
        return Updater(block, config)

    def step(updater: Updater, number: int) -> None:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        updater.backward(updater.trainable(x).square().mean() * 10**number)
        updater.step({"lr": 1e-2})

    first, second = updater(formats[0]), updater(formats[1])
    step(first, 0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # tensors in use are given
    for each in (first, second):
        step(each, 1)
    for mine, other in zip(second.trainable.parameters(), first.trainable.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_activations_are_channels_last_wherever_a_block_begins() -> None:
    seen: list[bool] = []
    plan = plan_of("runtime.memory_format=channels_last")
    blocks = plan.trainables(range(2))
    for own in blocks.values():
        block = own.block
        assert isinstance(block, nn.Sequential)
        inner = block[0]
        inner.register_forward_pre_hook(
            lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        assert isinstance(inner.weight, Tensor)
        assert inner.weight.is_contiguous(memory_format=torch.channels_last)
    carry = torch.randn(4, 1, 16, 16)
    for own in blocks.values():
        carry = own(carry).contiguous()
    assert seen == [True, True]


class Layers(nn.Sequential):
    def __init__(self, *, dropout: bool = True) -> None:
        norm = nn.BatchNorm1d(8)
        super().__init__(
            nn.Linear(8, 8), norm, nn.Dropout(0.5 * dropout), nn.ReLU(), Noise(), nn.Linear(8, 8)
        )


class Noise(nn.Module):
    """Draws from numpy, as a user's layer may."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float(np.random.rand())


class Children(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Layers(), Layers()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [Layers, Children])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_parts_that_are_computed_again_change_no_bit_and_keep_less(
    kind: type[nn.Module], precision: str
) -> None:
    found = []
    for recompute in ("false", "true"):
        torch.manual_seed(0)
        np.random.seed(0)
        block = TrainableBlock(kind(), {})
        config = load(None, [f"pipeline.recompute={recompute}", f"runtime.precision={precision}"])
        arithmetic.arrange(block, config, local=True)
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        x = torch.randn(16, 8)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = block(x)
        alive = sum(kept)
        torch.autograd.backward(output.float().square().sum())
        after = torch.rand(1), np.random.rand()
        found.append((alive, after, output, [one.grad for one in block.parameters()], block.state_dict()))
    (much, *plain), (little, *again) = found
    assert little < much
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def test_recomputation_comes_to_the_same_run_with_every_method() -> None:
    for method in ("scpl", "bp", "al"):
        equal(result(*METHODS[method], "pipeline.recompute=true"), result(*METHODS[method]))


def test_blocks_without_parts_are_named() -> None:
    assert not arithmetic.recompute_parts(nn.Linear(2, 2))
    assert not arithmetic.recompute_parts(nn.Sequential(nn.Linear(2, 2)))
    assert arithmetic.recompute_parts(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    encoder = nn.TransformerEncoderLayer(8, 2)
    assert arithmetic.recompute_parts(encoder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["runtime.precision=float16", "run.method=bp"],
            r"runtime.precision = .float16.: run.method = 'bp' .* use .bfloat16.",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(*settings).check()


def test_channels_last_is_for_images() -> None:
    config: Config = load(None, ["runtime.memory_format=channels_last"])
    with pytest.raises(ValueError, match=r"channels_last.*have 2 dimensions; leave it out"):
        arithmetic.check(config, torch.zeros(2, 64), local=True)


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    config = load(None, ["runtime.compile=true", "runtime.device=cpu"])
    with pytest.raises(ValueError, match=r"runtime.compile = true: .* install one .*g\+\+"):
        arithmetic.check(config, torch.zeros(2, 64), local=True)


def test_a_smaller_batch_is_compiled_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that needs no C++ compiler: whose code it is does not matter here."""
    import torch._dynamo

    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plan = plan_of(
        "runtime.compile=true", "runtime.precision=bfloat16", "runtime.memory_format=channels_last"
    )
    blocks = plan.trainables(range(4))
    usual = plan_of("runtime.precision=bfloat16", "runtime.memory_format=channels_last").trainables(range(4))
    names = {name for own in usual.values() for name in own.state_dict()}
    assert {name for own in blocks.values() for name in own.state_dict()} == names
    for size in (8, 8, 3, 8, 3):
        x = y = torch.randn(size, 1, 16, 16)
        for own, plain in zip(blocks.values(), usual.values(), strict=True):
            x, y = own(x).detach(), plain(y).detach()
        assert torch.equal(x, y)
    assert len(compiled) == 8


@pytest.mark.parametrize(
    ("setting", "mode"), [("true", None), ("default", None), ("reduce-overhead", "reduce-overhead")]
)
def test_a_block_is_compiled_in_the_mode_that_is_wanted(
    setting: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    modes: list[str | None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], mode: str | None = None) -> Any:
        modes.append(mode)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    block = plan_of(f"runtime.compile={setting}").trainables([0])[0]
    block(torch.randn(2, 1, 16, 16))
    assert modes == [mode]


class Replayed(torch.autograd.Function):
    """The product of two tensors, as CUDA graphs would give it: each time into the same memory."""

    outputs: ClassVar[dict[str, Tensor]] = {}

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return Replayed.filled("output", x * weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        x, _ = ctx.saved_tensors
        return None, Replayed.filled("gradient", x * gradient)

    @staticmethod
    def filled(name: str, value: Tensor) -> Tensor:
        return Replayed.outputs.setdefault(name, torch.empty_like(value)).copy_(value).detach()


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = Replayed.apply(x, self.weight)
        return product


def test_what_a_cuda_graph_gives_outlives_the_next_one() -> None:
    first, second = Scale(), Scale()
    for block in (first, second):
        arithmetic.replay(block)
    kept = first(torch.tensor([1.0, 2.0]))
    kept.sum().backward()
    after = second(kept.detach())
    after.sum().backward()
    first(torch.tensor([1.0, 1.0])).sum().backward()  # of another micro-batch
    assert kept.tolist() == [2.0, 6.0]
    assert after.tolist() == [4.0, 18.0]
    assert first.weight.grad is not None
    assert second.weight.grad is not None
    assert first.weight.grad.tolist() == [2.0, 3.0]
    assert second.weight.grad.tolist() == [2.0, 6.0]


def test_cuda_graphs_are_for_blocks_that_learn_alone() -> None:
    config = load(None, ["runtime.compile=reduce-overhead", "run.method=bp"])
    with pytest.raises(
        ValueError, match=r'runtime.compile = "reduce-overhead": .* run.method = \'bp\' .*use "default"'
    ):
        arithmetic.check(config, torch.zeros(2, 64), local=False)


def test_float16_scales_the_loss_of_each_block_and_goes_on_from_a_checkpoint() -> None:
    settings = [f"model.name={__name__}:narrow", "loss.projector=l,16,16", "runtime.precision=float16"]
    equal(result(*settings, "pipeline.stages=3"), result(*settings, "pipeline.stages=1"))
    config = load(None, ["runtime.precision=float16"])
    first, second = (Updater(Images(), config) for _ in range(2))
    before = first.trainable.block.weight.detach().clone()  # type: ignore[operator]
    x = torch.randn(2, 3, 8, 8)
    first.backward(first.trainable(x).sum() * 1e36)  # finite itself, but not when it is scaled
    first.step({"lr": 1e-2})
    assert torch.equal(first.trainable.block.weight, before)  # type: ignore[arg-type]
    state = copy.deepcopy(first.state_dict())
    assert state["scaler"]["scale"] == 2.0**15
    second.load_state_dict(state)
    for updater in (first, second):
        updater.backward(updater.trainable(x).sum())
        updater.step({"lr": 1e-2})
    assert not torch.equal(first.trainable.block.weight, before)  # type: ignore[arg-type]
    assert all(map(torch.equal, first.trainable.parameters(), second.trainable.parameters()))


@pytest.mark.parametrize(
    ("wanted", "gpus", "found"),
    [
        ("cpu", 2, "cpu"),
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:1"),  # the fourth worker of a host
        ("cuda", 4, "cuda:3"),
        ("cuda:0", 2, "cuda:0"),
        ("cuda:2", 2, r'"cuda:2": torch sees 2 GPUs here'),
        ("cuda", 0, r'"cuda": torch sees no GPUs here'),
    ],
)
def test_a_worker_computes_where_it_shall_or_says_what_is_here(
    wanted: str, gpus: int, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    config = load(values={"runtime.device": wanted})
    if found.startswith('"'):
        with pytest.raises(ValueError, match=f"runtime.device = {found}; use"):
            arithmetic.device(config, local_rank=3)
    else:
        assert str(arithmetic.device(config, local_rank=3)) == found
