# SPDX-License-Identifier: Apache-2.0
"""Structured sparsity: AT (Sparse), the baseline of AdvMoE (Zhang et al., ICCV 2023) that keeps a share r of each
layer's output channels, the same for all images.

The masks are learned as in HYDRA (Sehwag et al., NeurIPS 2020): behind a pretraining, scores take the gradients while
the weights rest (``start_search`` … ``fix_masks``), then the weights are finetuned with the masks as they are. HYDRA
removes single weights; AdvMoE's released layer ranks whole output channels by the L1 norm of their scores, and so does
this one.

A removed channel is zero from its convolution to whatever reads it: behind a norm too, which would else give its
constant beta. Hence ``compact`` can leave it out altogether.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .modes import undisturbed

__all__ = [
    "Add",
    "IndexedAdd",
    "LiveBatchNorm2d",
    "MaskedConv2d",
    "compact",
    "fix_masks",
    "masked_convolutions",
    "score_parameters",
    "set_searching",
    "start_search",
    "store_masks",
    "update_alive",
]


class MaskedConv2d(nn.Conv2d):
    """A convolution of which ``kept = max(1, int(ratio * out_channels))`` output channels remain.

    Attributes:
        scores: ``[O, I, kH, kW]``, what the search learns; outside of it frozen and in no graph.
        mask: ``[O]``, 1 for a channel that is kept, 0 for one removed; all ones before ``fix_masks``.
        searching: whether the scores choose, in each forward, instead of ``mask``.

    The released layer removes ``int((1 - ratio) * O)`` channels, and so keeps one more than a pathway of that ratio has
    where ``ratio * O`` is no integer; here both have the same.

    Raises:
        ValueError: if the ratio is not in (0, 1], or for groups.
    """

    mask: Tensor

    def __init__(self, *args: Any, ratio: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
        if self.groups != 1:
            raise ValueError(f"groups: expected 1, got {self.groups}")
        self.ratio = ratio
        self.kept = max(1, int(ratio * self.out_channels))
        self.searching = False
        self.scores = nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)
        self.register_buffer("mask", torch.ones(self.out_channels, device=self.weight.device, dtype=self.weight.dtype))

    def current_mask(self) -> Tensor:
        """``[O]``: ``mask``, or while searching the one that the scores choose: the channels with the largest sums of
        ``|scores|``; of equal ones those that come first."""
        if not self.searching:
            return self.mask
        order = self.scores.detach().abs().flatten(1).sum(1).argsort(descending=True, stable=True)
        return torch.zeros_like(self.mask).index_fill(0, order[: self.kept], 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, I, H, W]`` to ``[B, O, H', W']``, zero in removed channels.

        While searching, the mask's gradient goes straight through to ``|scores|``, element by element, as released:
        ``d scores = d(weight * mask) * weight * sign(scores)``; weight and bias get none.
        """
        mask = self.current_mask()
        rows = mask[:, None, None, None]
        bias = None if self.bias is None else self.bias * mask
        if not self.searching:
            return self._conv_forward(x, self.weight * rows, bias)
        magnitude = self.scores.abs()
        weight = self.weight.detach() * (rows + (magnitude - magnitude.detach()))
        return self._conv_forward(x, weight, None if bias is None else bias.detach())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ratio={self.ratio}"


class LiveBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm(x) * alive``: channels that come in as constant zeros stay so.

    Attributes:
        alive: ``[C]``, ones at first; ``update_alive`` finds it.
        searching: whether masks are searched for. Then a removed channel, whose output is (but for 1e-30) zero as ever,
            passes its gradient on as the running variance scales it, and keeps its running statistics. By those of the
            batch, where its variance is 0, the gradient would be ``1 / sqrt(eps)``, some hundred times, too large, and
            the masks would not come to rest.
    """

    alive: Tensor

    def __init__(self, num_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.searching = False
        self.register_buffer("alive", torch.ones(num_features, device=kwargs.get("device"), dtype=kwargs.get("dtype")))

    def forward(self, x: Tensor) -> Tensor:
        if not self.searching:
            return super().forward(x) * self.alive[:, None, None]
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None:
            raise ValueError("track_running_stats: masks are searched for with running statistics only, got False")
        scale = torch.rsqrt(var + self.eps) * (1 - self.alive)
        if self.weight is not None:
            scale = scale * self.weight.detach()
        before = mean.clone(), var.clone()
        removed = (1 - self.alive)[:, None, None]
        # so little above 0 that a ReLU behind it lets the gradient pass
        y = super().forward(x) * self.alive[:, None, None] + x * scale[:, None, None] + 1e-30 * removed
        if self.training:
            # new tensors: the forward has saved those that it has written to
            self.running_mean = torch.where(self.alive > 0, mean, before[0])
            self.running_var = torch.where(self.alive > 0, var, before[1])
        return y


class Add(nn.Module):
    """``a + b`` as a module, which ``compact`` can replace."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class IndexedAdd(nn.Module):
    """The sum of two tensors that hold different channels.

    Args:
        index_a, index_b: ``[C_a]``, ``[C_b]``: where the channels of each lie in the result, each once.
        size: C, the channels of the result; those of neither are zero.
    """

    index_a: Tensor
    index_b: Tensor

    def __init__(self, index_a: Tensor, index_b: Tensor, size: int) -> None:
        super().__init__()
        self.register_buffer("index_a", index_a)
        self.register_buffer("index_b", index_b)
        self.size = size

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a ``[B, C_a, ...]``, b ``[B, C_b, ...]`` to ``[B, C, ...]``."""
        total = a.new_zeros((a.shape[0], self.size, *a.shape[2:]))
        return total.index_copy(1, self.index_a, a).index_add(1, self.index_b, b)


def masked_convolutions(model: nn.Module) -> dict[str, MaskedConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedConv2d)}


def score_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What the search's optimiser takes."""
    return [conv.scores for conv in masked_convolutions(model).values()]


def set_searching(model: nn.Module, searching: bool) -> None:
    """Lets the scores choose the masks, and take gradients; or no longer."""
    for conv in masked_convolutions(model).values():
        conv.searching = searching
        conv.scores.requires_grad_(searching)
        if not searching:
            # an optimiser that still holds the scores would let them decay by a gradient of zeros
            conv.scores.grad = None
    for norm in _norms(model).values():
        norm.searching = searching


def start_search(model: nn.Module) -> None:
    """Lets scores choose the masks from now on, beginning with those of the largest weights.

    The scores are HYDRA's scaled initialisation (equation 4, and ``initialize_scaled_score`` of its code):
    ``sqrt(6 / fan_in) * weight / max |weight|`` of each layer, the range of a Kaiming uniform one in the order of the
    pretrained weights. Call ``update_alive`` before each forward while the scores move.

    Raises:
        ValueError: if there is no masked convolution.
    """
    with torch.no_grad():
        for conv in _masked(model).values():
            weight = conv.weight
            largest = weight.abs().max().clamp_min(torch.finfo(weight.dtype).tiny)
            conv.scores.copy_(math.sqrt(6 / weight[0].numel()) * weight / largest)
    set_searching(model, True)


def store_masks(model: nn.Module) -> None:
    """Makes ``mask`` what the scores choose now: a state_dict then holds the network as it is."""
    for conv in _masked(model).values():
        conv.mask.copy_(conv.current_mask())


def fix_masks(model: nn.Module) -> None:
    """Ends the search: what the scores chose becomes ``mask``. The norms learn of it by ``update_alive``.

    Raises:
        ValueError: if no search was begun.
    """
    if not all(conv.searching for conv in _masked(model).values()):
        raise ValueError("model: expected one that is searching; call start_search first")
    store_masks(model)
    set_searching(model, False)


def update_alive(model: nn.Module, image_size: int, channels: int = 3) -> None:
    """Finds which channels reach each LiveBatchNorm2d at all, for the masks in force, and writes its ``alive``.

    By one forward of one image ``[1, channels, image_size, image_size]`` in which convolutions give their masks and
    norms what they get: it takes any architecture whose other operations keep zeros zero and positive numbers positive
    (ReLU, sums, concatenations, pooling, flattening). Otherwise the model is left as it was. Not between a forward and
    its backward, which needs the ``alive`` of the forward.

    Raises:
        ValueError: if there is no masked convolution, or if a norm is used twice, on different channels.
    """
    _masked(model)
    with undisturbed(model):
        arrived = _probe(model, image_size, channels)
    for norm in _norms(model).values():
        if norm in arrived:
            norm.alive.copy_(arrived[norm][0])


def compact(model: nn.Module, image_size: int, channels: int = 3) -> nn.Module:
    """A copy without the removed channels, made of ordinary layers, that gives the same outputs in eval mode.

    Masked convolutions become nn.Conv2d, norms nn.BatchNorm2d over their live channels; convolutions and linear layers
    lose the inputs that are always zero, and an :class:`Add` of different channels becomes an :class:`IndexedAdd`.

    Args:
        image_size, channels: of the images, as for ``update_alive``.

    Raises:
        ValueError: if there is no masked convolution or it still searches, if ``alive`` does not go with the masks, and
            for architectures that this cannot do: other layers with parameters that get removed channels, a module used
            twice on different ones, or sums of different channels without an Add. The copy is held against the model
            on one random image, in float64, so that none of them goes unnoticed.
    """
    convolutions = _masked(model)
    for name, conv in convolutions.items():
        if conv.searching:
            raise ValueError(f"model: {name} is still searching; call fix_masks and update_alive first")
    result = copy.deepcopy(model)
    with undisturbed(result):
        arrived = _probe(result, image_size, channels)
    names = {module: name for name, module in result.named_modules()}
    smaller = {module: _smaller(names[module], module, *live) for module, live in arrived.items()}
    for parent in list(result.modules()):
        # not named_children, which leaves out a second name of the same module
        for child_name, child in parent._modules.items():
            if child in smaller:
                parent._modules[child_name] = smaller[child]
    result = smaller.get(result, result)
    _check_equal(result, model, image_size, channels)
    return result


def _masked(model: nn.Module) -> dict[str, MaskedConv2d]:
    convolutions = masked_convolutions(model)
    if not convolutions:
        raise ValueError("model: expected one with masked convolutions (MaskedConv2d), got none")
    return convolutions


def _norms(model: nn.Module) -> dict[str, LiveBatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LiveBatchNorm2d)}


def _probe(model: nn.Module, image_size: int, channels: int) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Which channels of each input are alive, bool ``[C]``, at additions and at leaves with parameters or buffers."""
    arrived: dict[nn.Module, tuple[Tensor, ...]] = {}

    def hook(name: str) -> Callable[..., Any]:
        def look(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            live = tuple(_live(x, -1 if isinstance(module, nn.Linear) else 1) for x in args if isinstance(x, Tensor))
            before = arrived.setdefault(module, live)
            if len(before) != len(live) or not all(map(torch.equal, before, live)):
                raise ValueError(f"model: {name} is used more than once, on different channels; give each use its own")
            if isinstance(module, Add) or not isinstance(output, Tensor):
                return None
            if isinstance(module, LiveBatchNorm2d):
                return args[0]
            # not a broadcast view: what follows may work in place
            ones = torch.ones_like(output)
            return ones * module.current_mask()[:, None, None] if isinstance(module, MaskedConv2d) else ones

        return look

    handles = []
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None and bool(module._parameters or module._buffers)
        if leaf or isinstance(module, (Add, MaskedConv2d, LiveBatchNorm2d)):
            handles.append(module.register_forward_hook(hook(name)))
    weight = next(model.parameters())
    image = torch.ones((1, channels, image_size, image_size), device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return arrived


def _live(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).flatten(1).amax(1) > 0 if x.dim() > 1 else x > 0


def _smaller(name: str, module: nn.Module, *live: Tensor) -> nn.Module:
    """What takes the module's place, given the live channels of its inputs."""
    if isinstance(module, Add):
        a, b = live
        if torch.equal(a, b):
            return module
        union = a | b
        place = union.cumsum(0) - 1
        return IndexedAdd(place[a], place[b], int(union.sum()))
    if isinstance(module, MaskedConv2d):
        return _convolution(module, module.mask > 0, live[0])
    if isinstance(module, LiveBatchNorm2d):
        if not torch.equal(module.alive > 0, live[0]):
            raise ValueError(f"model: alive of {name} does not go with the masks; call update_alive first")
        return _norm(module, live[0])
    if all(bool(mine.all()) for mine in live):
        return module
    if type(module) is nn.Linear:
        return _linear(module, live[0])
    if type(module) is nn.Conv2d and module.groups == 1:
        return _convolution(module, torch.ones_like(module.weight[:, 0, 0, 0], dtype=torch.bool), live[0])
    raise ValueError(f"model: removed channels reach {name}, a {type(module).__name__}, which cannot be made smaller")


def _part(parameter: Tensor | None, *index: Tensor) -> nn.Parameter | None:
    """``parameter[index[0]][:, index[1]]…``, contiguous."""
    if parameter is None:
        return None
    part = parameter.detach()
    for dim, keep in enumerate(index):
        part = part.index_select(dim, keep.nonzero()[:, 0])
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


# New layers begin on the meta device, where an initialisation costs nothing and draws no random numbers.


def _convolution(conv: nn.Conv2d, rows: Tensor, columns: Tensor) -> nn.Conv2d:
    weight = _part(conv.weight, rows, columns)
    assert weight is not None
    # torch declares the geometry as tuples of any length
    geometry: dict[str, Any] = {n: getattr(conv, n) for n in ("kernel_size", "stride", "padding", "dilation")}
    kind: dict[str, Any] = {"bias": conv.bias is not None, "padding_mode": conv.padding_mode}
    small = nn.Conv2d(weight.shape[1], weight.shape[0], **geometry, **kind, device="meta")
    small.weight, small.bias = weight, _part(conv.bias, rows)
    return small.train(conv.training)


def _linear(linear: nn.Linear, columns: Tensor) -> nn.Linear:
    weight = _part(linear.weight, torch.ones_like(linear.weight[:, 0], dtype=torch.bool), columns)
    assert weight is not None
    small = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    small.weight, small.bias = weight, linear.bias
    return small.train(linear.training)


def _norm(norm: LiveBatchNorm2d, alive: Tensor) -> nn.BatchNorm2d:
    small = nn.BatchNorm2d(
        int(alive.sum()), norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    small.weight, small.bias = _part(norm.weight, alive), _part(norm.bias, alive)  # type: ignore[assignment]
    for name, buffer in norm.named_buffers():
        if name != "alive":
            setattr(small, name, buffer[alive] if buffer.dim() else buffer)
    return small.train(norm.training)


def _check_equal(result: nn.Module, model: nn.Module, image_size: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((1, channels, image_size, image_size), generator=generator, dtype=torch.float64)
    image = image.to(next(model.parameters()).device)
    expected = "model: expected sums of different channels as modules Add, and outputs without removed channels"
    with torch.no_grad():
        want = copy.deepcopy(model).double().eval()(image)
        try:
            got = copy.deepcopy(result).double().eval()(image)
        except RuntimeError as error:
            raise ValueError(f"{expected}; the compact copy fails: {error}") from error
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max())):
        raise ValueError(f"{expected}; the compact copy gives other ones")
