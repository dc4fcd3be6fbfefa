"""What takes the place of a BatchNorm is the same module to everybody else."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scpl_dist.methods.batchnorm import DeferredBatchNorm, SharedBatchNorm, commit, defer, share

Exchange = Callable[[nn.Module], None]
EXCHANGES = pytest.mark.parametrize(
    "exchange", [defer, lambda module: share(module, lambda own: own)], ids=["deferred", "shared"]
)


@EXCHANGES
def test_parameters_buffers_and_settings_stay(exchange: Exchange) -> None:
    new: nn.Module = nn.BatchNorm2d(3, eps=1e-3, momentum=None).eval()
    names = dict([*new.named_parameters(), *new.named_buffers()])
    exchange(new)
    assert isinstance(new, DeferredBatchNorm | SharedBatchNorm)
    assert (new.eps, new.momentum, new.training) == (1e-3, None, False)
    state = new.state_dict(keep_vars=True)
    assert state.keys() == names.keys()
    assert all(state[name] is tensor for name, tensor in names.items())


@EXCHANGES
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_what_a_norm_does_not_have_it_does_not_get(exchange: Exchange, options: dict[str, bool]) -> None:
    norm, x = nn.BatchNorm1d(3, **options), torch.randn(8, 3)
    names, wanted = norm.state_dict().keys(), copy.deepcopy(norm)(x)
    exchange(model := nn.Sequential(norm))
    torch.testing.assert_close(model(x), wanted)
    assert {f"0.{name}" for name in names} == model.state_dict().keys()


@EXCHANGES
def test_hooks_stay_and_their_handles_still_remove_them(exchange: Exchange) -> None:
    seen: list[str] = []
    norm = nn.BatchNorm1d(3)
    norm.register_forward_pre_hook(lambda module, args: seen.append("before"))
    handle = norm.register_forward_hook(lambda module, args, output: seen.append("after"))
    norm.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    model, x = nn.Sequential(norm), torch.randn(8, 3, requires_grad=True)
    exchange(model)
    assert isinstance(norm, DeferredBatchNorm | SharedBatchNorm)
    torch.autograd.backward(model(x).sum())
    assert seen == ["before", "after", "backward"]
    handle.remove()
    model(x)
    assert seen[3:] == ["before"]


class Twice(nn.Module):
    """One norm under two names, the second in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.inner = nn.Sequential(nn.Linear(3, 3), self.first)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.inner(self.first(x))
        return output


@EXCHANGES
def test_a_norm_with_two_names_is_exchanged_once_and_keeps_both(exchange: Exchange) -> None:
    model = Twice()
    names = model.state_dict().keys()
    exchange(model)
    assert isinstance(model.first, DeferredBatchNorm | SharedBatchNorm)
    assert model.inner[1] is model.first
    assert model.state_dict().keys() == names
    x = torch.randn(8, 3)
    model(x)
    commit(model)
    tracked = model.first.num_batches_tracked
    assert tracked is not None
    assert tracked == (1 if isinstance(model.first, DeferredBatchNorm) else 2)
    seen = list(model.buffers())
    exchange(model)
    assert all(map(operator.is_, model.buffers(), seen))  # not once more


def test_sums_of_narrow_activations_are_taken_in_float32() -> None:
    norm = nn.BatchNorm1d(1)
    defer(norm)
    x = torch.ones(1003, 1, dtype=torch.bfloat16)  # a sum that bfloat16 does not have: it would be 1004
    for _ in range(3):
        norm(x)
    commit(norm)
    assert norm.running_mean is not None
    assert norm.running_mean.item() == pytest.approx(0.1)
    assert norm.running_var is not None
    assert norm.running_var.item() == pytest.approx(0.9)
