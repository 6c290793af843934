# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official Python batches."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .download import ARCHIVES, missing
from .sets import DATA, DataError, Source, TensorSplit

AGAIN = "unpack the archive again"


@DATA.register("cifar10")
def _cifar10(folder: Path | None) -> Source:
    return _read("cifar10", folder, [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10)


@DATA.register("cifar100")
def _cifar100(folder: Path | None) -> Source:
    return _read("cifar100", folder, ["train"], "test", b"fine_labels", 100)


def _read(name: str, folder: Path | None, training: list[str], test: str, labels: bytes, classes: int) -> Source:
    """The batches in the folder itself or in the one that the archive unpacks to."""
    if folder is None:
        raise missing(name)
    if (folder / ARCHIVES[name].folder).is_dir():
        folder = folder / ARCHIVES[name].folder
    absent = [each for each in [*training, test] if not (folder / each).is_file()]
    if absent:
        raise missing(name, f"{folder} has no {', '.join(absent)}")
    parts = [_batch(name, folder / each, labels, classes) for each in training]
    images, targets = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    train = TensorSplit(images, targets, padding=4, flip=True)
    return Source(train, TensorSplit(*_batch(name, folder / test, labels, classes)), classes, 32, 8 / 255, 5 / 255)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers: a batch file has no business to name anything else."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
        for name in ("_reconstruct", "ndarray", "dtype", "scalar")
    ) | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no batch of images needs")
        return super().find_class(module, name)


def _batch(name: str, path: Path, key: bytes, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 ``[n, 3, 32, 32]`` and labels."""
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{name}: {path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
    if not isinstance(content, dict) or b"data" not in content or key not in content:
        raise DataError(f"{name}: {path} has no images and labels; {AGAIN}")
    data, labels = content[b"data"], content[key]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise DataError(f"{name}: {path} holds no uint8 array [n, 3072]; {AGAIN}")
    fit = isinstance(labels, list) and len(labels) == len(data)
    if not fit or not all(isinstance(v, int) and 0 <= v < classes for v in labels):
        raise DataError(
            f"{name}: {path} has not one label in 0 .. {classes - 1} for each of its {len(data)} images; {AGAIN}"
        )
    return torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64)
