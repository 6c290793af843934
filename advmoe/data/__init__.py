# SPDX-License-Identifier: Apache-2.0
"""Data sets as tensors, augmentation of whole batches, and resumable iterators."""

from .augment import augment
from .batches import Batches, stream_generator
from .sets import DataError, DataSet, Split, list_data, load

__all__ = ["Batches", "DataError", "DataSet", "Split", "augment", "list_data", "load", "stream_generator"]
