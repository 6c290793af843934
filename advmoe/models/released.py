# SPDX-License-Identifier: Apache-2.0
"""Weights of AdvMoE's released code (Zhang et al., ICCV 2023; OPTML-Group/Robust-MoE-CNN on GitHub) in this library's
models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import RoutedConv2d

from .base import ModelSpec, Normalize
from .layers import Backbone
from .wide_resnet import WideResNet

__all__ = ["load_released"]

# their forwards skip the normalisation that a run may have hung on them
_NEVER_NORMALIZED = ("vgg16_bn", "densenet40")
_BUFFERS = ("normalize.mean", "normalize.std")
_NAMED = 8  # keys in a message


def load_released(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads what a run of the released code saved; nothing is changed if something does not fit.

    Takes the model's ``state_dict`` or the checkpoint that holds it, also of a network wrapped in ``DataParallel``. Of
    the router, which that code registers in every routed convolution too, the copies are compared and left out.

    Where the released WRN-28-10 has a projection, it and the first convolution read the block's input without BatchNorm
    and ReLU; this switches the model's blocks to that (all but the dense ones with the 3×3 stem). The state_dict does not
    hold the switch: a model that is made anew is loaded anew.

    Args:
        model: of :func:`create_model`, of kind ``"moe"`` with layout ``"partition"``, router ``"global"`` and shared
            BatchNorms, or of kind ``"dense"`` or ``"s_dense"`` (their ``_ori`` models); at the default width, and
            normalising as the released run did: ``normalize=False`` unless it was started with ``--normalize``, whose
            ``mean`` and ``std`` the model must then have. VGG and DenseNet never normalise there.
        state_dict: tensors by the released code's names.

    Raises:
        ValueError: for a model of another form, for keys that are missing, unexpected or of another shape (named), for
            copies of the router that differ, and for another normalisation.
    """
    model = _checked(model)
    spec = model.spec
    inner = state_dict.get("state_dict")
    given = dict(inner if isinstance(inner, Mapping) else state_dict)
    if all(key.startswith("module.") for key in given):
        given = {key.removeprefix("module."): value for key, value in given.items()}
    normalization = [given.pop(name, None) for name in _BUFFERS]

    own = model.state_dict()
    keys = {_released_key(spec, name): name for name in own}
    copies = _pop_copies(model, spec, given)
    missing = [key for key in keys if key not in given]
    unexpected = [key for key, value in given.items() if key not in keys or not isinstance(value, Tensor)]
    shapes = [
        f"{key} {list(given[key].shape)} instead of {list(own[name].shape)}"
        for key, name in keys.items()
        if key not in missing and key not in unexpected and given[key].shape != own[name].shape
    ]
    faults = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    if any(names for _, names in faults):
        listed = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults if names)
        raise ValueError(f"state_dict: expected that of the released {spec.arch} of kind {spec.kind}; {listed}")
    differing = [key for key, (original, value) in copies.items() if not _equal(value, given[original])]
    if differing:
        raise ValueError(f"state_dict: expected equal copies of one router; other values in {_some(differing)}")
    _check_normalization(model, *normalization)

    model.load_state_dict({name: given[key] for key, name in keys.items()})
    if isinstance(model, WideResNet):
        for stage in model.stages:
            for block in getattr(model, stage).children():
                block.raw_input = spec.routed or spec.imagenet_stem


def _checked(model: nn.Module) -> Backbone:
    if not isinstance(model, Backbone):
        raise ValueError(f"model: expected one of create_model, got {type(model).__name__}")
    spec = model.spec
    if spec.kind not in ("dense", "s_dense", "moe"):
        raise ValueError(f"model: expected kind 'dense', 's_dense' or 'moe', got {spec.kind!r}")
    if not spec.routed:
        return model
    if spec.arch == "densenet40":
        raise ValueError("model: the released code cannot construct a DenseNet of kind 'moe'")
    for name, released in (("layout", "partition"), ("router", "global"), ("bn", "shared"), ("moe_at", None)):
        if getattr(spec, name) != released:
            raise ValueError(f"model: expected {name}={released!r} as released, got {getattr(spec, name)!r}")
    return model


def _released_key(spec: ModelSpec, name: str) -> str:
    """The released code's name for one of ours."""
    if name.startswith("router."):
        name = name.replace("router.linear.", "router.fc.")
        return re.sub(r"^router\.blocks\.(\d)\.", lambda m: f"router.layer{int(m[1]) // 3 + 1}.{int(m[1]) % 3}.", name)
    if spec.arch == "wrn28_10":
        return re.sub(r"^(block\d)\.", r"\1.layer.", name)
    if spec.arch.startswith("resnet") and spec.imagenet_stem:
        return re.sub(r"^linear\.", "fc.", name).replace(".shortcut.", ".downsample.")
    return name


def _pop_copies(model: nn.Module, spec: ModelSpec, given: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Takes the routers of the routed convolutions out of ``given``: key: (that of the model's own router, value)."""
    routed = (name for name, module in model.named_modules() if isinstance(module, RoutedConv2d))
    homes = {_released_key(spec, f"{name}.router.") for name in routed}
    copies = {}
    for key in list(given):
        home, dot, rest = key.partition(".router.")
        if dot and home + dot in homes and f"router.{rest}" in given:
            copies[key] = (f"router.{rest}", given.pop(key))
    return copies


def _equal(a: Any, b: Tensor) -> bool:
    # a run that diverged has NaN in all copies
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _check_normalization(model: Backbone, mean: Any, std: Any) -> None:
    own = model.normalize if isinstance(model.normalize, Normalize) else None
    if mean is None or std is None or model.spec.arch in _NEVER_NORMALIZED:
        if own is not None:
            raise ValueError("model: the released network does not normalise its images; expected normalize=False")
        return
    for name, value in (("mean", mean), ("std", std)):
        expected = tuple(round(v, 6) for v in value.tolist())
        got = None if own is None else tuple(round(v, 6) for v in getattr(own, name).flatten().tolist())
        if got != expected:
            raise ValueError(f"model: expected normalize=True and {name}={expected} as in the state_dict, got {got}")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
