# SPDX-License-Identifier: Apache-2.0
"""When a layer's routing plan is made, and that it is made once for a Routing."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, ops
from .backends import BackendUnavailable

if TYPE_CHECKING:
    from .geometry import Conv2dGeometry
    from .routing import Routing

__all__ = ["has_kernels_for_norm", "plan_for", "plan_for_norm"]

_LARGEST_TILE, _MANY_PIXELS = 128, 512  # of any backend


def plan_for(
    routing: Routing,
    in_routing: Routing | None,
    input: Tensor,  # [B, C, H, W]
    weight: Tensor,
    out_expert: Tensor | None,  # [V]
    in_expert: Tensor | None,  # [V]
    geometry: Conv2dGeometry,
) -> Tensor | None:
    """The plan that the backend's calls for this layer will read, or None where they read none.

    Kept on the routing, and on what ``ungated`` and ``expand`` make of it, as long as it is plainly that of the same
    values. In a compiled graph it is a node of each layer; where the graph is differentiated, torch's elimination of
    common subexpressions leaves one.
    """
    if input.is_meta:
        return None
    if not _able(input, "plans") or (out_expert is None and in_expert is None):
        return None
    if not _reads_plan(input, weight, geometry):
        return None
    same = out_expert is not None and geometry.num_in > 0
    same = same and (in_routing is None or _same_tensor(in_routing.expert, routing.expert))
    num_in = 0 if same else geometry.num_in
    chosen = [routing.expert] if geometry.num_out else []
    if num_in:
        chosen.append((routing if in_routing is None else in_routing).expert)
    traced = ops.traced(input, weight)
    return _shared(routing, chosen, out_expert, in_expert if num_in else None, geometry.num_out, num_in, traced)


def plan_for_norm(routing: Routing, input: Tensor, num_experts: int) -> Tensor | None:
    """The plan for statistics of each expert's samples: that of a partition on the output side."""
    if not (_able(input, "normalises") and _able(input, "plans")):
        return None
    expert = routing.expert.reshape(-1)
    return _shared(routing, [routing.expert], expert, None, num_experts, 0, ops.traced(input, input))


def has_kernels_for_norm(input: Tensor) -> bool:
    """Whether the backend for ``input`` normalises by its own kernels."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False  # torch's own operators have those derivatives
    return _able(input, "normalises")


def _able(input: Tensor, ability: str) -> bool:
    if input.is_meta:
        return False
    # under a trace the backend is chosen when the graph runs
    if torch.compiler.is_compiling() or (input.device.type == "cuda" and ops.traced(input, input)):
        return input.device.type == "cuda"
    try:
        return getattr(backends.choose(input.device), ability)
    except BackendUnavailable:  # the operator that needs it says so
        return False


def _shared(
    routing: Routing,
    chosen: list[Tensor],  # whose identity and version tell whether a kept plan holds
    out_expert: Tensor | None,
    inner: Tensor | None,
    num_out: int,
    num_in: int,
    traced: bool,
) -> Tensor:
    if traced:
        return ops.plan(out_expert, inner, num_out, num_in)
    now = _moment(chosen)
    key = (num_out, num_in)
    kept = routing.plans.get(key)
    if (
        kept is not None
        and now is not None
        and kept[1] == now
        and len(kept[0]) == len(chosen)
        and all(map(_same_tensor, kept[0], chosen))
    ):
        return kept[2]
    plan = ops.plan(out_expert, inner, num_out, num_in)
    if now is not None:
        routing.plans[key] = (chosen, now, plan)
    return plan


def _reads_plan(input: Tensor, weight: Tensor, g: Conv2dGeometry) -> bool:
    """From shapes and from what is differentiated: whether a call of this layer reads a plan."""
    # a compiled graph may run with any backend, and for a batch of another size
    least, below = 0, _MANY_PIXELS
    if not ops.traced(input, input):
        backend = backends.choose(input.device)
        least, below = backend.plans_from, backend.plan_below
    if input.shape[0] * g.samples_per_input < least:
        return False
    gradients = torch.is_grad_enabled()
    if gradients and weight.requires_grad:
        return True

    def mixes(pixels: int) -> bool:
        return pixels < below and pixels % _LARGEST_TILE != 0

    rows, columns = ops.output_shape(input, weight, g)[2:]
    if mixes(rows * columns):
        return True
    residues = [-(-input.shape[2 + a] // g.stride[a]) for a in (0, 1)]
    return gradients and input.requires_grad and mixes(residues[0] * residues[1])


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or views of one with the same elements in the same order: versions are shared then."""
    if a is b:
        return True
    related = (a if a._base is None else a._base) is (b if b._base is None else b._base)
    return related and a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() and b.is_contiguous()


def _moment(tensors: list[Tensor]) -> Any:
    """What tells one value of these tensors from a later one; None where nothing does, and no plan is kept."""
    if any(t.is_inference() for t in tensors):
        return None
    versions = [t._version for t in tensors]
    device = tensors[0].device
    if device.type != "cuda":
        return versions, 0, 0
    # A plan made on another stream may not be there yet. One made outside a capture is no part of the graph, and one made
    # in another capture is part of that graph.
    stream = torch.cuda.current_stream(device).cuda_stream
    if not torch.cuda.is_current_stream_capturing():
        return versions, stream, 0
    capture = _capture(stream)
    return None if capture is None else (versions, stream, capture)


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return None


def _capture(stream: int) -> int | None:
    """The driver's number of the capture that a stream is in, or None where it does not say."""
    query = _driver()
    if query is None:
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    arguments = (ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value if query(*arguments) == 0 and number.value else None
