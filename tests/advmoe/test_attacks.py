# SPDX-License-Identifier: Apache-2.0
"""PGD: what it promises about its images, and about the model that it leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD, NonFiniteGradientError, from_name
from advmoe.models import create_model
from advmoe.objectives import cross_entropy
from moe_kernels.backends.cpu import CpuBackend


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", "moe", width=8, image_size=8)


@pytest.fixture()
def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(8, 3, 8, 8, generator=g), torch.randint(0, 10, (8,), generator=g)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("loss", ["ce", "kl", "margin"])
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_images_are_in_the_ball_and_in_range(model: nn.Module, batch: Any, loss: str, start: bool | str) -> None:
    images, labels = batch
    attack = PGD(0.05, 0.02, 4, loss=loss, random_start=start)
    found = attack(model, images, labels, generator())
    assert (found - images).abs().max() <= 0.05 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    assert not found.requires_grad
    if loss != "kl" or start is not False:  # KL from the clean image itself has no gradient there
        assert not torch.equal(found, images)


def test_the_start_is_projected_before_the_first_gradient(batch: Any) -> None:
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return self.linear(x.flatten(1))

    images, labels = batch
    PGD(0.3, 0.1, 2)(Watch(), images.round(), labels, generator())
    assert all(x.min() >= 0 and x.max() <= 1 and (x - images.round()).abs().max() <= 0.3 + 1e-6 for x in seen)


def test_the_same_generator_gives_the_same_bits(model: nn.Module, batch: Any) -> None:
    attack = PGD(0.05, 0.02, 3)
    first, second = (attack(model, *batch, generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, attack(model, *batch, torch.Generator().manual_seed(8)))


def test_the_loss_rises(model: nn.Module, batch: Any) -> None:
    images, labels = batch
    model.eval()
    found = PGD(0.1, 0.025, 10)(model, images, labels, generator())
    with torch.no_grad():
        assert cross_entropy(model(found), labels) > cross_entropy(model(images), labels)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(batch: Any, fails: bool) -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).train()
    model.bn1.eval()
    model.linear.weight.requires_grad_(False)
    if fails:
        model.linear.weight.fill_(float("nan"))
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    attack = PGD(0.05, 0.02, 2, restarts=2)
    if fails:
        with pytest.raises(NonFiniteGradientError, match="8 of 8 samples"):
            attack(model, *batch)
    else:
        attack(model, *batch)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_mode_keep_attacks_the_model_as_it_is(batch: Any) -> None:
    model = create_model("resnet18", "dense", width=8, image_size=8).train()
    before = model.bn1.num_batches_tracked.item()
    PGD(0.05, 0.02, 2, mode="keep")(model, *batch)
    assert model.bn1.num_batches_tracked.item() == before + 2 and model.training


def test_no_weight_gradient_is_computed(model: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Tensor:
        raise AssertionError("an attack asked for a weight gradient")

    monkeypatch.setattr(CpuBackend, "grad_weight", refuse)
    PGD(0.05, 0.02, 2)(model, *batch)


def test_a_blind_attack_is_reported(batch: Any) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x * 255).round().flatten(1) / 255)  # the gradient of round is zero

    result = PGD(0.05, 0.02, 2).run(Rounded(), *batch)
    assert result.zero_gradient.all()


def test_a_seeing_attack_is_not(model: nn.Module, batch: Any) -> None:
    assert not PGD(0.05, 0.02, 2).run(model, *batch).zero_gradient.any()


def test_restarts_never_help_the_model(model: nn.Module, batch: Any) -> None:
    images, labels = batch
    model.eval()
    with torch.no_grad():
        labels = model(images).argmax(1)  # all right at first
        right = [
            int((model(PGD(0.02, 0.01, 2, restarts=r)(model, images, labels, generator())).argmax(1) == labels).sum())
            for r in (1, 4, 12)
        ]
    assert right[0] >= right[1] >= right[2]


def test_gradients_flow_although_the_caller_has_none(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        found = PGD(0.05, 0.02, 2, random_start=False)(model, *batch)
    assert not torch.equal(found, batch[0])


def test_an_empty_batch(model: nn.Module) -> None:
    found = PGD(0.05, 0.02, 2)(model, torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 3, 8, 8)


def test_names() -> None:
    assert from_name("pgd50x2", 8 / 255) == PGD(8 / 255, 2 / 255, 50, restarts=2)
    assert from_name("pgd20-margin", 0.1) == PGD(0.1, 0.025, 20, loss="margin")
    assert from_name("pgd5", 0.1, 0.07).step_size == 0.07
    assert "PGD-50 (ce)" in from_name("pgd50x2", 0.1).describe() and "2 restarts" in from_name("pgd50x2", 0.1).describe()
    for name in ("pgd", "pgd50x", "fgsm", "pgd10-l2"):
        with pytest.raises(ValueError, match="attack: expected pgd<steps>"):
            from_name(name, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l1"}, "loss"),
        ({"random_start": "normal"}, "random_start"),
        ({"mode": "train"}, "mode"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"epsilon": -1.0}, "epsilon"),
    ],
)
def test_bad_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**{"epsilon": 0.1, "step_size": 0.1, "steps": 1, **options})
