# SPDX-License-Identifier: Apache-2.0
"""Objectives against their formulas in float64, and where the released form fails."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from advmoe.objectives import (
    BALANCE_LOSSES,
    balance_loss,
    cross_entropy,
    kl_divergence,
    margin_loss,
    router_pseudo_label_loss,
    trades_loss,
)


def logits(seed: int, scale: float = 1.0, classes: int = 10) -> torch.Tensor:
    return scale * torch.randn(8, classes, generator=torch.Generator().manual_seed(seed))


def test_kl_is_the_formula() -> None:
    p, q = logits(0), logits(1)
    pp, qq = p.double().softmax(1), q.double().softmax(1)
    each = (pp * (pp / qq).log()).sum(1)
    torch.testing.assert_close(kl_divergence(p, q, "none").double(), each, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl_divergence(p, q).double(), each.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kl_divergence(p, q, "sum").double(), each.sum(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="reduction"):
        kl_divergence(p, q, "mean")


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.01, 1e4))
def test_kl_is_finite_and_not_negative(seed: int, scale: float) -> None:
    p, q = logits(seed, scale).requires_grad_(), logits(seed + 1, scale).requires_grad_()
    value = kl_divergence(p, q, "none")
    assert torch.isfinite(value).all() and (value >= -2e-6).all()  # two predictions apart: rounding only
    value.sum().backward()
    assert torch.isfinite(p.grad).all() and torch.isfinite(q.grad).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(1e-6, 1.0), st.floats(0.1, 30.0))
def test_kl_of_near_predictions_is_not_negative(seed: int, apart: float, scale: float) -> None:
    p = logits(seed, scale)
    q = p + logits(seed + 1, apart)
    assert (kl_divergence(p, p, "none") == 0).all()
    assert (kl_divergence(p, q, "none") >= -1e-6).all()
    double = kl_divergence(p.double(), q.double(), "none")
    assert (double >= -1e-15 * (1 + scale)).all()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_kl_gradients_are_the_formula(scale: float) -> None:
    """d/dq = softmax(q) - softmax(p); d/dp_k = p_k (log p_k - log q_k - KL); against them in float64."""
    p, q = logits(0, scale).requires_grad_(), logits(1, scale).requires_grad_()
    kl_divergence(p, q, "sum").backward()
    with torch.no_grad():
        pl, ql = p.double().log_softmax(1), q.double().log_softmax(1)
        kl = (pl.exp() * (pl - ql)).sum(1, keepdim=True)
        torch.testing.assert_close(q.grad.double(), ql.exp() - pl.exp(), rtol=1e-4, atol=1e-5)
        expected = pl.exp() * (pl - ql - kl)
        torch.testing.assert_close(p.grad.double(), expected, rtol=1e-4, atol=1e-6 * scale)


def test_kl_passes_gradcheck() -> None:
    p, q = (logits(s, 3.0).double().requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a, b, "none"), (p, q))


@pytest.mark.parametrize("classes", [2, 100])
def test_kl_of_certain_predictions_that_disagree(classes: int) -> None:
    p, q = torch.zeros(1, classes), torch.zeros(1, classes)
    p[0, 0] = q[0, 1] = 1e4
    assert kl_divergence(p, q).item() == pytest.approx(1e4)
    assert kl_divergence(p, p).item() == 0


def test_the_released_form_is_nan_where_ours_is_not() -> None:
    p, q = logits(0, 1e4).requires_grad_(), logits(1, 1e4)
    F.kl_div(F.log_softmax(q, 1), F.softmax(p, 1), reduction="sum").backward()
    assert torch.isnan(p.grad).any()
    p.grad = None
    kl_divergence(p, q, "sum").backward()
    assert torch.isfinite(p.grad).all()


def test_trades_is_its_two_terms() -> None:
    clean, adversarial, labels = logits(0), logits(1), torch.arange(8)
    expected = F.cross_entropy(clean, labels) + 6 * kl_divergence(clean, adversarial)
    torch.testing.assert_close(trades_loss(clean, adversarial, labels, 6.0), expected)
    torch.testing.assert_close(trades_loss(clean, clean, labels, 6.0), F.cross_entropy(clean, labels))
    torch.testing.assert_close(trades_loss(clean, adversarial, labels), expected)  # 6 is the default
    torch.testing.assert_close(trades_loss(clean, adversarial, labels, 0.0), F.cross_entropy(clean, labels))


def test_trades_reaches_both_predictions() -> None:
    clean, adversarial = logits(0).requires_grad_(), logits(1).requires_grad_()
    trades_loss(clean, adversarial, torch.arange(8), 2.0).backward()
    expected = 2 * (adversarial.softmax(1) - clean.softmax(1)) / 8
    torch.testing.assert_close(adversarial.grad, expected.detach())
    assert clean.grad.abs().sum() > 0


def test_the_clean_prediction_is_not_detached() -> None:
    clean, adversarial = logits(0).requires_grad_(), logits(1)
    kl_divergence(clean, adversarial).backward()
    assert clean.grad.abs().sum() > 0


def test_margin_is_positive_exactly_where_wrong() -> None:
    z = logits(3)
    labels = torch.arange(8)
    assert torch.equal(margin_loss(z, labels, "none") > 0, z.argmax(1) != labels)
    assert margin_loss(z, labels).ndim == 0
    assert margin_loss(torch.tensor([[3.0, 1.0, 2.5]]), torch.tensor([0])).item() == -0.5
    each = margin_loss(z, labels, "none")
    assert margin_loss(z, labels, "sum").item() == pytest.approx(each.sum().item())
    assert margin_loss(z, labels).item() == pytest.approx(each.mean().item())
    for row, label, value in zip(z, labels, each, strict=True):
        others = [v for j, v in enumerate(row.tolist()) if j != label]
        assert value.item() == pytest.approx(max(others) - row[label].item())


def test_pseudo_label_is_the_class_modulo_experts() -> None:
    scores, labels = logits(0, classes=3), torch.arange(8)
    expected = 6 * F.cross_entropy(scores, labels % 3)
    torch.testing.assert_close(router_pseudo_label_loss(scores, scores, labels), expected)
    adversarial = logits(1, classes=3)
    expected = 2 * F.cross_entropy(scores, labels % 3) + 5 * kl_divergence(scores, adversarial)
    torch.testing.assert_close(router_pseudo_label_loss(scores, adversarial, labels, 2.0, 5.0), expected)


def test_cross_entropy_is_torchs() -> None:
    torch.testing.assert_close(
        cross_entropy(logits(0), torch.arange(8), "none"), F.cross_entropy(logits(0), torch.arange(8), reduction="none")
    )


def scores_of(*probabilities: tuple[float, ...]) -> torch.Tensor:
    """Scores whose softmax are these; shifted, which must not matter."""
    return torch.tensor(probabilities, dtype=torch.float64).log() + 3.0


def entropy(*probabilities: float) -> float:
    return -sum(p * math.log(p) for p in probabilities)


def test_balance_losses_by_hand() -> None:
    """Two samples with p = (0.7, 0.2, 0.1) and (0.1, 0.6, 0.3): P = (0.4, 0.4, 0.2), f = (1/2, 1/2, 0)."""
    scores = scores_of((0.7, 0.2, 0.1), (0.1, 0.6, 0.3))
    assert balance_loss(scores, "switch").item() == pytest.approx(3 * (0.5 * 0.4 + 0.5 * 0.4) - 1)
    column = math.log(3) - entropy(0.4, 0.4, 0.2)
    assert balance_loss(scores, "column_entropy").item() == pytest.approx(column)
    rows = (entropy(0.7, 0.2, 0.1) + entropy(0.1, 0.6, 0.3)) / 2
    assert balance_loss(scores, "entropy").item() == pytest.approx(rows + column)
    with pytest.raises(
        ValueError, match="balance: expected one of switch, entropy, column_entropy, variance, got 'swich'"
    ):
        balance_loss(scores, "swich")


def test_switch_counts_choices_without_a_gradient() -> None:
    """d/ds_ie of N sum_e f_e P_e is N / B p_ie (f_e - sum_j f_j p_ij): with f as a constant."""
    scores = logits(0, classes=3).double().requires_grad_()
    balance_loss(scores, "switch").backward()
    with torch.no_grad():
        p = scores.softmax(1)
        f = F.one_hot(scores.argmax(1), 3).double().mean(0)
        assert 0 < f.max() < 1
        torch.testing.assert_close(scores.grad, 3 / 8 * p * (f - (p * f).sum(1, keepdim=True)))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
def test_balance_gradients_are_right(kind: str) -> None:
    scores = logits(0, 2.0, classes=4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: balance_loss(s, kind), (scores,))


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_balance_is_0_where_experts_are_used_alike(kind: str, experts: int) -> None:
    decided = 50 * torch.eye(experts).repeat(3, 1)
    assert balance_loss(decided, kind).item() == pytest.approx(0, abs=1e-6)
    alone = torch.zeros(6, experts)
    alone[:, 0] = 50.0
    most = experts - 1 if kind in ("switch", "variance") else math.log(experts)
    assert balance_loss(alone, kind).item() == pytest.approx(most, abs=1e-5)
    undecided = torch.zeros(6, experts)
    # two of them want each sample decided too
    expected = {"entropy": math.log(experts), "variance": experts**-0.5 if experts > 1 else 0}.get(kind, 0)
    assert balance_loss(undecided, kind).item() == pytest.approx(expected, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.integers(1, 6))
def test_entropies_are_not_negative(seed: int, scale: float, experts: int) -> None:
    scores = logits(seed, scale, experts).double()
    column, both = (balance_loss(scores, kind).item() for kind in ("column_entropy", "entropy"))
    assert -1e-9 <= column <= both + 1e-12 and both <= 2 * math.log(experts) + 1e-9


def test_balance_pulls_towards_the_expert_that_is_left_out() -> None:
    for kind in BALANCE_LOSSES:
        scores = scores_of(*[(0.6, 0.3, 0.1)] * 4).requires_grad_()
        balance_loss(scores, kind).backward()
        assert (scores.grad[:, 0] > 0).all(), kind  # what descends lowers the first, and raises one of the others
        assert (scores.grad[:, 1:].amin(1) < 0).all(), kind


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_balance_is_finite_for_extreme_scores(kind: str, scale: float) -> None:
    scores = torch.tensor([[1.0, -1.0, 0.0], [1.0, -1.0, -1.0], [1.0, 0.9, 0.0]]) * scale
    scores.requires_grad_()
    value = balance_loss(scores, kind)
    value.backward()
    assert math.isfinite(value.item()) and torch.isfinite(scores.grad).all()
    assert value.item() == pytest.approx(2.0 if kind in ("switch", "variance") else math.log(3), abs=1e-5)


@pytest.mark.parametrize("kind", BALANCE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balance_of_half_precision_is_that_of_single(kind: str, dtype: torch.dtype) -> None:
    scores = torch.tensor([[60000.0, -60000.0], [30.0, -30.0], [30.0, 28.0]]).to(dtype)
    value = balance_loss(scores.requires_grad_(), kind)
    value.backward()
    assert value.dtype == torch.float32 and torch.isfinite(scores.grad).all()
    torch.testing.assert_close(value, balance_loss(scores.float(), kind))
