# SPDX-License-Identifier: Apache-2.0
"""Test images, clean and attacked, with what the model says of them and where its routers send them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..analysis.observation import Attack, Choice, Observation, observe
from ..attacks import AttackResult
from ..data import Split
from ..evaluation.measure import scores_of
from ..modes import undisturbed

__all__ = ["Example", "Examples", "Prediction", "Sent", "class_name", "find_examples"]

_CLASSES = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "digits": tuple(map(str, range(10))),
}
_SIDE = 128  # pixels of a picture, which small images are enlarged to
_BATCH = 32


def class_name(data: str, index: int) -> str:
    names = _CLASSES.get(data)
    return f"class {index}" if names is None else names[index]


@dataclass(frozen=True)
class Prediction:
    label: int
    probability: float


@dataclass(frozen=True)
class Sent:
    """Where one router sent an image: the experts clean and attacked, such as ``2`` or ``0+3``; of a router that chooses
    for each token, how many there are and how many have other experts under attack, in words."""

    layers: tuple[str, ...]
    clean: str
    attacked: str
    changed: bool


@dataclass(frozen=True)
class Example:
    """
    Args:
        index: of the test image.
        sent: by each router, in the order of the layers.
        pictures: PNG files: clean, attacked, their difference (:attr:`Examples.magnified`).
    """

    index: int
    label: int
    clean: Prediction
    attacked: Prediction
    sent: list[Sent]
    pictures: tuple[bytes, bytes, bytes]

    @property
    def fell(self) -> bool:
        return self.attacked.label != self.label


@dataclass(frozen=True)
class Examples:
    """
    Args:
        attack: what it is, in words.
        magnified: the factor of the difference's pictures, about a grey of one half.
        searched: test images that were looked through, in their order.
    """

    attack: str
    magnified: float
    searched: int
    examples: list[Example]


@dataclass
class _Keeping:
    """An attack that keeps what went into it and what it found last."""

    attack: Attack
    images: Tensor | None = None  # [B, 3, S, S], as found
    found: Tensor | None = None

    @property
    def epsilon(self) -> float:
        return self.attack.epsilon

    def describe(self) -> str:
        return self.attack.describe()

    def run(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> AttackResult:
        result = self.attack.run(model, images, labels, generator)
        self.images, self.found = images, result.images
        return result


@dataclass(frozen=True)
class _Seen:
    """The row of an observation, and its images ``[3, S, S]``."""

    index: int
    observed: Observation
    row: int
    clean: Tensor
    attacked: Tensor


def find_examples(model: nn.Module, split: Split, attack: Attack, count: int, limit: int, seed: int = 0) -> Examples:
    """The first images that the model has right and that fall to the attack, and the first that stay right: half of each,
    as far as there are so many.

    Args:
        limit: of the images that are looked through.
        seed: of the attack's random starts.

    Raises:
        ValueError: if ``count`` or ``limit`` is below 1, or as :func:`advmoe.analysis.observation.observe`.
        NonFiniteGradientError: as the attack.
    """
    if count < 1:
        raise ValueError(f"examples: expected at least 1, got {count}")
    split = split.first(limit)
    falling: list[_Seen] = []
    staying: list[_Seen] = []
    searched = 0
    keeping = _Keeping(attack)
    while searched < len(split) and (len(falling) < (count + 1) // 2 or len(staying) < count // 2):
        part = split.select(slice(searched, searched + _BATCH))
        observed = observe({"model": model}, part, keeping, _BATCH, seed)["model"]
        assert keeping.images is not None and keeping.found is not None
        for row in (observed.clean == observed.labels).nonzero().squeeze(1).tolist():
            fell = bool(observed.attacked[row] != observed.labels[row])
            seen = _Seen(searched + row, observed, row, keeping.images[row], keeping.found[row])
            (falling if fell else staying).append(seen)
        searched += len(part)
    falling = falling[: max((count + 1) // 2, count - len(staying))]
    chosen = falling + staying[: count - len(falling)]
    if not chosen:
        return Examples(attack.describe(), 1.0, searched, [])
    clean, attacked = (torch.stack([getattr(seen, name) for seen in chosen]) for name in ("clean", "attacked"))
    largest = float((attacked - clean).abs().max())
    magnified = 0.5 / largest if largest else 1.0
    labels = torch.stack([seen.observed.labels[seen.row] for seen in chosen])
    with undisturbed(model):
        scores = [scores_of(model, images, labels).softmax(1).cpu() for images in (clean, attacked)]
    examples = [_example(seen, scores[0][i], scores[1][i], magnified) for i, seen in enumerate(chosen)]
    return Examples(attack.describe(), magnified, searched, examples)


def _example(seen: _Seen, clean_scores: Tensor, attacked_scores: Tensor, magnified: float) -> Example:
    observed, row = seen.observed, seen.row
    # the class as it was observed: the scores were computed in another batch, whose rounding may differ
    clean, attacked = (
        Prediction(int(predicted[row]), float(scores[predicted[row]]))
        for predicted, scores in ((observed.clean, clean_scores), (observed.attacked, attacked_scores))
    )
    difference = 0.5 + magnified * (seen.attacked - seen.clean)
    pictures = (_png(seen.clean), _png(seen.attacked), _png(difference))
    sent = [_sent(choice, row) for choice in observed.choices]
    return Example(seen.index, int(observed.labels[row]), clean, attacked, sent, pictures)


def _sent(choice: Choice, row: int) -> Sent:
    clean, attacked = choice.clean[row], choice.attacked[row]  # [T, k]
    changed = int(choice.flipped()[row].sum())
    if len(clean) > 1:
        return Sent(choice.layers, f"{len(clean)} tokens", f"{changed} changed", changed > 0)
    names = ["+".join(map(str, each[0].tolist())) for each in (clean, attacked)]
    return Sent(choice.layers, names[0], names[1], changed > 0)


def _png(image: Tensor) -> bytes:
    """Of ``[3, S, S]`` in [0, 1], enlarged without blurring."""
    pixels = image.mul(255).round().clamp(0, 255).to("cpu", torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    times = max(1, _SIDE // picture.width)
    data = io.BytesIO()
    picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()
