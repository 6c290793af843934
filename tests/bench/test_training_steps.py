# SPDX-License-Identifier: Apache-2.0
"""Which methods ``python -m bench.training`` times."""

from __future__ import annotations

import pytest

from advmoe.config import ModelConfig
from bench.training import CONTENDERS, chosen, measure


def test_contenders_by_name() -> None:
    assert chosen(None) == list(CONTENDERS)
    assert [c.name for c in chosen(["AT (S-Dense)", "AT (MoE)"])] == ["AT (MoE)", "AT (S-Dense)"]
    with pytest.raises(ValueError, match=r"method: expected one of AT \(MoE\), .* did you mean AT \(MoE\)"):
        chosen(["AT (Moe)"])


def test_times_of_what_was_chosen() -> None:
    times = measure(ModelConfig(width=4), 4, 2, chosen(["AT (MoE)", "AT (S-Dense)"]), 1)
    assert {name: len(each) for name, each in times.items()} == {"AT (MoE)": 2, "AT (S-Dense)": 2}
