# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.certified RUN``: what certified bounds are worth on a run of kind network_moe or dual_moe: experts'
Lipschitz constants by each method beside the steepest gradient that was found, and the images certified beside those that
stand under an attack. Markdown, for docs/certified.md. ``--small`` trains it first: networks of one residual block."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.certification import VARIANTS, Certifier
from advmoe.certification.lipschitz import METHODS, LipschitzBounds
from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.models import DualModel
from advmoe.models.base import register_model
from advmoe.models.resnet import BasicBlock, ResNet
from advmoe.tables import table
from advmoe.training import train
from advmoe.training.evaluation import open_source

from .machine import describe

__all__ = ["main"]

SMALL = "one_block"
_DUAL = {"linf": 1, "l2": 2}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.certified", description=__doc__)
    parser.add_argument("run", help="a run folder or a checkpoint in one")
    parser.add_argument("--small", action="store_true", help="train it first, on digits: two networks of one block")
    parser.add_argument("--limit", type=int, default=100, help="test images")
    parser.add_argument("--data-dir", help="the folder that holds the data, if it has moved")
    o = parser.parse_args(arguments)
    register_model(SMALL)(lambda spec: ResNet(spec, BasicBlock, (1,)))
    if o.small:
        train(_small(), Path(o.run), quiet=True)
    opened = open_source(o.run, "best", None, o.data_dir, None, None)
    images, labels = opened.data.test.first(o.limit).batch(torch.arange(o.limit))
    model = opened.model.to(torch.float64).eval()
    images = images.double()
    machine = describe()
    print(f"{machine['cpu']}, torch {machine['torch']}; {len(images)} test images, float64\n")
    mixture = model.robust if isinstance(model, DualModel) else model
    print(_constants(mixture.expert(0), images, labels, opened.epsilon))  # type: ignore[operator]
    print()
    print(_shares(model, images, labels, opened.epsilon))


def _small() -> RunConfig:
    """Adversarial training in balls that networks so small can learn in."""
    return RunConfig(
        model=ModelConfig(SMALL, "network_moe", width=32, num_experts=2, router="linear", frozen_router=True),
        data=DataConfig("digits"),
        optim=OptimConfig(lr=0.05, weight_decay=5e-3),
        method=MethodConfig("at", objective="cross_entropy"),
        attack=AttackConfig(epsilon=0.03, step_size=0.015, steps=4),
        routing=RoutingConfig(share_epochs=0),
        epochs=40,
    )


def _heads(labels: Tensor, classes: int) -> Tensor:
    eye = torch.eye(classes, dtype=torch.float64)
    return eye[labels][:, None] - eye


def _steepest(expert: nn.Module, images: Tensor, heads: Tensor, norm: str) -> Tensor:
    """The dual norm of the steepest gradient of a difference with the label's score at each image, ``[n]``."""
    images = images.clone().requires_grad_()
    scores = expert(images)
    found = [
        torch.autograd.grad((scores * heads[:, j]).sum(), images, retain_graph=True)[0].flatten(1)
        for j in range(heads.shape[1])
    ]
    return torch.stack([grad.norm(_DUAL[norm], dim=1) for grad in found]).amax(0)


def _constants(expert: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> str:
    """Of the first expert: the largest constant of a difference between the label's score and another; median."""
    some, which = images[:20], labels[:20]
    rows = []
    for norm in _DUAL:
        with torch.no_grad():
            heads = _heads(which, expert(some[:1]).shape[1])
        found = _steepest(expert, some, heads, norm)
        rows.append([norm, "gradient at the image (no bound)", f"{float(found.median()):.3g}", "-"])
        for method in METHODS:
            if method == "power" and norm != "l2":
                continue
            bounds = LipschitzBounds(expert, norm, method, tuple(some.shape[1:]))
            wide = epsilon if norm == "linf" else epsilon * some[0].numel() ** 0.5
            radii = [wide, wide / 10, wide / 100, wide / 1000] if method == "interval" else [None]
            for radius in radii:
                start = time.perf_counter()
                ball = (None, None) if radius is None else (some, torch.full((len(some),), radius).double())
                value = float(bounds.of(heads, *ball).amax(1).median())
                name = method if radius is None else f"{method}, radius {255 * radius:.3g}/255"
                kind = name if METHODS[method] else f"{name} (estimate)"
                rows.append([norm, kind, f"{value:.3g}", f"{time.perf_counter() - start:.1f}"])
    return table(["norm", "method", "constant, median", "seconds for 20 images"], rows)


def _shares(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float) -> str:
    rows = []
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    for norm in _DUAL:
        wide = epsilon if norm == "linf" else epsilon * images[0].numel() ** 0.5
        grid = [wide, wide / 10, wide / 100, wide / 1000]
        for method in ("product", "interval"):
            certifier = Certifier(model, norm, method, tuple(images.shape[1:]))
            for variant in VARIANTS:
                start = time.perf_counter()
                try:
                    found = certifier.certify(images, labels, variant)
                except ValueError:
                    continue
                name = f"{method}, {variant}" + ("" if found.sound else " (no certificate)")
                shares = [f"{100 * found.certified(r):.0f} %" for r in grid]
                median = 255 * float(found.radius[right].median())
                rows.append([norm, name, f"{median:.3g}", *shares, f"{time.perf_counter() - start:.1f}"])
        routes = [f"{100 * float((found.route_radius > r).double().mean()):.0f} %" for r in grid]
        rows.append([norm, "route", f"{255 * float(found.route_radius.median()):.3g}", *routes, "-"])
        stands = []
        for radius in grid:
            attack = PGD(radius, radius / 4, 20, restarts=2, loss="margin", norm=norm, retire=True)
            with torch.no_grad():
                seen = model(attack(model, images, labels, torch.Generator().manual_seed(0))).argmax(1)
            stands.append(f"{100 * float(((seen == labels) & right).double().mean()):.0f} %")
        rows.append([norm, "stands under PGD-20, 2 starts", "-", *stands, "-"])
    head = ["norm", "bound", "median radius, /255", *(f"> {r}" for r in ("ε", "ε/10", "ε/100", "ε/1000")), "seconds"]
    share = f"{100 * float(right.double().mean()):.0f} %"
    return (
        f"SA {share}; ε = {255 * epsilon:.3g}/255 (L2: times the root of the numbers of an image)\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    main()
