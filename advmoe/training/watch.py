# SPDX-License-Identifier: Apache-2.0
"""Looks at the routers while they are trained, so that a collapsed one is reported within some steps and by name."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_kernels import Routing

from ..modes import undisturbed
from ..routers import FixedRouter, Router, observe_routers
from .parallel import ALONE, World

__all__ = ["COLLAPSED", "RouterWatch"]

logger = logging.getLogger("advmoe")
COLLAPSED = 0.999  # share of one expert, or of the k most used of a top-k choice, from which on a router is reported
_EVERY = 10  # steps; counting costs a little at each layer
_STEPS = 5  # watched steps that have to agree


class RouterWatch:
    """Counts the choices of every tenth step's training forwards, and warns of each router that sent all of the samples
    of five such steps to one expert, or to the same k of a top-k choice: once, and again only after it has recovered. Of
    ``world`` all processes' samples count."""

    def __init__(self, model: nn.Module, world: World = ALONE) -> None:
        self.model = model
        self.world = world
        self._counts: dict[Router, deque[Tensor]] = {}
        self._reported: set[Router] = set()

    @contextmanager
    def watching(self, position: int) -> Iterator[None]:
        """Around the step of this number."""
        if position % _EVERY:
            yield
            return
        step: dict[Router, Tensor] = {}

        def observe(router: Router, scores: Tensor, routing: Routing) -> None:
            training = self.model.training or router.training  # attacks look at all of it in eval mode
            if training and routing.num_experts > routing.top_k and not isinstance(router, FixedRouter):
                expert = routing.expert.reshape(-1).clamp(0, routing.num_experts - 1)
                ones = torch.ones_like(expert)
                # not bincount, which waits for the device
                count = expert.new_zeros(routing.num_experts).scatter_add_(0, expert, ones)
                step[router] = step[router] + count if router in step else count

        with observe_routers(self.model, observe):
            yield
        if step:
            counts = self.world.total(torch.cat(list(step.values())))
            for router, count in zip(step, counts.split([len(each) for each in step.values()]), strict=True):
                self._counts.setdefault(router, deque(maxlen=_STEPS)).append(count)
            self._report(position)

    def require_finite(self, images: Tensor) -> None:
        """Looks for a router whose scores of these images are not finite. Off the CPU a choice does not look itself,
        since that waits for the device, and what comes of it shows in the loss first.

        Raises:
            NonFiniteRouterError: if there is one; the message names its layer.
        """

        def observe(router: Router, scores: Tensor, routing: Routing) -> None:
            router.require_finite(scores)

        with undisturbed(self.model, eval_mode=False), torch.no_grad(), observe_routers(self.model, observe):
            self.model(images)

    def _report(self, position: int) -> None:
        for router, counts in self._counts.items():
            total = torch.stack(list(counts)).sum(0)
            k = router.options.top_k
            share = (total.topk(k).values.sum() / total.sum()).item()
            if share < COLLAPSED:
                self._reported.discard(router)
            elif len(counts) == _STEPS and router not in self._reported:
                self._reported.add(router)
                most = sorted(total.topk(k).indices.tolist())
                who = f"expert {most[0]}" if k == 1 else f"experts {', '.join(map(str, most))}"
                logger.warning(
                    "step %d: the router of %s has collapsed: %s took %.1f %% of the samples of %d steps",
                    position + 1, router.routes or "all layers", who, 100 * share, _STEPS,
                )  # fmt: skip
