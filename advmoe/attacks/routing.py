# SPDX-License-Identifier: Apache-2.0
"""What an attack does to, or with, the routers of a model.

A routed model can be attacked through its prediction alone, as any network, with what gradient reaches the image through
the gates. Since a choice has no gradient of its own, that may miss attacks which :data:`AGAINST` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import RoutedConv2d, RoutedLinear, Routing

from ..models.network_moe import NetworkMoE
from ..models.placed import Mixture
from ..routers import Router, observe_routers, replay_routing, routers_of

__all__ = ["AGAINST", "RoutingView"]

AGAINST = {
    "prediction": "the prediction, with what gradient passes the gates",
    "experts": "the experts, the routing held as it is on the clean images (RA-E)",
    "router": "the routers' choices, in order to change the prediction (RA-R)",
    "flip": "the routers' choices",
    "joint": "the prediction and the routers' choices",
    "soft": "the prediction, with gradients of the softmax mixture of all experts",
}
_WATCHING = ("router", "flip", "joint")  # those that look at the scores


class RoutingView:
    """The model as an attack of one kind of :data:`AGAINST` sees it, for a batch of images; a context manager.

    Raises:
        ValueError: if the kind needs routers (:class:`advmoe.routers.Router` with several experts) and there are none.
    """

    def __init__(self, model: nn.Module, against: str) -> None:
        self.model = model
        self.against = against
        self.routers = [r for r in routers_of(model).values() if r.num_experts > 1]
        self._clean: dict[Router, Routing] = {}
        self._seen: dict[Router, tuple[Tensor, Routing]] = {}
        self._exit = ExitStack()
        if against != "prediction" and not self.routers:
            raise ValueError(
                f"attack: one against {against!r} needs a model with routers of several experts (advmoe.routers.Router); "
                f"{type(model).__name__} has none"
            )

    def __enter__(self) -> RoutingView:
        if self.against in (*_WATCHING, "experts", "soft"):
            self._exit.enter_context(observe_routers(self.model, self._observe))
        if self.against == "soft":
            within: set[nn.Module] = set()
            for module in self.model.modules():
                if isinstance(module, NetworkMoE | Mixture):
                    hook = self._mixed_outputs
                    within.update(module.modules())
                # a layer that only reads by the choice of another (a classifier over windows) mixes no experts
                elif (
                    isinstance(module, RoutedConv2d | RoutedLinear)
                    and not module.out_slices.is_whole
                    and module not in within
                ):
                    hook = self._mixed
                else:
                    continue
                self._exit.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def learn(self, images: Tensor, size: int) -> None:
        """Takes note of the choices on the clean images, where the kind asks for them; ``size`` images at a time.

        Raises:
            ValueError: if no router has a choice to make: as many experts as there are, or one for all.
        """
        if self.against not in (*_WATCHING, "experts"):
            return
        parts: dict[Router, list[Routing]] = {}
        with torch.no_grad():
            for part in images.split(size):
                self.model(part)
                for router, (_, routing) in self._seen.items():
                    parts.setdefault(router, []).append(routing)
        if not parts:
            raise ValueError(f"attack: one against {self.against!r} needs a router that has a choice to make; none has")
        self._clean = {router: _joined(routings) for router, routings in parts.items()}

    def logits(self, x: Tensor, rows: Tensor, images: int, held: bool = True) -> Tensor:
        """The model's scores of ``x``, which are the images ``rows [n]`` of the ``images`` that were learned; against the
        experts with the routing ``held`` as it was."""
        self._seen.clear()
        if self.against != "experts" or not held:
            return self.model(x)
        choices = {router: _of_rows(routing, rows, images) for router, routing in self._clean.items()}
        with replay_routing(choices):
            return self.model(x)

    def margins(self, rows: Tensor, images: int) -> Tensor:
        """Of the last :meth:`logits`: ``[n, choices]``, for each choice the best score outside of the clean choice minus
        the lowest inside it: above 0 where the choice is another one. A router of tokens makes one for each token."""
        each = []
        for router, (scores, _) in self._seen.items():
            chosen = _of_rows(self._clean[router], rows, images).expert.reshape(len(scores), -1)
            inside = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
            best_outside = scores.masked_fill(inside, -torch.inf).amax(1)
            lowest_inside = scores.masked_fill(~inside, torch.inf).amin(1)
            each.append((best_outside - lowest_inside).reshape(len(rows), -1))
        return torch.cat(each, 1).float()

    def _observe(self, router: Router, scores: Tensor, routing: Routing) -> None:
        if router.num_experts > routing.top_k:  # else there is nothing to choose
            self._seen[router] = scores, routing

    def _mixed(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The output as it is, with the gradient of the sum over all experts, weighted by the routers' softmax."""
        values = dict(zip(("input", "routing", "in_routing"), args, strict=False)) | kwargs
        x, routing = values["input"], values["routing"]
        source = values.get("in_routing")
        # the same memory, also where each choice of a top-k one has become a sample of its own
        memory = routing.expert.data_ptr()
        scores = next((s for s, r in self._seen.values() if r.expert.data_ptr() == memory), None)
        if scores is None:
            return output
        if len(scores) != len(output):
            raise ValueError("attack: the softmax mixture of layers that give out each choice by itself is not there")
        if source is None and not module.in_slices.is_whole:  # type: ignore[union-attr]
            source = routing
        shares = scores.softmax(1).to(output.dtype)
        mixture = torch.zeros_like(output)
        for expert in range(routing.num_experts):
            alone = Routing(torch.full_like(scores[:, 0], expert, dtype=torch.int64), num_experts=routing.num_experts)
            share = shares[:, expert].reshape(-1, *[1] * (output.dim() - 1))
            mixture = mixture + share * module.forward(x, alone, source)
        return output.detach() + (mixture - mixture.detach())

    def _mixed_outputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """As :meth:`_mixed`, of whole networks, blocks or convolutions, whose mixture is that of their outputs."""
        if module.router not in self._seen:
            return output
        shares = self._seen[module.router][0].softmax(1)
        every = torch.arange(module.num_experts, device=shares.device).expand_as(shares).contiguous()
        routing = Routing(every, shares, num_experts=module.num_experts)
        mixture = module.forward(*args, **{**kwargs, "routing": routing})
        return output.detach() + (mixture - mixture.detach())


def _joined(routings: Sequence[Routing]) -> Routing:
    """The choices of several batches, gates as numbers."""
    gates = [r.gate.detach() for r in routings if r.gate is not None and not r.unit_gate]
    expert = torch.cat([r.expert for r in routings])
    return Routing(expert, torch.cat(gates) if gates else None, num_experts=routings[0].num_experts)


def _of_rows(routing: Routing, rows: Tensor, images: int) -> Routing:
    """The choices of these images."""

    def part(values: Tensor) -> Tensor:
        return values.reshape(images, -1, *values.shape[1:])[rows].flatten(0, 1)

    gate = None if routing.gate is None else part(routing.gate)
    return Routing(part(routing.expert), gate, num_experts=routing.num_experts)
