# SPDX-License-Identifier: Apache-2.0
"""The counts of ``python -m bench.roofline``, against other ways to count the same."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from advmoe.models import create_model
from advmoe.models.layers import Shortcut
from bench.roofline import (
    DEVICES,
    DIRECTIONS,
    DISCLAIMER,
    NETWORKS,
    Layer,
    count,
    main,
    residue_taps,
    rows,
    summary,
    tiles,
)
from moe_kernels import RoutedConv2d
from moe_kernels.backends.interface import Epilogue, Experts
from moe_kernels.backends.triton import routed_conv2d
from moe_kernels.backends.triton.configs import TileConfig, assume, multiprocessors
from moe_kernels.backends.triton.launch import Launch, record
from moe_kernels.geometry import Conv2dGeometry
from moe_kernels.slices import ExpertSlices

META = torch.device("meta")
LAYERS = [layer for layers in NETWORKS.values() for layer in layers]


def _layer(network: str, start: str) -> Layer:
    return next(layer for layer in NETWORKS[network] if str(layer).startswith(start))


# --- FLOPs and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_flops_are_those_of_torch_for_one_expert(layer: Layer, direction: str) -> None:
    batch = 6
    x = torch.empty(batch, layer.in_channels, layer.size, layer.size, device=META, requires_grad=True)
    w = torch.empty(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel, device=META, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = F.conv2d(x, w, None, layer.stride, layer.padding)
    expected = forward.get_total_flops()
    if direction != "forward":
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y, x if direction == "grad_input" else w, torch.empty_like(y))
        assert backward.get_total_flops() == expected
    with assume("sm_90"):
        assert count(layer, batch, direction, 4).flop == expected


@pytest.mark.parametrize("kernel", range(1, 8))
@pytest.mark.parametrize("stride", range(1, 5))
def test_residues_meet_each_tap_once(kernel: int, stride: int) -> None:
    taps = residue_taps(kernel, stride)
    assert len(taps) == stride and sum(taps) == kernel
    padding = kernel // 2
    for position in range(3 * stride):  # far outputs are taken to exist: a tap that meets only padding counts
        met = sum((position + padding - tap) % stride == 0 for tap in range(kernel))
        assert taps[(position + padding) % stride] == met


def test_bytes_by_hand() -> None:
    layer = Layer(32, 64, 32, 2)
    images, results = 128 * 32 * 32 * 32 * 2, 128 * 64 * 16 * 16 * 2
    weight = 64 * 32 * 9
    forward = count(layer, 128, "forward", 4)
    assert (forward.read, forward.written) == (images + 4 * weight * 2, results)
    backward = count(layer, 128, "grad_input", 4)
    assert (backward.read, backward.written) == (results + 4 * weight * 2, images)
    # 5 blocks of 64x64 in 64x288, two a multiprocessor: 53 segments wanted of 128 samples, so 3 samples each; an expert's
    # 32 samples are 11 segments
    with assume("sm_90"):
        gradient = count(layer, 128, "grad_weight", 4)
    partial = 4 * 11 * weight * 4
    assert gradient.partial == partial
    assert (gradient.read, gradient.written) == (images + results + partial, 4 * weight * 2 + partial)
    assert count(layer, 128, "grad_weight", 1, partial_sums=False).written == weight * 2


def test_bytes_of_one_sample_are_of_one_expert() -> None:
    layer = Layer(256, 256, 4, 1)
    assert count(layer, 1, "forward", 16) == count(layer, 1, "forward", 1)
    with assume("sm_90"):
        one, many = (count(layer, 1, "grad_weight", experts) for experts in (1, 16))
    assert many.read == one.read  # partial sums are of experts in use; written are all experts' rows
    assert many.written - one.written == 15 * 256 * 256 * 9 * 2


def test_input_that_no_tap_meets_is_not_read() -> None:
    shortcut = Layer(32, 64, 32, 2, kernel=1)
    assert count(shortcut, 128, "forward", 1).read == 128 * 16 * 16 * 32 * 2 + 32 * 64 * 2
    assert count(shortcut, 128, "grad_input", 1).written == 128 * 32 * 32 * 32 * 2  # zeros among them


# --- layers and tiles -------------------------------------------------------------------------------------------------


def test_resnet18_has_these_layers() -> None:
    with META:
        model = create_model("resnet18", num_experts=2, ratio=0.5)
    routed = Counter(
        (m.in_slices.width, m.out_slices.width, m.kernel_size[0], m.stride[0])
        for m in model.modules()
        if isinstance(m, RoutedConv2d)
    )
    listed = {(s.in_channels, s.out_channels, s.kernel, s.stride): s for s in NETWORKS["ResNet-18"]}
    assert routed == {key: layer.times for key, layer in listed.items() if layer.routed}
    shortcuts = [m for m in model.modules() if isinstance(m, Shortcut)]
    plain = {(m[0].in_channels, m[0].out_channels, m[0].kernel_size[0], m.step * m[0].stride[0]) for m in shortcuts}
    assert {key for key, layer in listed.items() if not layer.routed} < plain


def test_wrn28_10_has_28_layers() -> None:
    layers = NETWORKS["WRN-28-10"]
    assert all(layer.routed for layer in layers)
    assert sum(layer.times for layer in layers) + 1 == 28  # the stem; the classifier is not counted among them
    dense = sum(layer.times * count(layer.dense(), 1, "forward", 1).flop / 2 for layer in layers)
    stem, classifier = 32 * 32 * 16 * 3 * 9, 640 * 10
    assert dense + stem + classifier == pytest.approx(5.2433e9, rel=1e-4)  # multiply-accumulates of the dense network


@pytest.mark.parametrize("name", DEVICES)
def test_multiprocessors_are_those_of_the_table(name: str) -> None:
    with assume(DEVICES[name].architecture):
        assert multiprocessors(META) == DEVICES[name].multiprocessors


def _recorded(layer: Layer, batch: int, direction: str, experts: int, config: TileConfig) -> Launch:
    """What the library would start with this configuration."""

    def image(channels: int, size: int) -> torch.Tensor:
        x = torch.empty((batch, channels, size, size), dtype=torch.bfloat16, device=META)
        return x.contiguous(memory_format=torch.channels_last)

    outer, inner = ExpertSlices.partition(layer.out_channels, experts), ExpertSlices.whole(layer.in_channels)
    pair = (layer.stride, layer.stride), (layer.padding, layer.padding), (1, 1)
    g = Conv2dGeometry.of(outer, inner, *pair, 1)
    weight = torch.empty(outer.total, inner.total, layer.kernel, layer.kernel, dtype=torch.bfloat16, device=META)
    both = Experts(torch.empty(batch, dtype=torch.int64, device=META), None)
    x, y = image(layer.in_channels, layer.size), image(layer.out_channels, layer.out_size)
    with record() as launches, assume("sm_90", config):
        if direction == "forward":
            routed_conv2d.forward(x, weight, both, g, Epilogue())
        elif direction == "grad_input":
            routed_conv2d.grad_input(y, weight, both, g, (layer.size, layer.size))
        else:
            routed_conv2d.grad_weight(y, x, both, g, weight)
    names = ("convolution_kernel", "grad_weight_kernel")
    return next(launch for launch in launches if launch.kernel.__name__ in names)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("batch", [1, 7, 128])
@pytest.mark.parametrize("layer", [*LAYERS[::3], Layer(3, 64, 32, 1)], ids=str)
def test_tiles_are_those_that_the_library_starts(layer: Layer, batch: int, direction: str) -> None:
    experts = 4
    with assume("sm_90"):
        cut = tiles(layer, batch, direction, experts)
        work = count(layer, batch, direction, experts)
    # nothing that is compared depends on warps and stages
    launch = _recorded(layer, batch, direction, experts, TileConfig(cut.block_m, cut.block_n, cut.block_k, 4, 3))
    assert (launch.meta["BM"], launch.meta["BN"], launch.meta["BK"]) == (cut.block_m, cut.block_n, cut.block_k)
    started = math.prod(launch.grid)
    assert 0 < cut.rows_used <= 1 and 0 < cut.columns_used <= 1
    if direction == "grad_weight":
        segments = launch.args[3].shape[0]  # of the partial sums
        elements = layer.kernel**2 * layer.in_channels * layer.out_channels
        assert work.partial <= segments * elements * 4  # the workspace is for any routing, and not all of it is used
        assert cut.count * segments == started * (work.partial // (4 * elements))
        columns = elements // layer.out_channels
        blocks_m = -(-layer.out_channels // cut.block_m)
        assert cut.columns_used == pytest.approx(columns / (started // segments // blocks_m * cut.block_n))
    else:
        width = layer.in_channels if direction == "grad_input" else layer.out_channels
        each = -(-width // cut.block_n) * launch.grid[1]  # programs of one tile of rows
        assert bool(launch.meta["PACKED"]) == cut.packed
        spare = each * (experts + 1) if cut.packed else 0  # each group may have a tile that is not full
        assert cut.count <= started <= cut.count + spare


# --- the whole --------------------------------------------------------------------------------------------------------


def test_bounds_and_sums() -> None:
    all_rows = rows(DEVICES["h200"], 2, batches=(1, 1024))
    for row in all_rows:
        assert row["roofline_us"] == max(row["matrix_us"], row["memory_us"])
        expected = "matrix" if row["matrix_us"] >= row["memory_us"] else "memory"
        assert row["bound"] == (expected if row["roofline_us"] >= 2 else "launch")
    first = summary(all_rows)[0]
    mine = [r for r in all_rows if r["routed"] and r["network"] == first["network"] and r["batch"] == 1]
    mine = [r for r in mine if r["direction"] == "forward"]
    assert sum(r["times"] for r in mine) == 16
    assert first["moe_roofline_us"] == pytest.approx(sum(r["times"] * r["roofline_us"] for r in mine))
    assert first["moe_with_launch_us"] == first["dense_with_launch_us"] == 16 * 2


def test_main_prints_the_sums_and_what_they_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "roofline.json"
    main(["--experts", "3", "--device", "a100", "--json", str(path)])
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1] == DISCLAIMER
    assert any(line.startswith("Sums of the roofline times") for line in printed)
    assert sum(line.startswith(("| ResNet-18 ", "| WRN-28-10 ")) for line in printed) == 2 * 3 * len(DIRECTIONS)
    written: dict[str, Any] = json.loads(path.read_text())
    assert written["note"] == DISCLAIMER and written["device"]["name"].startswith("A100")
    assert len(written["rows"]) == len(LAYERS) * 3 * len(DIRECTIONS) and len(written["summary"]) == 18


def test_no_experts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--experts", "0"])
    assert "--experts: expected at least 1, got 0" in capsys.readouterr().err
