# SPDX-License-Identifier: Apache-2.0
"""Lipschitz constants: upper bounds are never below what is found, estimates never above them, unknown layers named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_mixtures import convolutional, fit, plain, settled, steepest
from torch import Tensor, nn

from advmoe.certification import lipschitz, softmax_constants
from advmoe.certification.lipschitz import LipschitzBounds
from advmoe.certification.network import Conv, Dense, Network
from advmoe.certification.norms import convolution_norm
from advmoe.certification.routes import distances
from advmoe.models import create_model

NORMS = ("linf", "l2")


class Residual(nn.Module):
    """A sum of branches with a projection, then a concatenation; padding, stride, groups, dilation, overlapping pools."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, 2, 2, dilation=2, groups=2)
        self.shortcut = nn.Conv2d(2, 4, 1, 2)
        self.norm = nn.BatchNorm2d(4)
        self.grow = nn.Conv2d(4, 2, 3, padding="same")
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x) + self.shortcut(x)))
        x = torch.cat([x, F.relu(self.grow(x)) - 0.3], 1)
        x = F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 2, 1)
        return self.linear(x.mean((2, 3)))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    trained = fit(convolutional(), torch.rand(60, 2, 5, 5), torch.randint(0, 3, (60,)), 20)
    return {
        "plain": (plain(inputs=18, width=10), (2, 3, 3)),
        "convolutional": (trained, (2, 5, 5)),
        "residual": (settled(Residual()), (2, 6, 6)),
    }


@pytest.fixture(scope="module", params=["plain", "convolutional", "residual"])
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    module, shape = networks()[request.param]
    return module.double().eval(), shape


def matrix(step: Conv, shape: tuple[int, ...]) -> Tensor:
    eye = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    return step.linear(eye).flatten(1).mT


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "kernel"),
    [(1, 1, 1, 1, 3), (2, 1, 1, 1, 3), (1, 0, 2, 2, 3), ((2, 3), (0, 2), 1, 1, (2, 3)), (1, 4, 1, 1, 3), (2, 0, 1, 1, 1)],
)
def test_norms_of_convolutions(stride, padding, dilation, groups, kernel) -> None:
    """Against the matrix: L-inf exact, the Fourier bound of L2 above it and not by much, power iteration below it."""
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    torch.manual_seed(1)
    kh, kw = pair(kernel)
    step = Conv(torch.randn(4, 4 // groups, kh, kw).double(), None, pair(stride), pair(padding), pair(dilation), groups)
    for shape in ((4, 6, 7), (4, 12, 9)):
        full = matrix(step, shape)
        exact = float(torch.linalg.matrix_norm(full, 2))
        bound = convolution_norm(step.weight, shape[1:], step.stride, step.dilation, groups)
        assert exact <= bound <= 1.8 * exact
        assert 0.97 * exact <= step.norm("l2", True, shape) <= exact * (1 + 1e-12)
        assert step.norm("linf", False, shape) == pytest.approx(float(full.abs().sum(1).max()), rel=1e-8)
        assert step.norm("linf", False, shape) >= float(full.abs().sum(1).max())
        assert torch.allclose(step.lengths(shape).flatten(), full.norm(dim=1))


def test_the_fourier_bound_is_the_circular_convolutions_norm() -> None:
    """Exact where nothing is cut off: on a large image it is approached from below."""
    torch.manual_seed(0)
    weight = torch.randn(2, 2, 3, 3).double()
    step = Conv(weight, None, (1, 1), (1, 1), (1, 1), 1)
    bound = convolution_norm(weight, (40, 40), (1, 1), (1, 1), 1)
    assert 0.98 * bound < step.norm("l2", True, (2, 40, 40)) <= bound


def test_a_network_computes_what_the_module_does(network) -> None:
    module, shape = network
    found = Network.of(module, shape)
    x = torch.rand(5, *shape).double()
    assert torch.allclose(found(x), module(x), atol=1e-12)
    assert not any(node.name.startswith("batch_norm") and len(node.reads) > 1 for node in found.nodes)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", ["product", "interval"])
def test_upper_bounds_hold_everywhere(network, norm: str, method: str) -> None:
    module, shape = network
    found = lipschitz(module, norm, method, shape=shape)
    assert found.upper_bound and found.radius == math.inf
    torch.manual_seed(0)
    x = 3 * torch.randn(200, *shape).double()
    y = torch.cat([x[100:], x[:100] + 0.1 * torch.randn_like(x[100:])])
    kind = torch.inf if norm == "linf" else 2
    moved, far = (module(x) - module(y)).norm(kind, dim=1), (x - y).flatten(1).norm(kind, dim=1)
    assert (moved <= found.value * far).all()
    for a, b in ((0, 1), (1, 2), (2, 0)):
        head = torch.zeros(3).double()
        head[a], head[b] = 1, -1
        steep = steepest(module, x, head, norm).max()
        assert 0 < steep <= found.differences[a, b] == found.differences[b, a]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [0.0, 1e-4, 0.01, 0.1, 1.0])
def test_bounds_in_a_ball_hold_there(network, norm: str, radius: float) -> None:
    module, shape = network
    torch.manual_seed(0)
    center = torch.rand(4, *shape).double()
    found = lipschitz(module, norm, "interval", center, radius)
    assert found.upper_bound and found.radius == radius and found.value.shape == (4,)
    whole = lipschitz(module, norm, "interval", shape=shape)
    assert (found.value <= whole.value * (1 + 1e-6)).all()
    assert (found.differences <= whole.differences * (1 + 1e-6)).all()
    delta = torch.empty(200, 4, *shape).double().uniform_(-1, 1)
    delta[:60] = delta[:60].sign()
    if norm == "l2":
        delta = delta / delta.flatten(2).norm(dim=2)[:, :, None, None, None] * torch.rand(200, 4, 1, 1, 1).double()
    points = (center + radius * delta).flatten(0, 1)
    for a, b in ((0, 1), (2, 1)):
        head = torch.zeros(3).double()
        head[a], head[b] = 1, -1
        steep = steepest(module, points, head, norm).unflatten(0, (200, 4)).amax(0)
        assert (steep <= found.differences[:, a, b]).all()
        if not radius:  # the gradient itself
            assert torch.allclose(steep, found.differences[:, a, b], rtol=1e-6)


def test_a_small_ball_has_smaller_constants(network) -> None:
    module, shape = network
    center = torch.rand(3, *shape).double()
    radii = [
        lipschitz(module, "linf", "interval", center, r).differences.sum().item() for r in (0.0, 0.01, 0.1, math.inf)
    ]
    assert radii[0] < radii[2] <= radii[3] * (1 + 1e-9) and sorted(radii) == pytest.approx(radii)
    whole = lipschitz(module, "linf", "interval", shape=shape)
    assert 0 < radii[3] <= 3 * whole.differences.sum().item() * (1 + 1e-6)


def test_an_estimate_is_called_one_and_is_below_the_bound(network) -> None:
    module, shape = network
    found, bound = lipschitz(module, "l2", "power", shape=shape), lipschitz(module, "l2", "product", shape=shape)
    assert not found.upper_bound and bound.upper_bound
    assert 0 < found.value <= bound.value * (1 + 1e-9)
    with pytest.raises(ValueError, match="estimates norms in l2"):
        lipschitz(module, "linf", "power", shape=shape)


def test_a_sum_has_the_sum_of_its_branches() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x + F.relu(self.a(x)))

    module = Twice().double()
    a, b = (torch.linalg.matrix_norm(layer.weight, 2) for layer in (module.a, module.b))
    found = lipschitz(module, "l2", shape=(4,))
    assert float(found.value) == pytest.approx(((1 + a) * b).item(), rel=1e-7)
    assert float(lipschitz(nn.Sequential(nn.ReLU()), "linf", shape=(4,)).value) == pytest.approx(1)


def test_scales_are_folded() -> None:
    """A BatchNorm's scale changes single rows: the norm of both together is less than the product."""
    module = settled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))).double().eval()
    steps = Network.of(module, (2, 3, 3)).nodes
    assert [type(node.step).__name__ for node in steps] == ["Conv", "Reshape", "Dense"]
    model = create_model("resnet18", "dense", width=4, image_size=8).eval()
    first = Network.of(model, (3, 8, 8)).nodes[0].step
    assert isinstance(first, Conv) and first.bias is not None and first.bias.shape == (4, 8, 8)  # normalisation too
    # not where others read what is scaled
    shared = Shared().double().eval()
    x = torch.rand(2, 3, dtype=torch.float64)
    assert torch.allclose(Network.of(shared, (3,))(x), shared(x))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(3, 3), settled(nn.BatchNorm1d(3)), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.norm(self.drop(y)) + y


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnet18", {"stem": "imagenet", "image_size": 16}),
        ("wrn28_10", {"width": 10}),
        ("vgg16_bn", {"image_size": 16}),
        ("densenet40", {"width": 8, "image_size": 8}),
    ],
)
def test_backbones(arch: str, options: dict) -> None:
    torch.manual_seed(0)
    settings = {"width": 4, "image_size": 8, "num_classes": 3, **options}
    model = settled(create_model(arch, "dense", **settings)).double().eval()
    size = settings["image_size"]
    x = torch.rand(3, 3, size, size).double()
    bounds = LipschitzBounds(model, "l2", "interval", (3, size, size))
    assert torch.allclose(bounds.network(x), model(x), rtol=1e-10, atol=1e-12)
    head = torch.tensor([[1.0, -1.0, 0.0]]).double()
    steep = steepest(model, x, head[0], "l2")
    here = bounds.of(head, x, torch.zeros(3).double())[:, 0]
    assert (steep <= here).all() and (here <= bounds.of(head)[0, 0] * (1 + 1e-9)).all()
    near = x + 1e-3 * torch.randn_like(x) / x[0].numel() ** 0.5 / 2
    assert (steepest(model, near, head[0], "l2") <= bounds.of(head, x, torch.full((3,), 1e-3).double())[:, 0]).all()


def test_softmax_of_a_linear_map() -> None:
    """The constants of the coordinates are approached; that of the sum is never exceeded and is less than theirs."""
    torch.manual_seed(0)
    weight = torch.randn(3, 6).double()
    for norm, dual in (("linf", 1), ("l2", 2)):
        each, joint = softmax_constants(distances(weight, norm))
        assert joint < each.sum()
        x = torch.randn(3000, 6).double() * 3
        x.requires_grad_()
        p = (x @ weight.T).softmax(1)
        for i in range(3):
            (grad,) = torch.autograd.grad(p[:, i].sum(), x, retain_graph=True)
            found = grad.norm(dual, dim=1).max()
            assert 0.75 * each[i] < found <= each[i]
        for h in torch.tensor([[1.0, -1, 1], [1, 1, -1], [1, -1, 0]]).double():
            (grad,) = torch.autograd.grad((p @ h).sum(), x, retain_graph=True)
            assert grad.norm(dual, dim=1).max() <= joint


def test_what_has_no_bound_is_named() -> None:
    shape = (2, 4, 4)
    flat = nn.Flatten()
    for layer, message in (
        (nn.Sigmoid(), "Sigmoid '0': aten.sigmoid"),
        (nn.GroupNorm(1, 2), "GroupNorm '0'"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "with ceil_mode"),
        (nn.Conv2d(2, 2, 2, padding="same"), "padded on one side"),
        (nn.BatchNorm2d(2, track_running_stats=False), "the batch's own statistics"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "aten.pad"),
    ):
        with pytest.raises(ValueError, match=message):
            lipschitz(nn.Sequential(layer, flat), shape=shape)
    with pytest.raises(ValueError, match=r"expected scores \[n, C\], got \[n, 2, 4, 4\]"):
        lipschitz(nn.ReLU(), shape=shape)
    with pytest.raises(ValueError, match="vision transformer; dot-product self-attention is not Lipschitz"):
        lipschitz(create_model("deit_tiny", "dense", image_size=32))
    with pytest.raises(ValueError, match="no bound is known of LayerNorm"):
        lipschitz(create_model("resnet18", "moe", width=4))


def test_wrong_words() -> None:
    with pytest.raises(ValueError, match="method: expected one of product"):
        lipschitz(plain(), method="products", shape=(2, 1, 1))
    with pytest.raises(ValueError, match="norm: expected one of linf"):
        lipschitz(plain(), "l1", shape=(2, 1, 1))
    with pytest.raises(ValueError, match="shape: expected the shape of one input"):
        lipschitz(plain())
    with pytest.raises(ValueError, match="expected both, with method 'interval'"):
        lipschitz(plain(), center=torch.rand(1, 2, 1, 1), radius=0.1)
    assert isinstance(Network.of(plain(), (2, 1, 1)).nodes[-1].step, Dense)
