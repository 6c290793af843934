# SPDX-License-Identifier: Apache-2.0
"""The table of bench.deployment."""

import pytest
import torch

from advmoe.tables import table
from bench.deployment import check, measure, report
from bench.machine import describe


def test_the_table_holds_ratios_of_medians() -> None:
    record = {
        "machine": {**describe(), "onnxruntime": "1.2.3"},
        "settings": {"arch": "resnet18", "width": 64, "repeats": 3},
        "results": [
            {"kind": "dense", "batch": 1, "ms": {"eager": [9.0, 1.0, 4.0], "onnxruntime": [2.0, 8.0, 1.0]}},
            {"kind": "moe", "batch": 1, "ms": {"eager": [2.0, 2.0, 2.0]}},
        ],
    }
    rows = [["dense", "1", "4.00", "0.50"], ["moe", "1", "2.00", "-"]]
    text = report(record)
    assert text.startswith(table(["network", "batch", "eager, ms", "onnxruntime"], rows) + "\n")
    assert "n = 3" in text and "onnxruntime 1.2.3" in text and torch.__version__ in text


def test_what_gives_other_logits_is_not_timed() -> None:
    forms = {"eager": lambda x: x.mean((1, 2, 3)), "other": lambda x: x.mean((1, 2, 3)) + 1}
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check(forms, 2)
    assert {name: len(ms) for name, ms in measure({"eager": forms["eager"]}, 2, 3).items()} == {"eager": 3}
