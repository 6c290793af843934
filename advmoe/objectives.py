# SPDX-License-Identifier: Apache-2.0
"""Objectives: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import unknown_name

__all__ = [
    "BALANCE_LOSSES",
    "balance_loss",
    "cross_entropy",
    "dlr_loss",
    "kl_divergence",
    "margin_loss",
    "router_pseudo_label_loss",
    "rt_er_loss",
    "trades_loss",
]

BALANCE_LOSSES = ("switch", "entropy", "column_entropy", "variance")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """``logits [B, classes]``, ``labels [B]``; reduction mean, sum or none. Computed in float32 at least, as all losses
    here."""
    return F.cross_entropy(_wide(logits), labels, reduction=reduction)


def kl_divergence(p_logits: Tensor, q_logits: Tensor, reduction: str = "batchmean") -> Tensor:
    """``KL(softmax(p) || softmax(q))`` of logits ``[B, classes]``, in log space.

    The form with softmax(p) as the target of KLDivLoss has a derivative 0 * log 0 as soon as one probability underflows,
    which is how AdvMoE's released code turns to NaN; this one stays finite for any finite logits.

    Args:
        reduction: batchmean, sum or none (``[B]``).
    """
    p_log = F.log_softmax(_wide(p_logits), dim=1)
    q_log = F.log_softmax(_wide(q_logits), dim=1)
    each = (p_log.exp() * (p_log - q_log)).sum(1)
    if reduction == "none":
        return each
    if reduction == "sum":
        return each.sum()
    if reduction == "batchmean":
        return each.sum() / each.shape[0]
    raise ValueError(f"reduction: expected batchmean, sum or none, got {reduction!r}")


def margin_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """``max_{j != y} z_j - z_y`` (Carlini and Wagner 2017): positive exactly where the prediction is wrong."""
    logits = _wide(logits)
    own = logits.gather(1, labels[:, None])
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), float("-inf")).amax(1)
    each = others - own.squeeze(1)
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


def dlr_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """``-(z_y - max_{j != y} z_j) / (z_1st - z_3rd)``, the difference of logits ratio (Croce and Hein 2020): as the
    margin positive exactly where the prediction is wrong, and the same for logits times any number. The first and the
    third may be equal: 1e-12 is added below.

    Raises:
        ValueError: if there are fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"dlr: expected logits of at least 3 classes, got {logits.shape[1]}")
    first_three = _wide(logits).topk(3, dim=1).values
    each = margin_loss(logits, labels, reduction="none") / (first_three[:, 0] - first_three[:, 2] + 1e-12)
    return each if reduction == "none" else each.sum() if reduction == "sum" else each.mean()


def trades_loss(clean_logits: Tensor, adversarial_logits: Tensor, labels: Tensor, beta: float = 6.0) -> Tensor:
    """TRADES (Zhang et al. 2019): ``CE(clean, y) + beta * KL(clean || adversarial)``; beta = 1 / lambda."""
    return cross_entropy(clean_logits, labels) + beta * kl_divergence(clean_logits, adversarial_logits)


def rt_er_loss(
    adversarial_logits: Tensor, labels: Tensor, apart: Sequence[tuple[Tensor, Tensor]], beta: float = 6.0
) -> Tensor:
    """RT-ER (arXiv 2502.06832): ``CE(F(x_adv), y) + beta * sum over experts of KL(f(x) || f(x_adv'))``.

    Each KL is the mean over the samples that are there; the released code divides by the nominal size of a batch.

    Args:
        apart: for each choice of experts their logits of clean and of attacked images, ``[B, classes]`` both.
    """
    return cross_entropy(adversarial_logits, labels) + beta * sum(
        (kl_divergence(clean, attacked) for clean, attacked in apart), start=adversarial_logits.new_zeros(())
    )


def router_pseudo_label_loss(
    scores: Tensor, adversarial_scores: Tensor, labels: Tensor, alpha: float = 6.0, beta: float = 6.0
) -> Tensor:
    """The router objective of AdvMoE's released code: ``alpha * CE(s(x), y mod N) + beta * KL(s(x) || s(x_adv))``.

    It does not see the network's prediction; the paper's lower level minimises TRADES through the network instead.
    """
    return alpha * cross_entropy(scores, labels % scores.shape[1]) + beta * kl_divergence(scores, adversarial_scores)


def balance_loss(scores: Tensor, kind: str) -> Tensor:
    """What keeps a router from sending all samples to one expert; 0 where the experts are used alike. Computed in float32
    at least, and finite for any finite scores.

    With p the softmax of ``scores [B, N]``, P its mean over the batch, f the share of samples whose highest score is each
    expert's, H the entropy in nats:

    - ``switch``: ``N * sum_e f_e P_e - 1`` (Fedus et al. 2022; f carries no gradient). Below 0, by little, where f and P
      prefer different experts;
    - ``column_entropy``: ``log N - H(P)``, at least 0: used alike on average;
    - ``entropy``: ``mean_i H(p_i) + log N - H(P)``, at least 0: used alike on average, and decided for each sample;
    - ``variance``: ``switch + 1 / sqrt(N) - mean_i std_e p_i`` with the standard deviation of a sample's probabilities,
      dividing by N - 1, which is 1 / sqrt(N) where it is decided: used alike on average, and decided.

    The last three as in robust sparse MoE layers (Pavlitska et al., ICCVW 2025) but for constants: log N, 1 / sqrt(N).

    Raises:
        ValueError: for an unknown kind, or no samples.
    """
    samples, experts = scores.shape
    if samples == 0:
        raise ValueError(f"scores: expected some samples, got shape {[samples, experts]}")
    scores = _wide(scores)
    # the difference of two scores may overflow, and 0 * -inf is no number
    log_p = F.log_softmax(scores, dim=1).clamp_min(torch.finfo(scores.dtype).min)
    p = log_p.exp()
    mean = p.mean(0)
    if kind == "switch":
        share = F.one_hot(scores.detach().argmax(1), experts).to(mean.dtype).mean(0)
        return experts * (share * mean).sum() - 1
    if kind == "variance":
        if experts == 1:
            return balance_loss(scores, "switch")
        # the root's derivative at 0, where all are alike, is none
        deviation = p.var(1).clamp_min(torch.finfo(p.dtype).tiny).sqrt()
        return balance_loss(scores, "switch") + experts**-0.5 - deviation.mean()
    if kind not in BALANCE_LOSSES:
        raise unknown_name("balance", kind, BALANCE_LOSSES)
    column = math.log(experts) + (mean * (mean + 1e-12).log()).sum()
    return column if kind == "column_entropy" else column - (p * log_p).sum(1).mean()
