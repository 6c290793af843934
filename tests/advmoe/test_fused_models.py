# SPDX-License-Identifier: Apache-2.0
"""moe_kernels.fuse on whole networks: the backbones in every kind and layout, and networks as other people write them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from other_models import build
from torch import nn

from advmoe import upcycle
from advmoe.models import create_model, list_models, record_routing
from advmoe.profiling import measure_latency
from moe_kernels import convert, fuse


def _moved(model: nn.Module, image_size: int = 32) -> nn.Module:
    """In eval mode, with running statistics of some images and affine parameters that are no ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(torch.rand(16, 3, image_size, image_size))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _assert_equal(model: nn.Module, image_size: int = 32, fallbacks: set[str] | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, torch.rand(1, 3, image_size, image_size))
    x = torch.rand(13, 3, image_size, image_size)
    with torch.no_grad():
        for batch in (x[:1], x):
            torch.testing.assert_close(fused(batch), model(batch), rtol=1e-4, atol=1e-5)
    assert {f.operation for f in fused.fallbacks} == (fallbacks or set())


_SMALL: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 16},
    "resnet34": {"width": 8},
    "resnet50": {"width": 8},
    "wrn28_10": {"width": 20},
    "wrn50_2": {"width": 8, "image_size": 64},
    "vgg16_bn": {"width": 16},
    "densenet40": {"width": 8},
}


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize("arch", [name for name in list_models() if name in _SMALL])
def test_every_backbone_is_one_program(arch: str, layout: str) -> None:
    options = {"num_experts": 3, **_SMALL[arch]}
    model = _moved(create_model(arch, layout=layout, **options), options.get("image_size", 32))
    # the identity shortcut out of a whole stem gathers the output's window, which has no native form
    gathers = layout == "windows" and arch in ("resnet18", "resnet34")
    known = {"index", "unsqueeze", "expand", "gather"} if gathers else set()
    _assert_equal(model, options.get("image_size", 32), known)


@pytest.mark.parametrize(
    "arch, options, fallbacks",
    [
        ("resnet18", {"kind": "dense"}, set()),
        ("vgg16_bn", {"kind": "s_dense"}, set()),
        ("densenet40", {"kind": "sparse"}, set()),
        ("wrn28_10", {"bn": "per_expert", "route_per": "block"}, set()),
        ("resnet18", {"router": "image", "gate": "softmax"}, set()),
        ("resnet18", {"router": "global", "bn": "per_expert"}, set()),
        ("vgg16_bn", {"router": "conv", "gate_after": "norm", "gate": "softmax"}, set()),
        ("resnet18", {"router": "linear", "temperature": 2.0, "standardize": False}, set()),
        ("resnet18", {"moe_at": (3, 4), "route_per": "stage"}, set()),
        ("resnet18", {"image_size": 64, "stem": "imagenet"}, set()),
    ],
)
def test_kinds_routers_and_options(arch: str, options: dict[str, Any], fallbacks: set[str]) -> None:
    options = {**_SMALL[arch], **options}
    size = options.get("image_size", 32)
    _assert_equal(_moved(create_model(arch, **options), size), size, fallbacks)


@pytest.mark.parametrize("options", [{}, {"top_k": 2, "gate": "softmax"}])
def test_a_vision_transformer_runs_as_torchs_operators(options: dict[str, Any]) -> None:
    model = _moved(create_model("deit_tiny", width=24, **options))
    x = torch.rand(5, 3, 32, 32)
    with pytest.warns(UserWarning, match="run as torch's own"):
        fused = fuse(model, x)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_upcycled_and_converted_networks() -> None:
    dense = create_model("resnet18", "dense", width=8)
    _assert_equal(_moved(upcycle(dense, num_experts=3, ratio=0.5)))
    other = _moved(convert(build("resnet"), 3))
    _assert_equal(other)


def test_it_chooses_the_experts_that_the_model_chooses() -> None:
    model = _moved(create_model("resnet18", width=16, num_experts=4, bn="per_expert"))
    x = torch.rand(64, 3, 32, 32) * torch.rand(64, 3, 1, 1)  # of different colours
    with torch.no_grad(), record_routing(model) as routings:
        expected = model(x)
    assert sum(len(r.expert.unique()) > 1 for r in routings.values()) >= 2
    torch.testing.assert_close(fuse(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def test_its_latency_can_be_measured() -> None:
    model = create_model("resnet18", width=8).eval()
    fused = fuse(model, torch.rand(1, 3, 32, 32))
    assert [t.repeats for t in measure_latency([model, fused], repeats=2)] == [2, 2]
    assert not fused.training
