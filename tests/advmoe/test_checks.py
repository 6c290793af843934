# SPDX-License-Identifier: Apache-2.0
"""The signs of gradient masking: an honest model shows none, and planted ones show those that they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD, from_name
from advmoe.cli import main
from advmoe.data import TensorSplit
from advmoe.evaluation import Scrutiny, evaluate, scrutinize, sign_test, suspect, wilson
from advmoe.models import create_model
from advmoe.routers import NonFiniteRouterError, Router
from advmoe.training.evaluation import evaluate_run
from moe_kernels import RoutedConv2d

ATTACK = PGD(0.02, 0.005, 10)


def images(count: int = 48, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def split(model: nn.Module, pixels: Tensor | None = None) -> TensorSplit:
    """Images with the classes that the model sees in them."""
    pixels = images() if pixels is None else pixels
    with torch.no_grad():
        return TensorSplit(pixels, model.eval()(pixels.float() / 255).argmax(1))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.linear(x.flatten(1) - 0.5)


class Rounded(Linear):
    """No gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * 64).round() / 64)


class Shattered(Linear):
    """The gradient is that of something else: it is there, and leads nowhere."""

    def forward(self, x: Tensor) -> Tensor:
        wrong = (x * 3e4).sin() / 300  # small, with a slope of 100
        return super().forward(x + wrong)


class ByBrightness(Router):
    level = "image"

    def forward(self, x: Tensor) -> Tensor:
        bright = 40 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([bright, -bright], 1)


class HiddenRouter(nn.Module):
    """Two experts that are sure of different classes: only the choice matters, and no gradient goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = ByBrightness(3, 2)
        self.router.options = type(self.router.options)(gate="none")
        self.conv = RoutedConv2d(3, 4, 1, num_experts=2)
        nn.init.normal_(self.conv.weight, 0, 1e-3)
        with torch.no_grad():
            self.conv.bias.copy_(torch.tensor([3.0, 0, 0, 0, 0, 3.0, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.router.route(x)).mean((2, 3))


def look(model: nn.Module, pixels: Tensor | None = None, attack: PGD = ATTACK) -> Scrutiny:
    return scrutinize(model, split(model, pixels), attack)


def test_an_honest_model_passes() -> None:
    found = look(Linear())
    assert suspect(found.checks) == []
    states = {check.name: check.passed for check in found.checks}
    assert states == {"gradient": True, "radius": True, "strength": True, "converged": True, "black_box": True,
                      "surrogate": None}  # fmt: skip
    curve = found.curve
    assert curve.images == 48 and list(curve.epsilons) == sorted(curve.epsilons) and 0.02 in curve.epsilons
    assert curve.epsilons[-1] == 0.5 and curve.ra[-1] == 0
    assert curve.ra[0] > 0.3 and list(curve.ra) == sorted(curve.ra, reverse=True)


def test_a_model_without_gradient_is_caught() -> None:
    found = look(Rounded())
    assert {"gradient", "radius", "black_box"} <= set(suspect(found.checks))
    measured = {check.name: check.measured for check in found.checks}
    assert float(measured["gradient"].split()[0]) > 90  # the others fell to the random start


def test_a_gradient_that_leads_nowhere_is_caught() -> None:
    red = suspect(look(Shattered()).checks)
    assert "gradient" not in red and "black_box" in red


def test_an_attack_of_too_few_steps_is_caught() -> None:
    found = look(Linear(), attack=PGD(0.02, 0.001, 3))
    assert "converged" in [check.name for check in found.checks if check.passed is False]
    assert "converged" not in suspect(found.checks)  # it says too weak, and not masked


def test_of_too_few_images_nothing_is_asked() -> None:
    for model, limit in ((Shattered(), 4), (Rounded(), 7)):
        found = scrutinize(model, split(model), ATTACK, limit=limit)
        assert {check.passed for check in found.checks} == {None}
        assert f"{limit} of {limit} images are right when clean: too few" in found.checks[0].measured
    model = Linear()
    wrong = TensorSplit(images(), (split(model).labels + 1) % 10)
    assert {check.passed for check in scrutinize(model, wrong, ATTACK).checks} == {None}


class Drawing(Linear):
    """Noise on the scores in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.5 * torch.randn(len(x), 10)


def test_one_unlucky_draw_is_no_fall() -> None:
    """Leaving an image alone where one forward was wrong would flatter a model that draws."""
    torch.manual_seed(0)
    model = Drawing()
    data = split(Linear(), images(200))
    ra = {}
    for retire in (False, True):
        torch.manual_seed(1)
        outcome = evaluate(model, data, {"pgd": PGD(0.02, 0.005, 10, retire=retire)}).attacks["pgd"]
        ra[retire] = outcome.ra
        assert any("the model draws something" in warning for warning in outcome.warnings)
    assert ra[True] == ra[False]  # the same attack
    honest = evaluate(Linear(), data, {"pgd": PGD(0.02, 0.005, 10)}).attacks["pgd"]
    assert honest.warnings == []


def test_checks_are_of_the_attacks_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text(
        "import torch\nfrom torch import nn\n\ndef model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    done = evaluate_run("plain:model", ["apgd-ce-l2"], data="digits", epsilon=0.5, limit=60, checks=60)
    assert done.scrutiny is not None and "L2 epsilon 0.5" in done.scrutiny.curve.attack
    assert done.scrutiny.curve.epsilons[-1] == 32
    with pytest.raises(ValueError, match="epsilon: expected one with attacks in L2"):
        evaluate_run("plain:model", ["pgd5-l2"], data="digits", limit=4)
    with pytest.raises(ValueError, match="attack: expected attacks of one norm"):
        evaluate_run("plain:model", ["pgd5-l2", "pgd5"], data="digits", epsilon=0.5, limit=4)


def test_a_hidden_router_is_caught_by_the_surrogate() -> None:
    pixels = torch.randint(0, 256, (48, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float()
    # means around a half by less than the radius
    means = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - means + 127.5 + torch.linspace(-4, 4, 48).view(-1, 1, 1, 1)).clamp(0, 255).to(torch.uint8)
    found = look(HiddenRouter(), pixels)
    assert "surrogate" in suspect(found.checks)


def test_a_nan_router_gives_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """sign(NaN) is 0 and argmax(NaN) is 0: the released code's robust accuracy of 91 %."""
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8)
    data = split(model)
    router = model.layer2[0].conv1.router
    with torch.no_grad():
        router.linear.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteRouterError, match=r"the router of layer2\.0\.conv1 gave scores that are not finite"):
        scrutinize(model, data, ATTACK, limit=8)
    with pytest.raises(NonFiniteRouterError):
        evaluate(model, data, {"autoattack": from_name("autoattack", 0.1)}, limit=8)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "planted.py").write_text(
        "import torch\nfrom advmoe.models import create_model\n\ndef model():\n"
        "    net = create_model('resnet18', 'moe', width=8, image_size=8)\n"
        "    net.load_state_dict(torch.load('weights.pt'))\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["evaluate", "planted:model", "--data", "digits", "--attack", "pgd2", "--limit", "8"]) == 1
    captured = capsys.readouterr()
    assert "not finite" in captured.err and "RA" not in captured.out


def test_the_command_marks_a_masked_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "masking.py").write_text(
        "import torch\nfrom torch import nn\nfrom advmoe.data import load\n\n"
        "class Rounded(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        train = load('digits').train\n"
        "        x, y = train.batch(torch.arange(len(train)))\n"
        "        self.means = nn.Parameter(torch.stack([x[y == c].mean(0).flatten() for c in range(10)]))\n"
        "    def forward(self, x):\n"
        "        x = (x * 8).round() / 8 + 0 * x\n"
        "        return -torch.cdist(x.flatten(1), self.means)\n\n"
        "def model():\n    return Rounded()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "e.json"
    arguments = [
        "masking:model",
        "--data",
        "digits",
        "--attack",
        "pgd5",
        "--limit",
        "40",
        "--checks",
        "24",
        "--out",
        str(out),
    ]
    assert main(["evaluate", *arguments]) == 0
    text = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert {"gradient", "radius"} <= set(record["suspect"])
    assert "suspect: gradient masking (" in text and " % ! |" in text and "FAILED" in text
    assert record["attacks"]["pgd5"]["ra"] > 0.5  # the figure that would have flattered
    assert record["curve"]["images"] == 24 and len(record["class_sa"]) == 10
    assert [t["batch_size"] for t in record["latency"]] == [1, 32]


def test_sign_test() -> None:
    assert sign_test(0, 0) == 1 and sign_test(4, 0) == 1 / 16 and sign_test(5, 0) == 1 / 32
    assert sign_test(15, 3) == pytest.approx(sum((816, 153, 18, 1)) / 2**18)  # 18 over 15, 16, 17 and 18


def test_wilson() -> None:
    """Against its defining equation: at the ends the share is 1.96 standard errors away."""
    for count, total in ((0, 10), (3, 10), (50, 256), (256, 256)):
        share = count / total
        for end in wilson(count, total):
            if 0 < end < 1:
                assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / total) ** 0.5, abs=1e-9)
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)
    assert wilson(50, 256)[0] < 50 / 256 < wilson(50, 256)[1]
