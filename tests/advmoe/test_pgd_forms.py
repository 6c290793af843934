# SPDX-License-Identifier: Apache-2.0
"""PGD's other balls and losses, and samples that are left alone once they have fallen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD, Ball, from_name
from advmoe.models import create_model
from advmoe.objectives import dlr_loss, margin_loss


def linear(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()


def images(count: int = 8) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_is_the_nearest_point(norm: str) -> None:
    """No point of the ball and the box, of many drawn, is nearer (for L2: onto the ball first, where the box does not
    bind)."""
    ball, centre = Ball(0.3, norm), torch.full((1, 3, 2, 2), 0.5)
    far = centre + torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    inside = ball.project(far, centre)
    g = torch.Generator().manual_seed(1)
    others = ball.start(centre.expand(4000, -1, -1, -1), True, g)
    order = torch.inf if norm == "linf" else 2
    assert torch.linalg.vector_norm(inside - centre, ord=order) <= 0.3 + 1e-6
    distance = torch.linalg.vector_norm((others - far).flatten(1), dim=1)
    assert torch.linalg.vector_norm(inside - far) <= distance.min()


def test_l2_starts_fill_the_ball() -> None:
    centre = torch.full((4000, 3, 2, 2), 0.5)
    length = (Ball(0.2, "l2").start(centre, True, torch.Generator().manual_seed(0)) - centre).flatten(1).norm(dim=1)
    assert length.max() <= 0.2 + 1e-6
    # uniform in 12 dimensions: P(length < r) = (r / 0.2) ** 12
    for radius in (0.15, 0.18, 0.19):
        assert (length < radius).float().mean().item() == pytest.approx((radius / 0.2) ** 12, abs=0.03)


def test_an_l2_step_goes_along_the_gradient() -> None:
    model, x = linear(), images(4)
    labels = predicted(model, x)
    found = PGD(5.0, 0.1, 1, random_start=False, norm="l2")(model, x * 0.2 + 0.4, labels)  # far from 0 and 1
    moved = (found - (x * 0.2 + 0.4)).flatten(1)
    torch.testing.assert_close(moved.norm(dim=1), torch.full((4,), 0.1))
    leaf = (x * 0.2 + 0.4).requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    assert torch.cosine_similarity(moved, grad.flatten(1)).min() > 1 - 1e-5


def test_an_l2_step_of_a_tiny_gradient_is_as_long() -> None:
    """Cross-entropy of a confident model: squares of the gradient are 0 in float32."""
    grad = torch.full((2, 3, 2, 2), 1e-30)
    grad[1] = 0
    centre = torch.full_like(grad, 0.5)
    found = Ball(1.0, "l2").ascend(centre, grad, centre, 0.1)
    assert (found[0] - centre[0]).norm().item() == pytest.approx(0.1) and torch.equal(found[1], centre[1])


def test_dlr_by_hand() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -2.0], [0.0, 2.0, 4.0, 1.0]])
    labels = torch.tensor([0, 1])
    expected = torch.tensor([-(3.0 - 1.0) / (3.0 - 0.5), -(2.0 - 4.0) / (4.0 - 1.0)])
    torch.testing.assert_close(dlr_loss(logits, labels, "none"), expected)
    torch.testing.assert_close(dlr_loss(7 * logits, labels, "none"), expected)
    torch.testing.assert_close(dlr_loss(logits, labels), expected.mean())
    assert torch.equal(dlr_loss(logits, labels, "none") > 0, margin_loss(logits, labels, "none") > 0)
    with pytest.raises(ValueError, match="dlr: expected logits of at least 3 classes, got 2"):
        dlr_loss(logits[:, :2], labels)


@pytest.mark.parametrize("loss", ["dlr", "margin", "ce"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_loss_fools_a_linear_model(loss: str, norm: str) -> None:
    model, x = linear(), images(16)
    labels = predicted(model, x)
    epsilon = 0.1 if norm == "linf" else 1.0
    found = PGD(epsilon, epsilon / 4, 20, loss=loss, norm=norm)(model, x, labels, torch.Generator().manual_seed(0))
    assert (predicted(model, found) != labels).float().mean() > 0.9


def test_fgsm_is_one_step_from_the_image() -> None:
    model, x = linear(), images()
    labels = predicted(model, x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    found = from_name("fgsm", 0.03)(model, x, labels)
    assert torch.equal(found, (x + 0.03 * grad.sign()).clamp(0, 1))


def test_a_fallen_sample_is_left_alone() -> None:
    model, x = linear(), images(32)
    labels = predicted(model, x)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    attack = PGD(0.03, 0.003, 20, random_start=False, restarts=3, retire=True)
    result = attack.run(model, x, labels)
    handle.remove()
    first = sizes[:20]
    assert first[0] == 32 and first == sorted(first, reverse=True) and first[-1] < 32
    fallen = predicted(model, result.images) != labels
    assert fallen.any() and not result.zero_gradient.any()
    # what fell lies where it fell first: one step before, it stood
    moved = (result.images - x).abs().flatten(1).amax(1)
    whole = (PGD(0.03, 0.003, 20, random_start=False)(model, x, labels) - x).abs().flatten(1).amax(1)
    assert (moved[fallen] <= whole[fallen] + 1e-6).all() and (moved[fallen] < whole[fallen] - 1e-4).any()
    full = sum([32] * 20 * 3)
    assert sum(sizes) < full / 2


def test_retiring_never_makes_the_attack_weaker() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).eval()
    x = images(64)
    labels = predicted(model, x)
    right = {}
    for retire in (False, True):
        attack = PGD(0.02, 0.005, 8, restarts=1, retire=retire, random_start=False)
        right[retire] = predicted(model, attack(model, x, labels)) == labels
    assert (right[True] <= right[False]).all() and 0 < int(right[True].sum()) < 64


def test_retired_images_are_the_same_bits_again() -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).eval()
    x = images(32)
    labels = predicted(model, x)
    attack = from_name("pgd10x3", 0.03)
    first, again = (attack(model, x, labels, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("against", ["prediction", "experts", "joint"])
def test_parts_are_attacked_as_the_whole_is(against: str) -> None:
    """Without a random start the batches that the images go in do not matter; nor do they in float64 for the routing."""
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8).double().eval()
    x = images(11).double()
    labels = predicted(model, x)
    attack = PGD(0.02, 0.005, 4, random_start=False, restarts=2, retire=True, against=against)
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    parts = attack.run(model, x, labels, batch_size=4)
    handle.remove()
    whole = attack.run(model, x, labels)
    torch.testing.assert_close(parts.images, whole.images, rtol=0, atol=1e-9)
    assert torch.equal(parts.zero_gradient, whole.zero_gradient) and max(sizes) == 4


def test_later_starts_make_full_batches_of_what_is_left() -> None:
    model, x = linear(), images(32)
    labels = predicted(model, x)
    labels[::2] = (labels[::2] + 1) % 10  # half of each batch falls at once
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    PGD(1e-6, 1e-6, 2, restarts=2, retire=True).run(model, x, labels, batch_size=8)
    handle.remove()
    # the first start: four batches, of which half is left for the second step; then the rest is judged, and started anew
    assert sizes == [8, 4] * 4 + [8, 8] + [8, 8] * 2 + [8, 8]


def test_an_extra_loss_does_not_go_with_retiring() -> None:
    with pytest.raises(ValueError, match="extra_loss: expected restarts=1, retire=False and batch_size=None"):
        PGD(0.1, 0.1, 1, retire=True).run(linear(), images(), torch.zeros(8, dtype=torch.int64), extra_loss=torch.sum)
