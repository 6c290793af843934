# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.aot``: compiles the Triton kernels for GPUs that are not here, and looks at what came out.

Every configuration of every kernel, for sm_80, sm_90 and sm_100: registers, spills, shared memory, and which matrix
instructions its loop has, from the cubin and the PTX. What is compiled is what the library would start: its own launch
code runs on tensors without memory, and the launches are written down. Exits with 1 where a main configuration spills,
asks for more shared memory than the device has, or multiplies without matrix instructions (float32 with full products
has none). ``--model`` compiles, in one process, what a training step of a whole model starts, and says how long it took.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor

from advmoe.models import create_model, list_models
from advmoe.tables import table
from moe_kernels import backends, use_backend
from moe_kernels.backends.interface import Epilogue, Experts
from moe_kernels.backends.triton import batch_norm, plan, routed_conv2d
from moe_kernels.backends.triton.configs import KERNELS, KINDS, TileConfig, assume, candidates
from moe_kernels.backends.triton.launch import INTERPRETED, OPTIONS, Launch, record
from moe_kernels.geometry import Conv2dGeometry
from moe_kernels.slices import ExpertSlices

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
# What a tile can be multiplied with; the small ones of sm_90 and sm_100 take the older instructions.
MATRIX = {"sm_80": ("mma.sync",), "sm_90": ("wgmma", "mma.sync"), "sm_100": ("tcgen05", "wgmma", "mma.sync")}
_INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}


class Job(NamedTuple):
    architecture: str
    kernel: str  # one of configs.KERNELS, or "other": those that multiply nothing
    kind: str
    variant: str
    config: TileConfig
    main: bool


# --- what is compiled -------------------------------------------------------------------------------------------------

# (input channels, output channels, size, kernel, stride, groups, windows, backward, epilogue and gate's gradient)
_VARIANTS: dict[str, tuple[Any, ...]] = {
    "3x3, one sample a tile": (64, 64, 32, 3, 1, 1, False, False, False),
    "3x3, packed": (256, 256, 4, 3, 1, 1, False, False, False),
    "3x3 of 32 channels": (32, 32, 32, 3, 1, 1, False, False, False),
    "3x3, packed, epilogue": (256, 256, 4, 3, 1, 1, False, False, True),
    "3x3 stride 2, windows": (64, 128, 16, 3, 2, 1, True, False, False),
    "1x1": (64, 128, 32, 1, 1, 1, False, False, False),
    "7x7 of 3 channels": (3, 64, 32, 7, 2, 1, False, False, False),
    "3x3 in 4 groups": (64, 64, 32, 3, 1, 4, False, False, False),
    "17 channels": (17, 31, 32, 3, 1, 1, False, False, False),
    "grad_input 3x3": (64, 64, 32, 3, 1, 1, False, True, False),
    "grad_input 3x3, packed, gate": (256, 256, 4, 3, 1, 1, False, True, True),
    "grad_input 3x3 stride 2": (64, 128, 32, 3, 2, 1, False, True, True),
    "grad_input 17 channels": (17, 31, 32, 3, 1, 1, False, True, False),
}  # fmt: skip
_GRAD_WEIGHT = {
    "3x3": (64, 64, 32, 3, 1, 1, False),
    "3x3 stride 2, windows": (64, 128, 16, 3, 2, 1, True),
    "1x1": (64, 128, 32, 1, 1, 1, False),
    "7x7 of 3 channels": (3, 64, 32, 7, 2, 1, False),
    "3x3 in 4 groups": (64, 64, 32, 3, 1, 4, False),
}
_MAIN = {
    "3x3, one sample a tile",
    "3x3, packed, epilogue",
    "grad_input 3x3, packed, gate",
    "grad_input 3x3 stride 2",
    "3x3",
}  # fmt: skip


_PLAIN = {"3x3, one sample a tile", "3x3"}


def jobs(architectures: list[str], every: bool) -> Iterator[Job]:
    """``every``: all variants with all configurations; else the main variants, and of the others each list's first."""
    for architecture in architectures:
        for kernel in KERNELS:
            variants = _VARIANTS if kernel == "convolution" else _GRAD_WEIGHT
            for kind in KINDS:
                for number, config in enumerate(candidates(architecture, kernel, kind)):
                    for variant in variants:
                        main = variant in _MAIN
                        if kind == "ieee" and variant not in _PLAIN and not every:
                            continue
                        if every or main or (number == 0 and architecture == "sm_90"):
                            yield Job(architecture, kernel, kind, variant, config, main)
        yield Job(architecture, "other", "half", "plan, BatchNorm", TileConfig(0, 0, 0, 0, 0), True)


def _launches(job: Job) -> list[Launch]:
    """The launches of one call with one configuration."""
    dtype = torch.bfloat16 if job.kind == "half" else torch.float32
    batch, experts = 128, 4

    def image(channels: int, size: int) -> Tensor:
        x = torch.empty((batch, channels, size, size), dtype=dtype, device="meta")
        return x.contiguous(memory_format=torch.channels_last)

    expert = torch.empty(batch, dtype=torch.int64, device="meta")
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    precision = conv.fp32_precision
    conv.fp32_precision = "tf32" if job.kind == "tf32" else "ieee"
    try:
        with record() as launches, assume(job.architecture, job.config if job.config.block_m else None):
            if job.kernel == "other":
                for samples in (128, 4096):
                    plan.make(Experts(expert, None), experts, 0, samples, expert.device)
                _batch_norm(image(64, 16), expert, experts)
                return launches
            values = (_VARIANTS if job.kernel == "convolution" else _GRAD_WEIGHT)[job.variant]
            channels, width, size, kernel, stride, groups, windows = values[:7]
            backward, more = values[7:] if job.kernel == "convolution" else (False, False)
            inner = ExpertSlices.windows(2 * channels, 0.5, experts) if windows else ExpertSlices.whole(channels)
            outer = ExpertSlices.windows(2 * width, 0.5, experts) if windows else ExpertSlices.partition(width, experts)
            pad = kernel // 2
            g = Conv2dGeometry.of(outer, inner, (stride, stride), (pad, pad), (1, 1), groups)
            shape = (outer.total, inner.total // groups, kernel, kernel)
            weight = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
            both = Experts(expert, expert if windows else None)
            x, out = image(channels, size), (size + 2 * pad - kernel) // stride + 1
            gate = torch.empty(batch, device="meta") if more else None
            if job.kernel == "grad_weight":
                routed_conv2d.grad_weight(image(width, out), x, both, g, weight)
            elif backward:
                routed_conv2d.grad_input(image(width, out), weight, both, g, (size, size), gate, x if more else None)
            else:
                affine = torch.empty(width, device="meta") if more else None
                residual = image(width, out) if more else None
                epilogue = Epilogue(None, gate, affine, affine, residual, more)
                routed_conv2d.forward(x, weight, both, g, epilogue)
    finally:
        conv.fp32_precision = precision
    # the reduction has one form whatever the configuration, and is compiled with the first; the plan is a job of its own
    first = job.config == candidates(job.architecture, job.kernel, job.kind)[0]
    apart = ("plan_kernel",) if first else ("plan_kernel", "reduce_kernel")
    return [launch for launch in launches if launch.kernel.__name__ not in apart]


def _batch_norm(x: Tensor, expert: Tensor, experts: int) -> None:
    for total, starts in ((experts * x.shape[1], ()), (160, (0, 32, 64, 96))):
        values = torch.empty(total, device="meta")
        order = torch.empty(experts + 2 + len(x), dtype=torch.int32, device="meta")
        batch_norm.moments(x, order, starts, total)
        batch_norm.sums(x, x, values, order, starts)
        batch_norm.affine(x, expert, experts, starts, values, values, values)
        batch_norm.affine(x, expert, experts, starts, values, values, values, x, values)


# --- compiling --------------------------------------------------------------------------------------------------------

_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


def _source(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """A launch's kernel as Triton specialises it at run time: to types, to sizes of 1 and to multiples of 16."""
    kernel = launch.kernel
    names = kernel.arg_names
    given = {**dict(zip(names, launch.args, strict=False)), **launch.meta}
    options = {**OPTIONS, **{name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]  # torch's allocations are aligned to more
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compiler.ASTSource(kernel, signature, constants, attributes), options


def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _look(cubin: bytes) -> dict[str, int]:
    """Registers of a thread; instructions that go through local memory, which is what a spill costs (a frame that nothing
    touches is none); instructions of the innermost loop that has matrix instructions, and how many of those."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(what: str) -> str:
            return subprocess.run([_cuobjdump(), what, file.name], capture_output=True, text=True, check=True).stdout

        registers = int(re.findall(r"REG:(\d+)", ask("--dump-resource-usage"))[0])
        code = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", ask("-sass"))
    place = {int(address, 16): number for number, (address, _) in enumerate(code)}
    loops = []
    for number, (_, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        first = place.get(int(jump.group(1), 16)) if jump else None
        if first is not None and first < number:
            body = code[first : number + 1]
            matrix = sum(1 for _, line in body if re.match(r"(?:@!?U?P\w+ +)?\w*MMA\b", line))
            if matrix:
                loops.append((len(body), matrix))
    loop, matrix = min(loops, default=(0, 0))
    spills = sum(1 for _, text in code if re.search(r"\b(?:STL|LDL)\b", text))
    return {"registers": registers, "spills": spills, "loop": loop, "loop_matrix": matrix}


def build(job: Job) -> list[dict[str, Any]]:
    """Compiles a job's kernels; a row for each."""
    target = triton.backends.compiler.GPUTarget("cuda", ARCHITECTURES[job.architecture], 32)
    rows = []
    for launch in _launches(job):
        source, options = _source(launch)
        start = time.perf_counter()
        compiled = triton.compile(source, target=target, options=options)
        seconds = time.perf_counter() - start
        seen = _look(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        found = {name: len(re.findall(pattern, ptx)) for name, pattern in _INSTRUCTIONS.items()}
        config = f"{job.config.block_m}x{job.config.block_n}x{job.config.block_k}" if job.config.block_m else "-"
        row = {
            "architecture": job.architecture, "kernel": launch.kernel.__name__, "kind": job.kind, "variant": job.variant,
            "config": config, "warps": options.get("num_warps", 4), "stages": options.get("num_stages", 3),
            **seen, "shared": compiled.metadata.shared,
            "matrix": next((name for name in MATRIX[job.architecture] if found[name]), "none"), "main": job.main,
            "seconds": round(seconds, 2),
        }  # fmt: skip
        row["faults"] = _faults(row)
        rows.append(row)
    return rows


def _faults(row: dict[str, Any]) -> list[str]:
    faults = []
    if row["main"] and row["spills"]:
        faults.append(f"{row['spills']} instructions spill or refill registers")
    if row["shared"] > SHARED_LIMIT[row["architecture"]]:
        faults.append(f"{row['shared']} bytes of shared memory, the device has {SHARED_LIMIT[row['architecture']]}")
    multiplies = row["kernel"] in ("convolution_kernel", "grad_weight_kernel")
    if row["main"] and multiplies and row["kind"] != "ieee" and (row["matrix"] == "none" or not row["loop"]):
        faults.append("no loop with matrix instructions")
    return faults


def compile_model(architecture: str, arch: str, batch: int) -> tuple[int, float]:
    """Kernels that a training step (bfloat16 by autocast) and an inference of an MoE of ``arch`` start, and the seconds
    that compiling them one after the other takes."""
    backend = type(backends._BACKENDS["triton"])
    model = create_model(arch, kind="moe", image_size=32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.zeros(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with (
        mock.patch.object(backend, "unsupported", lambda self, device: None),
        mock.patch.object(backend, "unavailable", lambda self: None),
        mock.patch.object(torch, "empty", _zeros),
        use_backend("triton"),
        assume(architecture),
        record() as launches,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().sum().backward()
        with torch.no_grad():
            model.eval().to(torch.bfloat16)(x.bfloat16())
    target = triton.backends.compiler.GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    start, hashes = time.perf_counter(), set()
    for launch in launches:
        source, options = _source(launch)
        hashes.add(triton.compile(source, target=target, options=options).hash)
    return len(hashes), time.perf_counter() - start


def _zeros(*shape: Any, memory_format: Any = None, **more: Any) -> Tensor:
    """In the place of torch.empty: nothing is launched, and what would be computed must not be NaN by chance."""
    out = torch.zeros(*shape, **more)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for GPUs that are not here.")
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    parser.add_argument("--all", action="store_true", help="every variant with every configuration, not the main ones")
    parser.add_argument("--json", type=Path, help="write the rows")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument(
        "--model",
        choices=list_models(),
        help="compile what a training step and an inference of this backbone start, and nothing else",
    )
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    if options.model:
        for architecture in options.arch:
            count, seconds = compile_model(architecture, options.model, 128)
            print(f"{options.model}, {architecture}: {count} kernels in {seconds:.0f} s, Triton {triton.__version__}")
        return 0
    start = time.perf_counter()
    rows = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for done in pool.map(build, jobs(options.arch, options.all), chunksize=4):
            rows += done
    seconds = time.perf_counter() - start
    if options.json:
        record = {"triton": triton.__version__, "torch": torch.__version__, "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    names = (
        "architecture",
        "kernel",
        "kind",
        "variant",
        "config",
        "warps",
        "registers",
        "spills",
        "shared",
        "matrix",
        "loop",
    )
    shown = [row for row in rows if row["faults"] or row["variant"] in _PLAIN]
    print(table(list(names), [[str(row[name]) for name in names] for row in shown]))
    bad = [row for row in rows if row["faults"]]
    for row in bad:
        print(*(row[name] for name in names[:5]), "; ".join(row["faults"]), sep=": ")
    print(f"\n{len(rows)} kernels compiled by Triton {triton.__version__} in {seconds:.0f} s, {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
