# SPDX-License-Identifier: Apache-2.0
"""Mistakes planted in the kernels themselves: the simulator, or the comparison with the loop, must catch each."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest

import moe_kernels

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(
        moe_kernels.available_backends()["cuda_sim"] is not None, reason=str(moe_kernels.available_backends()["cuda_sim"])
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH"),
]

# file, what is there, what is put in its place, and what is said then ("wrong": only the values tell)
MUTANTS = {
    "no barrier before a stage is read": (
        "gemm.h",
        "device::sync_threads();  // this stage",
        "// this stage",
        "which thread|no thread of this block",
    ),
    "a wait for one group too few": ("gemm.h", "wait_copies<Stages - 2>", "wait_copies<Stages - 1>", "on its way"),
    "no barrier after the rows": (
        "convolution.h",
        "        rows.store(3 * Tile::kM + r, x);\n    }\n    device::sync_threads();\n",
        "        rows.store(3 * Tile::kM + r, x);\n    }\n",
        "which thread|no thread of this block",
    ),
    "a row past the image": (
        "convolution.h",
        "seen[i] = unsigned(row) < unsigned(p.y.source)",
        "seen[i] = unsigned(row) <= unsigned(p.y.source)",
        "input|grad|wrong",
    ),
    "lanes of the left fragment exchanged": (
        "gemm.h",
        "Place::place(first + lane % 16, step * 2 + lane / 16)",
        "Place::place(first + lane % 16, step * 2 + 1 - lane / 16)",
        "wrong",
    ),
    "columns of the right fragment exchanged": (
        "gemm.h",
        "b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];",
        "b[0][0] = r[0], b[0][1] = r[2], b[1][0] = r[1], b[1][1] = r[3];",
        "wrong",
    ),
    "no barrier before the parts are counted": (
        "convolution.h",
        "flag.store(0, device::atomic_add(counters, unit, 1));\n    device::sync_threads();",
        "flag.store(0, device::atomic_add(counters, unit, 1));",
        "which thread|no thread of this block",
    ),
    "no tiles for groups that end inside one": (
        "groups.h",
        "/ tile_rows + partly;",
        "/ tile_rows + 0 * partly;",
        "wrong|workspace",
    ),
    "a group counted once for each sample": ("grad_weight.cu", "if (other < lane) leader = false;", "", "wrong"),
    "no barrier between the warps of a plan": (
        "plan.cu",
        "next.store(group, place + device::population(alike));\n            }\n            device::sync_threads();",
        "next.store(group, place + device::population(alike));\n            }",
        "which thread|no thread of this block|wrong|plan",
    ),
    "a segment that begins one pixel late": ("grad_weight.h", "at = line;", "at = line + 1;", "wrong|input|grad"),
    "an early start without waiting": ("convolution.h", "    device::wait_for_previous();\n", "", "wait_for_previous"),
}

_MODULE = '#include "bindings_gpu.h"\nPYBIND11_MODULE(mutant, m) { moe::bind_gpu(m); }\n'

_CHECK = """
import importlib.util, sys
import torch
sys.path.insert(0, sys.argv[2])
spec = importlib.util.spec_from_file_location("mutant", sys.argv[1])
mutant = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutant)
from oracle import Case, check, partition, whole
import moe_kernels
from moe_kernels import backends
backends._BACKENDS["cuda_sim"]._kernels = mutant.cuda_sim
torch.set_num_threads(1)
caught = []
for case in (
    Case(partition(64, 2), whole(64), padding=(1, 1), size=(4, 4), batch=3, dtype=torch.bfloat16),
    Case(partition(32, 2), whole(96), padding=(1, 1), size=(6, 6), batch=2, dtype=torch.bfloat16),
    Case(partition(8, 3), whole(8), size=(3, 3), batch=70, dtype=torch.bfloat16),
):
    with moe_kernels.use_backend("cuda_sim"):
        try:
            check(case)
        except RuntimeError as error:
            caught.append(str(error))
        except AssertionError as error:
            caught.append("wrong: " + str(error))
print("\\n".join(caught) or "nothing was noticed")
"""


def _build(folder: Path, source: Path) -> Path:
    """The simulator with the kernels of ``source``, as a module of its own."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DMOE_SIMULATOR", "-DMOE_WITH_SIMULATOR"]
    includes = (source, pybind11.get_include(), sysconfig.get_paths()["include"])
    flags += ['-DMOE_CUDA_MISSING="not built"', *(f"-I{path}" for path in includes)]
    module = folder / "module.cpp"
    module.write_text(_MODULE)
    files = [*source.glob("cuda/*.cu"), *source.glob("sim/*.cu"), *source.glob("sim/*.cpp"), source / "bindings_gpu.cpp"]

    def compiled(path: Path) -> str:
        target = folder / f"{path.stem}.{path.suffix[1:]}.o"
        command = ["g++", *flags, "-x", "c++", "-c", str(path), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*files, module]))
    library = folder / "mutant.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects], check=True)
    return library


def _said(folder: Path, mutate: tuple[str, str, str] | None) -> str:
    source = folder / "csrc"
    shutil.copytree(ROOT / "csrc", source)
    if mutate is not None:
        name, old, new = mutate
        path = source / "cuda" / name
        text = path.read_text()
        assert old in text, f"{name} no longer has: {old}"
        path.write_text(text.replace(old, new))
    library = _build(folder, source)
    command = [sys.executable, "-c", _CHECK, str(library), str(Path(__file__).parent)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_kernels_as_they_are_pass(tmp_path: Path) -> None:
    assert _said(tmp_path, None).strip() == "nothing was noticed"


@pytest.mark.parametrize("name", list(MUTANTS))
def test_a_planted_mistake_is_caught(name: str, tmp_path: Path) -> None:
    *mutate, expected = MUTANTS[name]
    said = _said(tmp_path, (mutate[0], mutate[1], mutate[2]))
    assert "nothing was noticed" not in said
    assert re.search(expected, said), said
