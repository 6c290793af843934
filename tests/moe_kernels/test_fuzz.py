# SPDX-License-Identifier: Apache-2.0
"""Random calls of the native CPU code's entry points, right and wrong, in buffers beside pages that nothing may touch
(csrc/fuzz), each in a process of its own: a kernel that reads outside ends it."""

from __future__ import annotations

import pytest
from processes import ISAS, python

from moe_kernels.backends import native

pytestmark = pytest.mark.skipif(
    not hasattr(native.module, "fuzz_conv2d"), reason="the native module was built without MOE_KERNELS_SIMULATOR=1"
)
ENTRIES = ["conv2d", "features", "program"]
_FUZZ = """
import sys
from moe_kernels.backends import native
print(getattr(native.module, "fuzz_" + sys.argv[1])(*map(int, sys.argv[2:])))
"""


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_random_calls(entry: str, isa: str) -> None:
    assert python(_FUZZ, entry, "1", "0", "700", MOE_KERNELS_CPU_ISA=isa).startswith("700 cases")


@pytest.mark.nightly
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(2, 7))
@pytest.mark.parametrize("entry", ENTRIES)
def test_very_many_random_calls(entry: str, isa: str, seed: int) -> None:
    assert python(_FUZZ, entry, str(seed), "0", "7000", MOE_KERNELS_CPU_ISA=isa).startswith("7000 cases")
