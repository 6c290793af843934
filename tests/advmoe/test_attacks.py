# SPDX-License-Identifier: Apache-2.0
"""PGD: what it promises about its images, and about the model that it leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD, Attack, AutoAttack, NonFiniteGradientError, from_name
from advmoe.models import create_model
from advmoe.objectives import cross_entropy
from moe_kernels import use_backend
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
    images = images.clone()
    images[:2] = images[:2].round()  # black and white pixels: the ball reaches beyond [0, 1]
    before = images.clone()
    if loss == "kl" and start is False:
        with pytest.raises(ValueError, match=r"random_start: .* loss 'kl', which is flat at the clean image"):
            PGD(0.05, 0.02, 4, loss=loss, random_start=start)
        return
    attack = PGD(0.05, 0.02, 4, loss=loss, random_start=start)
    found = attack(model, images, labels, generator())
    assert torch.equal(images, before)
    assert (found - images).abs().max() <= 0.05 + 1e-6
    assert found.min() >= 0 and found.max() <= 1
    assert not found.requires_grad
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
    restarted = PGD(0.05, 0.02, 3, restarts=3)
    assert torch.equal(restarted(model, *batch, generator()), restarted(model, *batch, generator()))


def test_the_generator_decides_and_not_the_process_state(model: nn.Module, batch: Any) -> None:
    attack = PGD(0.05, 0.02, 2)
    state = torch.get_rng_state()
    first = attack(model, *batch, generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(attack(model, *batch, generator()), first)


def test_the_memory_format_does_not_change_the_start(model: nn.Module, batch: Any) -> None:
    images, labels = batch
    attack = PGD(0.05, 0.0, 1)  # a step of 0: the start itself
    last = attack(model, images.contiguous(memory_format=torch.channels_last), labels, generator())
    assert torch.equal(last, attack(model, images, labels, generator()))


def test_one_step_is_the_sign_of_the_gradient(model: nn.Module, batch: Any) -> None:
    images, labels = batch
    x = images.clone().requires_grad_()
    model.eval()
    (grad,) = torch.autograd.grad(cross_entropy(model(x), labels), x)
    expected = (images + 0.03 * grad.sign()).clamp(0, 1)
    assert torch.equal(PGD(0.05, 0.03, 1, random_start=False)(model, images, labels), expected)


def test_kl_starts_from_one_clean_prediction() -> None:
    forwards: list[int] = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    net.register_forward_pre_hook(lambda m, a: forwards.append(len(a[0])))
    images, labels = torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
    PGD(0.1, 0.05, 3, loss="kl")(net, images, labels)
    assert forwards == [4] * 4


def test_an_extra_loss_is_ascended_too(batch: Any) -> None:
    images, labels = batch
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.zeros_(net[1].weight)  # the loss itself has no gradient
    result = PGD(0.1, 0.05, 4).run(net, images, labels, generator(), extra_loss=lambda x: x.sum())
    torch.testing.assert_close(result.images, (images + 0.1).clamp_max(1))
    assert not result.zero_gradient.any()


def test_the_loss_rises(model: nn.Module, batch: Any) -> None:
    images, labels = batch
    model.eval()
    found = PGD(0.1, 0.025, 10)(model, images, labels, generator())
    start = PGD(0.1, 0.0, 1)(model, images, labels, generator())
    with torch.no_grad():
        losses = [cross_entropy(model(x), labels) for x in (found, start, images)]
    assert losses[0] > max(losses[1:])


@pytest.mark.parametrize("mode", ["eval", "keep"])
@pytest.mark.parametrize("fails", ["", "nan", "raises"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(batch: Any, fails: str, mode: str, training: bool) -> None:
    torch.manual_seed(0)
    images, labels = batch[0].repeat(1, 1, 2, 2), batch[1]
    # of 16 pixels, so that a BatchNorm has values enough of the one image that a second start may be left with
    model = create_model("resnet18", "moe", width=8, image_size=16).train(training)
    model.bn1.train(not training)
    model.linear.weight.requires_grad_(False)
    for p in model.layer3.parameters():
        p.grad = torch.randn_like(p)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if fails == "nan":
        model.linear.weight.fill_(float("nan"))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if fails == "raises" and calls == 2:
            raise KeyError("planted")

    handle = model.layer2[0].register_forward_pre_hook(fail)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    attack = PGD(0.05, 0.02, 2, restarts=2, mode=mode)
    if fails == "nan":
        with pytest.raises(NonFiniteGradientError, match="8 of 8 samples"):
            attack(model, images, labels)
    elif fails:
        with pytest.raises(KeyError, match="planted"):
            attack(model, images, labels)
    else:
        attack(model, images, labels)
    handle.remove()
    assert calls >= 1
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    left = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert left.keys() == grads.keys() and all(torch.equal(left[n], g) for n, g in grads.items())


def test_a_nan_in_one_sample_is_enough(batch: Any) -> None:
    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.linear(x.flatten(1))
            # sqrt has an infinite derivative at 0: the value is finite and the gradient is not
            return torch.cat([logits[:3], logits[3:4] + (x[3] * 0).sum().sqrt(), logits[4:]])

    with pytest.raises(NonFiniteGradientError, match=r"1 of 8 samples is not finite \(PGD-2 \(ce\)"):
        PGD(0.05, 0.02, 2)(Planted(), *batch)


def test_mode_keep_attacks_the_model_as_it_is_and_leaves_it_so(batch: Any) -> None:
    model = create_model("resnet18", "dense", width=8, image_size=8).train()
    before = copy.deepcopy(model.state_dict())
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda m, _: modes.append(m.bn1.training))
    PGD(0.05, 0.02, 2, mode="keep")(model, *batch)
    handle.remove()
    assert modes == [True, True] and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_mode_keep_leaves_a_graph_that_was_made_before(batch: Any) -> None:
    """BatchNorm saves its statistics for its backward; they must not be newer than the graph."""
    images, labels = batch
    model = create_model("resnet18", "dense", width=8, image_size=8).train()
    clean = model(images)
    PGD(0.05, 0.02, 1, mode="keep")(model, images, labels)
    clean.sum().backward()


def test_an_extra_loss_goes_with_one_start(model: nn.Module, batch: Any) -> None:
    with pytest.raises(ValueError, match="extra_loss: expected restarts=1"):
        PGD(0.05, 0.02, 2, restarts=2).run(model, *batch, extra_loss=lambda x: x.sum())


def test_no_weight_gradient_is_computed(model: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"grad_weight": 0, "grad_input": 0}
    for name in calls:
        original = getattr(CpuBackend, name)

        def count(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Tensor:
            calls[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(CpuBackend, name, count)
    frozen: list[bool] = []
    handle = model.register_forward_pre_hook(lambda m, _: frozen.append(any(p.requires_grad for p in m.parameters())))
    with use_backend("cpu"):
        PGD(0.05, 0.02, 3)(model, *batch)
        handle.remove()
        assert frozen == [False] * 3
        assert calls == {"grad_weight": 0, "grad_input": 3 * 16}
        model(batch[0]).sum().backward()  # training does compute them, so that the count counts
    model.zero_grad()
    assert calls["grad_weight"] == 16


def test_a_blind_attack_is_reported(batch: Any) -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((x * 255).round().flatten(1) / 255)  # the gradient of round is zero

    result = PGD(0.05, 0.02, 2).run(Rounded(), *batch)
    assert result.zero_gradient.all() and result.zero_gradient.shape == (8,)


def test_blindness_is_reported_for_each_sample(batch: Any) -> None:
    images, labels = batch
    blind = torch.arange(8) % 3 == 0
    net = nn.Linear(192, 10)

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(torch.where(blind[:, None], x.flatten(1).detach(), x.flatten(1)))

    assert torch.equal(PGD(0.05, 0.02, 2).run(Half(), images, labels).zero_gradient, blind)


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


def test_only_samples_not_fooled_yet_are_started_again(batch: Any) -> None:
    images, _ = batch
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        labels = net(images).argmax(1)
        labels[::2] = (labels[::2] + 1) % 10  # wrong already: never attacked again
    sizes: list[int] = []
    handle = net.register_forward_pre_hook(lambda m, a: sizes.append(len(a[0])))
    found = PGD(1e-6, 1e-6, 2, restarts=3)(net, images, labels, generator())  # too small a ball to fool the others
    handle.remove()
    assert sizes == [8] * 3 + [4] * 6
    with torch.no_grad():
        assert torch.equal(net(found).argmax(1) != labels, torch.arange(8) % 2 == 0)


def test_of_several_starts_the_highest_loss_is_kept(model: nn.Module, batch: Any) -> None:
    images, _ = batch
    model.eval()
    with torch.no_grad():
        labels = model(images).argmax(1)
        losses = []
        for restarts in (1, 5):
            attack = PGD(0.002, 0.002, 1, restarts=restarts)  # small: nobody is fooled
            logits = model(attack(model, images, labels, generator()))
            losses.append(cross_entropy(logits, labels, reduction="none"))
    assert (losses[1] >= losses[0] - 1e-6).all() and (losses[1] > losses[0]).any()


def test_gradients_flow_although_the_caller_has_none(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        found = PGD(0.05, 0.02, 2, random_start=False)(model, *batch)
    assert not torch.equal(found, batch[0])


def test_an_empty_batch(model: nn.Module) -> None:
    found = PGD(0.05, 0.02, 2)(model, torch.rand(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0, 3, 8, 8)


def test_names() -> None:
    def plain(name: str, epsilon: float = 0.1, step_size: float | None = None) -> Attack:
        return from_name(name, epsilon, step_size, retire=False)

    assert plain("pgd50x2", 8 / 255) == PGD(8 / 255, 2 / 255, 50, restarts=2)
    assert plain("pgd20-margin") == PGD(0.1, 0.025, 20, loss="margin")
    assert plain("pgd5", 0.1, 0.07) == PGD(0.1, 0.07, 5)
    assert plain("pgd7x3-dlr-l2") == PGD(0.1, 0.025, 7, restarts=3, loss="dlr", norm="l2")
    assert plain("pgd1-ce-eot4") == PGD(0.1, 0.025, 1, eot=4)
    assert plain("trades10") == PGD(0.1, 0.025, 10, loss="kl", random_start="gaussian")
    assert plain("fgsm") == PGD(0.1, 0.1, 1, random_start=False)
    for against in ("experts", "router", "flip", "joint", "soft"):
        assert plain(f"{against}20x2") == PGD(0.1, 0.025, 20, restarts=2, against=against)
    assert from_name("pgd5", 0.1) == PGD(0.1, 0.025, 5, retire=True)
    assert plain("autoattack") == AutoAttack(0.1)
    assert plain("autoattack-rand") == AutoAttack(0.1, version="rand")
    assert plain("autoattack-l2") == AutoAttack(0.1, "l2") and plain("square") == AutoAttack(0.1, attacks=("square",))
    assert plain("apgd20-ce") == AutoAttack(0.1, attacks=("apgd-ce",), steps=20)
    assert plain("apgd7-t-l2") == AutoAttack(0.1, "l2", attacks=("apgd-t",), steps=7)
    assert "20 steps" in plain("apgd20-dlr").describe() and "steps" not in plain("apgd-dlr").describe()
    assert "PGD-50 (ce)" in plain("pgd50x2").describe() and "2 restarts" in plain("pgd50x2").describe()
    assert "RA-E" in plain("experts5").describe() and "L2" in plain("pgd5-l2").describe()
    wrong = ("pgd", "pgd50x", "pgd0", "PGD10", "pgd10 ", "pgd-10", "", "pgd10-l1", "pgd10-ce-kl", "trades10-ce",
             "autoattack-x", "rand-l2", "router10-ce", "fgsm-ce", "-rand", "rand", "standard", "pgd10-eot0",
             "apgd0-ce", "apgd20", "apgd20-kl", "fab20-t")  # fmt: skip
    with pytest.raises(ValueError, match=r"got 'pdg20'; did you mean pgd20\?"):
        from_name("pdg20", 0.1)
    for name in wrong:
        with pytest.raises(ValueError, match="attack: expected fgsm, or pgd<steps>"):
            from_name(name, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l1"}, "loss"),
        ({"random_start": "normal"}, "random_start"),
        ({"random_start": 0}, "random_start"),
        ({"mode": "train"}, "mode"),
        ({"steps": 0}, "steps"),
        ({"restarts": 0}, "restarts"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 8.0}, r"epsilon: expected at most 1, since pixels lie in \[0, 1\], got 8 \(8/255 is 0.0314\)"),
        ({"norm": "l1"}, "norm: expected one of linf, l2"),
        ({"against": "choices"}, "against"),
        ({"eot": 0}, "eot"),
        ({"step_size": -1.0}, "step_size"),
    ],
)
def test_bad_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PGD(**{"epsilon": 0.1, "step_size": 0.1, "steps": 1, **options})


@pytest.mark.parametrize(
    "attack", [PGD(0.1, 0.1, 1), AutoAttack(0.1, attacks=("square",), queries=2)], ids=["pgd", "autoattack"]
)
def test_what_is_no_batch_of_images_is_refused(model: nn.Module, batch: Any, attack: Any) -> None:
    """The commonest mistake: normalised images, in which a ball of 8/255 is another one."""
    images, labels = batch
    for wrong, message in (
        (images * 255, r"images: expected pixels in \[0, 1\], got .* to 25\d"),
        ((images - 0.5) / 0.25, r"images: expected pixels in \[0, 1\], got -"),
        (images * float("nan"), r"images: expected pixels in \[0, 1\], got nan"),
        (images[0], r"images: expected floating \[B, C, H, W\]"),
        ((images * 255).to(torch.uint8), r"images: expected floating \[B, C, H, W\], got torch.uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(model, wrong, labels)
    for bad in (labels.float(), labels[:3]):
        with pytest.raises(ValueError, match=r"labels: expected int64 \[8\]"):
            attack(model, images, bad)
    assert attack(model, images, labels).shape == images.shape
