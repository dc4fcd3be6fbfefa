"""The contrastive loss against formulas written out sample by sample."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from scpl_dist.methods import losses
from scpl_dist.methods.losses import supcon


def naive(features: torch.Tensor, labels: torch.Tensor, temperature: float, extra: int) -> float:
    """The loss with plain Python numbers; `extra` is what the divisor adds to the number of positives."""
    rows = features.double().tolist()
    trainable = []
    for row in rows:
        length = max(math.sqrt(sum(value * value for value in row)), 1e-12)
        trainable.append([value / length for value in row])
    total = 0.0
    for i in range(len(trainable)):
        scores = [
            sum(a * b for a, b in zip(trainable[i], other, strict=True)) / temperature for other in trainable
        ]
        normaliser = math.log(sum(math.exp(scores[a]) for a in range(len(trainable)) if a != i))
        positives = [p for p in range(len(trainable)) if p != i and labels[p] == labels[i]]
        if positives:
            total += sum(scores[p] - normaliser for p in positives) / (len(positives) + extra)
    return -total / len(trainable)


def batch(size: int, classes: int, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size * 100 + classes)
    features = torch.randn(size, width, generator=generator)
    return features, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize(("size", "classes"), [(2, 1), (2, 2), (17, 3), (64, 10), (40, 100)])
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_loss_is_the_published_formula(size: int, classes: int, temperature: float) -> None:
    features, labels = batch(size, classes)
    expected = naive(features, labels, temperature, extra=1)
    assert supcon(features, labels, temperature).item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("size", "classes"), [(17, 3), (64, 10)])
def test_divisor_positives_is_l_out_of_khosla(size: int, classes: int) -> None:
    features, labels = batch(size, classes)
    expected = naive(features, labels, 0.1, extra=0)
    assert supcon(features, labels, 0.1, "positives").item() == pytest.approx(expected, rel=1e-5)


def test_the_divisors_differ_by_the_weight_of_an_anchor() -> None:
    features, labels = torch.randn(12, 4), torch.arange(12) // 4  # 3 positives for each anchor
    ratio = supcon(features, labels, 0.1, "all") / supcon(features, labels, 0.1, "positives")
    assert ratio.item() == pytest.approx(3 / 4, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 4), st.floats(0.05, 2.0))
def test_loss_matches_the_formula_for_any_batch(size: int, classes: int, temperature: float) -> None:
    features, labels = batch(size, classes)
    expected = naive(features, labels, temperature, extra=1)
    assert supcon(features, labels, temperature).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_loss_ignores_order_length_and_names_of_classes() -> None:
    features, labels = batch(32, 5)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    base = supcon(features, labels)
    torch.testing.assert_close(supcon(features[order], labels[order]), base)
    torch.testing.assert_close(supcon(features * 7, labels), base)
    torch.testing.assert_close(supcon(features, 40 - labels), base)


def test_gradient_is_right() -> None:
    features, labels = batch(6, 2, width=3)
    leaf = features.requires_grad_()
    (gradient,) = torch.autograd.grad(supcon(leaf, labels, 0.5), leaf)
    for row, column in [(0, 0), (3, 1), (5, 2)]:
        step = torch.zeros_like(features)
        step[row, column] = 1e-3
        above = naive(features.detach() + step, labels, 0.5, extra=1)
        below = naive(features.detach() - step, labels, 0.5, extra=1)
        assert gradient[row, column].item() == pytest.approx((above - below) / 2e-3, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("size", [0, 1])
def test_fewer_than_two_samples_give_a_loss_of_zero_that_can_be_differentiated(size: int) -> None:
    features = torch.randn(size, 4, requires_grad=True)
    loss = supcon(features, torch.zeros(size, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(loss, features)
    assert loss.item() == 0
    assert gradient.shape == features.shape
    assert not gradient.any()


def test_a_batch_without_any_positives_gives_zero_and_no_nan() -> None:
    features = torch.randn(8, 4, requires_grad=True)
    for divisor in ("all", "positives"):
        loss = supcon(features, torch.arange(8), 0.1, divisor)
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.item() == 0
        assert gradient.isfinite().all()


def test_identical_and_zero_features_stay_finite() -> None:
    for features in (torch.ones(6, 4), torch.zeros(6, 4)):
        leaf = features.requires_grad_()
        loss = supcon(leaf, torch.tensor([0, 0, 1, 1, 2, 2]), 0.01)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_half_precision_features_give_a_float32_loss() -> None:
    features, labels = batch(32, 4)
    loss = supcon(features.bfloat16(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, supcon(features.bfloat16().float(), labels))


def at_once(features: torch.Tensor, labels: torch.Tensor, divisor: str) -> torch.Tensor:
    """The formula on the matrix of all pairs, temperature 0.1."""
    normalised = functional.normalize(features, dim=1)
    scores = normalised @ normalised.T / 0.1
    itself = torch.eye(len(labels), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    log_p = scores - scores.masked_fill(itself, -math.inf).logsumexp(1, keepdim=True)
    count = positive.sum(1)
    return -((log_p * positive).sum(1) / (count + 1 if divisor == "all" else count.clamp(min=1))).mean()


@pytest.mark.parametrize("divisor", ["all", "positives"])
@pytest.mark.parametrize("rows", [1, 7, 96])  # of 97: by one, with a rest, and all but one
def test_a_loss_in_parts_has_value_and_gradient_of_the_formula(
    divisor: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "PAIRS", rows * 97)
    features, labels = batch(97, 10)
    features = features.double().requires_grad_()
    in_parts = supcon(features.float(), labels, 0.1, divisor)
    wanted = at_once(features, labels, divisor)
    torch.testing.assert_close(in_parts.double(), wanted, rtol=1e-6, atol=1e-6)
    (mine,) = torch.autograd.grad(in_parts, features)
    (theirs,) = torch.autograd.grad(wanted, features)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest tensor that any operation gives, also in a backward pass."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_no_matrix_of_all_pairs_is_made_of_many_samples(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "PAIRS", 64 * 64)
    features, labels = batch(size, 10)
    features.requires_grad_()
    with _Largest() as largest:  # type: ignore[no-untyped-call]
        torch.autograd.grad(supcon(features, labels), features)
    assert largest.elements == max(64 * 64, features.numel())


@pytest.mark.parametrize("known", [0, 1, 2, 9])
def test_samples_without_a_label_belong_to_nothing(known: int) -> None:
    features, labels = batch(12, 3)
    labels[torch.randperm(12, generator=torch.Generator().manual_seed(1))[known:]] = -100
    there = labels != -100
    for divisor in ("all", "positives"):
        all_of_them, some = features.clone().requires_grad_(), features[there].clone().requires_grad_()
        loss = supcon(all_of_them, labels, 0.1, divisor, ignored=-100)
        wanted = supcon(some, labels[there], 0.1, divisor)
        torch.testing.assert_close(loss, wanted)
        torch.autograd.backward([loss, wanted])
        assert all_of_them.grad is not None
        torch.testing.assert_close(all_of_them.grad[there], some.grad)
        assert not all_of_them.grad[~there].any()
