# SPDX-License-Identifier: Apache-2.0
"""ExpertSlices: where each expert's channels lie."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from moe_kernels import ExpertSlices


def test_whole_is_one_slice_of_all_channels() -> None:
    slices = ExpertSlices.whole(7)
    assert slices == ExpertSlices(7, 7, (0,))
    assert slices.is_whole and slices.is_partition and slices.num_experts == 1


def test_partition_is_slices_side_by_side() -> None:
    slices = ExpertSlices.partition(3, 4)
    assert slices == ExpertSlices(12, 3, (0, 3, 6, 9))
    assert slices.is_partition and not slices.is_whole and slices.num_experts == 4


@hypothesis.given(total=st.integers(1, 600), ratio=st.floats(0.01, 1.0), num_experts=st.integers(1, 40))
def test_windows_follow_the_formula_and_stay_inside(total: int, ratio: float, num_experts: int) -> None:
    slices = ExpertSlices.windows(total, ratio, num_experts)
    assert slices.width == max(1, int(ratio * total))
    assert slices.starts[0] == 0
    for expert, start in enumerate(slices.starts):
        if num_experts > 1:
            assert start == round(expert * (total - slices.width) / (num_experts - 1))
        assert 0 <= start <= total - slices.width
    assert num_experts == 1 or slices.starts[-1] == total - slices.width
    assert len(slices.starts) == num_experts


def test_two_half_windows_are_a_partition() -> None:
    assert ExpertSlices.windows(8, 0.5, 2) == ExpertSlices.partition(4, 2)


def test_windows_of_one_expert_are_a_plain_narrow_layer() -> None:
    slices = ExpertSlices.windows(8, 0.5, 1)
    assert slices == ExpertSlices(8, 4, (0,))
    assert not slices.is_whole and not slices.is_partition


def test_slices_are_frozen_hashable_and_picklable() -> None:
    slices = ExpertSlices.windows(8, 0.5, 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        slices.width = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(slices)) == slices
    assert len({slices, ExpertSlices.windows(8, 0.5, 3)}) == 1
    assert ExpertSlices(4, 2, [0, 2]) == ExpertSlices.partition(2, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4.0, 2, (0,)), TypeError, r"total: expected an integer, got 4\.0"),
        ((4, True, (0,)), TypeError, r"width: expected an integer, got True"),
        ((4, 2, (0, 1.5)), TypeError, r"starts: expected an integer, got 1\.5"),
        ((0, 2, (0,)), ValueError, r"total: expected at least 1, got 0"),
        ((4, 2, ()), ValueError, r"starts: expected one start for each expert, got none"),
        ((4, 2, (0, 3)), ValueError, r"starts\[1\]: the slice 3:5 does not lie in 0:4"),
        ((4, 2, (-1,)), ValueError, r"starts\[0\]: the slice -1:1 does not lie in 0:4"),
    ],
)
def test_bad_slices_raise(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ExpertSlices(*arguments)


def test_bad_partition_and_windows_raise() -> None:
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        ExpertSlices.partition(3, 0)
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        ExpertSlices.windows(3, 0.5, 0)
    for ratio in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="ratio: expected 0 < ratio <= 1, got"):
            ExpertSlices.windows(3, ratio, 2)
