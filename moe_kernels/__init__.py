# SPDX-License-Identifier: Apache-2.0
"""Routed convolution: for each sample the slice of one weight tensor that a router chose, and nothing else.

Layers: :mod:`~moe_kernels.nn` (modules) → :mod:`~moe_kernels.functional` → :mod:`~moe_kernels.ops` (operators of
torch.library) → :mod:`~moe_kernels.backends`.

Letters used in shapes: B samples, k choices a sample, V = B * k virtual samples, N experts, C and K input and output
channels of one slice, R_out and R_in those of the whole weight, H, W the input's and P, Q the output's rows and columns.
"""

from . import functional
from ._version import __version__
from .backends import BackendUnavailable, available_backends, use_backend
from .convert import LightRouter, ScoreNorm, SelfRoutedConv2d, convert
from .inference import FusedModel, fuse
from .nn import RoutedBatchNorm2d, RoutedConv2d, RoutedLayerNorm, RoutedLinear
from .routing import Routing
from .slices import ExpertSlices

__all__ = [
    "BackendUnavailable",
    "ExpertSlices",
    "FusedModel",
    "LightRouter",
    "RoutedBatchNorm2d",
    "RoutedConv2d",
    "RoutedLayerNorm",
    "RoutedLinear",
    "Routing",
    "ScoreNorm",
    "SelfRoutedConv2d",
    "__version__",
    "available_backends",
    "convert",
    "functional",
    "fuse",
    "use_backend",
]
