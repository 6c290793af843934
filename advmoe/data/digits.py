# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's handwritten digits: nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .sets import DATA, Source, TensorSplit


@DATA.register("digits")
def _digits(folder: Path | None) -> Source:
    """1,797 digits of 8×8 pixels, grey in three channels; every fifth is a test image.

    The classes are well apart, so that the radius 8/255 would be no test: epsilon is 0.15.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % 5 == 0
    train, test = (TensorSplit(images[mask], labels[mask], padding=1) for mask in (~is_test, is_test))
    return Source(train, test, 10, 8, epsilon=0.15, step_size=0.1)
