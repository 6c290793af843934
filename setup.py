# SPDX-License-Identifier: Apache-2.0
"""Builds moe_kernels._C with CMake and ninja. Everything else about the package is in pyproject.toml.

Of the environment, besides CXX, CUDACXX, CUDAHOSTCXX and CUDA_HOME:

- ``MOE_KERNELS_CUDA``: 1 builds the CUDA kernels or fails, 0 leaves them out; unset builds them where nvcc is found.
- ``MOE_KERNELS_CUDA_ARCHS``: the architectures, as CMake names them: ``90-real``, or ``80-real,90``; CMakeLists.txt
  reads it.
- ``MOE_KERNELS_SIMULATOR``: 1 adds what the tests run: the CUDA kernels for the host, and random calls.
- ``MAX_JOBS``: compilers at a time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures afresh on every build: under build isolation pip's tools live in a new folder each time, and a kept
    CMake cache would point at the last one's."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / f"cmake-{sys.implementation.cache_tag}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        cmake = _tool("cmake")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYTHON_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DMOE_KERNELS_CUDA={_switch('MOE_KERNELS_CUDA', 'AUTO')}",
            f"-DMOE_KERNELS_SIMULATOR={_switch('MOE_KERNELS_SIMULATOR', 'OFF')}",
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.spawn(configure)
        self.spawn([cmake, "--build", str(work), "--target", "_C", "--parallel", jobs])
        if not target.exists():
            raise RuntimeError(f"CMake finished but did not write {target}")
        print(f"moe_kernels: built {target.name}: {(work / 'build_info.txt').read_text()}", flush=True)


def _switch(name: str, unset: str) -> str:
    value = os.environ.get(name, "").lower()
    states = {"": unset, "auto": unset, "0": "OFF", "off": "OFF", "1": "ON", "on": "ON"}
    if value not in states:
        raise RuntimeError(f"{name}: expected 0 or 1, got {value!r}")
    return states[value]


def _tool(name: str) -> str:
    """The tool's path: pip's build environment puts its own first on PATH."""
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} was not found; pip installs it with build isolation, or `pip install {name}`")
    subprocess.run([found, "--version"], check=True, stdout=subprocess.DEVNULL)
    return found


setup(ext_modules=[Extension("moe_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
