# SPDX-License-Identifier: Apache-2.0
"""The package as installed; and, nightly, its wheel and sdist in fresh environments."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
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
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(ROOT)], check=True)
    pattern = "*.whl" if kind == "wheel" else "*.tar.gz"
    (archive,) = (tmp_path / "dist").glob(pattern)
    python = _environment(tmp_path / "venv")
    constraints = ROOT / "constraints.txt"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), str(archive)]
    subprocess.run(install, check=True)
    script = (
        "import torch; from moe_kernels import RoutedConv2d, Routing, available_backends;"
        "assert available_backends()['cpu'] is None;"
        "m = RoutedConv2d(3, 4, 3, num_experts=2); r = Routing(torch.tensor([0, 1]), num_experts=2);"
        "print(m(torch.randn(2, 3, 8, 8), r).shape)"
    )
    done = subprocess.run([str(python), "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "torch.Size([2, 4, 6, 6])" in done.stdout
    subprocess.run([str(python), "-m", "advmoe", "--version"], cwd=tmp_path, check=True)
