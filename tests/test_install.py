# SPDX-License-Identifier: Apache-2.0
"""The package as installed; and, nightly, its wheel and sdist in fresh environments."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

import moe_kernels

ROOT = Path(__file__).parents[1]


def test_the_native_module_is_there_and_says_what_it_is() -> None:
    available = moe_kernels.available_backends()
    assert available["reference"] is None and available["cpu"] is None
    done = subprocess.run([sys.executable, "-m", "moe_kernels.info"], capture_output=True, text=True, check=True)
    assert "backend reference: available" in done.stdout
    assert re.search(r"backend cpu: available; (avx512|avx2|generic); CPU kernels for \S+ \(generic", done.stdout)


def test_the_native_module_links_no_openmp_runtime() -> None:
    from moe_kernels import _C  # type: ignore[attr-defined]

    content = Path(_C.__file__).read_bytes()
    for name in (b"libgomp", b"libomp", b"libiomp"):
        assert name not in content


def test_the_advmoe_command_is_installed() -> None:
    command = Path(sys.executable).with_name("advmoe")
    done = subprocess.run([str(command), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"advmoe {moe_kernels.__version__}"


def test_the_installed_version_is_that_of_the_source() -> None:
    assert importlib.metadata.version("moe-kernels") == moe_kernels.__version__


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    places = re.compile("/" + "(root|home|work|Users|tmp)/[a-z]")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        assert path.stat().st_size < 1_000_000, name
        found = places.search(path.read_text(errors="ignore"))
        assert found is None, f"{name}: {found[0] if found else ''}"


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_wheel_and_sdist_install_elsewhere(tmp_path: Path, kind: str) -> None:
    env = {**os.environ, "MOE_KERNELS_CUDA": "0"}  # minutes less
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)], env=env, check=True)
    pattern = "*.whl" if kind == "wheel" else "*.tar.gz"
    (archive,) = (tmp_path / "dist").glob(pattern)
    if kind == "sdist":
        with tarfile.open(archive) as sources:
            packed = {name.partition("/")[2] for name in sources.getnames()}
        assert {str(file.relative_to(ROOT)) for file in ROOT.glob("csrc/**/*.*")} <= packed
    python = _environment(tmp_path / "venv")
    constraints = ROOT / "constraints.txt"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), str(archive)]
    subprocess.run(install, env=env, check=True)
    script = (
        "import torch; from moe_kernels import RoutedConv2d, Routing, available_backends;"
        "assert available_backends()['cpu'] is None;"
        "m = RoutedConv2d(3, 4, 3, num_experts=2); r = Routing(torch.tensor([0, 1]), num_experts=2);"
        "print(m(torch.randn(2, 3, 8, 8), r).shape)"
    )
    done = subprocess.run([str(python), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "torch.Size([2, 4, 6, 6])" in done.stdout
    subprocess.run([str(python), "-m", "advmoe", "--version"], cwd=tmp_path, check=True)


# --- with and without nvcc --------------------------------------------------------------------------------------------

NVCC = shutil.which(os.environ.get("CUDACXX") or "nvcc")


class Machine:
    """A copy of the sources, an environment that sees this one's packages, and a PATH with nvcc or without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        left_out = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, self.tree, ignore=left_out)
        self.python = _environment(folder / "venv")
        (self.site,) = (folder / "venv").glob("lib/python*/site-packages")
        (self.site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    def environment(self, nvcc: bool, **variables: str) -> dict[str, str]:
        names = ("MOE_KERNELS_", "CMAKE_", "CUDA")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        if not nvcc:
            kept["PATH"] = os.pathsep.join(map(self._without_nvcc, kept["PATH"].split(os.pathsep)))
            kept["CUDA_HOME"] = str(self.folder / "no-cuda")  # instead of the usual place
        elif NVCC:
            kept["CUDACXX"] = NVCC
        return {**kept, **variables}

    def _without_nvcc(self, place: str) -> str:
        """The folder itself, or one with links to everything in it but nvcc: a compiler may lie beside it."""
        if not (Path(place) / "nvcc").exists():
            return place
        shadow = self.folder / "path" / place.strip("/").replace("/", "-")
        if not shadow.exists():
            shadow.mkdir(parents=True)
            for file in Path(place).iterdir():
                if file.name != "nvcc":
                    (shadow / file.name).symlink_to(file)
        return str(shadow)

    def install(self, nvcc: bool, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python), "-m", "pip", "install", "-v", "--no-deps", "--force-reinstall", str(self.tree)]
        return subprocess.run(
            command,
            env=self.environment(nvcc, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def info(self) -> str:
        """What the installed package says of itself where no GPU is seen."""
        env = self.environment(nvcc=False, CUDA_VISIBLE_DEVICES="")
        command = [str(self.python), "-m", "moe_kernels.info"]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    def module(self) -> Path:
        (found,) = self.site.glob("moe_kernels/_C*.so")
        return found


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.nightly
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc here: not on PATH, nor named in CUDACXX")
def test_with_nvcc_the_cuda_kernels_are_built_and_wait_for_a_device(machine: Machine) -> None:
    done = machine.install(nvcc=True, MOE_KERNELS_CUDA="1", MOE_KERNELS_CUDA_ARCHS="90-real")
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"CUDA kernels: nvcc \S+ for 90-real", done.stdout)
    assert b"libcudart.so" not in machine.module().read_bytes()  # linked statically
    out = machine.info()
    assert "backend cpu: available" in out
    (line,) = re.findall("backend cuda: .*", out)
    assert re.search(r"not available: built \(nvcc \S+ for 90-real\), but ", line), line


@pytest.mark.nightly
def test_without_nvcc_one_line_says_so(machine: Machine) -> None:
    done = machine.install(nvcc=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert len(re.findall(r"^.*-- CUDA kernels: not built, nvcc was not found", done.stdout, re.MULTILINE)) == 1
    out = machine.info()
    assert "backend cpu: available" in out
    assert re.search(r"backend cuda: not available: built without CUDA kernels \(nvcc was not found\)", out), out

    asked = machine.install(nvcc=False, MOE_KERNELS_CUDA="1")
    assert asked.returncode != 0
    said = " ".join(asked.stdout.split())
    assert "CUDA kernels were asked for (MOE_KERNELS_CUDA=1), but nvcc was not found" in said

    wrong = machine.install(nvcc=False, MOE_KERNELS_CUDA="yes")
    assert wrong.returncode != 0 and "MOE_KERNELS_CUDA: expected 0 or 1, got 'yes'" in wrong.stdout


@pytest.mark.nightly
def test_a_second_install_from_the_same_tree_starts_anew(machine: Machine) -> None:
    """Each has tools of its own in a folder of its own, and the second finds an nvcc that the first had not."""
    first = machine.install(nvcc=False)
    assert first.returncode == 0, first.stdout[-4000:]
    found = NVCC is not None
    second = machine.install(nvcc=found, MOE_KERNELS_CUDA_ARCHS="90-real", MOE_KERNELS_SIMULATOR="1")
    assert second.returncode == 0, second.stdout[-4000:]
    assert ("CUDA kernels: nvcc" in second.stdout) == found
    assert "with the simulator" in second.stdout
    assert "backend cpu: available" in machine.info()
