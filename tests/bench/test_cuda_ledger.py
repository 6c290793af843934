# SPDX-License-Identifier: Apache-2.0
"""What the ledger of the CUDA kernels reads from cuobjdump, and which kernels it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import cuda_ledger
from bench.cuda_ledger import Code, Row, Usage

COPY = "_ZN3moe4cuda18convolution_kernelINS0_4TileINS0_6device8bfloat16ELi64EEENS0_4CopyEEEvNS0_6ParamsE"
PLAN = "_ZN3moe4cuda11plan_kernelENS0_6ParamsE"
USAGE = f"""
Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
host = linux
compile_size = 64bit
compressed

Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function {COPY}:
  REG:166 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:768 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {PLAN}:
  REG:25 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_120
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {COPY}:
  REG:152 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:768 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
	code for sm_80
	.target	sm_80

		Function : {COPY}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   HFMA2.MMA R11, -RZ, RZ, 0, 0 ;          /* 0x00000000ff0b7435 */
        /*0020*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;    /* 0x000000020408723c */
        /*0030*/              @!P0 HMMA.1688.F32.TF32 R8, R4, R2, R8 ;     /* 0x000000020408723c */
        /*0040*/                   STL [R1+0x94], R17 ;                    /* 0x0000941101007387 */
        /*1a050*/             @UP1 LDL.LU R3, [R1+0x94] ;                  /* 0x0000941101007387 */
        /*0060*/                   LDGSTS.E.BYPASS.128 [R3], [R4] ;        /* 0x0000941101007387 */
		..........

		Function : {PLAN}
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
"""


def row(kernel: str, **values: int) -> Row:
    plain = {"registers": 128, "stack": 0, "local": 0, "shared": 0, "spills": 0, "matrix": 32}
    return Row(kernel, "sm_90", **{**plain, **values})


def test_usage_of_each_architecture() -> None:
    assert cuda_ledger.parse_usage(USAGE) == {
        ("sm_80", COPY): Usage(166, 0, 0, 0),
        ("sm_80", PLAN): Usage(25, 16, 8, 1024),
        ("sm_120", COPY): Usage(152, 0, 0, 1024),
    }


def test_code_counts_spills_and_matrix_instructions() -> None:
    assert cuda_ledger.parse_code(SASS) == {("sm_80", COPY): Code(2, 2), ("sm_80", PLAN): Code(0, 0)}


@pytest.mark.parametrize(
    "name, short",
    [
        (
            "void moe::cuda::convolution_kernel<moe::cuda::Tile<moe::cuda::device::bfloat16, 64>, moe::cuda::Gather>"
            "(moe::cuda::ConvolutionParams<moe::cuda::Tile<moe::cuda::device::bfloat16, 64>::T>)",
            "convolution_kernel<Tile<bfloat16, 64>, Gather>",
        ),
        ("moe::cuda::(anonymous namespace)::plan_kernel(moe::cuda::(anonymous namespace)::PlanParams)", "plan_kernel"),
        ("void moe::f<(moe::Kind)1, moe::A<float> >(int)", "f<(Kind)1, A<float>>"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert cuda_ledger.short_name(name) == short


@pytest.mark.parametrize(
    "good",
    [
        row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Copy>"),
        row("grad_weight_kernel<Tile<tf32, 64, 64>, Copy>"),
        row("convolution_kernel<Tile<float, 64, 64>, Forward, Copy>", matrix=0),
        row("convolution_kernel<Tile<float16, 64, 64>, Forward, Gather>", spills=4, stack=8),
        row("plan_kernel", matrix=0),
        row("route<bfloat16, 8>", matrix=0),
    ],
)
def test_what_is_accepted(good: Row) -> None:
    assert cuda_ledger.faults(good) == []


@pytest.mark.parametrize(
    "bad, message",
    [
        (row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Copy>", spills=3), "3 instructions spill"),
        (row("plan_kernel", matrix=0, stack=16), "16 bytes of stack"),
        (row("route<float, 8>", matrix=0, local=16), "16 of local memory"),
        (row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Copy>", matrix=0), "no matrix instruction"),
        (row("convolution_kernel<Tile<float16, 64, 64>, Forward, Gather>", matrix=0), "no matrix instruction"),
        (row("grad_weight_kernel<Tile<tf32, 64, 64>, Copy>", matrix=0), "no matrix instruction"),
        (row("grad_weight_kernel<Tile<float, 64, 64>, Copy>"), "32 matrix instructions"),
        (row("convolution_kernel<Tile<half, 64, 64>, Forward, Copy>"), "no element"),
    ],
)
def test_what_is_refused(bad: Row, message: str) -> None:
    (fault,) = cuda_ledger.faults(bad)
    assert message in fault


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the command on given rows; returns its exit status and the file that it wrote."""

    def run(*rows: Row) -> tuple[int, Path]:
        monkeypatch.setattr(cuda_ledger, "binaries", lambda path: [path])
        monkeypatch.setattr(cuda_ledger, "look", lambda paths, processes: list(rows))
        written = tmp_path / "ledger.json"
        return cuda_ledger.main(["--binary", str(tmp_path), "--json", str(written)]), written

    return run


def test_the_command(ledger, capsys: pytest.CaptureFixture[str]) -> None:
    good = row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Copy>")
    gathers = row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Gather>", spills=5)
    status, written = ledger(good, gathers)
    out = capsys.readouterr().out
    assert status == 0 and "2 kernels" in out and "0 with faults" in out
    assert "5 instructions spill or refill" in out and "it gathers" in out
    assert json.loads(written.read_text())["rows"] == [good._asdict(), gathers._asdict()]


def test_the_command_fails_of_a_fault_and_of_nothing_to_check(ledger, capsys: pytest.CaptureFixture[str]) -> None:
    good = row("convolution_kernel<Tile<bfloat16, 64, 64>, Forward, Copy>")
    assert ledger(good, row("plan_kernel", matrix=0, spills=1))[0] == 1
    assert "sm_90 plan_kernel: 1 instructions spill" in capsys.readouterr().out
    assert ledger(good, row("grad_weight_kernel<Tile<float16, 64, 64>, Copy>", matrix=0))[0] == 1
    assert ledger(row("plan_kernel", matrix=0))[0] == 1
    assert "nothing to check" in capsys.readouterr().err


def test_the_binaries_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make cuda"):
        cuda_ledger.binaries(tmp_path)
    with pytest.raises(SystemExit, match="make cuda"):
        cuda_ledger.binaries(tmp_path / "none.so")
    (tmp_path / "x").mkdir()
    for name in ("b.cu.o", "a.cu.o", "c.cpp.o"):
        (tmp_path / "x" / name).touch()
    assert [path.name for path in cuda_ledger.binaries(tmp_path)] == ["a.cu.o", "b.cu.o"]
    (tmp_path / "build_info.txt").write_text("CPU kernels; CUDA kernels: nvcc 13.0.88 for 90-real")
    assert cuda_ledger.compiler(tmp_path) == "nvcc 13.0.88"
