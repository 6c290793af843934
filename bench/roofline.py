# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.roofline``: what a data sheet allows the routed layers of ResNet-18 and WRN-28-10, by counting.

FLOPs and bytes of the three calls of each layer (forward, input gradient, weight gradient; bfloat16), divided by a
device's peak rates: the longer of the two times is the layer's roofline. Nothing is run and nothing is measured. Counted
are:

- 2 FLOP for a multiply-accumulate, taps that meet only padding among them, because the kernels multiply those too. The
  input gradient of a stride counts each residue's own taps.
- each byte of the input that some tap meets, and each of the output, once; the weights of the ``min(N, B)`` experts in
  use. The weight gradient writes all N experts' rows, and writes and reads float32 partial sums as the kernel's rule
  splits them.

One expert a sample, samples spread evenly, caches that hold nothing from the layer before. The tile and the number of
tiles are those that the library's own rules pick for the device, untuned.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from advmoe.tables import percent, table
from moe_kernels.backends.triton.configs import SMALLEST_BLOCK, Problem, assume, block_k, estimated_best
from moe_kernels.backends.triton.routed_conv2d import _packs, _segment, _tiling
from moe_kernels.geometry import Conv2dGeometry, output_size
from moe_kernels.slices import ExpertSlices

from .contenders import SHAPES

__all__ = ["DEVICES", "DIRECTIONS", "NETWORKS", "Layer", "count", "main", "residue_taps", "rows", "summary", "tiles"]

BATCHES = (1, 128, 1024)
DIRECTIONS = ("forward", "grad_input", "grad_weight")
LAUNCH = 2e-6  # seconds: stated, not measured
DISCLAIMER = (
    "Counted, not measured: these are lower bounds from the data sheet, not measurements and not predictions of a time."
)
_NOTES = f"""\
MoE: one expert's width; dense: twice that on both sides, but for an input of fixed width. In no sum: plain layers, the
stem, routers, normalisation, the classifier. Every layer is taken to find its data in memory, not in a cache.
Weight gradients: MoE with partial sums and with all N experts' rows written, dense without partial sums.
launch: matrix and memory time are both below {LAUNCH * 1e6:.0f} µs, which a launch is taken for; in the columns with
launches each layer takes that long at least.
"""
_META = torch.device("meta")
_ELEMENT = 2  # bytes, bfloat16
_PARTIAL = 4  # bytes, float32


@dataclass(frozen=True)
class Device:
    """Peak rates as the maker states them, without sparsity; nothing reaches both, and little reaches either."""

    name: str
    architecture: str  # of the tables in moe_kernels/backends/triton/configs
    matrix: float  # bf16 FLOP/s
    bandwidth: float  # bytes/s
    multiprocessors: int
    source: str


DEVICES = {
    "h200": Device(
        "H200 SXM", "sm_90", 989e12, 4.8e12, 132,
        "NVIDIA H200 data sheet (1,979 TFLOP/s with sparsity), multiprocessors: H100 architecture white paper",
    ),
    "a100": Device(
        "A100 80GB SXM", "sm_80", 312e12, 2.039e12, 108,
        "NVIDIA A100 80GB data sheet, multiprocessors: A100 architecture white paper",
    ),
    "b200": Device(
        "B200", "sm_100", 2250e12, 8e12, 148,
        "NVIDIA HGX B200 data sheet (about 4,500 TFLOP/s a GPU with sparsity), multiprocessors as CUDA reports them",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A square convolution with padding ``kernel // 2``; channels are those of one expert."""

    in_channels: int
    out_channels: int
    size: int  # of the input
    stride: int
    kernel: int = 3
    times: int = 1  # in the network
    routed: bool = True
    fixed_input: bool = False  # the input is as wide in the dense network

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return output_size(self.size, self.kernel, self.stride, self.padding, 1)

    def dense(self) -> Layer:
        """The layer that this one is the half of (r = 0.5)."""
        widen = 1 if self.fixed_input else 2
        return replace(self, in_channels=widen * self.in_channels, out_channels=2 * self.out_channels, routed=False)

    def __str__(self) -> str:
        kind = f"{self.kernel}x{self.kernel}" + ("" if self.routed else " plain")
        return f"{self.in_channels}->{self.out_channels}@{self.size}/{self.stride} {kind}"


def _resnet18() -> tuple[Layer, ...]:
    """The 3×3 convolutions of eight blocks. The stem keeps its full width, so the first input is the dense network's. The
    shortcuts are plain convolutions, as released: all samples share one weight."""
    layers = [
        Layer(s.in_channels, s.out_channels, s.size, s.stride, times=1 + 2 * (number % 2), fixed_input=number == 0)
        for number, s in enumerate(SHAPES)
    ]
    shortcuts = [Layer(c, 2 * c, size, 2, kernel=1, routed=False) for c, size in ((32, 32), (64, 16), (128, 8))]
    return (*layers, *shortcuts)


def _wrn28_10(blocks: int = 4) -> tuple[Layer, ...]:
    """Three groups of ``blocks`` blocks of two 3×3 convolutions; shortcuts are routed. The 16 channels of the stem are
    taken as they are in both networks."""
    layers, shortcuts = [], []
    for before, channels, size, stride in ((16, 80, 32, 1), (80, 160, 32, 2), (160, 320, 16, 2)):
        first = Layer(before, channels, size, stride, fixed_input=before == 16)
        layers += [first, Layer(channels, channels, size // stride, 1, times=2 * blocks - 1)]
        shortcuts.append(replace(first, kernel=1))
    return (*layers, *shortcuts)


NETWORKS = {"ResNet-18": _resnet18(), "WRN-28-10": _wrn28_10()}


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What one call multiplies and moves."""

    flop: int
    read: int  # bytes
    written: int  # bytes
    partial: int = 0  # bytes of partial sums, which are in both read and written

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flop / (self.read + self.written)


def residue_taps(kernel: int, stride: int) -> list[int]:
    """Along one axis, how many taps of a kernel meet an input pixel, for each residue of its position (moved by the
    padding) modulo the stride. They sum to the kernel's taps: each meets one residue."""
    return [len(range(residue, kernel, stride)) for residue in range(stride)]


def _touched(layer: Layer) -> int:
    """Rows of the input that some tap meets: a 1×1 kernel of stride 2 meets every second one only."""
    first = range(-layer.padding, -layer.padding + layer.stride * layer.out_size, layer.stride)
    return len({row + tap for row in first for tap in range(layer.kernel)} & set(range(layer.size)))


def _loads(batch: int, experts: int) -> list[int]:
    """Samples of each expert, spread evenly."""
    return [batch // experts + (expert < batch % experts) for expert in range(experts)]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _split(layer: Layer, batch: int) -> int:
    """Samples of one segment of the weight gradient, by the kernel's own rule; inside ``assume``."""
    columns = layer.kernel**2 * layer.in_channels
    blocks = _cdiv(layer.out_channels, 64) * _cdiv(columns, 64)
    return _segment(batch, blocks, layer.out_channels * columns, _META)


def count(layer: Layer, batch: int, direction: str, experts: int, partial_sums: bool = True) -> Work:
    """The work of one call. ``partial_sums``: whether a weight gradient has them; how many asks for ``assume`` around."""
    taps = layer.kernel**2
    weight = layer.out_channels * layer.in_channels * taps
    image = batch * _touched(layer) ** 2 * layer.in_channels * _ELEMENT
    result = batch * layer.out_size**2 * layer.out_channels * _ELEMENT
    used = min(experts, batch) * weight * _ELEMENT
    if direction == "forward":
        return Work(2 * batch * layer.out_size**2 * weight, image + used, result)
    if direction == "grad_input":
        pixels = _cdiv(layer.size, layer.stride)  # of one residue, along an axis
        products = sum(residue_taps(layer.kernel, layer.stride)) ** 2 * pixels**2  # (pixel, tap) pairs over all residues
        written = batch * layer.size**2 * layer.in_channels * _ELEMENT
        return Work(2 * batch * products * layer.in_channels * layer.out_channels, result + used, written)
    partial = 0
    if partial_sums:
        segment = _split(layer, batch)
        partial = sum(_cdiv(load, segment) for load in _loads(batch, experts)) * weight * _PARTIAL
    written = experts * weight * _ELEMENT + partial
    return Work(2 * batch * layer.out_size**2 * weight, image + result + partial, written, partial)


@dataclass(frozen=True)
class Tiles:
    """How the kernel cuts a call. Rows are pixels of the result; in the weight gradient its output channels."""

    block_m: int
    block_n: int
    block_k: int
    packed: bool  # a tile takes rows of several samples
    count: int  # that have work; a few more start and leave at once
    rows_used: float
    columns_used: float


def tiles(layer: Layer, batch: int, direction: str, experts: int) -> Tiles:
    """The configuration with the least estimated time, and what becomes of it; inside ``assume``."""
    outer = ExpertSlices.partition(layer.out_channels, experts)
    inner = ExpertSlices.whole(layer.in_channels)
    pad, stride = layer.padding, layer.stride
    g = Conv2dGeometry.of(outer, inner, (stride, stride), (pad, pad), (1, 1), 1)
    kernel = (layer.kernel, layer.kernel)
    if direction == "grad_weight":
        width, depth = layer.out_channels, layer.in_channels
        segment = _split(layer, batch)
        # columns of one tap, and how often they come: few channels of an image fill tiles across taps
        columns, times = depth, layer.kernel**2
        if depth < SMALLEST_BLOCK:
            columns, times = columns * times, 1
        terms = batch * layer.out_size**2
        problem = Problem("grad_weight", "half", width, columns, terms, _cdiv(batch, segment) * times)
        config = estimated_best(problem, _META)
        blocks_m, blocks_n = _cdiv(width, config.block_m), _cdiv(columns, config.block_n)
        segments = sum(_cdiv(load, segment) for load in _loads(batch, experts))
        return Tiles(
            config.block_m, config.block_n, config.block_k, False, segments * blocks_m * blocks_n * times,
            width / (blocks_m * config.block_m), columns / (blocks_n * config.block_n),
        )  # fmt: skip
    backward = direction == "grad_input"
    size = layer.size if backward else layer.out_size
    depth, width = layer.in_channels, layer.out_channels
    if backward:
        depth, width = width, depth
    bf16 = torch.empty(0, dtype=torch.bfloat16, device=_META)
    tiling = _tiling(g, batch, (size, size), kernel, bf16, backward)
    config = estimated_best(tiling.problem, _META)
    packed = _packs(tiling, batch, config, experts)
    loads = _loads(batch, experts) if packed else [1] * batch
    row_tiles = sum(_cdiv(load * tiling.pixels, config.block_m) for load in loads)
    blocks = _cdiv(width, config.block_n)
    return Tiles(
        config.block_m, config.block_n, block_k(config, depth)[0], packed, row_tiles * blocks * tiling.residues,
        batch * tiling.pixels / (row_tiles * config.block_m), width / (blocks * config.block_n),
    )  # fmt: skip


# --- rows -------------------------------------------------------------------------------------------------------------


def _times(work: Work, device: Device) -> dict[str, Any]:
    matrix, memory = work.flop / device.matrix, (work.read + work.written) / device.bandwidth
    longer = max(matrix, memory)
    return {
        **asdict(work), "intensity": work.intensity, "matrix_us": matrix * 1e6, "memory_us": memory * 1e6,
        "roofline_us": longer * 1e6, "with_launch_us": max(longer, LAUNCH) * 1e6,
        "bound": "launch" if longer < LAUNCH else "matrix" if matrix >= memory else "memory",
    }  # fmt: skip


def rows(device: Device, experts: int, batches: Sequence[int] = BATCHES) -> list[dict[str, Any]]:
    """A row for each network, batch, direction and layer; under ``"dense"`` the same of the dense network's layer.

    The dense layer's weight gradient is counted without partial sums: whether its kernel has any is not known here, and
    the comparison is not to lean to the routed side.
    """
    result = []
    with assume(device.architecture):
        for network, layers in NETWORKS.items():
            for batch in batches:
                for direction in DIRECTIONS:
                    for layer in layers:
                        own = experts if layer.routed else 1
                        cut = tiles(layer, batch, direction, own)
                        dense = count(layer.dense(), batch, direction, 1, partial_sums=False)
                        row = {
                            "network": network, "layer": str(layer), **asdict(layer), "batch": batch,
                            "direction": direction, "experts": own, **_times(count(layer, batch, direction, own), device),
                            "tiles": asdict(cut), "waves": cut.count / device.multiprocessors,
                            "dense": _times(dense, device),
                        }  # fmt: skip
                        result.append(row)
    return result


def summary(all_rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the routed layers of each network, as often as each occurs."""
    sums: dict[tuple[str, int, str], dict[str, float]] = {}
    for row in all_rows:
        if not row["routed"]:
            continue
        mine = sums.setdefault((row["network"], row["batch"], row["direction"]), {})
        for name in ("roofline_us", "with_launch_us"):
            for side, values in (("moe", row), ("dense", row["dense"])):
                mine[f"{side}_{name}"] = mine.get(f"{side}_{name}", 0.0) + row["times"] * values[name]
    return [
        {
            "network": network, "batch": batch, "direction": direction, **mine,
            "dense/moe": mine["dense_roofline_us"] / mine["moe_roofline_us"],
            "dense/moe with launch": mine["dense_with_launch_us"] / mine["moe_with_launch_us"],
        }
        for (network, batch, direction), mine in sums.items()
    ]  # fmt: skip


# --- printing ---------------------------------------------------------------------------------------------------------


def _figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 2 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def _layer_table(here: Sequence[dict[str, Any]]) -> str:
    header = [
        "layer", "count", "GFLOP", "MB read", "MB written", "FLOP/byte", "matrix µs", "memory µs", "bound", "tile",
        "tiles", "waves", "rows used", "columns used",
    ]  # fmt: skip
    cells = []
    for row in here:
        cut = row["tiles"]
        tile = f"{cut['block_m']}x{cut['block_n']}x{cut['block_k']}" + ("p" if cut["packed"] else "")
        line = [
            row["layer"], str(row["times"]), _figure(row["flop"] / 1e9), _figure(row["read"] / 1e6),
            _figure(row["written"] / 1e6), _figure(row["intensity"]), _figure(row["matrix_us"]),
            _figure(row["memory_us"]), row["bound"], tile, str(cut["count"]), _figure(row["waves"]),
            percent(cut["rows_used"]), percent(cut["columns_used"]),
        ]  # fmt: skip
        cells.append(line)
    return table(header, cells)


def _summary_table(sums: Sequence[dict[str, Any]]) -> str:
    header = [
        "network", "batch", "direction", "MoE µs", "dense µs", "dense/MoE", "MoE µs, launches", "dense µs, launches",
        "dense/MoE, launches",
    ]  # fmt: skip
    cells = [
        [
            s["network"], str(s["batch"]), s["direction"], _figure(s["moe_roofline_us"]), _figure(s["dense_roofline_us"]),
            f"{s['dense/moe']:.2f}", _figure(s["moe_with_launch_us"]), _figure(s["dense_with_launch_us"]),
            f"{s['dense/moe with launch']:.2f}",
        ]
        for s in sums
    ]  # fmt: skip
    return table(header, cells)


def _report(device: Device, experts: int, all_rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"{device.name}: {device.matrix / 1e12:.0f} TFLOP/s bf16 without sparsity, {device.bandwidth / 1e12:.1f} TB/s, "
        f"{device.multiprocessors} multiprocessors.\nSource: {device.source}.\n"
        f"N = {experts} experts, r = 0.5, 32x32 images, bf16; tiles: {device.architecture}, untuned; "
        "p: a tile takes rows of several samples."
    )
    for network in NETWORKS:
        for batch in sorted({row["batch"] for row in all_rows}):
            here = [r for r in all_rows if (r["network"], r["batch"], r["direction"]) == (network, batch, "forward")]
            print(f"\n{network}, forward, B = {batch}\n\n{_layer_table(here)}")
    print(f"\nSums of the roofline times over the routed layers of a network\n\n{_summary_table(summary(all_rows))}\n")
    print(_NOTES)
    print(DISCLAIMER)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEVICES), default="h200")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all rows and the sums, of all directions")
    options = parser.parse_args(arguments)
    if options.experts < 1:
        parser.error(f"--experts: expected at least 1, got {options.experts}")
    device = DEVICES[options.device]
    all_rows = rows(device, options.experts)
    if options.json:
        record = {
            "note": DISCLAIMER, "device": asdict(device), "experts": options.experts, "launch_us": LAUNCH * 1e6,
            "rows": all_rows, "summary": summary(all_rows),
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    _report(device, options.experts, all_rows)


if __name__ == "__main__":
    main()
