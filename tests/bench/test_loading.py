# SPDX-License-Identifier: Apache-2.0
"""Made images in ImageNet's layout, and how fast they are decoded."""

from pathlib import Path

import pytest
import torch

from advmoe.data import load
from bench.loading import images_per_second
from bench.made_imagenet import write


@pytest.mark.parametrize("workers", [0, 1])
def test_made_images_are_read_as_imagenet(tmp_path: Path, workers: int) -> None:
    write(tmp_path, 2, 1, classes=40)
    data = load("imagenet", tmp_path)
    assert (data.num_classes, data.image_size, len(data.test)) == (40, 224, 40)
    assert len(data.train) + len(data.validation) == 80 and len(data.train) >= 64
    images, _ = data.test.batch(torch.arange(2))
    assert not torch.equal(images[0], images[1])
    assert images_per_second(data, workers, 64) > 0
