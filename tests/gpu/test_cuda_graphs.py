# SPDX-License-Identifier: Apache-2.0
"""Nothing waits for the device; a whole training step is a CUDA graph, replayed with other routings; torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from on_device import (
    DEVICE,
    FEW,
    MANY,
    all_zero,
    assert_same_bits,
    capture,
    choice,
    counters,
    gradients,
    images,
    net,
    no_synchronisation,
    sgd,
    train,
    warm_up,
)
from oracle import windows
from torch import Tensor, nn

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing

pytestmark = pytest.mark.gpu

CHOICES = ([0, 1, 2, 0, 1, 1], [2, 2, 2, 2, 2, 2], [1, 0, 0, 2, 1, 0])


def _choices(batch: int) -> list[Tensor]:
    return [torch.tensor(choices, device=DEVICE).repeat(batch // 6) for choices in CHOICES]


# --- no synchronisation -------------------------------------------------------------------------------------------------


def test_a_training_step_waits_for_nothing() -> None:
    model = net()
    optimizer = sgd(model)
    x, target = images(), torch.randint(10, (6,), device=DEVICE)
    train(model, optimizer, x, target)  # compiles, and makes the optimizer's state
    with no_synchronisation():
        for _ in range(2):
            train(model, optimizer, x, target)
            with torch.no_grad():
                model.eval()(x)
            model.train()


def test_fresh_layers_wait_for_nothing() -> None:
    """Slices that no layer of this process had before: where they begin must not be copied from the host."""
    x, routing = images(), choice(0, 1, 2, 0, 1, 1)
    scores = torch.randn(6, 3, device=DEVICE, requires_grad=True)

    def run(total: int) -> None:
        slices = windows(total, 0.5, 3)
        first = RoutedConv2d(16, slices, 3, padding=1, device=DEVICE)
        norm = RoutedBatchNorm2d(slices, device=DEVICE)
        second = RoutedConv2d(slices, 24, 3, num_experts=3, device=DEVICE)
        head = RoutedLinear(24, windows(total + 2, 0.5, 3), device=DEVICE)
        y = norm(first(x, routing), routing).relu()
        top = Routing.from_scores(scores, top_k=2, gate="softmax")
        results = (
            head(second(y, routing).mean((2, 3)), routing),
            first(x, top),
            top.combine(second(first(x, top.expand()), top.expand())),
            Routing.from_scores(scores, gate="softmax").combine(first(x, routing)),
        )
        torch.stack([result.square().sum() for result in results]).sum().backward()

    run(64)
    with no_synchronisation():
        run(64)  # the kernels are there: what is new is the layers alone
        run(96)


# --- CUDA graphs --------------------------------------------------------------------------------------------------------


def test_a_training_step_as_a_graph_with_its_router() -> None:
    """Forward, loss, backward and step; the replays' routings differ, and the parameters keep eager's bits."""
    eager = net()
    model, optimizer, eager_optimizer = copy.deepcopy(eager), None, sgd(eager)
    optimizer = sgd(model)
    batches = [(images(), torch.randint(10, (6,), device=DEVICE)) for _ in range(4)]
    with torch.no_grad():
        chosen = {tuple(eager.route(x).expert.tolist()) for x, _ in batches}
    assert len(chosen) > 1, "the batches must differ in what they choose"

    x, target = (t.clone() for t in batches[0])
    losses: list[Tensor] = []

    def step() -> None:
        losses[:] = [train(model, optimizer, x, target)]

    warm_up(step)
    optimizer.zero_grad(set_to_none=True)
    replay = capture(step)
    with torch.no_grad():  # back to the start: the warm-up was training too
        for mine, first in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
            mine.copy_(first)
        for state in optimizer.state.values():
            state["momentum_buffer"].zero_()
    for images_now, target_now in batches:
        x.copy_(images_now)
        target.copy_(target_now)
        replay()
        expected = train(eager, eager_optimizer, images_now, target_now)
        assert torch.equal(losses[0], expected)
        assert_same_bits(gradients(model), gradients(eager))
        assert_same_bits(model.state_dict(), eager.state_dict())


def _captured(model: nn.Module, x: Tensor, routing: Routing, dy: Tensor) -> tuple[object, dict[str, Tensor]]:
    """A forward and backward as a graph, and where it leaves its results."""
    found: dict[str, Tensor] = {}

    def step() -> None:
        leaf = x.detach().requires_grad_()
        y = model(leaf, routing)
        names, parameters = zip(*model.named_parameters(), strict=True)
        dx, *rest = torch.autograd.grad(y, [leaf, *parameters], dy)
        found.update({"output": y.detach(), "input": dx, **dict(zip(names, rest, strict=True))})

    warm_up(step)
    return capture(step), found


def _eager(model: nn.Module, x: Tensor, expert: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = model(leaf, Routing(expert.clone(), num_experts=3))
    names, parameters = zip(*model.named_parameters(), strict=True)
    dx, *rest = torch.autograd.grad(y, [leaf, *parameters], dy)
    return {"output": y.detach(), "input": dx, **dict(zip(names, rest, strict=True))}


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_a_routing_made_before_the_capture_may_change_between_replays(batch: int) -> None:
    """Its plan, kept from the eager calls before, is no part of the graph and must not be used in it."""
    model, x = net(router=False), images(batch)
    first, *others = _choices(batch)
    expert = first.clone()
    routing, dy = Routing(expert, num_experts=3), torch.randn(batch, 10, device=DEVICE)
    model(x, routing).sum().backward()
    replay, found = _captured(model, x, routing, dy)
    for now in others:
        expert.copy_(now)
        replay()  # type: ignore[operator]
        assert_same_bits(found, _eager(model, x, expert, dy))
    # and the plan of the capture, in memory that belongs to the graph, serves no eager call
    expert.copy_(first)
    expected = _eager(model, x, expert, dy)
    assert torch.equal(model(x, routing), expected["output"])


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_two_captures_with_one_routing(batch: int) -> None:
    """Each makes its own plan: the second one is replayed first, when the first one's plan is of other choices."""
    models = [net(router=False), net(router=False)]
    x, dy = images(batch), torch.randn(batch, 10, device=DEVICE)
    first, *others = _choices(batch)
    expert = first.clone()
    routing = Routing(expert, num_experts=3)
    captured = [_captured(model, x, routing, dy) for model in models]
    for now in others:
        expert.copy_(now)
        for model, (replay, found) in reversed(list(zip(models, captured, strict=True))):
            replay()  # type: ignore[operator]
            assert_same_bits(found, _eager(model, x, expert, dy))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_as_a_graph(dtype: torch.dtype, mode: type) -> None:
    model = net().to(dtype).eval()
    batches = [images(37, 16, dtype) for _ in range(3)]
    with mode():
        x, found = batches[0].clone(), []

        def step() -> None:
            found[:] = [model(x)]

        warm_up(step)
        replay = capture(step)
        for batch in batches:
            x.copy_(batch)
            replay()
            assert torch.equal(found[0], model(batch))


def test_a_split_reduction_as_a_graph(backend: str) -> None:
    """Its counters are the graph's own, and zero again after each replay."""
    layer = RoutedConv2d(256, 256, 3, padding=1, bias=False, num_experts=3, device=DEVICE).requires_grad_(False)
    x, found = torch.randn(1, 256, 4, 4, device=DEVICE).contiguous(memory_format=torch.channels_last), []
    routing, kept = choice(1), counters()

    def step() -> None:
        leaf = x.detach().requires_grad_()
        y = layer(leaf, routing)
        found[:] = [y.detach(), torch.autograd.grad(y, leaf, y.detach())[0]]

    step()
    expected = [t.clone() for t in found]
    if backend == "cuda":
        assert kept, "one sample of 4x4 and 256 channels: the reduction was to be split"
    warm_up(step)
    replay = capture(step)
    streams = list(kept)
    for _ in range(3):
        for t in found:
            t.fill_(float("nan"))
        replay()
        assert all(torch.equal(t, e) for t, e in zip(found, expected, strict=True))
    assert list(kept) == streams and all_zero(kept)


# --- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inside", [False, True], ids=["routing given", "router inside"])
def test_compiled_forward_and_backward_without_recompilation(inside: bool) -> None:
    """One graph serves every choice."""
    eager = net(router=inside)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for expert in CHOICES:
            x, dy = images(), torch.randn(6, 10, device=DEVICE)
            arguments = (x,) if inside else (x, choice(*expert))
            y, expected = compiled(*arguments), eager(*arguments)
            torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
            for module, out in ((model, y), (eager, expected)):
                module.zero_grad()
                out.backward(dy)
            truth = gradients(eager)
            for name, grad in gradients(model).items():
                torch.testing.assert_close(grad, truth[name], rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("fresh_dynamo")
def test_reduce_overhead() -> None:
    """torch.compile's own CUDA graphs, replayed with other choices; nothing here keeps it from making them."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = net(router=False).eval()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for expert in (*CHOICES, *CHOICES):
            torch.compiler.cudagraph_mark_step_begin()
            x = images()
            torch.testing.assert_close(compiled(x, choice(*expert)), model(x, choice(*expert)), rtol=1e-3, atol=1e-4)
    assert counters["inductor"]["cudagraph_skips"] == 0
