# SPDX-License-Identifier: Apache-2.0
"""Our attacks against others' implementations, and our models in their hands: foolbox, pyautoattack, and the form that
RobustBench and torchattacks expect."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from pathlib import Path
from typing import Any

import foolbox
import pytest
import torch
from small_runs import SMALL, small_architecture, unpacked
from torch import Tensor, nn

from advmoe.attacks import PGD, AutoAttack, NonFiniteGradientError, from_name
from advmoe.cli import main
from advmoe.models import create_model
from advmoe.training.evaluation import evaluate_run


@pytest.fixture(scope="module", params=["moe", "windows", "dense"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    kind = "dense" if request.param == "dense" else "moe"
    options = {"layout": "windows"} if request.param == "windows" else {}
    return create_model("resnet18", kind, width=8, image_size=8, **options).eval()


def images(count: int = 64, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_agrees_with_foolbox(model: nn.Module, norm: str) -> None:
    x = images(200)
    labels = predicted(model, x)
    epsilon, steps = (0.01 if norm == "linf" else 0.1), 10
    theirs_kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    attack = theirs_kind(abs_stepsize=epsilon / 4, steps=steps, random_start=False)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, theirs, _ = attack(wrapped, x, labels, epsilons=epsilon)
    ours = PGD(epsilon, epsilon / 4, steps, random_start=False, norm=norm)(model, x, labels)
    same = (predicted(model, ours) == predicted(model, theirs)).float().mean().item()
    assert same >= 0.995
    fooled = (predicted(model, ours) != labels).float().mean().item()
    assert 0.02 < fooled < 0.98  # not all the same, so that agreement says something


def small() -> nn.Module:
    """Two routed blocks."""
    torch.manual_seed(0)
    with small_architecture():
        return create_model(SMALL, "moe", width=8, image_size=8, layout="windows").eval()


def direct(model: nn.Module, x: Tensor, labels: Tensor, epsilon: float, version: str, batch_size: int) -> tuple[Any, ...]:
    from pyautoattack import AutoAttack as Package

    for p in model.parameters():
        p.requires_grad_(False)
    adversary = Package(model, norm="Linf", eps=epsilon, seed=0, version=version)
    adversary.square.n_queries = 100
    adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 3
    return adversary.run_standard_evaluation(x, labels, batch_size=batch_size)


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    original = AutoAttack._adversary

    def short(self: AutoAttack, *args: Any) -> Any:
        adversary = original(self, *args)
        adversary.apgd.n_iter = adversary.apgd_targeted.n_iter = adversary.fab.n_iter = 3
        return adversary

    monkeypatch.setattr(AutoAttack, "_adversary", short)


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_autoattack_is_the_packages_sample_by_sample(version: str, few_iterations: None) -> None:
    """With few iterations and queries, so that each attack has something left to do; in several batches."""
    model = small()
    x = images(40)
    labels = predicted(model, x)
    labels[::7] = (labels[::7] + 1) % 10  # wrong already
    theirs, their_predictions = direct(model, x, labels, 0.01, version, 16)
    attack = AutoAttack(0.01, version=version, queries=100)
    result = attack.run(model, x, labels, seed=0, batch_size=16)
    assert torch.equal(result.robust, their_predictions == labels)
    assert torch.equal(result.images, theirs)
    assert (result.fell_to[::7] == -2).all() and 0 < int(result.robust.sum()) < 34
    stages = list(result.stages().values())
    assert stages == sorted(stages, reverse=True) and stages[-1] == result.robust.double().mean().item()


def test_apgd_takes_the_steps_it_is_given() -> None:
    """As many forwards as the package makes with so many steps, and its images."""
    from pyautoattack import AutoAttack as Package

    model = small()
    x = images(12)
    labels = predicted(model, x)
    forwards = 0

    def count(*args: Any) -> None:
        nonlocal forwards
        forwards += 1

    model.register_forward_hook(count)
    adversary = Package(model, norm="Linf", eps=0.02, seed=0, version="standard")
    adversary.verbose = False
    adversary.attacks_to_run = ["apgd-ce"]
    adversary.apgd.n_iter = 4
    theirs, predictions = adversary.run_standard_evaluation(x, labels, batch_size=12)
    theirs_made, forwards = forwards, 0
    result = from_name("apgd4-ce", 0.02).run(model, x, labels, seed=0, batch_size=12)
    assert torch.equal(result.images, theirs) and torch.equal(result.robust, predictions == labels)
    assert not result.robust.all() and forwards == theirs_made + 1  # and one for the clean predictions
    with pytest.raises(ValueError, match="steps: expected at least 1, got 0"):
        AutoAttack(0.01, steps=0)


def _broken_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    original = AutoAttack._attack
    count = 0

    def attack(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(AutoAttack, "_attack", staticmethod(attack))


def test_autoattack_goes_on_to_the_same_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_iterations: None
) -> None:
    model = small()
    x = images(24)
    labels = predicted(model, x)
    attack = AutoAttack(0.01, attacks=("apgd-ce", "square"), queries=20)
    whole = attack.run(model, x, labels, batch_size=8)
    assert len(whole.fell_to.unique()) > 1  # some fall, some stand
    for calls in (1, 2, 4):
        state = tmp_path / f"{calls}.pt"
        with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
            _broken_after(broken, calls)
            attack.run(model, x, labels, batch_size=8, state=state)
        assert state.exists()
        with pytest.raises(ValueError, match="was made with other weights, images or settings"):
            attack.run(model, x, labels, seed=1, batch_size=8, state=state)
        resumed = attack.run(model, x, labels, batch_size=8, state=state)
        assert torch.equal(resumed.fell_to, whole.fell_to) and torch.equal(resumed.images, whole.images)
        assert not state.exists()


def test_autoattack_leaves_the_process_and_the_model_as_they_were() -> None:
    model = small().train()
    model.bn1.eval()
    modes = [m.training for m in model.modules()]
    x, state = images(8), torch.get_rng_state()
    trace = sys.gettrace()
    labels = torch.zeros(8, dtype=torch.int64)
    result = AutoAttack(0.01, attacks=("square",), queries=20).run(model, x, labels)
    assert torch.equal(torch.get_rng_state(), state) and sys.gettrace() is trace
    assert [m.training for m in model.modules()] == modes and all(p.requires_grad for p in model.parameters())
    assert not logging.getLogger("auto-attack").handlers
    assert torch.equal(result.images[result.fell_to < 0], x[result.fell_to < 0])


def test_autoattack_knows_the_number_of_classes() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ValueError, match="apgd-t: expected a model of at least 4 classes, got 3"):
        AutoAttack(0.1).run(net, images(4), torch.zeros(4, dtype=torch.int64))
    torch.manual_seed(0)
    five = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    x = images(16)
    result = AutoAttack(0.5, attacks=("apgd-t", "fab-t")).run(five, x, predicted(five, x))
    assert not result.robust.any() and result.warnings == ()


def test_autoattack_raises_on_what_is_not_finite() -> None:
    class Planted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(192, 10)

        def forward(self, x: Tensor) -> Tensor:
            # sqrt has an infinite derivative at 0: the value is finite and the gradient is not
            return self.linear(x.flatten(1)) + (x * 0).sum((1, 2, 3)).sqrt()[:, None]

    net = Planted()
    with pytest.raises(NonFiniteGradientError, match="the gradient of 6 of 6 samples is not finite"):
        AutoAttack(0.1, attacks=("apgd-ce",)).run(net, images(6), predicted(net, images(6)))


def test_our_models_have_the_form_that_others_expect() -> None:
    """RobustBench: forward(x in [0, 1]) -> logits, normalisation inside; torchattacks besides reads `training` and the
    parameters' device, and sets modes by train() and eval()."""
    model = create_model("resnet18", "moe", width=8, image_size=8, num_classes=7)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert isinstance(model, nn.Module) and model.training
    model.eval()
    assert not model.training and not any(m.training for m in model.modules())
    x = images(3)
    logits = model(x)
    assert logits.shape == (3, 7) and logits.dtype == torch.float32 and torch.isfinite(logits).all()
    assert next(model.parameters()).device == x.device
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(model(leaf), torch.zeros(3, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, leaf, retain_graph=False, create_graph=False)  # as torchattacks asks for it
    assert grad.shape == x.shape and grad.abs().sum() > 0


PUBLISHED = """
import importlib.util
from importlib import resources
import torch

def model():
    folder = resources.files("pyautoattack") / "examples"
    spec = importlib.util.spec_from_file_location("_pyautoattack_resnet", folder / "resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.ResNet18()
    net.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return net
"""


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The CIFAR-10 ResNet-18 that comes with pyautoattack, as ``module:function``."""
    (tmp_path / "published_resnet.py").write_text(PUBLISHED)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "published_resnet:model"


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked("cifar10", tmp_path_factory.mktemp("data"))


def test_a_published_model_falls(
    published: str, cifar10: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """About 87 % and 0 %: it was trained without an attack."""
    out = tmp_path / "published.json"
    arguments = ["--data", "cifar10", "--data-dir", str(cifar10), "--attack", "pgd20", "--limit", "64", "--checks", "0"]
    assert main(["evaluate", published, *arguments, "--batch-size", "32", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert 0.76 < record["sa"] < 0.97 and record["attacks"]["pgd20"]["ra"] == 0 and record["epsilon"] == 8 / 255
    assert "| pgd20  |     64 | 0.0 % |" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_published_model_falls_whole(published: str, cifar10: Path) -> None:
    # APGD follows every image for all of its 100 steps, also one that has fallen
    done = evaluate_run(
        published,
        ["pgd20", "autoattack"],
        data="cifar10",
        data_dir=str(cifar10),
        limit=1000,
        autoattack_limit=32,
        checks=32,
    )
    assert 0.84 < done.result.sa < 0.90
    assert done.result.attacks["pgd20"].ra == 0 and done.result.attacks["autoattack"].ra == 0
    assert done.record["suspect"] == []
