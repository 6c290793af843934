# SPDX-License-Identifier: Apache-2.0
"""Data sets by name, augmentation of whole batches, and resumable orders of batches."""

from . import cifar, digits, imagenet  # noqa: F401 - they register their data sets
from .augment import augment
from .batches import Batches, stream_generator
from .color import color_jitter
from .download import ARCHIVES, download
from .files import FileSplit
from .loader import BatchStream, batches_in_order
from .sets import DATA, DataError, DataSet, Source, Split, TensorSplit, list_data, load

__all__ = [
    "ARCHIVES",
    "DATA",
    "BatchStream",
    "Batches",
    "DataError",
    "DataSet",
    "FileSplit",
    "Source",
    "Split",
    "TensorSplit",
    "augment",
    "batches_in_order",
    "color_jitter",
    "download",
    "list_data",
    "load",
    "stream_generator",
]
