# SPDX-License-Identifier: Apache-2.0
"""What makes a trained model fast: :func:`fuse`.

``capture`` makes a graph of a model, ``folding`` gives it less to do, ``lowering`` turns it into programs of the CPU's
kernels, ``graphs`` into CUDA graphs; ``fused`` is what one calls.
"""

from .fused import Fallback, FusedModel, StepTime, fuse

__all__ = ["Fallback", "FusedModel", "StepTime", "fuse"]
