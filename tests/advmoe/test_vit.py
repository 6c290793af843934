# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: timm's names, experts of tokens against a loop, layouts, costs, training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import ATTACK, batch
from torch import Tensor, nn

from advmoe.config import MethodConfig, OptimConfig, RoutingConfig
from advmoe.models import create_model, record_routing, router_parameters
from advmoe.models.layers import Path
from advmoe.models.vit import Attention, MoeMlp
from advmoe.profiling import profile
from advmoe.routers import routers_of
from advmoe.training.methods import build_method

WIDTH, HIDDEN = 16, 64


def small(kind: str = "moe", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("deit_tiny", kind, image_size=8, width=WIDTH, **options)


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def timm_names(depth: int, features: int, tokens: int, patch: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Of timm's deit_tiny_patch16_224, written down."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, features),
        "pos_embed": (1, tokens + 1, features),
        "patch_embed.proj.weight": (features, 3, patch, patch),
        "patch_embed.proj.bias": (features,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (features,), "norm1.bias": (features,),
            "attn.qkv.weight": (3 * features, features), "attn.qkv.bias": (3 * features,),
            "attn.proj.weight": (features, features), "attn.proj.bias": (features,),
            "norm2.weight": (features,), "norm2.bias": (features,),
            "mlp.fc1.weight": (4 * features, features), "mlp.fc1.bias": (4 * features,),
            "mlp.fc2.weight": (features, 4 * features), "mlp.fc2.bias": (features,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
    return {**shapes, "norm.weight": (features,), "norm.bias": (features,), "head.weight": (classes, features),
            "head.bias": (classes,)}  # fmt: skip


@pytest.mark.parametrize(("arch", "features", "params"), [("deit_tiny", 192, 5_717_416), ("vit_small", 384, 22_050_664)])
def test_a_dense_one_has_the_names_and_shapes_of_timm(arch: str, features: int, params: int) -> None:
    with torch.device("meta"):
        model = create_model(arch, "dense", num_classes=1000, image_size=224)
    assert {n: tuple(v.shape) for n, v in model.state_dict().items()} == timm_names(12, features, 196, 16, 1000)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.nightly
@pytest.mark.parametrize(("arch", "features", "heads"), [("deit_tiny", 192, 3), ("vit_small", 384, 6)])
def test_the_weights_of_timm_give_what_they_give_there(arch: str, features: int, heads: int) -> None:
    try:  # it wants torchvision, which not every torch has a fitting one of
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    torch.manual_seed(0)
    theirs = VisionTransformer(embed_dim=features, num_heads=heads).eval()
    ours = create_model(arch, "dense", num_classes=1000, image_size=224, normalize=False).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 224, 224)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_cost_against_a_hand_count() -> None:
    """DeiT-Tiny at 224 pixels: 197 tokens, attention included."""
    with torch.device("meta"):
        dense, moe, scaled = (create_model("deit_tiny", kind, 1000, 224) for kind in ("dense", "moe", "s_dense"))
    tokens, d = 197, 192
    block = tokens * d * (3 * d + d) + 2 * tokens**2 * d
    mlp = tokens * 2 * 4 * d * d
    around = 196 * d * 3 * 16 * 16 + 1000 * d
    assert profile(dense, 224).gflops == pytest.approx((12 * (block + mlp) + around) / 1e9, rel=1e-12)
    assert profile(dense, 224).gflops == pytest.approx(1.26, abs=0.01)  # as printed for DeiT-Tiny
    assert profile(scaled, 224).gflops == pytest.approx((12 * (block + mlp / 2) + around) / 1e9, rel=1e-12)
    cost = profile(moe, 224)
    assert cost.pathway_gflops == pytest.approx((12 * block + 6 * mlp + 6 * mlp / 2 + around) / 1e9, rel=1e-12)
    assert cost.router_gflops == pytest.approx(6 * tokens * d * 2 / 1e9)


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.manual_seed(0)
    layer: Any = create_model("deit_tiny", kind="dense", image_size=8, width=12).blocks[0].attn.double()  # type: ignore[index]
    assert isinstance(layer, Attention)
    layer.heads = 3  # of 4 numbers each; a network of this width has one
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    y = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
    torch.testing.assert_close(layer(x, Path()), layer.proj(y.transpose(1, 2).reshape(2, 5, 12)))


def looped(mlp: MoeMlp, x: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
    """Token by token, choice by choice; expert and gate [tokens, k]."""
    rows = []
    for token, experts, gates in zip(x.flatten(0, 1), expert.tolist(), gate, strict=True):
        y = torch.zeros_like(token)
        for e, g in zip(experts, gates, strict=True):
            out, inner = mlp.fc1.out_slices, mlp.fc2.in_slices
            rows1 = slice(out.starts[e], out.starts[e] + out.width)
            h = F.gelu(F.linear(token, mlp.fc1.weight[rows1], mlp.fc1.bias[rows1]))
            if inner.is_whole and mlp.fc2.out_slices.total > len(token):
                rows2, columns = slice(e * len(token), (e + 1) * len(token)), slice(None)
            else:
                rows2, columns = slice(None), slice(inner.starts[e], inner.starts[e] + inner.width)
            y = y + g * F.linear(h, mlp.fc2.weight[rows2, columns], mlp.fc2.bias[rows2])
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "straight_through"), (1, "softmax"), (2, "softmax"), (3, "none")])
def test_experts_of_tokens_against_a_loop(layout: str, top_k: int, gate: str) -> None:
    model = small(num_experts=4, layout=layout, top_k=top_k, gate=gate).double()
    mlp = model.blocks[1].mlp
    nn.init.normal_(mlp.fc1.bias)
    nn.init.normal_(mlp.fc2.bias)
    for m in (mlp.fc1, mlp.fc2):
        m.weight.data.mul_(10)
    mlp.eval()
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    from advmoe.models.layers import Path

    routing = mlp.router.route(x.flatten(0, 1)[:, :, None, None])
    expert = routing.expert.view(15, -1)
    gates = torch.ones_like(expert, dtype=x.dtype) if gate in ("straight_through", "none") else routing.gate.view(15, -1)
    assert len(expert.unique()) > 1
    torch.testing.assert_close(mlp(x, Path()), looped(mlp, x, expert, gates), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_experts", [1, 2, 4])
@pytest.mark.parametrize("router", ["light", "image"])
def test_windows_with_r_1_are_the_dense_network(num_experts: int, router: str) -> None:
    dense = small("dense").eval()
    model = small(layout="windows", ratio=1.0, num_experts=num_experts, router=router).eval()
    own = dict(dense.state_dict().items())
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and all(".router." in name or name.startswith("router.") for name in missing)
    torch.testing.assert_close(model(images()), dense(images()), rtol=1e-5, atol=1e-6)


def test_every_second_block_or_those_named() -> None:
    def routed(model: nn.Module) -> list[int]:
        return [i for i, block in enumerate(model.blocks, start=1) if isinstance(block.mlp, MoeMlp)]

    assert routed(small()) == [2, 4, 6, 8, 10, 12]
    assert routed(small(moe_at=(1, 12))) == [1, 12]
    assert list(routers_of(small(moe_at=(3,)))) == ["blocks.2.mlp.router"]


@pytest.mark.parametrize("router", ["light", "image", "linear", "global", "random", "fixed"])
def test_routers_and_what_is_recorded(router: str) -> None:
    model = small(router=router, num_experts=3).eval()
    with record_routing(model) as routings:
        assert model(images()).shape == (5, 10)
    per_image = router in ("image", "linear", "global")
    assert list(routings) == ([f"blocks.{i}.mlp.fc1" for i in (1, 3, 5, 7, 9, 11)])[: 1 if per_image else 6]
    assert all(r.expert.shape == ((5,) if per_image else (5 * 5,)) for r in routings.values())
    network = small(route_per="network")
    assert list(routers_of(network)) == ["router"]
    network(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sparse"}, "kind: deit_tiny has no channels of convolutions to remove"),
        ({"stem": "cifar"}, "stem: deit_tiny has patches instead, got 'cifar'"),
        ({"image_size": 10}, "image_size: deit_tiny has patches of 4 pixels here, got 10"),
        ({"width": 193}, "width: expected a multiple of the 3 heads, got 193"),
        ({"route_per": "stage"}, "route_per: expected layer or network for deit_tiny, got 'stage'"),
        ({"bn": "per_expert"}, "bn: expected shared for deit_tiny, got 'per_expert'"),
        (
            {"top_k": 2, "gate": "straight_through"},
            "gate: expected 'softmax' or 'none' with top_k 2, got 'straight_through'",
        ),
        ({"top_k": 3, "gate": "softmax"}, "top_k: expected at most the 2 experts, got 3"),
        (
            {"arch": "resnet18", "top_k": 2, "gate": "softmax"},
            "top_k: the layers of resnet18 take one expert each, got 2",
        ),
        (
            {"top_k": 2, "gate": "softmax", "router": "image"},
            "top_k: a choice for all tokens of an image takes one expert",
        ),
        ({"top_k": 2, "gate": "softmax", "route_per": "network"}, "top_k: a choice for all tokens of an image"),
        ({"moe_at": (13,)}, "moe_at: expected stages from 1 to 12"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"arch": "deit_tiny", "image_size": 8, "width": WIDTH, **options})


@pytest.mark.parametrize("method", ["at", "advmoe"])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "straight_through"), (2, "softmax")])
@pytest.mark.parametrize("share_epochs", [0, 1])
def test_at_and_advmoe_train_it(method: str, top_k: int, gate: str, share_epochs: int) -> None:
    model = small(num_experts=3, top_k=top_k, gate=gate, moe_at=(2, 4))
    routing = RoutingConfig(balance="switch", share_epochs=share_epochs)
    trainer = build_method(model, MethodConfig(method), OptimConfig(lr=0.01), ATTACK, routing)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for epoch in range(2):
        trainer.enter_epoch(epoch)
        trainer.begin_epoch(epoch)
        model.train()
        losses = trainer.step([batch(epoch)] * trainer.batches_per_step).losses
        trainer.settle()
        assert all(torch.isfinite(torch.tensor(value)) for value in losses.values())
        assert ("balance" in losses) == (epoch >= share_epochs)
        fc1 = model.blocks[1].mlp.fc1.weight.chunk(3)
        assert torch.equal(fc1[0], fc1[1]) == (epoch < share_epochs)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert router_parameters(model)


def test_sharing_is_exact_with_several_experts() -> None:
    """Gates of several choices are 1 in sum, so that copies compute what one expert does."""
    model = small(num_experts=3, top_k=2, gate="softmax").eval()
    from advmoe.training.methods.base import tie_experts

    tie_experts(model)
    together = model(images())
    for router in routers_of(model).values():
        router.only = 0
    torch.testing.assert_close(model(images()), together, rtol=1e-5, atol=1e-6)


def test_options_are_in_the_spec() -> None:
    model = small(num_experts=4, top_k=2, gate="softmax")
    assert dataclasses.asdict(model.spec)["router_options"]["top_k"] == 2
