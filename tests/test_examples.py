# SPDX-License-Identifier: Apache-2.0
"""The examples run as a reader would run them, and learn something."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_model_learns() -> None:
    out = run("own_model.py")
    accuracy = re.search(r"test accuracy ([\d.]+)%", out)
    assert accuracy is not None and float(accuracy[1]) > 60, out


def test_train_digits_trains_attacks_and_reports() -> None:
    out = run("train_digits.py", "--epochs", "2")
    losses = [float(v) for v in re.findall(r"TRADES loss ([\d.]+)", out)]
    assert len(losses) == 2 and losses[1] < 2.5, out
    assert re.search(r"SA [\d.]+%, RA [\d.]+% .* routing flipped for [\d.]+%", out), out


def test_a_resnet_of_ones_own_is_converted_and_learns() -> None:
    out = run("convert_resnet.py", "--epochs", "4", "--width", "8")
    found = re.findall(r"^(.*): (\d+) routed layers, test accuracy ([\d.]+)%", out, re.M)
    assert [int(layers) for _, layers, _ in found] == [0, 11, 11, 11], out
    accuracies = {name: float(accuracy) for name, _, accuracy in found}
    assert accuracies["as it was"] > 80 and accuracies["4 experts for the last quarter"] > 60, out
