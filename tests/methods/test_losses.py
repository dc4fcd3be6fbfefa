"""The contrastive loss against formulas written out sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
