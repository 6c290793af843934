# SPDX-License-Identifier: Apache-2.0
"""Attacks on routers, and with them: what each follows, and that the model is left as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import AGAINST, PGD
from advmoe.models import create_model, record_routing
from advmoe.routers import ImageRouter, Router, observe_routers, replay_routing, routers_of
from moe_kernels import RoutedConv2d, Routing

AGAINST_ROUTERS = [name for name in AGAINST if name != "prediction"]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"layout": "windows"},
    {"router": "image", "num_experts": 3},
    {"route_per": "block", "bn": "per_expert"},
]


def build(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", "moe", width=8, image_size=8, **options).eval()


def batch(model: nn.Module, count: int = 6) -> tuple[Tensor, Tensor]:
    """Images with the classes that the model sees in them."""
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return images, model(images).argmax(1)


def choices(model: nn.Module, images: Tensor) -> Tensor:
    """``[layers, B]``"""
    with record_routing(model) as routings, torch.no_grad():
        model(images)
        return torch.stack([r.expert for r in routings.values()])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("against", AGAINST_ROUTERS)
def test_images_stay_in_the_ball_and_the_model_as_it_was(against: str, options: dict[str, Any]) -> None:
    model = build(**options)
    images, labels = batch(model)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = PGD(0.1, 0.05, 2, against=against, restarts=2)(model, images, labels, torch.Generator().manual_seed(0))
    assert (found - images).abs().max() <= 0.1 + 1e-6 and found.min() >= 0 and found.max() <= 1
    assert not torch.equal(found, images)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(r._observers or r.replayed for r in routers_of(model).values())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("against", AGAINST_ROUTERS)
def test_a_model_without_routers_is_refused(against: str) -> None:
    dense = create_model("resnet18", "dense", width=8, image_size=8)
    images, labels = batch(dense)
    with pytest.raises(ValueError, match=f"attack: one against '{against}' needs a model with routers"):
        PGD(0.1, 0.05, 1, against=against)(dense, images, labels)


def test_flip_changes_more_choices_than_the_prediction_attack() -> None:
    model = build()
    images, labels = batch(model, 16)
    clean = choices(model, images)
    flips = {}
    for against in ("prediction", "flip"):
        found = PGD(0.1, 0.02, 20, against=against)(model, images, labels, torch.Generator().manual_seed(0))
        flips[against] = (choices(model, found) != clean).float().mean().item()
    assert flips["flip"] > flips["prediction"] + 0.1


def test_flip_retires_a_sample_when_all_its_choices_have_changed() -> None:
    model = build(router="image")
    images, labels = batch(model, 16)
    before = choices(model, images)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    found = PGD(0.5, 0.05, 30, against="flip", retire=True)(model, images, labels, torch.Generator().manual_seed(0))
    handle.remove()
    changed = (choices(model, found) != before).all(0)
    assert sizes[0] == 16 and sizes == sorted(sizes, reverse=True)
    # the last forward was before the last step, behind which another choice may have changed
    assert changed.any() and 16 - int(changed.sum()) <= sizes[-1] < 16


def test_experts_sees_the_clean_routing_whatever_it_does() -> None:
    """With the routing held, the attack's own forwards use the clean choices of the very images, also of a part."""
    model = build(num_experts=3)
    images, labels = batch(model, 8)
    clean = choices(model, images)
    labels[::2] = (labels[::2] + 1) % 10  # wrong already: not started again
    seen: list[Tensor] = []
    layer = next(m for m in model.modules() if isinstance(m, RoutedConv2d))
    handle = layer.register_forward_pre_hook(lambda m, args: seen.append(args[1].expert.clone()))
    attack = PGD(1e-4, 1e-4, 3, against="experts", retire=True, restarts=2)  # too little for the others to fall
    attack(model, images, labels, torch.Generator().manual_seed(0))
    handle.remove()
    # the clean images, three steps, a look at the model as it is; three steps of the half that stands, and a look
    assert [len(s) for s in seen] == [8] * 5 + [4] * 4
    assert all(torch.equal(s, clean[0]) for s in seen[:4])
    assert all(torch.equal(s, clean[0][1::2]) for s in seen[5:8])


def test_ra_e_is_judged_by_the_model_as_it_is() -> None:
    """What fools the model with its routing held need not fool it: such an image is no find, and goes on being moved."""
    model = build(num_experts=3)
    images, labels = batch(model, 24)
    attack = PGD(0.05, 0.01, 6, against="experts", restarts=3, retire=True)
    found = attack(model, images, labels, torch.Generator().manual_seed(0))
    alone = dataclasses.replace(attack, restarts=1)(model, images, labels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        stand, stand_alone = model(found).argmax(1) == labels, model(alone).argmax(1) == labels
    assert (stand <= stand_alone).all() and stand.sum() < stand_alone.sum()


def test_without_a_choice_there_is_nothing_to_attack() -> None:
    model = build()
    images, labels = batch(model)
    for router in routers_of(model).values():
        router.only = 0
    for against in ("experts", "router", "flip", "joint"):
        with pytest.raises(ValueError, match=f"attack: one against '{against}' needs a router that has a choice to make"):
            PGD(0.1, 0.05, 1, against=against)(model, images, labels)


@pytest.mark.parametrize("against", AGAINST_ROUTERS)
def test_an_empty_batch(against: str) -> None:
    found = PGD(0.1, 0.05, 2, against=against)(build(), torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_mixture_of_tokens(top_k: int) -> None:
    torch.manual_seed(0)
    model = create_model("deit_tiny", "moe", width=12, image_size=8, num_experts=3, top_k=top_k, gate="softmax").eval()
    images, labels = batch(model, 4)
    soft = PGD(0.1, 0.02, 1, against="soft", random_start=False)
    if top_k == 1:
        plain = PGD(0.1, 0.02, 1, random_start=False)(model, images, labels)
        assert not torch.equal(soft(model, images, labels), plain)
    else:
        with pytest.raises(ValueError, match="the softmax mixture of layers that give out each choice by itself"):
            soft(model, images, labels)


def test_replayed_choices_are_made_and_not_observed() -> None:
    model = build()
    images, _ = batch(model)
    routers = routers_of(model)
    held = {r: Routing(torch.ones(6, dtype=torch.int64), num_experts=2) for r in routers.values()}
    observed: list[Router] = []
    with observe_routers(model, lambda router, *_: observed.append(router)), replay_routing(held):
        assert choices(model, images).eq(1).all()
    assert not observed and not any(r.replayed for r in routers.values())


class Mixture(nn.Module):
    """One routed layer behind an image-level router of known scores: the mixture can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.router = ImageRouter(3, 2)
        self.conv = RoutedConv2d(3, 4, 1, num_experts=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.router.route(x)).mean((2, 3))


def test_soft_follows_the_gradient_of_the_mixture() -> None:
    torch.manual_seed(0)
    model = Mixture().double().eval()
    images = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0])
    x = images.clone().requires_grad_()
    shares = model.router(x).softmax(1)
    weights, biases = model.conv.weight.view(2, 4, 3), model.conv.bias.view(2, 4)
    each = torch.einsum("eoi,bihw->beohw", weights, x) + biases[None, :, :, None, None]
    soft = (shares[:, :, None, None, None] * each).sum(1).mean((2, 3))
    hard = model(x.detach())
    # the value is the hard one's: softmax and cross-entropy are taken there
    probability = hard.softmax(1) - nn.functional.one_hot(labels, 4)
    (expected,) = torch.autograd.grad((soft * probability.detach()).sum(), x)
    found = PGD(0.1, 0.01, 1, random_start=False, against="soft")(model, images, labels)
    torch.testing.assert_close(found, (images + 0.01 * expected.sign()).clamp(0, 1))
    plain = PGD(0.1, 0.01, 1, random_start=False)(model, images, labels)
    assert not torch.equal(found, plain)


def test_joint_with_no_weight_is_the_prediction_attack() -> None:
    model = build(router="image", gate="none")
    images, labels = batch(model)
    joint = PGD(0.1, 0.02, 3, against="joint", router_weight=0.0, random_start=False)(model, images, labels)
    assert torch.equal(joint, PGD(0.1, 0.02, 3, random_start=False)(model, images, labels))
    heavy = PGD(0.1, 0.02, 3, against="joint", router_weight=1e3, random_start=False)(model, images, labels)
    assert not torch.equal(joint, heavy)


class Drawing(nn.Module):
    """A linear model whose sign is drawn anew in each forward: one gradient says nothing, their mean is small."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.1))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        signs = torch.where(torch.rand(len(x)) < 0.75, 1.0, -1.0)
        bright = self.weight * signs * x.mean((1, 2, 3))
        return torch.stack([bright, -bright], 1)


def test_eot_averages_gradients() -> None:
    torch.manual_seed(0)
    images, labels = torch.full((64, 3, 4, 4), 0.5), torch.zeros(64, dtype=torch.int64)
    lower = {}
    for eot in (1, 31):
        model = Drawing()
        found = PGD(0.2, 0.1, 1, random_start=False, eot=eot)(model, images, labels)
        assert model.calls == eot
        lower[eot] = (found < images).flatten(1).all(1).float().mean().item()
    assert 0.6 < lower[1] < 0.9 and lower[31] > 0.98  # the mean gradient's sign is right, a single one's 3 of 4 times


def test_eot_retires_what_every_draw_gets_wrong() -> None:
    torch.manual_seed(0)
    images, labels = torch.full((64, 3, 4, 4), 0.5), torch.ones(64, dtype=torch.int64)
    result = PGD(0.2, 0.0, 1, random_start=False, eot=1, retire=True).run(Drawing(), images, labels)
    assert not result.zero_gradient.any()
    model = Drawing()
    PGD(0.2, 0.0, 3, random_start=False, eot=8, retire=True)(model, images, labels)
    assert model.calls == 3 * 8  # hardly any sample is wrong in all of 8 draws of which a quarter are right
