# SPDX-License-Identifier: Apache-2.0
"""SA, RA and flip rates against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.data import Split, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import create_model, record_routing
from moe_kernels import RoutedConv2d, Routing


def split(count: int = 10, size: int = 8) -> Split:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    return Split(images, torch.randint(0, 2, (count,), generator=g))


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
    # the attack can move the mean by epsilon, against the label
    robust = right & ((means - 0.5).abs() > epsilon + 1e-6)
    moved = torch.where(data.labels == 1, means - epsilon, means + epsilon)
    flipped = (moved > 0.5) != (means > 0.5)
    result = evaluate(Brightness(), data, {"pgd": PGD(epsilon, epsilon, 5)}, batch_size=7)
    assert result.images == 40
    assert result.sa == pytest.approx(right.float().mean().item())
    outcome = result.attacks["pgd"]
    assert outcome.ra == pytest.approx(robust.float().mean().item())
    assert outcome.flip_rate == pytest.approx(flipped.float().mean().item(), abs=0.03)
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
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    attack = {"pgd": PGD(0.1, 0.05, 2)}
    first, again = (evaluate(model, split(), attack, batch_size=4, seed=0) for _ in range(2))
    assert first == again
    assert [m.training for m in model.modules()] == modes
    assert set(first.usage) == set(first.attacks["pgd"].layer_flip_rate) and len(first.usage) == 16


def test_flips_are_of_any_layer() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).eval()
    data, attack = split(), PGD(0.2, 0.1, 3)
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
    with pytest.raises(ValueError, match="split: expected at least one image"):
        evaluate(model, split(), {}, limit=0)
