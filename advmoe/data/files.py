# SPDX-License-Identifier: Apache-2.0
"""Images that stay in files and are decoded when a batch wants them."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .color import color_jitter
from .sets import DataError, Split

__all__ = ["FileSplit"]

_FORMATS = ("JPEG", "PNG")  # Pillow would read others of these names too, and run Ghostscript for one of them
_LARGEST = 100_000_000  # pixels; 300 MB when decoded


@dataclass(frozen=True)
class FileSplit(Split):
    """Image files of any size, cut to squares when they are read.

    The shorter side becomes ``resize`` pixels (bilinear) and a square of ``size`` is cut out: its middle, or, where a
    batch is drawn for training, a random one, mirrored or not.

    Args:
        name: of the data set, for messages.
        root: what ``files`` are relative to.
        files: numpy array of str: one buffer that processes share, where a list would be copied into each by its
            reference counts.
        labels: int64 ``[n]``.
        size, resize: in pixels; ``resize=None``: the files must be of this size as they are.
        flip: mirrored images keep their class.
        jitter: strength of :func:`advmoe.data.color_jitter` where a batch is drawn for training.
    """

    name: str
    root: Path
    files: np.ndarray
    labels: Tensor
    size: int
    resize: int | None = None
    flip: bool = True
    jitter: float = 0.0

    @property
    def workers(self) -> int:  # type: ignore[override]
        """One for each core but the one that trains."""
        return max(1, len(os.sched_getaffinity(0)) - 1) if hasattr(os, "sched_getaffinity") else 1

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None, part: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        pixels, labels = self.pixels(index, generator, part), self.labels[index[part]]
        images = pixels.permute(0, 3, 1, 2).float()  # [B, S, S, 3] in memory is channels_last
        images.div_(255)
        if generator is not None and self.jitter:
            images = color_jitter(images, generator, self.jitter, part, len(index))
        return images, labels

    def pixels(
        self, index: Tensor, generator: torch.Generator | None = None, part: Tensor | slice = slice(None)
    ) -> Tensor:
        """uint8 ``[B, S, S, 3]``; arguments as :meth:`batch`'s.

        Raises:
            DataError: if a file cannot be decoded, or has another size than it must have.
        """
        where = torch.full((len(index), 3), 0.5)
        if generator is not None:
            where = torch.rand((len(index), 3), generator=generator)
        files = self.files[index[part].numpy()].tolist()
        out = np.empty((len(files), self.size, self.size, 3), np.uint8)
        for i, (file, (across, down, mirror)) in enumerate(zip(files, where[part].tolist(), strict=True)):
            out[i] = self._cut(self.root / file, across, down, self.flip and generator is not None and mirror < 0.5)
        return torch.from_numpy(out)

    def select(self, index: Tensor | slice) -> FileSplit:
        files = self.files[index if isinstance(index, slice) else index.numpy()]
        return dataclasses.replace(self, files=files, labels=self.labels[index])

    def augmented(self, shift: int | None, cutout: int, fill: tuple[float, ...], jitter: float = 0.0) -> FileSplit:
        super().augmented(shift, cutout, fill)  # refuses what is of images in memory
        return dataclasses.replace(self, jitter=jitter)

    def _cut(self, path: Path, across: float, down: float, mirror: bool) -> np.ndarray:
        """``across`` and ``down``: where the square lies in the room that it has, from 0 to 1."""
        try:
            with Image.open(path, formats=_FORMATS) as image:
                if image.width * image.height > _LARGEST:
                    raise ValueError(f"{image.width}x{image.height} pixels, more than any image has")
                if self.resize is None:
                    if image.size != (self.size, self.size):
                        found, wanted = f"{image.width}x{image.height}", f"{self.size}x{self.size}"
                        raise DataError(f"{self.name}: {path} has {found} pixels, expected {wanted}")
                    return np.asarray(image.convert("RGB"))
                # a JPEG decoder leaves out what is finer than is wanted
                image.draft("RGB", tuple(math.ceil(s * self.resize / min(image.size)) for s in image.size))
                rgb = image.convert("RGB")
        except DataError:
            raise
        except Exception as error:  # a damaged file raises nearly anything
            raise DataError(
                f"{self.name}: {path} cannot be read as an image ({error}); unpack the archive again"
            ) from error
        side = min(rgb.size) * self.size / self.resize  # of the square, in the file's pixels
        left, top = (rgb.width - side) * across, (rgb.height - side) * down
        square = rgb.resize((self.size, self.size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        pixels = np.asarray(square)
        return pixels[:, ::-1] if mirror else pixels
