# SPDX-License-Identifier: Apache-2.0
"""Routers, and one's own."""

from __future__ import annotations

import pytest
import torch

from advmoe import routers
from advmoe.models import create_model
from advmoe.routers import LightRouter, NonFiniteRouterError, Router, list_routers, record_scores, register_router


def test_a_router_of_ones_own() -> None:
    @register_router("test_corner")
    class Corner(Router):
        def __init__(self, in_channels: int, num_experts: int) -> None:
            super().__init__(in_channels, num_experts)
            self.linear = torch.nn.Linear(in_channels, num_experts)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x[:, :, 0, 0])

    try:
        assert "test_corner" in list_routers()
        model = create_model("resnet18", "moe", width=8, image_size=8, router="test_corner", num_experts=3)
        model(torch.rand(4, 3, 8, 8)).sum().backward()
        assert model.layer1[0].conv1.router.linear.weight.grad is not None
        with pytest.raises(ValueError, match="registered already"):
            register_router("test_corner")(Corner)
    finally:
        del routers._ROUTERS._entries["test_corner"]


def test_non_finite_scores_name_the_layer() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8)
    with torch.no_grad():
        model.layer2[1].conv1.router.linear.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteRouterError, match=r"router of layer2\.1\.conv1 "):
        model(torch.rand(2, 3, 8, 8))


def test_light_router_does_not_look_at_the_rest_of_the_batch() -> None:
    torch.manual_seed(0)
    router = LightRouter(5, 3)
    x = torch.randn(7, 5, 4, 4)
    torch.testing.assert_close(router(x)[3:4], router(x[3:4]))


def test_light_router_sees_no_scale() -> None:
    torch.manual_seed(0)
    router = LightRouter(16, 3)
    x = torch.randn(7, 16, 4, 4)
    torch.testing.assert_close(router(100 * x), router(x), rtol=1e-3, atol=1e-3)


def test_record_scores_keeps_the_graph() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8)
    with record_scores(model) as scores:
        model(torch.rand(2, 3, 8, 8))
    assert len(scores) == 16 and all(s.shape == (2, 2) and s.requires_grad for s in scores.values())
    assert not any(m._forward_hooks for m in model.modules())
