# SPDX-License-Identifier: Apache-2.0
"""Training: one engine, a small class for each method, runs as folders."""

from .engine import NonFiniteLossError, Trainer, resume, train
from .methods import AT, AdvMoE, Method, Standard, StepResult, build_method
from .runs import Run, RunError, load_checkpoint, load_model

__all__ = [
    "AT",
    "AdvMoE",
    "Method",
    "NonFiniteLossError",
    "Run",
    "RunError",
    "Standard",
    "StepResult",
    "Trainer",
    "build_method",
    "load_checkpoint",
    "load_model",
    "resume",
    "train",
]
