# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.made_imagenet DIR``: images of noise in ImageNet's layout, number of classes and usual size, to time
what needs ImageNet where it is not. Nothing can be learned from them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, SIZE = 1000, (500, 375)  # width and height in pixels


def write(folder: Path, train: int, val: int, classes: int = CLASSES, seed: int = 0) -> None:
    """``train`` and ``val`` images for each class."""
    generator = np.random.default_rng(seed)
    coarse = SIZE[1] // 8, SIZE[0] // 8, 3
    for split, count in (("train", train), ("val", val)):
        for k in range(classes):
            target = folder / split / f"n{k:08d}"
            target.mkdir(parents=True)
            for i in range(count):
                noise = Image.fromarray(generator.integers(0, 256, coarse, dtype=np.uint8)).resize(SIZE)
                noise.save(target / f"{i}.JPEG", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2, help="images of each class (2)")
    parser.add_argument("--val", type=int, default=1, help="images of each class (1)")
    o = parser.parse_args()
    if o.folder.exists() and any(o.folder.iterdir()):
        parser.error(f"{o.folder} is there and not empty")
    write(o.folder, o.train, o.val)


if __name__ == "__main__":
    main()
