# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of AdvMoE's released code: keys and shapes written down by its rules, and its forwards in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.models import create_model, load_released

State = dict[str, Tensor]
ROUTER_STAGES = ((1, 16), (2, 32), (3, 64))
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
CLASSES = 10


@dataclass
class Keys:
    """Key and shape of everything in a released state_dict; ``experts`` is 0 for the ``_ori`` models."""

    experts: int
    ratio: float
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def scaled(self, channels: int) -> int:
        return int(self.ratio * channels)

    def norm(self, name: str, channels: int) -> None:
        self.shapes |= {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
        self.shapes[f"{name}.num_batches_tracked"] = ()

    def conv(self, name: str, channels: int, out: int, kernel: int) -> None:
        self.shapes[f"{name}.weight"] = (out, channels, kernel, kernel)

    def moe(self, name: str, channels: int, out: int, kernel: int) -> None:
        self.conv(name, channels, out * max(1, self.experts), kernel)
        if self.experts:
            self.router(f"{name}.router")

    def linear(self, name: str, features: int, out: int) -> None:
        self.shapes |= {f"{name}.weight": (out, features), f"{name}.bias": (out,)}

    def router(self, name: str) -> None:
        self.conv(f"{name}.conv1", 3, 16, 3)
        self.norm(f"{name}.bn1", 16)
        channels = 16
        for stage, width in ROUTER_STAGES:
            for block in range(3):
                for i, source in ((1, channels), (2, width)):
                    self.conv(f"{name}.layer{stage}.{block}.conv{i}", source, width, 3)
                    self.norm(f"{name}.layer{stage}.{block}.bn{i}", width)
                channels = width
        self.linear(f"{name}.fc", 64, self.experts)


def resnet_keys(k: Keys, depth: int, imagenet: bool) -> None:
    blocks, expansion = ((2, 2, 2, 2), 1) if depth == 18 else ((3, 4, 6, 3), 4)
    channels = 64 if k.experts and not imagenet else k.scaled(64)
    k.conv("conv1", 3, channels, 7 if imagenet else 3)
    k.norm("bn1", channels)
    for stage, count in enumerate(blocks, start=1):
        planes = k.scaled(32 * 2**stage)
        for i in range(count):
            name, out = f"layer{stage}.{i}", planes * expansion
            kernels = (3, 3) if depth == 18 else (1, 3, 1)
            widths = (channels, *[planes] * (len(kernels) - 1), out)
            for j, kernel in enumerate(kernels):
                k.moe(f"{name}.conv{j + 1}", widths[j], widths[j + 1], kernel)
                k.norm(f"{name}.bn{j + 1}", widths[j + 1])
            if (stage > 1 and i == 0) or channels != out:
                if imagenet:
                    k.moe(f"{name}.downsample.0", channels, out, 1)
                else:
                    k.conv(f"{name}.shortcut.0", channels, out, 1)
                k.norm(f"{name}.{'downsample' if imagenet else 'shortcut'}.1", out)
            channels = out
    k.linear("fc" if imagenet else "linear", channels, CLASSES)


def wrn_keys(k: Keys, imagenet: bool) -> None:
    channels = k.scaled(16)
    k.conv("conv1", 3, channels, 7 if imagenet else 3)
    if imagenet:
        k.norm("bn0", channels)
    for stage in (1, 2, 3):
        width = k.scaled(80 * 2**stage)
        for i in range(4):
            name = f"block{stage}.layer.{i}"
            k.norm(f"{name}.bn1", channels)
            k.moe(f"{name}.conv1", channels, width, 3)
            k.norm(f"{name}.bn2", width)
            k.moe(f"{name}.conv2", width, width, 3)
            if channels != width:
                k.moe(f"{name}.convShortcut", channels, width, 1)
            channels = width
    k.norm("bn1", channels)
    k.linear("fc", channels, CLASSES)


def vgg_keys(k: Keys) -> None:
    index, channels = 0, 3
    for entry in VGG16:
        if isinstance(entry, str):
            index += 1
            continue
        (k.moe if index else k.conv)(f"features.{index}", channels, k.scaled(entry), 3)
        k.norm(f"features.{index + 1}", k.scaled(entry))
        index, channels = index + 3, k.scaled(entry)
    for i, (features, out) in enumerate(((channels * 4, 256), (256, 256), (256, CLASSES))):
        k.linear(f"classifier.{2 * i}", features, out)


def densenet_keys(k: Keys) -> None:
    assert not k.experts  # the released code cannot construct it
    channels, growth = k.scaled(24), int(12 * k.ratio)
    k.conv("features.conv0", 3, channels, 3)
    for block in (1, 2, 3):
        for i in range(6):
            name = f"features.denseblock{block}.denselayer{i + 1}"
            k.norm(f"{name}.norm1", channels)
            k.conv(f"{name}.conv1", channels, 4 * growth, 1)
            k.norm(f"{name}.norm2", 4 * growth)
            k.conv(f"{name}.conv2", 4 * growth, growth, 3)
            channels += growth
        if block < 3:
            k.norm(f"features.transition{block}.norm", channels)
            k.conv(f"features.transition{block}.conv", channels, channels // 2, 1)
            channels //= 2
    k.norm("features.norm_final", channels)
    k.linear("classifier", channels, CLASSES)


def released_shapes(arch: str, stem: str, experts: int, ratio: float = 0.5) -> dict[str, tuple[int, ...]]:
    keys = Keys(experts, ratio)
    if experts:
        keys.router("router")
    if arch.startswith("resnet"):
        resnet_keys(keys, int(arch[6:]), stem == "imagenet")
    elif arch == "wrn28_10":
        wrn_keys(keys, stem == "imagenet")
    elif arch == "vgg16_bn":
        vgg_keys(keys)
    else:
        densenet_keys(keys)
    return keys.shapes


def released_state(arch: str, stem: str, experts: int, ratio: float = 0.5, dtype: torch.dtype = torch.float32) -> State:
    """Random tensors of those shapes; the router's copies are its own tensors, as torch saves them."""
    generator = torch.Generator().manual_seed(0)
    # drawn once, as millions of values take seconds: each tensor repeats them from another place on
    pool = torch.randn(100_003, generator=generator, dtype=dtype)
    state: State = {}
    for key, shape in released_shapes(arch, stem, experts, ratio).items():
        original = f"router.{key.partition('.router.')[2]}"
        if original in state:
            state[key] = state[original]
        elif key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        else:
            numel = math.prod(shape)
            value = pool.roll(len(state) * 997).repeat(-(-numel // len(pool)))[:numel].view(shape)
            if len(shape) == 4:  # of a size that keeps the features' over any depth
                value = value * (2 / math.prod(shape[1:])) ** 0.5
            elif key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
                value = 1 + value.tanh() / 2
            else:
                value = value / 10
            state[key] = value
    return state


def empty_model(arch: str, stem: str, experts: int, ratio: float = 0.5, **options: object) -> torch.nn.Module:
    """Without the time that initialisation takes."""
    size = {"image_size": 128 if stem == "imagenet" else 32, "normalize": False}
    kind = ("moe" if experts else "s_dense") if experts or ratio < 1 else "dense"
    settings = {"router": "global", "num_experts": max(1, experts), "ratio": ratio, "kind": kind, "stem": stem}
    with torch.device("meta"):
        model = create_model(arch, **{**size, **settings, **options})  # type: ignore[arg-type]
    model.to_empty(device="cpu")
    for p in [*model.parameters(), *model.buffers()]:
        p.data.zero_()
    return model


PLACES = {
    ("resnet18", "cifar"): {
        "conv1.weight": "conv1.weight",
        "layer2.0.shortcut.0.weight": "layer2.0.shortcut.0.weight",
        "layer2.1.conv2.weight": "layer2.1.conv2.weight",
        "layer4.0.bn2.running_var": "layer4.0.bn2.running_var",
        "linear.bias": "linear.bias",
    },
    ("resnet18", "imagenet"): {
        "conv1.weight": "conv1.weight",
        "layer3.0.downsample.0.weight": "layer3.0.shortcut.0.weight",
        "layer3.0.downsample.1.running_mean": "layer3.0.shortcut.1.running_mean",
        "fc.weight": "linear.weight",
    },
    ("resnet50", "cifar"): {
        "layer2.0.conv3.weight": "layer2.0.conv3.weight",
        "layer1.0.shortcut.1.bias": "layer1.0.shortcut.1.bias",
        "linear.weight": "linear.weight",
    },
    ("resnet50", "imagenet"): {
        "layer1.0.downsample.0.weight": "layer1.0.shortcut.0.weight",
        "layer3.5.conv2.weight": "layer3.5.conv2.weight",
        "fc.bias": "linear.bias",
    },
    ("wrn28_10", "cifar"): {
        "conv1.weight": "conv1.weight",
        "block1.layer.0.convShortcut.weight": "block1.0.convShortcut.weight",
        "block3.layer.3.bn1.weight": "block3.3.bn1.weight",
        "bn1.running_var": "bn1.running_var",
        "fc.weight": "fc.weight",
    },
    ("wrn28_10", "imagenet"): {
        "bn0.bias": "bn0.bias",
        "block2.layer.0.conv1.weight": "block2.0.conv1.weight",
    },
    ("vgg16_bn", "cifar"): {
        "features.0.weight": "features.0.weight",
        "features.40.weight": "features.40.weight",
        "features.41.running_mean": "features.41.running_mean",
        "classifier.4.weight": "classifier.4.weight",
    },
}
ROUTER_PLACES = {
    "router.conv1.weight": "router.conv1.weight",
    "router.layer1.2.bn1.bias": "router.blocks.2.bn1.bias",
    "router.layer2.0.conv2.weight": "router.blocks.3.conv2.weight",
    "router.layer3.2.bn2.running_var": "router.blocks.8.bn2.running_var",
    "router.fc.weight": "router.linear.weight",
}


@pytest.mark.parametrize("experts", [2, 5])
@pytest.mark.parametrize(("arch", "stem"), list(PLACES))
def test_every_released_architecture_loads(arch: str, stem: str, experts: int) -> None:
    state, model = released_state(arch, stem, experts), empty_model(arch, stem, experts)
    load_released(model, state)
    own = model.state_dict()
    copies = sum(key.endswith(".router.conv1.weight") for key in state)
    assert copies == {"resnet18": 16, "resnet50": 48, "wrn28_10": 27, "vgg16_bn": 12}[arch] + (
        {"resnet18": 3, "resnet50": 4}.get(arch, 0) if stem == "imagenet" else 0
    )
    for theirs, ours in {**PLACES[arch, stem], **ROUTER_PLACES}.items():
        assert torch.equal(own[ours], state[theirs]), theirs
    single = [value for key, value in state.items() if ".router." not in key]
    assert len(single) == len(own)
    # every tensor is somewhere, once
    sums = [sorted(v.double().sum().item() for v in values) for values in (single, own.values())]
    assert sums[0] == sums[1]


# 0.7: r times the width is no integer. The dense WRN-28-10 has 36 million parameters, named as those of the scaled one;
# the released code cannot run its ImageNet form scaled, whose first BatchNorm has 16 channels always
SCALED = [
    (arch, stem, ratio)
    for arch, stem in (*PLACES, ("densenet40", "cifar"))
    for ratio in ((0.5, 0.7) if arch == "wrn28_10" else (1.0, 0.5, 0.7))
    if (arch, stem) != ("wrn28_10", "imagenet")
]


@pytest.mark.parametrize(("arch", "stem", "ratio"), SCALED)
def test_dense_and_scaled_ones_load(arch: str, stem: str, ratio: float) -> None:
    state, model = released_state(arch, stem, 0, ratio), empty_model(arch, stem, 0, ratio)
    load_released(model, state)
    for theirs, ours in PLACES.get((arch, stem), {"features.norm_final.bias": "features.norm_final.bias"}).items():
        assert torch.equal(model.state_dict()[ours], state[theirs])


def norm(state: State, name: str, x: Tensor) -> Tensor:
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), training=False)


def moe(state: State, name: str, x: Tensor, expert: Tensor, experts: int, stride: int = 1) -> Tensor:
    """All experts, then the chosen channels, picked out by a mask: as the released layer does."""
    weight = state[f"{name}.weight"]
    y = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
    width = len(weight) // experts
    mask = F.one_hot(expert, experts).repeat_interleave(width, 1).bool()
    return y[mask].view(len(x), width, *y.shape[2:])


def router_scores(state: State, x: Tensor) -> Tensor:
    x = F.relu(norm(state, "router.bn1", F.conv2d(x, state["router.conv1.weight"], padding=1)))
    for stage, width in ROUTER_STAGES:
        for block in range(3):
            name, stride = f"router.layer{stage}.{block}", 2 if stage > 1 and not block else 1
            y = F.relu(norm(state, f"{name}.bn1", F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)))
            y = norm(state, f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1))
            if stride == 2:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, width // 4, width // 4))
            x = F.relu(y + x)
    return F.linear(x.mean((2, 3)), state["router.fc.weight"], state["router.fc.bias"])


def resnet18_logits(state: State, x: Tensor, expert: Tensor, experts: int, imagenet: bool) -> Tensor:
    stem = state["conv1.weight"]
    x = F.relu(norm(state, "bn1", F.conv2d(x, stem, stride=2 if imagenet else 1, padding=stem.shape[2] // 2)))
    if imagenet:
        x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for i in (0, 1):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and not i else 1
            y = F.relu(norm(state, f"{name}.bn1", moe(state, f"{name}.conv1", x, expert, experts, stride)))
            y = norm(state, f"{name}.bn2", moe(state, f"{name}.conv2", y, expert, experts))
            if f"{name}.shortcut.0.weight" in state:
                x = norm(state, f"{name}.shortcut.1", F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=stride))
            elif f"{name}.downsample.0.weight" in state:
                x = norm(state, f"{name}.downsample.1", moe(state, f"{name}.downsample.0", x, expert, experts, stride))
            x = F.relu(y + x)
    head = "fc" if imagenet else "linear"
    return F.linear(x.mean((2, 3)), state[f"{head}.weight"], state[f"{head}.bias"])


def wrn_logits(state: State, x: Tensor, expert: Tensor, experts: int, imagenet: bool, raw: bool = True) -> Tensor:
    x = F.conv2d(x, state["conv1.weight"], stride=2 if imagenet else 1, padding=3 if imagenet else 1)
    if imagenet:
        x = F.max_pool2d(F.relu(norm(state, "bn0", x)), 3, 2, 1)
    for stage in (1, 2, 3):
        for i in range(4):
            name, stride = f"block{stage}.layer.{i}", 2 if stage > 1 and not i else 1
            y = F.relu(norm(state, f"{name}.bn1", x))
            if i == 0:
                y = x = x if raw else y
                x = moe(state, f"{name}.convShortcut", x, expert, experts, stride)
            y = F.relu(norm(state, f"{name}.bn2", moe(state, f"{name}.conv1", y, expert, experts, stride)))
            x = moe(state, f"{name}.conv2", y, expert, experts) + x
    return F.linear(F.relu(norm(state, "bn1", x)).mean((2, 3)), state["fc.weight"], state["fc.bias"])


def vgg_logits(state: State, x: Tensor, expert: Tensor, experts: int, imagenet: bool) -> Tensor:
    index = 0
    for entry in VGG16:
        if isinstance(entry, str):
            x, index = F.max_pool2d(x, 2), index + 1
            continue
        y = (
            moe(state, f"features.{index}", x, expert, experts)
            if index
            else F.conv2d(x, state["features.0.weight"], padding=1)
        )
        x, index = F.relu(norm(state, f"features.{index + 1}", y)), index + 3
    x = F.adaptive_avg_pool2d(x, 2).flatten(1)
    for i in (0, 2, 4):
        x = F.linear(x, state[f"classifier.{i}.weight"], state[f"classifier.{i}.bias"])
        x = F.relu(x) if i < 4 else x
    return x


LOGITS = {"resnet18": resnet18_logits, "wrn28_10": wrn_logits, "vgg16_bn": vgg_logits}


@pytest.mark.parametrize(
    ("arch", "stem", "size"),
    [
        ("resnet18", "cifar", 16),
        ("resnet18", "imagenet", 32),
        ("wrn28_10", "cifar", 8),
        ("wrn28_10", "imagenet", 32),
        ("vgg16_bn", "cifar", 16),
    ],
)
def test_the_loaded_model_computes_what_the_released_one_does(arch: str, stem: str, size: int) -> None:
    experts = 2
    state = released_state(arch, stem, experts, dtype=torch.float64)
    x = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # in the middle of the two images' scores, so that they go to different experts
    state["router.fc.bias"] -= router_scores(state, x).mean(0)
    scores = router_scores(state, x)
    expert = scores.argmax(1)
    assert expert.tolist() in ([0, 1], [1, 0])
    expected = LOGITS[arch](state, x, expert, experts, stem == "imagenet")

    model = empty_model(arch, stem, experts, image_size=size).double().eval()
    load_released(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model.router(x), scores, rtol=1e-10, atol=1e-10)
        logits = model(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("stem", "raw"), [("cifar", False), ("imagenet", True)])
def test_a_dense_wide_resnet_reads_what_the_released_one_does(stem: str, raw: bool) -> None:
    """Its projections read the raw input on the ImageNet stem only."""
    ratio = 0.25 if stem == "cifar" else 1.0
    state = released_state("wrn28_10", stem, 0, ratio)
    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = empty_model("wrn28_10", stem, 0, ratio, image_size=8).eval()
    load_released(model, state)
    with torch.no_grad():
        expected = [wrn_logits(state, x, torch.tensor([0]), 1, stem == "imagenet", raw=r) for r in (raw, not raw)]
        torch.testing.assert_close(model(x), expected[0], rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@pytest.fixture(scope="module")
def state() -> State:
    return released_state("resnet18", "cifar", 2)


def test_the_prefix_of_data_parallel_and_the_checkpoint_around_it(state: State) -> None:
    model = empty_model("resnet18", "cifar", 2)
    load_released(model, {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}})
    assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"])


def test_the_evaluation_s_single_router_loads(state: State) -> None:
    model = empty_model("resnet18", "cifar", 2)
    load_released(model, {key: value for key, value in state.items() if ".router." not in key})
    assert torch.equal(model.router.linear.weight, state["router.fc.weight"])


def test_copies_of_a_router_that_diverged_are_equal(state: State) -> None:
    broken = torch.full_like(state["router.fc.bias"], float("nan"))
    model = empty_model("resnet18", "cifar", 2)
    load_released(model, {key: broken if key.endswith("router.fc.bias") else value for key, value in state.items()})
    assert model.router.linear.bias.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.0.conv1.weight": None}, r"missing: layer2\.0\.conv1\.weight$"),
        (
            {"router.layer2.1.bn1.weight": None},
            r"missing: router\.layer2\.1\.bn1\.weight.*unexpected: layer1\.0\.conv1\.router\.",
        ),
        ({"fc.weight": torch.zeros(10, 256)}, r"unexpected: fc\.weight$"),
        ({"layer9.0.conv1.router.fc.bias": torch.zeros(2)}, r"unexpected: layer9\.0\.conv1\.router\.fc\.bias$"),
        ({"linear.bias": torch.zeros(100)}, r"of another shape: linear\.bias \[100\] instead of \[10\]$"),
        (
            {"conv1.weight": torch.zeros(32, 3, 3, 3), "bn1.bias": None},
            r"missing: bn1\.bias; of another shape: conv1\.weight",
        ),
        (
            {"layer3.1.conv2.router.fc.bias": torch.ones(2)},
            r"equal copies.*other values in layer3\.1\.conv2\.router\.fc\.bias$",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(
    state: State, change: dict[str, Tensor | None], message: str
) -> None:
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    model = empty_model("resnet18", "cifar", 2)
    with pytest.raises(ValueError, match=message):
        load_released(model, changed)
    assert all(not p.any() for p in model.parameters())


def test_another_number_of_experts_or_ratio_does_not_fit(state: State) -> None:
    for experts, ratio in ((3, 0.5), (2, 0.4)):
        with pytest.raises(ValueError, match=r"of another shape: .* and \d+ more"):
            load_released(empty_model("resnet18", "cifar", experts, ratio), state)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet18", {"layout": "windows"}, "layout='partition' as released, got 'windows'"),
        ("resnet18", {"router": "light"}, "router='global' as released, got 'light'"),
        ("resnet18", {"bn": "per_expert"}, "bn='shared' as released, got 'per_expert'"),
        ("resnet18", {"moe_at": (1,)}, r"moe_at=None as released, got \(1,\)"),
        ("resnet18", {"kind": "sparse", "router": "light"}, "kind 'dense', 's_dense' or 'moe', got 'sparse'"),
        ("densenet40", {}, "cannot construct a DenseNet"),
    ],
)
def test_models_of_another_form_raise(arch: str, options: dict[str, object], message: str) -> None:
    with torch.device("meta"):
        model = create_model(arch, **{"kind": "moe", "router": "global", **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_released(model, {})
    with pytest.raises(ValueError, match="expected one of create_model, got Linear"):
        load_released(torch.nn.Linear(2, 2), {})


def test_the_normalisation_must_be_the_run_s(state: State) -> None:
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    normalized = {**state, "normalize.mean": mean, "normalize.std": std}
    plain, own, other = (
        empty_model("resnet18", "cifar", 2, **options)
        for options in ({}, {"normalize": True}, {"normalize": True, "std": (0.25,) * 3})
    )
    for model in (own, other):  # made on the meta device, their buffers hold nothing yet
        model.normalize = create_model("resnet18", "dense", width=1, mean=model.spec.mean, std=model.spec.std).normalize
    with pytest.raises(ValueError, match="expected normalize=False"):
        load_released(own, state)
    with pytest.raises(ValueError, match=r"expected normalize=True and mean=\(0.4914, 0.4822, 0.4465\).*got None"):
        load_released(plain, normalized)
    with pytest.raises(ValueError, match=r"std=\(0.247, 0.2435, 0.2616\) as in the state_dict, got \(0.25, 0.25, 0.25\)"):
        load_released(other, normalized)
    load_released(own, normalized)
    assert torch.equal(own.linear.weight, state["linear.weight"])


def test_the_released_vgg_never_normalises() -> None:
    buffers = {"normalize.mean": torch.zeros(3), "normalize.std": torch.ones(3)}
    load_released(empty_model("vgg16_bn", "cifar", 0), {**released_state("vgg16_bn", "cifar", 0), **buffers})
