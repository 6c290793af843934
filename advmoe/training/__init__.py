# SPDX-License-Identifier: Apache-2.0
"""Training: one engine, a small class for each method, runs as folders."""

from .engine import Interrupted, StepError, Trainer, resume, train
from .methods import AT, AdvMoE, ATSparse, FastAT, FreeAT, Method, NonFiniteLossError, Standard, StepResult, build_method
from .runs import Run, RunError, load_checkpoint, load_model

__all__ = [
    "AT",
    "ATSparse",
    "AdvMoE",
    "FastAT",
    "FreeAT",
    "Interrupted",
    "Method",
    "NonFiniteLossError",
    "Run",
    "RunError",
    "Standard",
    "StepError",
    "StepResult",
    "Trainer",
    "build_method",
    "load_checkpoint",
    "load_model",
    "resume",
    "train",
]
