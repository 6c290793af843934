# SPDX-License-Identifier: Apache-2.0
"""Random calls of the native CPU kernels, right and wrong, in buffers beside pages that nothing may touch (csrc/fuzz),
each in a process of its own: a kernel that reads outside ends it."""

from __future__ import annotations

import pytest
from processes import ISAS, python

from moe_kernels.backends import native

pytestmark = pytest.mark.skipif(
    not hasattr(native.module, "fuzz_conv2d"), reason="the native module was built without MOE_KERNELS_SIMULATOR=1"
)
_FUZZ = """
import sys
from moe_kernels.backends import native
print(native.module.fuzz_conv2d(*map(int, sys.argv[1:])))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_random_calls(isa: str) -> None:
    assert python(_FUZZ, "1", "0", "700", MOE_KERNELS_CPU_ISA=isa).startswith("700 cases")


@pytest.mark.nightly
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(2, 7))
def test_very_many_random_calls(isa: str, seed: int) -> None:
    assert python(_FUZZ, str(seed), "0", "7000", MOE_KERNELS_CPU_ISA=isa).startswith("7000 cases")
