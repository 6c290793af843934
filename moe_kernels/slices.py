# SPDX-License-Identifier: Apache-2.0
"""Where each expert's channels lie in a layer's weight."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExpertSlices"]


@dataclass(frozen=True)
class ExpertSlices:
    """Equal-width slices of a layer's channels, one for each expert.

    Expert ``e`` owns channels ``starts[e] : starts[e] + width`` of ``total``. Slices may overlap, and then share weights.

    Args:
        total: channels of the whole side of the weight.
        width: channels of one slice.
        starts: first channel of each expert's slice; its length is the number of experts.

    Raises:
        TypeError: if a size is not an integer.
        ValueError: if a size is not positive, there is no slice, or a slice leaves ``[0, total)``.
    """

    total: int
    width: int
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", tuple(self.starts))
        for name, value in (("total", self.total), ("width", self.width), *(("starts", s) for s in self.starts)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        for name, value in (("width", self.width), ("total", self.total)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not self.starts:
            raise ValueError("starts: expected one start for each expert, got none")
        for expert, start in enumerate(self.starts):
            if start < 0 or start + self.width > self.total:
                raise ValueError(
                    f"starts[{expert}]: the slice {start}:{start + self.width} does not lie in 0:{self.total}"
                )

    @classmethod
    def whole(cls, channels: int) -> ExpertSlices:
        """One slice with all the channels: a side that does not depend on the choice."""
        return cls(channels, channels, (0,))

    @classmethod
    def partition(cls, width: int, num_experts: int) -> ExpertSlices:
        """``num_experts`` slices side by side, ``num_experts * width`` channels in all: the layout of AdvMoE's
        released code (Zhang et al., ICCV 2023)."""
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        return cls(num_experts * width, width, tuple(expert * width for expert in range(num_experts)))

    @classmethod
    def windows(cls, total: int, ratio: float, num_experts: int) -> ExpertSlices:
        """Windows of the ``total`` channels of a dense layer, evenly spread: the paper's "subset of channels".

        ``width = max(1, int(ratio * total))``; window ``e`` starts at ``round(e * (total - width) / (num_experts - 1))``.
        Windows overlap where ``num_experts * ratio > 1``; equal windows are allowed.
        """
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
        if num_experts < 1:
            raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
        width = max(1, int(ratio * total))
        if num_experts == 1:
            return cls(total, width, (0,))
        spread = total - width
        return cls(total, width, tuple(round(expert * spread / (num_experts - 1)) for expert in range(num_experts)))

    @property
    def num_experts(self) -> int:
        return len(self.starts)

    @property
    def is_whole(self) -> bool:
        """True where every choice means all the channels."""
        return self.width == self.total

    @property
    def is_partition(self) -> bool:
        """True where slice ``e`` starts at ``e * width`` and the slices fill the side."""
        return self.total == self.width * len(self.starts) and self.starts == tuple(
            expert * self.width for expert in range(len(self.starts))
        )
