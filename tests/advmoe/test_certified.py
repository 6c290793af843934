# SPDX-License-Identifier: Apache-2.0
"""No attack breaks a sound certificate, and the printed theorem is broken by one."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_mixtures import Mixture, attacked, convolutional, fit, margins, on_grid, plain
from small_runs import SMALL, small_architecture, tiny
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.certification import Certifier, certify, denominator, dual_radius, moe_radius, route_radii
from advmoe.config import ModelConfig
from advmoe.data import load
from advmoe.models import DualModel, create_model
from advmoe.report import analyses as driver
from advmoe.report.analyses import analyze
from advmoe.training import train
from advmoe.training.runs import load_model

NORMS = ("linf", "l2")
KINDS = {  # k, gate, what is mixed
    "hard": (1, "none", "logits"),
    "straight-through": (1, "straight_through", "probabilities"),
    "soft": (3, "softmax", "probabilities"),
    "soft logits": (3, "softmax", "logits"),
    "top-2": (2, "softmax", "probabilities"),
    "top-2 logits": (2, "softmax", "logits"),
    "sum of two": (2, "none", "probabilities"),
    "scaled": (1, "softmax", "logits"),
}


def points(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """In the plane, three classes with curved borders."""
    x = torch.rand(n, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    a, b = x[:, 0, 0, 0], x[:, 1, 0, 0]
    return x, (a**2 + b > 0.7).long() + (b - a > 0.2).long()


def mixture(kind: str, seed: int = 0, trained: bool = True, **options) -> nn.Module:
    torch.manual_seed(seed)
    top_k, gate, mix = KINDS[kind]
    model = Mixture([plain() for _ in range(3)], top_k=top_k, gate=gate, mix=mix, **options).double().eval()
    model.router.linear.weight.data *= 4
    return fit(model, *points(200)) if trained else model


def truthful(model: nn.Module, n: int = 16) -> tuple[Tensor, Tensor]:
    """Points with the model's own predictions for labels: none is misclassified."""
    x, _ = points(n, 1)
    return x, model(x).argmax(1)


def unbroken(model: nn.Module, x: Tensor, y: Tensor, radius: Tensor, norm: str) -> None:
    within = radius.clamp_max(10) * (1 - 1e-6)
    assert (on_grid(model, x, y, within, norm) > 0).all()
    assert (attacked(model, x, y, within, norm) > 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["product", "interval"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_attack_breaks_a_certificate(kind: str, method: str, norm: str) -> None:
    """On a fine grid of the ball, which is exhaustive in the plane, and by descent on the margin; trained and random."""
    for trained in (True, False) if method == "interval" else (True,):
        model = mixture(kind, trained=trained, normalize=trained, temperature=0.5 if trained else 1.0)
        x, y = truthful(model)
        certifier = Certifier(model, norm, method, (2, 1, 1))
        for variant in ("sound", "twice"):
            if "logits" in kind and variant == "twice":
                continue
            found = certifier.certify(x, y, variant)
            assert found.sound and (found.radius > 0).all()
            assert (found.radius <= found.route_radius).all()
            by_hand = torch.minimum(found.route_radius, found.margin / found.denominator)
            assert (found.radius <= by_hand).all()
            if method == "product":
                assert torch.allclose(found.radius, by_hand, rtol=1e-6)
            unbroken(model, x, y, found.radius, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("robust", "other", "on"),
    [
        ("soft", "soft", "probabilities"),
        ("hard", "hard", "probabilities"),
        ("hard", "plain", "logits"),
        ("soft logits", "top-2 logits", "logits"),
        ("soft logits", "plain", "probabilities"),
    ],
)
def test_no_attack_breaks_a_dual_models_certificate(robust: str, other: str, on: str, norm: str) -> None:
    torch.manual_seed(3)
    standard = fit(nn.Sequential(plain()).double(), *points(200)) if other == "plain" else mixture(other, 1)
    model = DualModel(standard, mixture(robust, 2), 0.5, on).eval()
    certifier = Certifier(model, norm, "interval", (2, 1, 1))
    for alpha in (0.5, 0.8):
        model.alpha = certifier.alpha = alpha
        x, y = truthful(model)
        found = certifier.certify(x, y)
        assert found.sound and (found.radius > 0).double().mean() > 0.5
        unbroken(model, x, y, found.radius, norm)
        if on == "probabilities" and "logits" not in robust:
            theorem = certifier.certify(x, y, "twice")
            assert (theorem.radius <= found.radius * (1 + 1e-2)).all()
            unbroken(model, x, y, theorem.radius, norm)
            assert (theorem.radius > 0).any() == (alpha > 0.5)


@pytest.mark.parametrize("norm", NORMS)
def test_no_attack_breaks_a_certificate_of_convolutions(norm: str) -> None:
    for kind in ("hard", "soft"):
        torch.manual_seed(0)
        top_k, gate, mix = KINDS[kind]
        experts = [convolutional() for _ in range(3)]
        model = Mixture(experts, 2, 5, top_k, gate, mix, normalize=True, standardize=True).double()
        x = torch.rand(80, 2, 5, 5).double()
        fit(model, x, (4 * x[:, 0].mean((1, 2)) + 4 * x[:, 1, :3].mean((1, 2)) - 3).long().clamp(0, 2), 30)
        x = x[:10]
        y = model(x).argmax(1)
        for method in ("product", "interval"):
            found = certify(model, x, y, norm, method=method)
            assert found.sound and (found.radius > 0).all()
            assert (attacked(model, x, y, found.radius * (1 - 1e-6), norm) > 0).all()


def test_a_mixture_of_whole_networks() -> None:
    """The library's own, in the precision it has: by its attack, hard and soft."""
    for options in ({}, {"top_k": 3, "gate": "softmax", "mix": "probabilities"}):
        torch.manual_seed(0)
        model = create_model("resnet18", "network_moe", 3, 8, 3, width=2, router="linear", **options).eval()
        x = torch.rand(3, 3, 8, 8)
        with torch.no_grad():
            y = model(x).argmax(1)
        found = certify(model, x, y, method="interval")
        assert found.sound and (found.radius > 0).all() and "upper bounds" in found.note
        for i, radius in enumerate(found.radius.tolist()):
            epsilon = min(radius * (1 - 1e-5), 1.0)
            attack = PGD(epsilon, epsilon / 4, 5, restarts=2, loss="margin")
            with torch.no_grad():
                assert model(attack(model, x[i : i + 1], y[i : i + 1])).argmax(1) == y[i]


@pytest.mark.parametrize("norm", NORMS)
def test_where_everything_is_linear_the_radius_is_exact(norm: str) -> None:
    """A little farther an image of another class is found: the route's radius, and the margin over its slope."""
    torch.manual_seed(0)
    for apart in (False, True):  # the experts' own borders come first; experts that disagree, so that the routes' do
        model = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(2, 3)) for _ in range(3)]).double().eval()
        for i, expert in enumerate(model.experts):
            expert[1].weight.data *= 1 if apart else 6
            expert[1].bias.data += 2.0 * apart * torch.eye(3)[i]
        model.router.linear.bias.data = -0.5 * model.router.linear.weight.sum(1).data
        x, y = truthful(model)
        found = certify(model, x, y, norm)
        unbroken(model, x, y, found.radius, norm)
        own = found.route_radius > found.radius * (1 + 1e-6)
        beyond = on_grid(model, x, y, found.radius * 1.05, norm, 201)
        assert (beyond[own] < 0).all()
        if not apart:
            assert own.any()
        else:
            assert not own.all()
            switched = route_radii(Certifier(model, norm, shape=(2, 1, 1)).members[0].weight, model.scores(x), norm)
            assert torch.equal(switched, found.route_radius)
            assert (beyond[~own] < 0).all()  # another expert, another class


def test_the_printed_theorem_is_broken_by_a_softmax_of_two_classes() -> None:
    """One expert, p = sigmoid(u x): L = |u| / 4 is exact, and the margin 2 p - 1 falls by 2 L on a unit of length."""
    model = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(2, 2))], mix="probabilities").double().eval()
    model.experts[0][1].weight.data = torch.tensor([[3.0, 1.0], [0.0, 0.0]]).double()
    model.experts[0][1].bias.data = torch.tensor([-1.9, 0.0]).double()
    x = torch.tensor([[0.5, 0.5], [0.6, 0.3]]).double().reshape(2, 2, 1, 1)
    y = model(x).argmax(1)
    for norm in NORMS:
        printed, sound = certify(model, x, y, norm, "paper"), certify(model, x, y, norm)
        assert not printed.sound and "no certificate" in printed.note
        assert (printed.radius > 1.9 * sound.radius).all()
        assert (attacked(model, x, y, printed.radius * 0.99, norm) < 0).all()
        unbroken(model, x, y, sound.radius, norm)


def test_the_printed_theorem_is_broken_by_trained_mixtures() -> None:
    for kind in ("hard", "soft"):
        model = mixture(kind)
        x, y = truthful(model, 100)
        printed = certify(model, x, y, "l2", "paper", "interval")
        assert (on_grid(model, x, y, printed.radius * (1 - 1e-6), "l2", 31) < 0).any()


def test_the_printed_theorems_constants_are_of_one_class() -> None:
    """Assumption 5.3 speaks of f^(y) alone: with three classes it may stand still while another one overtakes it."""

    def f(t: Tensor) -> Tensor:
        p = 0.6 * torch.sigmoid(t)
        return torch.stack([torch.full_like(t, 0.4), p, 0.6 - p], -1)

    here = f(torch.zeros(1).double())[0]
    margin = here[0] - here[1:].max()
    one, none = torch.ones(1).double(), torch.zeros(1).double()
    assert moe_radius(margin, denominator(one, none, none), "paper") == math.inf
    assert moe_radius(margin, denominator(one, none, none), "twice") == math.inf  # twice nothing
    assert f(torch.tensor([2.0]).double())[0].argmax() == 1
    sound = moe_radius(margin, denominator(one, 0.6 * one / 4, none))  # of the difference
    assert f(sound[None])[0].argmax() == 0


def test_the_printed_theorems_bounds_of_outputs_are_of_one_class() -> None:
    """M_2 = 0 bounds f_2^(y), and the routers' part of the margin still falls by 1 for it: F^(y) = a_1."""
    u = 1.0
    gate = lambda t: torch.sigmoid(torch.as_tensor(u * t)).item()  # noqa: E731
    margin = torch.tensor(2 * gate(0.2) - 1)
    r, a = torch.full((2,), u / 4), torch.tensor([gate(0.2), 1 - gate(0.2)])
    printed = moe_radius(margin, denominator(a, torch.zeros(2), r, torch.tensor([1.0, 0.0])), "paper")
    sound = moe_radius(margin, denominator(a, torch.zeros(2), r, 1.0))
    assert gate(0.2 - 0.99 * printed) < 0.5 < gate(0.2 - 0.99 * sound)


def test_theorems_by_hand() -> None:
    a, r, lip = (torch.tensor(v).double() for v in ([0.25, 0.75], [0.5, 1.0], [4.0, 2.0]))
    below = denominator(a, lip, r)
    assert below == 0.5 + 1.0 + 1.0 + 1.5 and denominator(a, lip, r, 0.5) == 0.25 + 0.5 + 1.0 + 1.5
    margin = torch.tensor([0.8, -0.1], dtype=torch.float64)
    assert moe_radius(margin, below, "paper").tolist() == [0.2, 0.0]
    assert moe_radius(margin, below, "twice").tolist() == [0.1, 0.0]
    for alpha in (0.5, 0.7, 1.0):
        found = dual_radius(torch.tensor([0.9], dtype=torch.float64), below, alpha)
        direct = (alpha * 0.9 - (1 - alpha)) / (alpha * 4)  # of alpha m_R - (1 - alpha) over alpha K
        assert found.item() == pytest.approx(max(direct, 0))
    for alpha in (0.0, 1.2):
        with pytest.raises(ValueError, match="alpha: expected a number above 0"):
            dual_radius(margin, below, alpha)
    with pytest.raises(ValueError, match="variant: expected one of sound"):
        moe_radius(margin, below, "printed")


def test_alone_the_robust_mixture_has_its_own_certificate() -> None:
    robust = mixture("soft", 2)
    x, y = truthful(robust)
    alone = certify(DualModel(mixture("soft", 1), robust, 1.0, "probabilities"), x, y)
    assert torch.equal(alone.radius, certify(robust, x, y).radius)


def test_theorem_5_5_needs_a_margin() -> None:
    """Whatever the standard model says: with it against the label, the certificate is the theorem's alone."""
    torch.manual_seed(0)
    robust = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(2, 2))]).double().eval()
    standard = Mixture([nn.Sequential(nn.Flatten(), nn.Linear(2, 2))]).double().eval()
    robust.experts[0][1].weight.data = torch.tensor([[4.0, 0.0], [-4.0, 0.0]]).double()
    robust.experts[0][1].bias.data.zero_()
    standard.experts[0][1].weight.data.zero_()
    standard.experts[0][1].bias.data = torch.tensor([-30.0, 30.0]).double()
    x = torch.tensor([0.05, 0.3, 0.9]).double().reshape(3, 1, 1, 1).repeat(1, 2, 1, 1)
    y = torch.zeros(3, dtype=torch.int64)
    model = DualModel(standard, robust, 0.8, "probabilities").eval()
    found, theorem = certify(model, x, y), certify(model, x, y, variant="twice")
    assert found.radius[0] == 0 and margins(model, x, y)[0] < 0
    assert torch.allclose(found.radius, theorem.radius, rtol=1e-6)
    margin = torch.tanh(4 * x[1:, 0, 0, 0])
    assert torch.allclose(theorem.radius[1:], (margin - 0.25) / 4, rtol=1e-6)  # 2 p - 1 = tanh(4 x), of slope 4
    unbroken(model, x[1:], y[1:], found.radius[1:], "linf")


def test_what_is_misclassified_or_estimated_is_not_certified() -> None:
    model = mixture("hard")
    x, y = truthful(model)
    wrong = certify(model, x, (y + 1) % 3)
    assert (wrong.radius == 0).all() and wrong.certified(0) == 0
    estimate = certify(model, x, y, "l2", method="power")
    assert not estimate.sound and "nothing is certified" in estimate.note
    assert (estimate.radius >= certify(model, x, y, "l2").radius * (1 - 1e-6)).all()
    parts = certify(model, x, y, batch_size=5)
    assert torch.allclose(parts.radius, certify(model, x, y).radius)
    with pytest.raises(ValueError, match="variant: expected one of sound"):
        certify(model, x, y, variant="printed")
    with pytest.raises(ValueError, match="images: expected at least one"):
        certify(model, x[:0], y[:0])
    with pytest.raises(ValueError, match=r"Theorem 5\.4 is about mixtures of probabilities"):
        certify(mixture("soft logits"), x, y, variant="paper")
    with pytest.raises(ValueError, match=r"Theorem 5\.5 is about probabilities"):
        certify(DualModel(model, model, 0.7, "logits"), x, y, variant="paper")


@pytest.mark.parametrize("on", ["logits", "probabilities"])
def test_a_scaled_single_choice_is_certified_by_itself_alone(on: str) -> None:
    """Its gate is below 1: one expert's class does not depend on it, that of the Dual-Model does."""
    scaled = mixture("scaled")
    x, y = truthful(scaled)
    found = certify(scaled, x, y).radius
    assert (found > 0).any()
    unbroken(scaled, x, y, found, "linf")
    assert torch.equal(certify(DualModel(scaled, scaled, 1.0, on), x, y).radius, found)
    for standard, robust in ((mixture("hard"), scaled), (scaled, mixture("hard"))):
        with pytest.raises(ValueError, match=r"^gate: of a Dual-Model"):
            certify(DualModel(standard, robust, 0.7, on), x, y)


def test_a_ball_of_its_own_gives_larger_radii() -> None:
    model = mixture("soft")
    x, y = truthful(model)
    assert certify(model, x, y, method="interval").radius.mean() > 1.5 * certify(model, x, y).radius.mean()


@pytest.mark.parametrize("norm", NORMS)
def test_routes_stay_within_their_radius_and_change_beyond(norm: str) -> None:
    for kind in ("hard", "top-2"):
        model = mixture(kind, normalize=True, standardize=True)
        x, y = truthful(model)
        found = certify(model, x, y, norm)
        angles = torch.linspace(0, 2 * torch.pi, 721).double()
        around = torch.stack([angles.cos(), angles.sin()], 1)
        if norm == "linf":
            around = around / around.abs().amax(1, keepdim=True)
        for factor in (1 - 1e-6, 1.01):
            moved = x[:, None] + factor * found.route_radius[:, None, None, None, None] * around.reshape(1, -1, 2, 1, 1)
            routes = model.route(moved.flatten(0, 1)).expert.reshape(len(x), len(angles), -1).sort(2).values
            same = (routes == model.route(x).expert.reshape(len(x), 1, -1).sort(2).values).flatten(1).all(1)
            assert same.all() if factor < 1 else not same.any()


def test_the_analysis_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shares that the certificates give; the printed theorem where it is about such a mixture."""
    with small_architecture():
        for kind, method in (("network_moe", "standard"), ("dual_moe", "jtdmoe")):
            model = ModelConfig(SMALL, kind, width=4, num_experts=2, router="linear", frozen_router=True)
            train(tiny(method, kind, model=model, epochs=4), tmp_path / kind, quiet=True)
            monkeypatch.setattr(sys.modules["advmoe.analysis.certified"], "LOCAL", 1e9 if kind == "network_moe" else 0)
            found = analyze([tmp_path / kind], only=["certified"], attack="pgd2", limit=50, device="cpu")
            (finding,) = (each.finding for each in found.written)
            rows = [dict(zip(finding.columns, row, strict=True)) for row in finding.rows]
            shares = [row["sound"] for row in rows]
            assert shares == sorted(shares, reverse=True) and shares[-1] == 0 < shares[0]
            if kind == "network_moe":
                opened = load_model(tmp_path / kind)[0]
                images, labels = load("digits").test.first(50).batch(torch.arange(50))
                own = certify(opened, images, labels, method="interval").radius
                assert all(row["sound"] == float((own > row["radius"]).double().mean()) for row in rows)
                assert all(row["twice"] <= row["sound"] and row["twice"] <= row["printed"] for row in rows)
                assert "interval: upper bounds" in finding.note
            else:  # of logits, as released
                assert "by product" in finding.note
                assert {row["printed"] for row in rows} == {None} and "mixes logits" in finding.note
            assert 0.15 in {row["radius"] for row in rows}
        for quick, named, reason in ((10, False, "--only certified"), (10, True, None), (10**9, False, None)):
            monkeypatch.setattr(driver, "_QUICK", quick)
            said = driver._obstacle("certified", SimpleNamespace(model=opened), None, named)  # type: ignore[arg-type]
            assert reason in said if reason else said is None
