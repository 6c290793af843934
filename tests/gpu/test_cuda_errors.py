# SPDX-License-Identifier: Apache-2.0
"""What cannot raise without a synchronisation: a wrong index or a NaN score costs that sample its output and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_device import DEVICE, choice, images, no_synchronisation
from oracle import windows
from torch import Tensor, nn

import moe_kernels
from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing

pytestmark = pytest.mark.gpu

GOOD = [0, 1, 2, 0, 1, 1]
BAD = {1: 3, 3: -1, 5: 2**40}  # sample: an index that no expert has
WIDE = windows(64, 0.5, 3)


def _wrong() -> list[int]:
    return [BAD.get(i, e) for i, e in enumerate(GOOD)]


def _vectors() -> Tensor:
    return images()[:, :, 0, 0].contiguous()


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "partition": (lambda: RoutedConv2d(16, 32, 3, padding=1, num_experts=3), images),
    "windows on both sides": (lambda: RoutedConv2d(windows(32, 0.5, 3), WIDE, 3, stride=2), images),
    "input side alone": (lambda: RoutedConv2d(windows(32, 0.5, 3), 24, 3), images),
    "large image": (lambda: RoutedConv2d(16, 32, 3, padding=1, num_experts=3), lambda: images(size=32)),
    "groups": (lambda: RoutedConv2d(16, 32, 3, groups=4, num_experts=3), images),
    "linear": (lambda: RoutedLinear(16, WIDE), _vectors),
    "batch norm": (lambda: RoutedBatchNorm2d(16, 3), images),
    "batch norm of windows": (lambda: RoutedBatchNorm2d(windows(32, 0.5, 3)), images),
}


def _assert_only_the_bad_are_nan(y: Tensor, expected: Tensor, same_bits: bool = True) -> None:
    for i in range(len(y)):
        if i in BAD:
            assert y[i].isnan().all(), f"sample {i}"
        elif same_bits:
            assert torch.equal(y[i], expected[i]), f"sample {i}"
        else:
            assert y[i].isfinite().all(), f"sample {i}"


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", list(LAYERS))
def test_an_index_out_of_range_costs_its_sample_alone(name: str, training: bool) -> None:
    make, make_input = LAYERS[name]
    layer, x = make().to(DEVICE).train(training), make_input()
    expected = layer(x, choice(*GOOD))
    dy = torch.randn_like(expected)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    routing, good = choice(*_wrong()), choice(*GOOD)
    with no_synchronisation():
        y, expected = layer(leaves[0], routing), layer(leaves[1], good)
    # a BatchNorm's statistics are those of the samples that are left
    statistics = isinstance(layer, RoutedBatchNorm2d) and training
    _assert_only_the_bad_are_nan(y, expected, same_bits=not statistics)
    dx, expected_dx = (torch.autograd.grad(out, leaf, dy)[0] for out, leaf in zip((y, expected), leaves, strict=True))
    for i in set(range(len(x))) - BAD.keys():
        assert torch.equal(dx[i], expected_dx[i]) if not statistics else dx[i].isfinite().all(), f"sample {i}"
    torch.cuda.synchronize()  # no access out of bounds: the process still has its device
    with pytest.raises(ValueError, match=r"expert: expected indices in 0 \.\. 2"):
        routing.validate()


def test_gates_biases_and_choices_of_two() -> None:
    """One wrong choice of two is enough."""
    layer, x = RoutedConv2d(16, WIDE, 3, padding=1, device=DEVICE), images()
    gate = torch.rand(6, 2, device=DEVICE, requires_grad=True)
    good = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]], device=DEVICE)
    wrong = good.clone()
    for i, (sample, index) in enumerate(BAD.items()):
        wrong[sample, i % 2] = index
    y, expected = (layer(x, Routing(expert, gate, num_experts=3)) for expert in (wrong, good))
    _assert_only_the_bad_are_nan(y, expected)
    y[[0, 2, 4]].sum().backward()
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("top_k", "gate"), [(1, "straight_through"), (1, "softmax"), (1, "none"), (2, "softmax"), (2, "none")]
)
def test_nan_scores_cost_their_samples_alone(top_k: int, gate: str) -> None:
    layer, x = RoutedConv2d(16, WIDE, 3, padding=1, device=DEVICE), images()
    scores = torch.randn(6, 3, device=DEVICE)
    broken = scores.clone()
    for sample in BAD:
        broken[sample, sample % 3] = float("nan")
    broken.requires_grad_()
    with no_synchronisation():
        routing = Routing.from_scores(broken, top_k, gate)
    y, expected = layer(x, routing), layer(x, Routing.from_scores(scores, top_k, gate))
    _assert_only_the_bad_are_nan(y, expected)
    y[[0, 2, 4]].sum().backward()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="expert: expected indices"):
        routing.validate()


def test_the_device_of_every_argument_is_checked() -> None:
    layer, x = RoutedConv2d(16, 32, 3, num_experts=3, device=DEVICE), images()
    with pytest.raises(ValueError, match="routing: expected the input's device"):
        layer(x, Routing(torch.tensor(GOOD), num_experts=3))
    with pytest.raises(ValueError, match="weight: expected the input's device"):
        layer(x.cpu(), Routing(torch.tensor(GOOD), num_experts=3))


# --- compute-sanitizer --------------------------------------------------------------------------------------------------

_SCRIPT = """
import torch
from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, Routing
torch.manual_seed(0)
device = torch.device("cuda")
wide = ExpertSlices.windows(48, 0.5, 3)
layers = [RoutedConv2d(17, 24, 3, padding=1, num_experts=3), RoutedBatchNorm2d(24, 3),
          RoutedConv2d(24, wide, 3, stride=2), RoutedConv2d(wide, 33, 3, padding=2, dilation=2, num_experts=3)]
layers = [layer.to(device, torch.bfloat16) for layer in layers]
x = torch.randn(5, 17, 9, 7).to(device, torch.bfloat16).requires_grad_()
for expert in ([0, 1, 2, 0, 1], [2, 2, 2, 2, 2], [0, 3, -1, 2, 1]):
    routing = Routing(torch.tensor(expert).to(device), torch.ones(5).to(device).requires_grad_(), num_experts=3)
    y = x
    for layer in layers:
        y = layer(y, routing)
    y.float().sum().backward()
torch.cuda.synchronize()
print("done")
"""


def test_memcheck_finds_nothing(backend: str) -> None:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    path = os.pathsep.join([str(Path(moe_kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # each tensor an allocation of its own, so that a step past its end is seen
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["MOE_KERNELS_BACKEND"] = backend
    script = [sys.executable, "-c", _SCRIPT]
    memcheck = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    # alone first: the kernels are then compiled, and a failure under the tool is the tool's finding
    for command in (script, [*memcheck, *script]):
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            assert command is not script
            pytest.skip("compute-sanitizer took more than 120 s")
        output = (done.stdout + done.stderr)[-3000:]
        if command is not script and done.returncode not in (0, 9) and "not supported" in output:
            pytest.skip(f"compute-sanitizer does not run here: {output.strip().splitlines()[-1]}")
        assert done.returncode == 0 and "done" in done.stdout, output
