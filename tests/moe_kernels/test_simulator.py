# SPDX-License-Identifier: Apache-2.0
"""The simulator of the CUDA kernels tried on small kernels, csrc/sim/selftest.cu: correct ones pass, and each planted
mistake is found and told where it is."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

_C: Any = pytest.importorskip("moe_kernels._C")
if not hasattr(_C, "cuda_sim"):
    pytest.skip("moe_kernels._C was built without MOE_KERNELS_SIMULATOR=1", allow_module_level=True)

OK = 0
INVALID_ARGUMENT = 1
DEVICE_ERROR = 2

UNWRITTEN = r"byte \d+ of shared memory, which no thread of this block has written so far"
IN_FLIGHT = (
    r"byte \d+ of shared memory, to which a copy_async of (this )?thread \d+ \(sim/selftest\.cu:\d+\) is on its way"
)
THREAD = r"byte \d+ of shared memory, which thread \d+ \(sim/selftest\.cu:\d+\)"

# None: the kernel is correct. Else: what is said of its mistake.
CASES: dict[str, str | None] = {
    "reduction": None,
    "reduction_without_barrier": f"reads {UNWRITTEN}",
    "reduction_with_sync_warp_only": f"reads {UNWRITTEN}",
    "exchange_in_warp": None,
    "exchange_in_warp_without_sync_warp": f"reads {UNWRITTEN}",
    "exchange_in_warp_with_shuffle_for_barrier": f"reads {THREAD} wrote with no sync_warp or sync_threads in between",
    "broadcast": None,
    "broadcast_without_barrier": f"reads {THREAD} wrote with no sync_warp or sync_threads in between",
    "broadcast_with_sync_warp_only": f"reads {THREAD} wrote with no sync_threads in between",
    "ring": None,
    "ring_reused_without_barrier": f"writes {THREAD} read with no sync_warp or sync_threads in between",
    "barrier": None,
    "barrier_after_some_returned": None,
    "barrier_in_divergent_branch": "threads of a block are at different barriers",
    "barrier_and_shuffle": r"no thread can go on: thread 0 and 31 others wait at shuffle \(sim/selftest\.cu:\d+\), "
    r"thread 16 and 31 others wait at sync_threads \(sim/selftest\.cu:\d+\)",
    "collective": None,
    "collective_with_returned_lane": "shuffle needs all 32 lanes, and lane 0 of its warp has returned",
    "collective_with_lane_that_returns": "returns while lane 0 of its warp waits at shuffle for all 32 lanes",
    "collective_of_different_kinds": "different collectives: lane 0 waits at shuffle .*, lane 5 comes to ballot",
    "collective_at_different_lines": "different collectives: lane 0 waits at shuffle .*, lane 5 comes to shuffle",
    "lanes": None,
    "memory": None,
    "global_read_past_end": "reads element 128 of in, which has 128",
    "global_read_before_start": "reads element -1 of in, which has 128",
    "global_write_past_end": "writes element 128 of out, which has 128",
    "global_vector_past_end": "reads elements 126 to 129 of in, which has 128",
    "global_vector_misaligned": "reads element 2 of in, misaligned: its address is no multiple of 16 bytes",
    "global_null": "reads element 0 of absent, which has 0",
    "shared_read_past_end": "reads element 128 of shared memory, which has 128",
    "shared_write_past_end": "writes element 128 of shared memory, which has 128",
    "shared_vector_past_end": "writes elements 127 to 128 of shared memory, which has 128",
    "shared_vector_misaligned": "reads element 1 of shared memory, misaligned: its address is no multiple of 8 bytes",
    "shared_unwritten": f"reads {UNWRITTEN}",
    "shared_half_written": f"reads {UNWRITTEN}",
    "shared_larger_than_asked": "places 512 elements of 4 bytes at byte 32 of shared memory, which has 2048 bytes",
    "atomics": None,
    "atomics_read_without_barrier": f"adds to {THREAD} read with no sync_warp or sync_threads in between",
    "atomics_write_without_barrier": r"writes byte 4 of shared memory, which threads of several warps \(.*\) added to "
    "with no sync_threads in between",
    "atomics_unwritten": f"adds to {UNWRITTEN}",
    "copies": None,
    "copies_without_wait": f"reads {IN_FLIGHT}",
    "copies_without_barrier": f"reads {UNWRITTEN}",
    "copies_wait_for_wrong_group": f"reads {IN_FLIGHT}",
    "copies_without_commit": f"reads {IN_FLIGHT}",
    "copies_written_over": f"writes {IN_FLIGHT}",
    "copies_into_what_is_read": f"copies to {THREAD} read with no sync_warp or sync_threads in between",
    "copies_from_outside": "copies from elements 128 to 131 of in, which has 128",
    "copies_misaligned": "copies to element 1 of shared memory, misaligned: its address is no multiple of 16 bytes",
    "copies_twice": f"copies to {IN_FLIGHT}",
    "copy_for_all": None,
    "copy_for_all_with_wait_for_barrier": f"reads {THREAD} wrote with no sync_warp or sync_threads in between",
    "overlap": None,
    "overlap_reads_early": "reads in before wait_for_previous, and an earlier kernel may still write it",
    "overlap_writes_early": "writes out before wait_for_previous, and an earlier kernel may still read it",
    "overlap_copies_early": "copies from in before wait_for_previous, and an earlier kernel may still write it",
    "overlap_never_waits": "no thread called wait_for_previous in a launch that overlaps",
    "types": None,
    "product_bfloat16": None,
    "product_bfloat16_matrices": None,
    "product_bfloat16_transposed": None,
    "product_bfloat16_swapped": "wrong product",
    "product_bfloat16_wrong_transposition": "wrong product",
    "product_float16": None,
    "product_float16_matrices": None,
    "product_float16_transposed": None,
    "product_float16_swapped": "wrong product",
    "product_float16_wrong_transposition": "wrong product",
    "product_tf32": None,
    "product_tf32_matrices": None,
    "product_tf32_swapped": "wrong product",
    "product_row_misaligned": "reads element 145 of shared memory, misaligned: its address is no multiple of 16 bytes",
    "launch_too_many_threads": "threads of a block: 1056",
    "launch_too_much_shared_memory": "bytes of shared memory: 233472",
    "launch_empty_grid": "blocks of a grid in one dimension: 0",
}

# These are no thread's doing: the host compared, or the launch as a whole was wrong.
WITHOUT_PLACE = ("wrong product", "no thread called", "threads of a block: 1056", "bytes of shared", "blocks of a grid")
PLACE = re.compile(r" \(sim/selftest\.cu:\d+, kernel \w+, block \(\d+, \d+, \d+\), thread \d+\)$")


def test_every_case_is_here() -> None:
    assert sorted(_C.cuda_sim.selftest_names()) == sorted(CASES)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    expected = CASES[name]
    code, message = _C.cuda_sim.selftest(name)
    if expected is None:
        assert (code, message) == (OK, "")
        return
    assert code == DEVICE_ERROR
    assert re.search(expected, message), message
    if not expected.startswith(WITHOUT_PLACE):
        assert PLACE.search(message), message


def test_unknown_case() -> None:
    code, message = _C.cuda_sim.selftest("no such case")
    assert code == INVALID_ARGUMENT
    assert "no such case" in message


def test_nothing_is_left_of_an_error() -> None:
    """An error ends a launch with fibers half done and cells half marked; the next launch is as good as the first."""
    for name, expected in CASES.items():
        if expected is not None:
            assert _C.cuda_sim.selftest(name)[0] == DEVICE_ERROR
            assert _C.cuda_sim.selftest("copies") == (OK, "")


def test_several_host_threads_at_once() -> None:
    names = list(CASES) * 3
    expected = {name: _C.cuda_sim.selftest(name) for name in CASES}
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_C.cuda_sim.selftest, names)) == [expected[name] for name in names]
