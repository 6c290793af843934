# SPDX-License-Identifier: Apache-2.0
"""The page of runs: complete in itself, and with nothing on it that no file and no model says."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL, small_architecture, tiny
from torch import Tensor, nn

from advmoe.analysis import Choice, Finding
from advmoe.attacks import PGD
from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, RunConfig
from advmoe.data import TensorSplit
from advmoe.recipes import Catalog
from advmoe.report.examples import _sent, class_name, find_examples
from advmoe.report.page import _classes, _curve, _paper, _radius, _Subject, source_labels, write_report
from advmoe.training import Run, RunError, train
from moe_kernels import RoutedConv2d, Routing

VOID = {"meta", "img", "br", "link", "input", "hr"}
LAYERS = 4
RECORD: dict[str, Any] = {  # as evaluations were before there were checks
    "checkpoint": "best",
    "data": "digits",
    "seed": 0,
    "epsilon": 0.15,
    "gflops": 0.0012,
    "torch": "2.12.1",
    "threads": 3,
    "images": 360,
    "sa": 0.4111,
    "attacks": {
        "pgd50x2": {
            "description": "PGD-50 (ce)",
            "ra": 0.2222,
            "flip_rate": 0.3333,
            "layer_flip_rate": {"layer1.0.conv1": 0.3333},
            "zero_gradient": 0.0444,
        }
    },
    "usage": {"layer1.0.conv1": [0.5, 0.5]},
}


class Page(HTMLParser):
    """Fails at a tag that does not nest, and collects."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def images(self) -> list[bytes]:
        sources = [attrs["src"] or "" for tag, attrs in self.tags if tag == "img"]
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        return [base64.b64decode(source.partition(",")[2], validate=True) for source in sources]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run without an evaluation."""
    with small_architecture():
        config = tiny("at", model=ModelConfig(SMALL, width=8))
        yield train(config, tmp_path_factory.mktemp("runs") / "one", quiet=True).folder


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog()


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one pixel: the page is looked at, not they."""
    pixel = io.BytesIO()
    Image.new("RGB", (1, 1)).save(pixel, "PNG")
    monkeypatch.setattr(Finding, "png", lambda finding, dpi=150: pixel.getvalue())


def written(sources: list[Path], out: Path | None = None, **options: Any) -> tuple[str, Page]:
    text = write_report(sources, out, **{"limit": 12, "examples": 2, "attack": "pgd2", **options}).read_text()
    return text, Page(text)


def record(run: Path, **changes: Any) -> None:
    (run / "evaluation.json").write_text(json.dumps(RECORD | changes))


# --- the page -----------------------------------------------------------------------------------------------------------


def test_the_page_is_complete_in_itself(run: Path) -> None:
    record(run)
    text, page = written([run], examples=4, limit=40)
    assert text.startswith("<!DOCTYPE html>")
    assert not [attrs for tag, attrs in page.tags if tag in ("script", "link", "iframe", "object")]
    for _, attrs in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "url(" not in text and "@import" not in text
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links and {str(link)[1:] for link in links} == ids
    sizes = [Image.open(io.BytesIO(data)).size for data in page.images()]
    examples = [size for size in sizes if size == (128, 128)]  # of 8 pixels, each 16 times
    assert len(examples) == 3 * 4 and len(sizes) - len(examples) >= 6
    assert all((attrs.get("alt") or "").strip() for tag, attrs in page.tags if tag == "img")
    for title in ("Accuracy and loss over the epochs", "Usage of the experts", "RA against the radius of the attack"):
        assert title in page.text
    # each picture has its table: 2 epochs of training's
    assert "2 of 2 epochs" in page.text and page.cells[page.cells.index("validation_sa") - 1] == "epoch"


@pytest.mark.usefixtures("quick")
def test_what_was_not_evaluated_is_said_and_not_made_up(run: Path) -> None:
    _, page = written([run], examples=0)
    assert f"advmoe evaluate {run}" in page.text and "has not been evaluated" in page.text
    assert "no gradient" not in page.cells and "paper" not in " ".join(page.cells)
    assert "none were asked for" in page.text
    shutil.copy(run / "best.pt", run / "last.pt")
    _, page = written([run], examples=0, checkpoint="last")
    assert f"advmoe evaluate {run} --checkpoint last" in page.text and "evaluation-last.json" in page.text


@pytest.mark.usefixtures("quick")
def test_an_older_record_shows_what_it_has(run: Path) -> None:
    record(run)
    _, page = written([run])
    row = page.cells[page.cells.index("41.1 %") :][:7]
    assert row == ["41.1 %", "pgd50x2", "22.2 %", "33.3 %", "4.4 %", "0.0012", "not measured"]
    assert "evaluation.json has no checks" in page.text and "suspect" not in page.text and "FAILED" not in page.text
    assert "torch 2.12.1, threads 3" in page.text and "360 test images of digits, epsilon 0.15" in page.text
    assert not [cell for cell in page.cells if "the paper" in cell]  # it has no digits


@pytest.mark.usefixtures("quick")
def test_everything_of_a_record_is_shown(run: Path) -> None:
    autoattack = {"description": "AutoAttack", "images": 100, "ra": 0.2, "interval": [0.13, 0.29], "flip_rate": None}
    autoattack |= {"zero_gradient": None, "stages": {"apgd-ce": 0.25, "square": 0.2}, "warnings": ["it is random"]}
    pgd = RECORD["attacks"]["pgd50x2"] | {"interval": [0.1822, 0.2684], "suspect": ["black_box", "gradient"]}
    checks = [
        {"name": "radius", "passed": True, "measured": "0.1 % at 8 times", "means": "the largest radius is survived"},
        {"name": "black_box", "passed": False, "measured": "Square: 11.0 %", "means": "gradients are <masked>"},
        {"name": "surrogate", "passed": None, "measured": "no softmax gate", "means": "routing is"},
    ]
    record(
        run,
        attacks={"pgd50x2": pgd, "autoattack": autoattack},
        sa_interval=[0.3614, 0.4626],
        router_gflops=0.0003,
        machine="riscv64",
        latency=[{"batch_size": 32, "median_ms": 7.125, "low_ms": 7.0, "high_ms": 7.5, "repeats": 20}],
        checks=checks,
        curve={"attack": "pgd50", "images": 128, "epsilons": [0.0, 0.15, 1.2], "ra": [0.4, 0.2, 0.0]},
    )
    _, page = written([run])
    row = page.cells[page.cells.index("41.1 % [36.1, 46.3]") :][:11]
    marked = "22.2 % [18.2, 26.8]⚠ suspect: gradient masking (black_box, gradient)"
    assert row[1:3] == ["pgd50x2", marked]
    assert row[5:] == [
        "0.0012routers 25 % of it",
        "batch 32: 7.12 ms[7.00, 7.50]",
        "autoattack",
        "20.0 % [13.0, 29.0]",
        "-",
        "-",
    ]
    assert "AutoAttack; on 100 test images; after apgd-ce 25.0 %, after square 20.0 %; it is random." in page.text
    first = page.cells.index("radius")
    assert page.cells[first + 1] == "✓ passed"
    assert page.cells[first + 4 : first + 8] == ["black_box", "✗ FAILED", "Square: 11.0 %", "gradients are <masked>"]
    assert page.cells[first + 9] == "not run" and "machine riscv64" in page.text
    # the curve is that of the record, and no other is attacked for
    assert page.text.count("RA against the radius") == 1
    assert "pgd50, and with the other radii, on 128 test images" in page.text


@pytest.mark.usefixtures("quick")
def test_red_checks_of_the_record_mark_every_attack(run: Path) -> None:
    outcome = RECORD["attacks"]["pgd50x2"]
    record(run, attacks={"pgd50x2": outcome, "pgd10": outcome}, suspect=["radius"])
    _, page = written([run], examples=0)
    assert page.cells.count("22.2 %⚠ suspect: gradient masking (radius)") == 2


@pytest.mark.usefixtures("quick")
def test_text_is_escaped(trained: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / '<b>&"it"'))
    attacks = {'<i>"x"': RECORD["attacks"]["pgd50x2"] | {"description": "<script>alert(1)</script>"}}
    record(folder, attacks=attacks)
    text, page = written([folder])
    assert "<b>" not in text and "<i>" not in text and "<script" not in text
    assert str(folder) in page.text and '<i>"x"' in page.cells and "<script>alert(1)</script>" in page.text


@pytest.mark.usefixtures("quick")
def test_several_runs_on_one_page(run: Path, trained: Path, tmp_path: Path) -> None:
    config = Run(run).config()
    dataclasses.replace(config, epochs=7).save(run / "config.yaml")
    record(run, curve={"attack": "pgd50", "images": 128, "epsilons": [0.15], "ra": [0.2]})
    out = tmp_path / "page.html"
    _, page = written([run, trained], out)
    start = page.cells.index("what differs")
    assert page.cells[start : start + 6] == ["what differs", "run", "one", "epochs", "7", "2"]
    assert page.cells[start + 6] == "setting"  # the table of all begins
    assert f"advmoe evaluate {trained}" in page.text and f"advmoe evaluate {run}" not in page.text
    assert "run: Usage of the experts" in page.text and "one: Usage of the experts" in page.text
    assert "Attacks that transfer between models" in page.text
    # one run has no curve on record: both are attacked anew, on the same images
    assert page.text.count("RA against the radius of the attack") == 1 and "on 128 test images" not in page.text
    assert len([attrs for tag, attrs in page.tags if tag == "article"]) == 4
    with pytest.raises(ValueError, match=r"out: expected a file for the page of 2 runs, got none"):
        write_report([run, trained])
    with pytest.raises(ValueError, match="sources: expected different runs, got"):
        write_report([run, run / ".." / "run"], out)


def test_what_cannot_be_written_is_said_first(run: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"limit": 0}, "limit: expected at least 1, got 0"),
        ({"examples": -1}, "examples: expected at least 0, got -1"),
        ({"attack": "pdg50"}, "attack: expected .* got 'pdg50'"),
        ({"out": tmp_path}, "out: expected a file in a folder that is there"),
        ({"out": tmp_path / "none" / "page.html"}, "out: expected a file in a folder that is there"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report([run], **options)
    with pytest.raises(ValueError, match="sources: expected at least one run, got none"):
        write_report([])
    with pytest.raises(RunError, match="is no run"):
        write_report([tmp_path / "none"])
    for text, message in (
        ("{", "cannot be read"),
        ('{"sa": 0.5}', "expected an evaluation, got one without images, attacks"),
    ):
        (run / "evaluation.json").write_text(text)
        with pytest.raises(RunError, match=message):
            write_report([run])
    assert not (run / "report.html").exists()


# --- its parts ----------------------------------------------------------------------------------------------------------


def subject(config: RunConfig, **changes: Any) -> _Subject:
    return _Subject("it", Run("it"), config, [], RECORD | changes, Path("it/evaluation.json"))


CIFAR = RunConfig(
    model=ModelConfig("resnet18", "moe", num_experts=4, width=16),
    data=DataConfig("cifar10", train_limit=5000),
    attack=AttackConfig(8 / 255, 5 / 255, steps=2, loss="kl"),
    seed=3,
)


def test_the_papers_figures_are_those_of_its_tables(catalog: Catalog) -> None:
    paper = _paper(subject(CIFAR, epsilon=8 / 255), catalog)
    assert paper is not None
    figures = {name: paper[name] for name in ("sa", "ra_pgd50", "ra_autoattack", "gflops")}
    assert figures == {"sa": "80.15 ± 0.11", "ra_pgd50": "51.83 ± 0.12", "ra_autoattack": "45.13", "gflops": "0.15"}
    assert {each.split(" is ")[0] for each in paper["differences"]} == {
        "model.num_experts",
        "model.width",
        "data.train_limit",
    }
    dense = dataclasses.replace(CIFAR, model=ModelConfig("resnet18", "dense", ratio=0.3), method=MethodConfig("at"))
    assert (_paper(subject(dense, epsilon=8 / 255), catalog) or {})["ra_pgd50"] == "50.13 ± 0.13"
    # trained with PGD-10: table A1
    steps = dataclasses.replace(CIFAR, attack=dataclasses.replace(CIFAR.attack, steps=10))
    assert (_paper(subject(steps, epsilon=8 / 255), catalog) or {})["ra_pgd50"] == "52.22"
    fifth = dataclasses.replace(CIFAR, model=dataclasses.replace(CIFAR.model, ratio=0.2))
    assert (_paper(subject(fifth, epsilon=8 / 255), catalog) or {})["ra_pgd50"] == "49.18"


@pytest.mark.parametrize(
    "other",
    [
        {"model": dataclasses.replace(CIFAR.model, kind="upcycled")},
        {"model": dataclasses.replace(CIFAR.model, ratio=0.4)},
        {"method": MethodConfig(objective="cross_entropy")},
        {"data": DataConfig("digits")},
        {"init": "runs/other"},
        {},  # at another radius
    ],
)
def test_the_paper_has_nothing_to_say_of_other_settings(catalog: Catalog, other: dict[str, Any]) -> None:
    epsilon = 8 / 255 if other else 4 / 255
    assert _paper(subject(dataclasses.replace(CIFAR, **other), epsilon=epsilon), catalog) is None


def test_curves_and_classes_are_the_records() -> None:
    curve = {"attack": "pgd50", "images": 10, "epsilons": [0.0, 0.1], "ra": [0.5, 0.25]}
    found = _curve([subject(CIFAR)], [curve])
    assert list(found.rows) == [("it", 0.0, 0.5), ("it", 0.1, 0.25)] and found.png()[:4] == b"\x89PNG"
    attacks = {"pgd50": {"class_ra": [0.1, None, 0.3]}, "old": {}}
    classes = _classes(subject(CIFAR, class_sa=[0.5, 0.75, None], attacks=attacks))
    assert classes is not None and classes.columns == ("class", "clean", "pgd50")
    assert list(classes.rows) == [("airplane", 0.5, 0.1), ("automobile", 0.75, None)]
    assert classes.png()[:4] == b"\x89PNG"
    shares = [i / 100 for i in range(100)]  # more than have room for their names
    many = dataclasses.replace(CIFAR, data=DataConfig("cifar100"))
    assert _classes(subject(many, class_sa=shares, attacks={})).png()[:4] == b"\x89PNG"  # type: ignore[union-attr]
    assert _classes(subject(CIFAR)) is None


def test_names_that_people_use() -> None:
    assert [_radius(8 / 255), _radius(0.15), _radius(None), _radius(0.0)] == ["8/255", "0.15", "-", "0"]
    assert [class_name("cifar10", 3), class_name("digits", 7), class_name("cifar100", 7)] == ["cat", "7", "class 7"]
    labels = source_labels([Path("a/x/seed0"), Path("a/y/seed0")])
    assert len(set(labels)) == 2 and all(len(label) < 10 for label in labels)


# --- examples -----------------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Class 1 where the mean is above a half, and so is the expert of its one routed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = RoutedConv2d(3, 1, 1, bias=False, num_experts=2)
        nn.init.zeros_(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) - 0.5
        self.conv(x, Routing((bright > 0).long(), num_experts=2))
        return torch.stack([-bright, bright], 1)


def grey(levels: list[int], labels: list[int]) -> TensorSplit:
    images = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    return TensorSplit(images, torch.tensor(labels))


def test_examples_by_hand() -> None:
    step = 8 / 255
    # image 0 is wrong when clean; 2 and 4 fall to a step of 8, 1, 3 and 5 stay
    data = grey([200, 100, 124, 180, 130, 240], [0, 0, 0, 1, 1, 1])
    attack = PGD(step, step, 2, random_start=False)
    found = find_examples(Brightness(), data, attack, 4, 100)
    assert [example.index for example in found.examples] == [2, 4, 1, 3]
    assert [example.fell for example in found.examples] == [True, True, False, False]
    assert found.searched == 6 and found.magnified == pytest.approx(0.5 / step)
    first = found.examples[0]
    assert (first.label, first.clean.label, first.attacked.label) == (0, 0, 1)
    # logits are -0.5 and 0.5 off the mean, twice
    assert first.clean.probability == pytest.approx(1 / (1 + np.exp(2 * (124 / 255 - 0.5))), rel=1e-5)
    assert first.attacked.probability == pytest.approx(1 / (1 + np.exp(-2 * (132 / 255 - 0.5))), rel=1e-5)
    assert [(sent.layers, sent.clean, sent.attacked, sent.changed) for sent in first.sent] == [
        (("conv",), "0", "1", True)
    ]
    assert not found.examples[2].sent[0].changed
    clean, attacked, difference = (np.asarray(Image.open(io.BytesIO(data))) for data in first.pictures)
    assert clean.shape == (128, 128, 3)
    assert (clean == 124).all() and (attacked == 132).all() and (difference == 255).all()
    # as many as there are, and of the others where one kind is short
    assert [e.index for e in find_examples(Brightness(), data, attack, 5, 100).examples] == [2, 4, 1, 3, 5]
    assert [e.index for e in find_examples(Brightness(), data, attack, 99, 3).examples] == [2, 1]
    nothing = find_examples(Brightness(), grey([200], [0]), attack, 2, 1)
    assert nothing.examples == [] and nothing.searched == 1


def test_examples_are_searched_no_further_than_needed() -> None:
    data = grey([124, 100] * 40, [0] * 80)
    found = find_examples(Brightness(), data, PGD(8 / 255, 8 / 255, 1, random_start=False), 3, 80)
    assert [example.index for example in found.examples] == [0, 2, 1] and found.searched == 32


def test_difference_keeps_unchanged_pixels_grey() -> None:
    class FirstPixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 0, 0, 0] - 0.5, 0.5 - x[:, 0, 0, 0]], 1)

    found = find_examples(FirstPixel(), grey([130], [0]), PGD(0.1, 0.1, 1, random_start=False), 1, 1)
    difference = np.asarray(Image.open(io.BytesIO(found.examples[0].pictures[2])))
    assert (difference[:16, :16] == [0, 128, 128]).all() and (difference[16:] == 128).all()
    assert found.examples[0].sent == []


def test_choices_of_tokens_and_of_several_experts() -> None:
    clean, attacked = torch.tensor([[[0, 2]]]), torch.tensor([[[1, 2]]])
    sent = _sent(Choice(("a", "b"), 4, clean, attacked), 0)
    assert (sent.layers, sent.clean, sent.attacked, sent.changed) == (("a", "b"), "0+2", "1+2", True)
    tokens = torch.zeros(1, 5, 1, dtype=torch.int16)
    other = tokens.clone()
    other[0, :2] = 1
    sent = _sent(Choice(("mlp",), 4, tokens, other), 0)
    assert (sent.clean, sent.attacked, sent.changed) == ("5 tokens", "2 changed", True)
