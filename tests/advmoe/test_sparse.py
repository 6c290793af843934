# SPDX-License-Identifier: Apache-2.0
"""Masks, their search, what they leave alive, and the network without the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models import create_model
from advmoe.profiling import profile
from advmoe.sparse import (
    Add,
    IndexedAdd,
    LiveBatchNorm2d,
    MaskedConv2d,
    compact,
    fix_masks,
    masked_convolutions,
    score_parameters,
    start_search,
    update_alive,
)

SIZE = 8


@pytest.fixture(autouse=True)
def seed(process_state: None) -> None:
    torch.manual_seed(0)


def conv(source: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = False, ratio: float = 0.5) -> nn.Module:
    return MaskedConv2d(source, out, kernel, stride, kernel // 2, bias=bias, ratio=ratio)


class PostActivation(nn.Module):
    """ResNet-like: an identity shortcut, then a projection of stride 2."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.stem, self.bn = conv(3, 9, ratio=ratio), LiveBatchNorm2d(9)
        self.conv1, self.bn1 = conv(9, 11, ratio=ratio), LiveBatchNorm2d(11)
        self.conv2, self.bn2 = conv(11, 9, ratio=ratio), LiveBatchNorm2d(9)
        self.conv3, self.bn3 = conv(9, 12, 3, 2, ratio=ratio), LiveBatchNorm2d(12)
        self.shortcut = nn.Sequential(conv(9, 12, 1, 2, ratio=ratio), LiveBatchNorm2d(12))
        self.add1, self.add2 = Add(), Add()
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(self.add1(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))), x))
        x = F.relu(self.add2(self.bn3(self.conv3(x)), self.shortcut(x)))
        return self.linear(x.mean((2, 3)))


class PreActivation(nn.Module):
    """WRN-like: norms read sums, whose channels are those of all that was added so far; ReLUs work in place."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.stem = conv(3, 13, ratio=ratio)
        self.norms = nn.ModuleList(LiveBatchNorm2d(13) for _ in range(3))
        self.convs = nn.ModuleList(conv(13, 13, ratio=ratio) for _ in range(2))
        self.adds = nn.ModuleList(Add() for _ in range(2))
        self.linear = nn.Linear(13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer, add in zip(self.norms, self.convs, self.adds, strict=False):
            x = add(x, layer(F.relu(norm(x), inplace=True)))
        return self.linear(F.relu(self.norms[-1](x)).mean((2, 3)))


class Concatenating(nn.Module):
    """DenseNet-like, with a transition that pools."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.stem = conv(3, 7, ratio=ratio)
        self.norms = nn.ModuleList(LiveBatchNorm2d(c) for c in (7, 12, 17, 14))
        self.convs = nn.ModuleList(conv(a, b, ratio=ratio) for a, b in ((7, 5), (12, 5), (17, 9), (9, 5)))
        self.pool = nn.AvgPool2d(2)
        self.linear = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            x = torch.cat((x, self.convs[i](F.relu(self.norms[i](x)))), 1)
        x = self.pool(self.convs[2](F.relu(self.norms[2](x))))
        x = torch.cat((x, self.convs[3](x)), 1)
        return self.linear(F.relu(self.norms[3](x)).mean((2, 3)))


class Flattening(nn.Module):
    """VGG-like: a bias in the convolutions, 2×2 features of each channel for the first of two linear layers."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(conv(3, 9, bias=True, ratio=ratio), LiveBatchNorm2d(9), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(9, 10, 3, padding=1), nn.ReLU()),
            *(conv(10, 11, bias=True, ratio=ratio), LiveBatchNorm2d(11), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(44, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


NETWORKS = (PostActivation, PreActivation, Concatenating, Flattening)


def images(count: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1), dtype=dtype)


def randomize(model: nn.Module) -> nn.Module:
    """Norms with betas and statistics that a removed channel would show; float64."""
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.5, 1.0)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return model.double()


def random_masks(model: nn.Module) -> None:
    """Ends a search in which the scores came out at random."""
    start_search(model)
    for scores in score_parameters(model):
        scores.detach().normal_()
    fix_masks(model)


def sparse(network: Callable[[float], nn.Module], ratio: float = 0.5) -> nn.Module:
    model = randomize(network(ratio))
    random_masks(model)
    update_alive(model, SIZE)
    return model.eval()


def arriving(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Which channels of each norm's input really are not zero, for images; the norms here read no ReLU."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].abs().amax((0, 2, 3)) > 0

        return look

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, LiveBatchNorm2d)]
    handles = [m.register_forward_pre_hook(hook(n)) for n, m in norms]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if not n.endswith("scores"))


def test_a_layer_keeps_exactly_its_share() -> None:
    for width in (1, 2, 3, 7, 10, 13, 33, 64):
        for tenths in range(1, 11):
            layer = MaskedConv2d(2, width, 1, ratio=tenths / 10, bias=False)
            kept = max(1, int(tenths / 10 * width))
            assert layer.kept == kept
            assert layer(torch.ones(1, 2, 1, 1)).count_nonzero() == width
            start_search(layer)
            assert layer(torch.ones(1, 2, 1, 1)).count_nonzero() == kept
            fix_masks(layer)
            assert layer.mask.sum() == kept
            assert torch.equal(layer(torch.ones(1, 2, 1, 1)).flatten() != 0, layer.mask > 0)


@pytest.mark.parametrize(("options", "match"), [({"ratio": 0.0}, "ratio"), ({"ratio": 1.1}, "ratio"),
                                                ({"ratio": 0.5, "groups": 2}, "groups")])  # fmt: skip
def test_a_layer_says_what_it_does_not_take(options: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MaskedConv2d(4, 4, 3, **options)


def test_channels_are_ranked_by_the_l1_norm_of_their_scores() -> None:
    layer = MaskedConv2d(1, 3, 3, ratio=0.34)
    start_search(layer)
    with torch.no_grad():
        layer.scores.zero_()
        layer.scores[0, 0, 0, 0] = 3.0  # the largest score, and the largest L2 norm
        layer.scores[1] = torch.tensor([0.5, -0.5]).repeat(5)[:9].view(1, 3, 3)  # the largest L1 norm; the sum is 0.5
        layer.scores[2] = 0.2  # the largest sum but for channel 0
    assert layer.current_mask().tolist() == [0, 1, 0]


def test_of_equal_channels_the_first_are_kept() -> None:
    layer = MaskedConv2d(2, 40, 1, ratio=0.5)
    nn.init.ones_(layer.weight)
    start_search(layer)
    assert layer.current_mask().tolist() == [1.0] * 20 + [0.0] * 20


def test_the_search_begins_with_the_scaled_weights() -> None:
    layer = MaskedConv2d(2, 6, 3, ratio=0.5)
    assert not layer.scores.requires_grad
    start_search(layer)
    largest = layer.weight.detach().abs().max()
    assert torch.allclose(layer.scores, (6 / (2 * 9)) ** 0.5 * layer.weight / largest, rtol=1e-6, atol=0)
    assert layer.scores.requires_grad
    best = layer.weight.abs().sum((1, 2, 3)).argsort(descending=True)[:3]
    assert layer.current_mask()[best].tolist() == [1, 1, 1]


def test_gradient_goes_straight_through_to_the_scores() -> None:
    layer = MaskedConv2d(3, 6, 3, padding=1, ratio=0.5).double()
    start_search(layer)
    layer.scores.detach().normal_()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    mask = layer.current_mask()
    weight = layer.weight.detach() * mask.view(-1, 1, 1, 1)
    assert torch.equal(y, F.conv2d(x, weight, layer.bias.detach() * mask, padding=1))
    dy = torch.randn_like(y)
    y.backward(dy)
    of_weight = torch.nn.grad.conv2d_weight(x.detach(), layer.weight.shape, dy, padding=1)
    expected = of_weight * layer.weight.detach() * layer.scores.detach().sign()
    assert torch.allclose(layer.scores.grad, expected, rtol=1e-12, atol=1e-12)
    assert (layer.scores.grad[mask == 0] != 0).any()
    assert torch.allclose(x.grad, torch.nn.grad.conv2d_input(x.shape, weight, dy, padding=1), rtol=1e-12, atol=1e-12)
    assert layer.weight.grad is None and layer.bias.grad is None


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model.train()(images()), torch.arange(4)).backward()
    optimizer.step()


def test_a_search_moves_scores_and_finetuning_weights() -> None:
    model = randomize(PostActivation(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    convs = masked_convolutions(model).values()
    start_search(model)
    update_alive(model, SIZE)
    scores, weights = [c.scores.detach().clone() for c in convs], [c.weight.detach().clone() for c in convs]
    step(model, optimizer)
    assert not any(torch.equal(c.scores, old) for c, old in zip(convs, scores, strict=True))
    assert all(torch.equal(c.weight, old) for c, old in zip(convs, weights, strict=True))

    fix_masks(model)
    update_alive(model, SIZE)
    masks = [c.mask.clone() for c in convs]
    scores = [c.scores.detach().clone() for c in convs]
    step(model, optimizer)
    assert all(torch.equal(c.scores, old) for c, old in zip(convs, scores, strict=True))
    assert not any(torch.equal(c.weight, old) for c, old in zip(convs, weights, strict=True))
    assert all(torch.equal(c.mask, old) for c, old in zip(convs, masks, strict=True))


def test_removed_channels_stay_zero_behind_a_norm() -> None:
    layer, norm = MaskedConv2d(3, 6, 3, ratio=0.5), LiveBatchNorm2d(6)
    model = randomize(nn.Sequential(layer, norm))
    random_masks(model)
    removed = layer.mask == 0
    for mode in (True, False):
        model.train(mode)
        norm.alive.fill_(1)
        assert (model(images())[:, removed] != 0).all()  # beta
        update_alive(model, SIZE)
        assert (model(images())[:, removed] == 0).all()
        plain = nn.BatchNorm2d.forward(norm, layer(images()))
        assert torch.equal(model(images())[:, ~removed], plain[:, ~removed])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_alive_is_what_really_arrives(network: Callable[[float], nn.Module], ratio: float) -> None:
    model = sparse(network, ratio)
    for name, live in arriving(model, images()).items():
        assert torch.equal(model.get_submodule(name).alive > 0, live), name
    assert any(m.alive.min() == 0 for m in model.modules() if isinstance(m, LiveBatchNorm2d)) == (ratio < 1)


def test_alive_behind_sums_and_concatenations_by_hand() -> None:
    model = sparse(PreActivation)
    first = model.stem.mask
    second = torch.maximum(first, model.convs[0].mask)
    third = torch.maximum(second, model.convs[1].mask)
    assert [n.alive.tolist() for n in model.norms] == [first.tolist(), second.tolist(), third.tolist()]
    assert first.sum() < second.sum()
    model = sparse(Concatenating)
    assert torch.equal(model.norms[1].alive, torch.cat((model.stem.mask, model.convs[0].mask)))


def test_while_searching_alive_goes_with_the_scores() -> None:
    model = randomize(PostActivation(0.5))
    start_search(model)
    update_alive(model, SIZE)
    assert torch.equal(model.bn.alive, model.stem.current_mask())
    assert model.bn.alive.sum() == 4
    with torch.no_grad():
        model.stem.scores.copy_(model.stem.scores.flip(0))
    update_alive(model, SIZE)
    assert torch.equal(model.bn.alive, model.stem.current_mask())


def test_a_removed_channel_gets_a_gradient_of_the_size_of_the_others() -> None:
    """By the statistics of the batch, where its variance is 0, it would be 1 / sqrt(eps) = 316 times too large."""
    torch.manual_seed(0)
    model = nn.Sequential(MaskedConv2d(3, 8, 3, ratio=0.5, bias=False), LiveBatchNorm2d(8), nn.Conv2d(8, 4, 3))
    conv, norm = model[0], model[1]
    x = torch.randn(16, 3, 8, 8)
    for _ in range(50):  # the running variance of a pretrained network
        model(x)
    start_search(model)
    update_alive(model, 8)
    statistics = norm.running_mean.clone(), norm.running_var.clone()
    y = model[:2](x)
    removed = conv.current_mask() == 0
    assert y[:, removed].abs().max() < 1e-20 and y[:, ~removed].abs().amax((0, 2, 3)).min() > 0
    model(x).square().sum().backward()
    sizes = conv.scores.grad.flatten(1).norm(dim=1)
    assert sizes[removed].min() > 0 and sizes[removed].max() < 20 * sizes[~removed].median()
    for now, before in zip((norm.running_mean, norm.running_var), statistics, strict=True):
        assert torch.equal(now[removed], before[removed]) and not torch.equal(now[~removed], before[~removed])


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("network", NETWORKS)
def test_compact_gives_the_same_outputs_and_is_smaller(network: Callable[[float], nn.Module], ratio: float) -> None:
    model = sparse(network, ratio)
    small = compact(model, SIZE)
    x = images()
    assert torch.allclose(small(x), model(x), rtol=1e-9, atol=1e-9)
    kinds = {type(m) for m in small.modules()}
    assert not kinds & {MaskedConv2d, LiveBatchNorm2d}
    before, after = profile(model, SIZE), profile(small, SIZE)
    if ratio == 1:
        assert after.params == parameters(model) and after.gflops == before.gflops
        assert IndexedAdd not in kinds
    else:
        # what is left of a convolution between two masked ones is the ratio squared; plain and first ones lose less
        assert after.params < (0.9 if ratio == 0.8 else 0.6) * parameters(model)
        assert after.gflops < (0.9 if ratio == 0.8 else 0.75) * before.gflops


def test_a_channel_below_zero_is_not_a_removed_one() -> None:
    model = sparse(PostActivation)
    shapes = [p.shape for p in compact(model, SIZE).parameters()]
    for norm in (m for m in model.modules() if isinstance(m, LiveBatchNorm2d)):
        nn.init.constant_(norm.bias, -100.0)
    assert [p.shape for p in compact(model, SIZE).parameters()] == shapes


def test_compact_is_counted_by_hand() -> None:
    model = sparse(Flattening)
    small = compact(model, SIZE)
    # 9 channels become 4, 11 become 5, each with 4 features
    shapes = {n: tuple(p.shape) for n, p in small.named_parameters()}
    assert shapes["features.0.weight"] == (4, 3, 3, 3) and shapes["features.0.bias"] == (4,)
    assert shapes["features.1.weight"] == (4,)
    assert shapes["features.4.weight"] == (10, 4, 3, 3) and shapes["features.4.bias"] == (10,)
    assert shapes["features.6.weight"] == (5, 10, 3, 3)
    assert shapes["classifier.1.weight"] == (16, 20) and shapes["classifier.1.bias"] == (16,)
    assert shapes["classifier.4.weight"] == (5, 16)
    macs = 64 * 4 * 27 + 16 * 10 * 36 + 16 * 5 * 90 + 16 * 20 + 5 * 16
    assert profile(small, SIZE).gflops == pytest.approx(macs / 1e9)
    live = model.features[6].mask.repeat_interleave(4) > 0
    assert torch.equal(small.classifier[1].weight, model.classifier[1].weight[:, live])


@pytest.mark.parametrize("network", NETWORKS)
def test_compact_after_finetuning(network: Callable[[float], nn.Module]) -> None:
    """Statistics have moved, and the small network trains on as the masked one does."""
    model = sparse(network)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(2):
        step(model, optimizer)
    small = compact(model, SIZE)
    assert all(m.training for m in small.modules())
    x = images()
    assert torch.allclose(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)
    if network is not Flattening:  # whose dropout draws
        assert torch.allclose(small.train()(x), model.train()(x), rtol=1e-9, atol=1e-9)
        small(x).square().sum().backward()
        assert all(p.grad is not None for p in small.parameters())


def test_a_masked_network_comes_back_from_its_state() -> None:
    model = sparse(PostActivation)
    other = randomize(PostActivation(0.5)).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))
    assert torch.equal(compact(other, SIZE)(images()), compact(model, SIZE)(images()))


def test_compact_takes_a_module_with_two_names() -> None:
    model = sparse(PostActivation)
    model.again = model.conv1
    small = compact(model, SIZE)
    assert small.again is small.conv1 and type(small.again) is nn.Conv2d


def test_compact_keeps_a_convolutions_geometry() -> None:
    layer = MaskedConv2d(3, 4, 3, ratio=0.5, dilation=2, padding="same", padding_mode="reflect")
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * SIZE**2, 2)).double()
    random_masks(model)
    small = compact(model, SIZE)
    assert type(small[0]) is nn.Conv2d and small[0].out_channels == 2
    assert torch.allclose(small(images()), model(images()), rtol=1e-9, atol=1e-12)


def test_compact_of_a_lone_layer() -> None:
    """The output is its own: it may lose nothing."""
    layer = MaskedConv2d(3, 4, 3, ratio=0.5)
    assert type(compact(layer, SIZE)) is nn.Conv2d
    random_masks(layer)
    with pytest.raises(ValueError, match="output"):
        compact(layer, SIZE)


def test_indexed_add() -> None:
    add = IndexedAdd(torch.tensor([0, 2]), torch.tensor([2, 3]), 5)
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    assert add(a, b).tolist() == [[1, 0, 12, 20, 0]]
    assert add(a[:, :, None, None], b[:, :, None, None]).shape == (1, 5, 1, 1)


@pytest.mark.parametrize("look", [update_alive, compact])
def test_nothing_else_changes(look: Callable[..., object]) -> None:
    model = sparse(PostActivation).train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    random = torch.get_rng_state()
    look(model, SIZE)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_stays_after_an_error() -> None:
    model = sparse(PostActivation).train()
    with pytest.raises(RuntimeError):
        update_alive(model, SIZE, channels=2)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad != n.endswith("scores") for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_compact_keeps_modes_and_frozen_parameters() -> None:
    model = sparse(PostActivation).train()
    model.bn1.eval()
    model.conv2.weight.requires_grad_(False)
    small = compact(model, SIZE)
    assert small.training and small.conv2.training and not small.bn1.training
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["conv2.weight"]
    assert small.bn1.eps == model.bn1.eps and torch.equal(
        small.bn1.running_var, model.bn1.running_var[model.bn1.alive > 0]
    )


class Plain(nn.Module):
    """A sum that no Add makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 6), conv(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x) + self.b(x)).square().sum((1, 2, 3))


class Twice(nn.Module):
    """One norm for two different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = conv(3, 6), conv(3, 6), LiveBatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x)).sum((1, 2, 3)) + self.norm(self.b(x)).sum((1, 2, 3))


def test_errors_say_what_came() -> None:
    for call in (start_search, fix_masks, lambda m: update_alive(m, SIZE), lambda m: compact(m, SIZE)):
        with pytest.raises(ValueError, match="MaskedConv2d"):
            call(nn.Conv2d(3, 4, 3))
    model = randomize(PostActivation(0.5))
    with pytest.raises(ValueError, match="start_search"):
        fix_masks(model)
    start_search(model)
    with pytest.raises(ValueError, match="stem is still searching"):
        compact(model, SIZE)
    fix_masks(model)
    with pytest.raises(ValueError, match="alive of bn does not"):
        compact(model, SIZE)


@pytest.mark.parametrize(
    "tail", [nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False), nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=3)]
)
def test_layers_that_cannot_be_made_smaller(tail: nn.Module) -> None:
    model = nn.Sequential(conv(3, 6), tail).double()
    random_masks(model)
    with pytest.raises(ValueError, match=f"reach 1, a {type(tail).__name__}"):
        compact(model, SIZE)


@pytest.mark.parametrize("kept", [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
def test_sums_of_different_channels_do_not_go_unnoticed(kept: list[int]) -> None:
    """Where both sides keep three channels, the sum of the small ones has a shape, and is another."""
    model = Plain().double()
    random_masks(model)
    model.a.mask.copy_(torch.tensor([1, 1, 1, 0, 0, 0]))
    model.b.mask.copy_(torch.tensor(kept))
    with pytest.raises(ValueError, match="modules Add"):
        compact(model, SIZE)


def test_a_module_used_twice() -> None:
    model = Twice().double()
    random_masks(model)
    model.a.mask.copy_(torch.tensor([1.0, 1, 1, 0, 0, 0]))
    model.b.mask.copy_(torch.tensor([0.0, 0, 0, 1, 1, 1]))
    with pytest.raises(ValueError, match="norm is used more than once"):
        update_alive(model, SIZE)
    model.b.mask.copy_(model.a.mask)
    update_alive(model, SIZE)
    assert torch.equal(model.norm.alive, model.a.mask)


@pytest.mark.parametrize("arch", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40"])
def test_removed_channels_can_come_back_through_a_relu(arch: str) -> None:
    """At exactly 0 a ReLU would let no gradient pass, and a mask would be what it began with."""
    torch.manual_seed(0)
    width = {"wrn28_10": 20, "densenet40": 12}.get(arch, 8)
    model = create_model(arch, "sparse", image_size=16, width=width, ratio=0.5)
    for module in model.modules():
        if isinstance(module, LiveBatchNorm2d):
            nn.init.normal_(module.bias)
    start_search(model)
    update_alive(model, 16)
    model(torch.rand(16, 3, 16, 16)).logsumexp(1).sum().backward()
    for name, conv in masked_convolutions(model).items():
        sizes = conv.scores.grad.flatten(1).norm(dim=1)
        assert (sizes > 0).float().mean() > 0.9, name  # of a few every ReLU behind them may be closed by other channels


def test_a_search_changes_the_masks_it_began_with() -> None:
    torch.manual_seed(0)
    model = create_model("vgg16_bn", "sparse", image_size=16, width=8, ratio=0.5)
    start_search(model)
    begun = {name: conv.current_mask().clone() for name, conv in masked_convolutions(model).items()}
    optimizer = torch.optim.SGD(
        score_parameters(model), lr=10.0, momentum=0.9
    )  # an untrained network's gradients are small
    x, y = torch.rand(32, 3, 16, 16), torch.randint(0, 10, (32,))
    for _ in range(15):
        update_alive(model, 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    now = masked_convolutions(model).items()
    changed = [name for name, conv in now if not torch.equal(conv.current_mask(), begun[name])]
    assert len(changed) >= 3
