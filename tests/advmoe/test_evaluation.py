# SPDX-License-Identifier: Apache-2.0
"""SA, RA and flip rates against counts by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD, AttackResult, NonFiniteGradientError
from advmoe.data import TensorSplit, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import create_model, record_routing
from moe_kernels import RoutedConv2d, Routing


def split(count: int = 10, size: int = 8) -> TensorSplit:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(0, 2, (count,), generator=g))


def as_predicted(model: nn.Module, data: TensorSplit) -> TensorSplit:
    """The images with the classes that the model sees in them: all are right, and attacked."""
    images, _ = data.batch(torch.arange(len(data)))
    with torch.no_grad():
        return TensorSplit(data.images, model.eval()(images).argmax(1))


class Brightness(nn.Module):
    """Class 1 where the mean is above a half; its routed layer switches expert there too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = RoutedConv2d(3, 1, 1, bias=False, num_experts=2)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) - 0.5
        self.conv(x, Routing((bright > 0).long(), num_experts=2))
        return torch.stack([-bright, bright], 1)


def test_counts_by_hand() -> None:
    data = split(40)
    means = data.images.float().div(255).mean((1, 2, 3))
    right = (means > 0.5).long() == data.labels
    epsilon = 0.02
    # the attack moves every pixel by epsilon, against the label, as far as there is room in [0, 1]
    sign = torch.where(data.labels == 1, -1.0, 1.0).view(-1, 1, 1, 1)
    moved = (data.images.float().div(255) + epsilon * sign).clamp(0, 1).mean((1, 2, 3))
    robust = (moved > 0.5).long() == data.labels
    flipped = (moved > 0.5) != (means > 0.5)
    result = evaluate(Brightness(), data, {"pgd": PGD(epsilon, epsilon, 5)}, batch_size=7)
    assert result.images == 40
    assert result.sa == pytest.approx(right.float().mean().item())
    outcome = result.attacks["pgd"]
    assert outcome.ra == pytest.approx(robust.float().mean().item())
    assert outcome.flip_rate == pytest.approx(flipped[right].float().mean().item())  # what is wrong is not attacked
    assert outcome.layer_flip_rate == {"conv": outcome.flip_rate}
    assert outcome.zero_gradient == 0
    share = (means > 0.5).float().mean().item()
    assert result.usage["conv"] == pytest.approx([1 - share, share])
    assert 0 < outcome.ra < result.sa < 1 and outcome.flip_rate > 0


def test_an_image_wrong_when_clean_is_never_robust() -> None:
    class Contrary(nn.Module):
        """Wrong on clean images, right on any that was touched."""

        def __init__(self, clean: Tensor, labels: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.clean, self.labels = clean, labels

        def forward(self, x: Tensor) -> Tensor:
            touched = (x != self.clean).flatten(1).any(1)
            right = nn.functional.one_hot(self.labels, 2).float()
            return torch.where(touched[:, None], right, 1 - right) + self.weight * x.sum()

    data = split(6)
    images, labels = data.batch(torch.arange(6))
    result = evaluate(Contrary(images, labels), data, {"pgd": PGD(0.1, 0.1, 1)})
    assert result.sa == 0 and result.attacks["pgd"].ra == 0


def test_it_is_a_function_of_the_seed_and_leaves_the_model() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).train()
    data = as_predicted(model, split())
    model.train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    attack = {"pgd": PGD(0.1, 0.05, 2)}
    first, again = (evaluate(model, data, attack, batch_size=4, seed=0) for _ in range(2))
    assert first == again and first.sa == 1
    assert [m.training for m in model.modules()] == modes
    assert set(first.usage) == set(first.attacks["pgd"].layer_flip_rate) and len(first.usage) == 16


def test_the_batch_size_changes_nothing_without_a_random_start() -> None:
    attack = {"pgd": PGD(0.02, 0.01, 3, random_start=False)}
    first, *others = (evaluate(Brightness(), split(23), attack, batch_size=b) for b in (1, 5, 23, 100))
    assert all(other == first for other in others)


def test_the_seed_and_the_name_start_the_attack() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8)
    data = as_predicted(model, split())
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                seen.append(x.detach().clone())
            return self.inner(x)

    for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b")):
        evaluate(Watch(), data, {name: PGD(0.1, 0.05, 1)}, seed=seed)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[3])


def test_a_blind_attack_shows_in_the_outcome() -> None:
    class Rounded(nn.Module):
        """No parameters, and no gradient either."""

        def forward(self, x: Tensor) -> Tensor:
            bright = x.mean((1, 2, 3)) - 0.5
            return torch.stack([-bright, bright], 1).round(decimals=3) + 0 * x.sum()

    outcome = evaluate(Rounded(), split(12), {"pgd": PGD(0.1, 0.1, 2, random_start=False)})
    assert outcome.attacks["pgd"].zero_gradient == 1 and outcome.attacks["pgd"].ra == outcome.sa


@pytest.mark.parametrize("training", [True, False])
def test_a_fault_leaves_the_model_as_it_was(training: bool) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8).train(training)
    model.bn1.train(not training)
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        model.linear.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteGradientError, match="the scores of 10 of 10 images are not finite"):
        evaluate(model, split(), {"pgd": PGD(0.1, 0.05, 2)})
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_usage_and_layer_flips_are_shares() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8, num_experts=3)
    result = evaluate(model, as_predicted(model, split(11)), {"pgd": PGD(0.2, 0.1, 2)}, batch_size=4)
    outcome = result.attacks["pgd"]
    assert all(len(u) == 3 and sum(u) == pytest.approx(1) for u in result.usage.values())
    assert max(outcome.layer_flip_rate.values()) <= outcome.flip_rate <= sum(outcome.layer_flip_rate.values())
    assert json.loads(json.dumps(result.as_dict()))["attacks"]["pgd"]["ra"] == outcome.ra


class TopTwo(nn.Module):
    """Two of three experts for each image, by its brightness: 1: 0 and 1; 2: 1 and 0; 3: 1 and 2. Expanded, an image is
    two virtual samples."""

    def __init__(self, expand: bool) -> None:
        super().__init__()
        self.conv = RoutedConv2d(3, 4, 1, num_experts=3)
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tensor([[0, 1], [0, 1], [1, 0], [1, 2]])
        routing = Routing(table[(x.mean((1, 2, 3)) * 10).round().long()], num_experts=3)
        y = self.conv(x, routing.expand() if self.expand else routing)
        return y.mean((2, 3)).unflatten(0, (len(x), -1)).sum(1)


class Brighten(PGD):
    def run(self, model: nn.Module, images: Tensor, labels: Tensor, *_: Any, **__: Any) -> AttackResult:
        return AttackResult(images + 0.1, torch.zeros(len(images), dtype=torch.bool))


@pytest.mark.parametrize("expand", [False, True])
def test_another_order_of_the_same_experts_is_no_flip(expand: bool) -> None:
    images = torch.tensor([26, 26, 51, 51], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 2, 2).contiguous()
    data = TensorSplit(images, torch.zeros(4, dtype=torch.int64))
    model = TopTwo(expand)
    outcome = evaluate(model, as_predicted(model, data), {"brighten": Brighten(0.1, 0.1, 1)}).attacks["brighten"]
    assert outcome.flip_rate == 0.5  # 1 to 2 is none, 2 to 3 is one


def test_flips_are_of_any_layer() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).eval()
    data, attack = as_predicted(model, split()), PGD(0.2, 0.1, 3)
    outcome = evaluate(model, data, {"pgd": attack}, batch_size=10, seed=3).attacks["pgd"]
    images, labels = data.batch(torch.arange(10))
    found = attack(model, images, labels, stream_generator(3, "evaluate", "pgd", 0))
    with record_routing(model) as routings, torch.no_grad():
        model(images)
        clean = {n: r.expert for n, r in routings.items()}
        model(found)
        flips = torch.stack([r.expert != clean[n] for n, r in routings.items()])
    assert outcome.flip_rate == pytest.approx(flips.any(0).float().mean().item())


def test_a_model_without_routing_has_no_flip_rate() -> None:
    model = create_model("resnet18", "dense", width=8, image_size=8)
    result = evaluate(model, split(), {"pgd": PGD(0.1, 0.05, 1)}, limit=4)
    assert result.images == 4 and result.attacks["pgd"].flip_rate is None and result.usage == {}
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit: expected at least 1, got {limit}"):
            evaluate(model, split(), {}, limit=limit)
    with pytest.raises(ValueError, match="split: expected at least one image"):
        evaluate(model, split(0), {})
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        evaluate(model, split(), {}, batch_size=0)
