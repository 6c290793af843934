# SPDX-License-Identifier: Apache-2.0
"""Vision transformers (DeiT: Touvron et al. 2021; in timm's names), dense or with a mixture of experts in place of the
MLP of every second block (V-MoE: Riquelme et al. 2021; trained adversarially by Puigcerver et al. 2022)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedConv2d, RoutedLinear

from ..routers import RouterOptions, routers_of
from .base import ModelSpec, register_model
from .layers import Backbone, Path, add_router, layer_norm, linear

__all__ = ["Attention", "MoeMlp", "VisionTransformer"]


class PatchEmbed(nn.Module):
    """Images ``[B, 3, S, S]`` to tokens ``[B, (S / patch)^2, D]``."""

    def __init__(self, spec: ModelSpec, patch: int, features: int) -> None:
        super().__init__()
        self.proj: nn.Module
        if spec.whole:
            self.proj = RoutedConv2d(3, features, patch, patch, num_experts=spec.num_experts)
        else:
            self.proj = nn.Conv2d(3, features, patch, patch)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        return path.convolve(self.proj, x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention of ``heads`` heads over tokens ``[B, T, D]``."""

    def __init__(self, spec: ModelSpec, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(spec, features, 3 * features)
        self.proj = linear(spec, features, features)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        batch, tokens, features = x.shape
        qkv = path.linear(self.qkv, x).reshape(batch, tokens, 3, self.heads, features // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return path.linear(self.proj, y.transpose(1, 2).reshape(batch, tokens, features))

    def own_macs(self, output: Tensor) -> int:
        """Multiply-accumulates of one image, which may have several experts' samples here, beside its layers': scores and
        their sums of values, T^2 D each."""
        return 2 * output.shape[1] * output.numel()


class Mlp(nn.Module):
    def __init__(self, spec: ModelSpec, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = linear(spec, features, hidden)
        self.fc2 = linear(spec, hidden, features)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        return path.linear(self.fc2, F.gelu(path.linear(self.fc1, x)))


class MoeMlp(nn.Module):
    """N MLPs of ``int(ratio * hidden)`` hidden features, of which each token has its own choice, or, where the path has
    one choice for the image, all tokens that one.

    In the partition layout an expert has weights of its own; in the windows layout its hidden features are a window of
    the dense MLP's.
    """

    def __init__(self, spec: ModelSpec, features: int, hidden: int) -> None:
        super().__init__()
        n = spec.num_experts
        inner = ExpertSlices.windows(hidden, spec.ratio, n) if spec.windows else spec.scaled(hidden)
        self.fc1 = RoutedLinear(features, inner, num_experts=n)
        self.fc2 = RoutedLinear(inner, ExpertSlices.whole(features) if spec.windows else features, num_experts=n)
        if spec.route_per == "layer":
            add_router(self, spec, features)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        if path.choice is not None:
            inner = path.choice.expand()
            return path.choice.combine(self.fc2(F.gelu(self.fc1(x, inner)), inner))
        tokens = x.flatten(0, 1)  # [B * T, D]
        routing = self.router.route(tokens[:, :, None, None])  # type: ignore[union-attr,operator]
        inner = routing.expand()
        return routing.combine(self.fc2(F.gelu(self.fc1(tokens, inner)), inner)).view_as(x)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec, features: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(spec, features)
        self.attn = Attention(spec, features, heads)
        self.norm2 = layer_norm(spec, features)
        hidden = 4 * features
        self.mlp = MoeMlp(spec, features, hidden) if spec.routed else Mlp(spec, features, spec.scaled(hidden))

    def forward(self, x: Tensor, path: Path) -> Tensor:
        x = x + self.attn(path.normalize(self.norm1, x), path)
        return x + self.mlp(path.normalize(self.norm2, x), path)


class VisionTransformer(Backbone):
    """A stage is a block here: ``moe_at`` names the blocks with experts, by default 2, 4, …; those left out are dense.

    The ratio scales the hidden features of MLPs: all of kind s_dense, those with experts of kind moe. Patches have 16
    pixels from 128-pixel images on, 8 from 64 and 4 below.
    """

    takes_top_k = True

    def __init__(self, spec: ModelSpec, features: int, depth: int) -> None:
        super().__init__(spec, depth)
        self.settings = features, depth
        features = features if spec.width is None else spec.width
        heads = max(1, features // 64)
        patch = 16 if spec.image_size >= 128 else 8 if spec.image_size >= 64 else 4
        if spec.kind == "sparse":
            raise ValueError(
                f"kind: {spec.arch} has no channels of convolutions to remove; expected dense, s_dense or moe"
            )
        if spec.gate_after != "conv":
            raise ValueError(f"gate_after: {spec.arch} has no BatchNorms; expected 'conv'")
        if spec.stem is not None:
            raise ValueError(f"stem: {spec.arch} has patches instead, got {spec.stem!r}")
        if spec.image_size % patch:
            raise ValueError(f"image_size: {spec.arch} has patches of {patch} pixels here, got {spec.image_size}")
        if features % heads:
            raise ValueError(f"width: expected a multiple of the {heads} heads, got {features}")
        for name, value, only in (("route_per", spec.route_per, ("layer", "network")), ("bn", spec.bn, ("shared",))):
            if spec.routed and value not in only and not (name == "bn" and spec.windows):
                raise ValueError(f"{name}: expected {' or '.join(only)} for {spec.arch}, got {value!r}")
        if spec.router_options.top_k > 1 and spec.route_per != "layer":
            raise ValueError(
                f"top_k: a choice for all tokens of an image takes one expert, got {spec.router_options.top_k}"
            )
        self.patch_embed = PatchEmbed(spec, patch, features)
        own = spec.num_experts if spec.whole else 1
        self.slices = ExpertSlices.partition(1, own)  # of class token and positions, each expert's own
        self.cls_token = nn.Parameter(torch.zeros(own, 1, features))
        self.pos_embed = nn.Parameter(torch.zeros(own, 1 + (spec.image_size // patch) ** 2, features))
        self._add_network_router(features)
        routed = tuple(range(2, depth + 1, 2)) if spec.moe_at is None else spec.moe_at
        self.blocks = nn.ModuleList(
            Block(spec if i in routed or not spec.routed else spec.dense(), features, heads) for i in range(1, depth + 1)
        )
        self.norm = layer_norm(spec, features)
        self.head = linear(spec, features, spec.num_classes)
        self._initialize()

    def _initialize(self) -> None:
        """Linear layers, class token and positions N(0, 0.02) within two deviations, biases 0, as DeiT's; routers keep
        torch's own."""
        skip = {id(m) for router in routers_of(self).values() for m in router.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear | RoutedLinear) and id(module) not in skip:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)

    def _upcycled(self, num_experts: int, ratio: float, router: str, options: RouterOptions) -> VisionTransformer:
        """The same with experts: copies of each MLP's hidden features of the largest norms, in and out."""
        if self.spec.kind != "dense":
            raise ValueError(f"dense_model: expected one of kind dense, got {self.spec.kind!r}")
        spec = dataclasses.replace(
            self.spec, kind="moe", layout="partition", num_experts=num_experts, ratio=ratio, router=router,
            router_options=options, route_per="layer",
        )  # fmt: skip
        model = VisionTransformer(spec, *self.settings).to(self.cls_token.device, self.cls_token.dtype)
        own = dict(self.state_dict())
        for name, block in model.blocks.named_children():
            mlp = block.mlp
            if isinstance(mlp, MoeMlp):
                fc1, fc2 = (f"blocks.{name}.mlp.{layer}" for layer in ("fc1", "fc2"))
                rows, columns = own[f"{fc1}.weight"], own[f"{fc2}.weight"]
                norms = rows.abs().sum(1) * columns.abs().sum(0)
                kept = norms.argsort(descending=True, stable=True)[: mlp.fc1.out_features].sort().values
                own |= {
                    f"{fc1}.weight": rows[kept].repeat(num_experts, 1),
                    f"{fc1}.bias": own[f"{fc1}.bias"][kept].repeat(num_experts),
                    f"{fc2}.weight": columns[:, kept].repeat(num_experts, 1),
                    f"{fc2}.bias": own[f"{fc2}.bias"].repeat(num_experts),
                }
        routers = {n: v for n, v in model.state_dict().items() if ".router." in n}
        model.load_state_dict({**own, **routers})
        return model.train(self.training)

    def run(self, x: Tensor, path: Path) -> Tensor:
        x = self.patch_embed(x, path)
        if not self.image_level:
            path.enter(self, x.transpose(1, 2).unsqueeze(3))
        x = torch.cat([path.rows(self.cls_token).expand(x.shape[0], -1, -1), x], 1) + path.rows(self.pos_embed)
        for block in self.blocks:
            x = block(x, path)
        return path.linear(self.head, path.gated(path.normalize(self.norm, x)[:, 0]))


@register_model("deit_tiny")
def deit_tiny(spec: ModelSpec) -> nn.Module:
    """DeiT-Tiny: 12 blocks of 192 features and 3 heads; of kind moe six of them with experts."""
    return VisionTransformer(spec, 192, 12)


@register_model("vit_small")
def vit_small(spec: ModelSpec) -> nn.Module:
    """ViT-Small: 12 blocks of 384 features and 6 heads; of kind moe six of them with experts."""
    return VisionTransformer(spec, 384, 12)
