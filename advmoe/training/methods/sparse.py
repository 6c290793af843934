# SPDX-License-Identifier: Apache-2.0
"""AT (Sparse): a mask over output channels learned as HYDRA learns it (Sehwag et al. 2020), adversarially throughout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...sparse import (
    masked_convolutions,
    score_parameters,
    set_searching,
    start_search,
    store_masks,
    update_alive,
)
from .base import Batch, Method, StepResult, only

__all__ = ["ATSparse"]


class ATSparse(Method):
    """Three phases, each with a cosine schedule and an optimiser of its own: ``pretrain_epochs`` of adversarial training
    of the dense network, ``mask_epochs`` in which only the scores of the mask are trained and the weights rest, and the
    remaining epochs of adversarial training of what the mask has kept.

    The paper's AT (Sparse) gives 100 epochs to each. Without epochs left to fine-tune, the result is a mask over the
    weights that it began with (with ``init``, say those of standard training: the robust mask of the paper's Figure 3).
    ``best`` is chosen in the last phase alone.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not masked_convolutions(model):
            raise ValueError("method: at_sparse needs a model of kind sparse; use at for this one")
        super().__init__(model, *args, **kwargs)
        self.search = self.config.pretrain_epochs
        self.finetune = self.search + self.config.mask_epochs
        self.phase = "pretrain"
        self.image_size: int | None = None  # of the images, once one has come
        if self.config.mask_epochs < 1:
            raise ValueError("mask_epochs: expected at least 1 for at_sparse, got 0")
        if self.optim.optimizer != "sgd":
            raise ValueError(f"optimizer: at_sparse learns its masks by sgd, got {self.optim.optimizer!r}")

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        scores = score_parameters(self.model)
        masks = {id(p) for p in scores}
        weights = [p for p in self.model.parameters() if id(p) not in masks]
        self.weights, self.scores = weights, scores
        o = self.optim
        masks_only = [{"params": scores, "lr": o.lr, "base_lr": o.lr}]
        return {
            "pretrain": self._optimizer([(weights, o.lr)]),
            "mask": torch.optim.SGD(masks_only, momentum=o.momentum, nesterov=o.nesterov),
            "finetune": self._optimizer([(weights, o.lr)]),
        }

    def schedule(self, epoch: int, epochs: int) -> tuple[int, int]:
        ends = (0, self.search, self.finetune, epochs)
        return next(phase for phase in itertools.pairwise(ends) if epoch < phase[1])

    def enter_epoch(self, epoch: int) -> None:
        self.phase = "pretrain" if epoch < self.search else "mask" if epoch < self.finetune else "finetune"
        set_searching(self.model, self.phase == "mask")

    def begin_epoch(self, epoch: int) -> None:
        if epoch == self.search:
            start_search(self.model)

    def settle(self) -> None:
        # an epoch ends so: the last phase finds the masks in place
        if self.phase == "mask" and self.image_size is not None:
            store_masks(self.model)
            update_alive(self.model, self.image_size)

    def may_be_best(self, epoch: int, epochs: int) -> bool:
        return epoch >= (self.finetune if self.finetune < epochs else self.search)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        batch = batches[0]
        self.image_size = batch.images.shape[-1]
        if self.phase == "mask":
            update_alive(self.model, self.image_size)
        with only(self.model, self.scores if self.phase == "mask" else self.weights):
            return self._descend(self.optimizers[self.phase], self._parts(batch), self._objective)
