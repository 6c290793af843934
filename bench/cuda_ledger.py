# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.cuda_ledger``: what nvcc made of the CUDA kernels, for GPUs that are not here.

For each kernel and architecture, from the machine code: registers, stack, local and static shared memory,
instructions that spill or refill registers, and matrix instructions. Exits with 1 where a kernel spills (those that
gather element by element may), where one whose element is multiplied by the matrix unit has no matrix instruction, and
where one that must keep float32's products has some. Shared memory that a launch asks for is not in the binary; the
1024 bytes that the system takes are, from sm_90 on. ``make cuda`` builds what is looked at; :mod:`bench.aot` is the
same for the Triton kernels.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from advmoe.tables import table

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "cuda"  # by `make cuda`
MULTIPLIES = r"\b(?:convolution|grad_weight)_kernel<"
MATRIX_ELEMENTS = {"bfloat16", "float16", "tf32"}  # of float the products are the multiplier's, in full


class Usage(NamedTuple):
    """What a kernel takes: bytes but for the registers."""

    registers: int
    stack: int
    local: int
    shared: int


class Code(NamedTuple):
    """Instructions of a kernel that go through local memory, which is what a spill costs, and matrix instructions."""

    spills: int
    matrix: int


class Row(NamedTuple):
    kernel: str
    architecture: str
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    matrix: int


# --- what cuobjdump says ----------------------------------------------------------------------------------------------

_USAGE = re.compile(
    r"^arch = (?P<arch>sm_\w+)|^ *Function (?P<name>\S+):\s+"
    r"REG:(?P<reg>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)",
    re.MULTILINE,
)
# An instruction's own name, after its address and predicate: HFMA2.MMA is none of the matrix unit's. mma.sync becomes
# HMMA on each of sm_80 .. sm_120, of bfloat16, float16 and tf32; wgmma becomes HGMMA, tcgen05 UTCHMMA.
_CODE = re.compile(
    r"^\s*code for (?P<arch>sm_\w+)|^\s*Function : (?P<name>\S+)"
    r"|^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?:(?P<spill>STL|LDL)|(?P<matrix>HMMA|HGMMA|UTCHMMA))\b",
    re.MULTILINE,
)


def parse_usage(text: str) -> dict[tuple[str, str], Usage]:
    """``cuobjdump --dump-resource-usage``: (architecture, mangled name) to what the kernel takes."""
    found: dict[tuple[str, str], Usage] = {}
    architecture = ""
    for match in _USAGE.finditer(text):
        if match["arch"]:
            architecture = match["arch"]
            continue
        found[architecture, match["name"]] = Usage(
            int(match["reg"]), int(match["stack"]), int(match["local"]), int(match["shared"])
        )
    return found


def parse_code(text: str) -> dict[tuple[str, str], Code]:
    """``cuobjdump -sass``: (architecture, mangled name) to the instructions counted."""
    found: dict[tuple[str, str], Code] = {}
    architecture = name = ""
    for match in _CODE.finditer(text):
        if match["arch"]:
            architecture = match["arch"]
        elif match["name"]:
            name = match["name"]
            found[architecture, name] = Code(0, 0)
        else:
            spills, matrix = found[architecture, name]
            found[architecture, name] = Code(spills + bool(match["spill"]), matrix + bool(match["matrix"]))
    return found


def short_name(name: str) -> str:
    """A demangled kernel without its namespaces, return type and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\b_GLOBAL__N__\w+::", "", name)
    depth = 0
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:index]
            break
    return re.sub(r"\b\w+::", "", name).removeprefix("void ").replace("> >", ">>")


# --- the rules --------------------------------------------------------------------------------------------------------


def may_spill(row: Row) -> bool:
    return re.search(r"\bGather\b", row.kernel) is not None


def spilled(row: Row) -> str | None:
    if row.spills or row.stack or row.local:
        return f"{row.spills} instructions spill or refill, {row.stack} bytes of stack, {row.local} of local memory"
    return None


def faults(row: Row) -> list[str]:
    found = []
    spill = spilled(row)
    if spill and not may_spill(row):
        found.append(spill)
    if re.search(MULTIPLIES, row.kernel):
        elements = set(re.findall(r"\b(?:bfloat16|float16|tf32|float)\b", row.kernel))
        if not elements:
            found.append("its arguments name no element that this script knows")
        elif elements & MATRIX_ELEMENTS and not row.matrix:
            found.append("no matrix instruction")
        elif not elements & MATRIX_ELEMENTS and row.matrix:
            found.append(f"{row.matrix} matrix instructions, which do not keep float32's products")
    return found


# --- looking ----------------------------------------------------------------------------------------------------------


def cuobjdump() -> str:
    """Triton's, which its version pins; or the one on PATH or beside nvcc."""
    folders = []
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    folders += [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    folders += [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    for folder in folders:
        found = shutil.which("cuobjdump", path=str(folder))
        if found:
            return found
    raise SystemExit("cuobjdump was not found: it is in the package triton, and in CUDA's toolkit")


def binaries(path: Path) -> list[Path]:
    """``path``, or the objects with kernels in it."""
    found = sorted(path.rglob("*.cu.o")) if path.is_dir() else [path]
    if not found or not path.exists():
        raise SystemExit(f"{path}: no such binary, or no *.cu.o in it; `make cuda` builds them")
    return found


def compiler(path: Path) -> str:
    """Which nvcc made it: CMake writes that beside the objects, and into the module."""
    described = path / "build_info.txt" if path.is_dir() else path
    match = re.search(rb"nvcc \d+(\.\d+)+", described.read_bytes()) if described.exists() else None
    return match[0].decode() if match else "unknown"


def _ask(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def look(paths: Iterable[Path], processes: int) -> list[Row]:
    """A row for each kernel and architecture."""
    tool = cuobjdump()

    def read(path: Path) -> tuple[dict[tuple[str, str], Usage], dict[tuple[str, str], Code]]:
        # all architectures at once: the tool takes a second to start
        return parse_usage(_ask(tool, "--dump-resource-usage", str(path))), parse_code(_ask(tool, "-sass", str(path)))

    usages: dict[tuple[str, str], Usage] = {}
    codes: dict[tuple[str, str], Code] = {}
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:  # a thread waits for a process
        for usage, code in pool.map(read, sorted(paths, key=lambda path: -path.stat().st_size)):
            usages.update(usage)
            codes.update(code)
    names = sorted({name for _, name in usages})
    readable = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = {name: short_name(line) for name, line in zip(names, readable.splitlines(), strict=True)}
    # a KeyError here: a kernel without code, which would pass every rule
    rows = [Row(short[name], arch, *usage, *codes[arch, name]) for (arch, name), usage in usages.items()]
    return sorted(rows, key=lambda row: (row.kernel, _number(row.architecture)))


def _number(architecture: str) -> int:
    return int(re.sub(r"\D", "", architecture))


def record(rows: list[Row], nvcc: str) -> str:
    """JSON with a line for each row, so that a change of one kernel is a change of its lines."""
    lines = ",\n".join(" " + json.dumps(row._asdict()) for row in rows)
    return f'{{"compiler": {json.dumps(nvcc)}, "rows": [\n{lines}\n]}}\n'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Look at the machine code of the CUDA kernels.")
    parser.add_argument("--binary", type=Path, default=BUILT, help="a module or object, or a folder of *.cu.o")
    parser.add_argument("--json", type=Path, help="write the rows")
    parser.add_argument("--rows", type=int, default=12, help="how many of them to print, most registers first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    rows = look(binaries(options.binary), options.jobs)
    if not any(re.search(MULTIPLIES, row.kernel) for row in rows):
        print(f"{options.binary}: {len(rows)} kernels, and none that multiplies: nothing to check", file=sys.stderr)
        return 1
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(record(rows, compiler(options.binary)))
    worst = sorted(rows, key=lambda row: (-row.registers, -row.spills, row.kernel))[: options.rows]
    print(table(list(Row._fields), [[str(value) for value in row] for row in worst]))
    bad = 0
    for row in rows:
        wrong = faults(row)
        bad += bool(wrong)
        if wrong:
            print(f"{row.architecture} {row.kernel}: {'; '.join(wrong)}")
        elif spilled(row):
            print(f"{row.architecture} {row.kernel}: {spilled(row)} (it gathers, and may)")
    architectures = ", ".join(sorted({row.architecture for row in rows}, key=_number))
    seconds = time.perf_counter() - start
    print(
        f"\n{len({row.kernel for row in rows})} kernels by {compiler(options.binary)} for {architectures}, "
        f"looked at in {seconds:.0f} s: {bad} with faults"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
