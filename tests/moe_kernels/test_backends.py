# SPDX-License-Identifier: Apache-2.0
"""Which backend computes: use_backend, available_backends, the environment, instruction sets, OpenMP."""

from __future__ import annotations

import re

import pytest
import torch
from oracle import CallCounter, partition
from processes import ISAS, python

from moe_kernels import BackendUnavailable, RoutedConv2d, Routing, available_backends, backends, functional, use_backend
from moe_kernels.backends import native

X, W = torch.randn(2, 3, 4, 4), torch.randn(8, 3, 3, 3)
ROUTING = Routing(torch.tensor([1, 0]), num_experts=2)


def _run(x: torch.Tensor = X) -> torch.Tensor:
    return functional.routed_conv2d(x, W, ROUTING, out_slices=partition(4, 2))


def test_available_backends_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: available_backends()[name] for name in ("reference", "cpu")} == {"reference": None, "cpu": None}
    monkeypatch.setattr(native, "_import_error", "libfoo.so: cannot open shared object file")
    reason = available_backends()["cpu"]
    assert reason is not None and "libfoo.so" in reason and "pip install -e ." in reason


def test_use_backend_chooses_and_restores(calls: CallCounter) -> None:
    _run()
    assert calls["forward"] == 1
    with use_backend("reference"):
        _run()
        assert calls["forward"] == 1
        with use_backend("cpu"):
            _run()
            assert calls["forward"] == 2
        with use_backend("auto"):
            _run()
            assert calls["forward"] == 3
        with pytest.raises(ZeroDivisionError), use_backend("cpu"):
            _ = 1 / 0
        _run()
    assert calls["forward"] == 3
    _run()
    assert calls["forward"] == 4


def test_use_backend_governs_the_backward(calls: CallCounter) -> None:
    x = X.clone().requires_grad_()
    y = _run(x)
    with use_backend("reference"):
        y.sum().backward()
    assert calls == {"forward": 1}


UNKNOWN = "backend: expected one of auto, reference, cpu, triton, cuda, cuda_sim, got 'tpu'"


def test_unknown_backend_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(
            ValueError, match=r"backend: expected one of auto, reference, cpu, triton, cuda, cuda_sim, got 'tpu'"
        ),
        use_backend("tpu"),
    ):
        pass
    monkeypatch.setattr(backends, "_environment", "tpu")
    with pytest.raises(
        ValueError, match=r"backend: expected one of auto, reference, cpu, triton, cuda, cuda_sim, got 'tpu'"
    ):
        _run()
    assert not backends._override


@pytest.mark.parametrize(("value", "expected"), [("reference", "ReferenceBackend"), ("", "CpuBackend")])
def test_environment_chooses(value: str, expected: str) -> None:
    """Read once, at the import."""
    code = """
import torch
from moe_kernels import backends, use_backend
print(type(backends.choose(torch.device("cpu"))).__name__)
with use_backend("cpu"):  # the program is nearer than the environment
    print(type(backends.choose(torch.device("cpu"))).__name__)
"""
    assert python(code, MOE_KERNELS_BACKEND=value).split() == [expected, "CpuBackend"]


def test_without_the_native_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silent fallback to the slow loop."""
    monkeypatch.setattr(native, "_import_error", "no such file")
    with pytest.raises(BackendUnavailable, match=r"cpu: the native module moe_kernels\._C cannot be imported"):
        _run()
    with pytest.raises(BackendUnavailable, match=r"`pip install -e \.`"), use_backend("cpu"):
        pass
    with use_backend("reference"):
        assert _run().shape == (2, 4, 2, 2)
    assert issubclass(BackendUnavailable, RuntimeError)


def test_another_device_says_what_to_do() -> None:
    with pytest.raises(BackendUnavailable, match=r"no backend of moe_kernels computes on 'xpu' yet; move the tensors"):
        backends.choose(torch.device("xpu"))
    with pytest.raises(BackendUnavailable, match="cpu: computes on the CPU only, got xpu"), use_backend("cpu"):
        backends.choose(torch.device("xpu"))


def test_meta_tensors_need_no_backend() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=2, device="meta")
    routing = Routing(torch.empty(5, dtype=torch.int64, device="meta"), num_experts=2)
    for training in (True, False):
        y = layer.train(training)(torch.empty(5, 3, 8, 8, device="meta"), routing)
        assert y.shape == (5, 4, 6, 6) and y.is_meta
        with torch.no_grad():
            assert layer(torch.empty(5, 3, 8, 8, device="meta"), routing).shape == y.shape


def test_one_openmp_runtime() -> None:
    """torch's own: a second one in the process makes both slow."""
    code = """
import torch, moe_kernels
from moe_kernels import info
torch.set_num_threads(2)
layer = moe_kernels.RoutedConv2d(16, 16, 3, num_experts=2)
x = torch.randn(8, 16, 16, 16)
routing = moe_kernels.Routing(torch.arange(8) % 2, num_experts=2)
layer(x, routing).sum().backward()
torch.nn.functional.conv2d(x, torch.randn(16, 16, 3, 3)).sum()
print(*info.openmp_runtimes(), sep="\\n")
"""
    runtimes = python(code).split()
    assert len(runtimes) == 1, runtimes
    assert "torch" in runtimes[0]


def test_info_runs_as_a_module() -> None:
    out = python("import runpy; runpy.run_module('moe_kernels.info', run_name='__main__')")
    assert "backend reference: available" in out
    assert "backend cpu: available" in out
    assert re.search(r"backend cpu: available; (avx512|avx2|generic); CPU kernels", out)


_ISA_CHECK = """
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from oracle import NAMED, DTYPES, Case, check, partition, whole, windows
from moe_kernels.backends import cpu
assert cpu.CpuBackend().isa() == sys.argv[1], cpu.CpuBackend().isa()
cases = [*NAMED.values(),
    Case(partition(31, 2), whole(33), padding=(1, 1), size=(9, 9), layout="channels_last"),
    Case(partition(64, 2), whole(32), padding=(1, 1), stride=(2, 2), size=(8, 8)),
    Case(partition(32, 2), whole(16), kernel=(1, 1), size=(7, 5)),
    Case(partition(16, 2), whole(3), kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(15, 15)),
    Case(windows(48, 0.5, 3), windows(40, 0.5, 3), padding=(1, 1), size=(6, 6)),
    Case(partition(24, 2), whole(24), groups=24, padding=(1, 1), size=(9, 9)),
    # weight gradients summed where they belong, with no copy
    Case(partition(32, 2), whole(32), padding=(1, 1), size=(4, 4), batch=5, weight_layout="channels_last"),
    Case(partition(48, 3), whole(16), padding=(1, 1), stride=(2, 2), size=(9, 7), weight_layout="channels_last"),
    Case(partition(31, 2), whole(33), padding=(1, 1), size=(5, 5), weight_layout="channels_last"),
    # by Winograd's algorithm
    Case(partition(40, 2), whole(32), padding=(1, 1), size=(8, 9), batch=4),
    Case(partition(16, 2), whole(48), padding=(1, 1), size=(9, 9), batch=5),
]
for case in cases:
    for dtype in DTYPES:
        check(replace(case, dtype=dtype))
print("checked", len(cases) * len(DTYPES))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set_equals_the_loop(isa: str) -> None:
    assert python(_ISA_CHECK, isa, MOE_KERNELS_CPU_ISA=isa).split()[0] == "checked"


def test_an_instruction_set_that_is_not_known_says_so() -> None:
    code = """
import torch, moe_kernels
from moe_kernels.backends.cpu import CpuBackend
print(CpuBackend().describe())  # a report of what is wrong must not fail of it
try:
    print("isa", CpuBackend().isa())
except (ValueError, RuntimeError) as error:
    print("error", error)
"""
    out = python(code, MOE_KERNELS_CPU_ISA="avx1024")
    described, raised = out.splitlines()
    assert raised.startswith("error") and "avx1024" in raised, out
    assert described == raised.removeprefix("error ")
