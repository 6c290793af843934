# SPDX-License-Identifier: Apache-2.0
"""fuse() on a device: equal to the model, a CUDA graph for each size of batch, nothing that waits for the device."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from on_device import DEVICE, assert_close_in_norm, images, net, no_synchronisation
from torch import Tensor, nn

from moe_kernels import fuse

pytestmark = pytest.mark.gpu


def _settled() -> nn.Module:
    model = net()
    with torch.no_grad():
        model.train()(images(36))
    return model.eval()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equal_to_the_model_for_any_batch(dtype: torch.dtype, bound: float) -> None:
    exact = _settled().cpu().double()
    model = copy.deepcopy(exact).to(DEVICE, dtype)
    fused = fuse(model, images(2, dtype=dtype))
    for batch in (1, 6, 36, 6):
        x = images(batch, dtype=dtype)
        with torch.no_grad():
            expected, eager = exact(x.cpu().double()), model(x)
        got = fused(x)
        agrees = (eager.float() - got.float()).abs().amax(1) <= 0.1 * eager.float().abs().amax()
        if dtype is torch.float32:
            assert bool(agrees.all())
            assert_close_in_norm(got, expected, bound)
        else:  # close scores may choose differently
            assert float(agrees.float().mean()) >= 0.75


def test_a_graph_for_each_size_of_batch_and_results_of_ones_own() -> None:
    fused = fuse(_settled(), images(2))
    first, second = images(6), images(6)
    a = fused(first)
    before = a.clone()
    b = fused(second)
    assert a.equal(before) and not b.equal(a)
    assert fused(first).equal(before)
    assert fused._graphs is not None and len(fused._graphs._graphs) == 1
    fused(images(36))
    assert len(fused._graphs._graphs) == 2
    for batch in range(1, 12):
        fused(images(batch))
    assert len(fused._graphs._graphs) == 8


def test_nothing_waits_for_the_device() -> None:
    fused = fuse(_settled(), images(2))
    x = images(6)
    fused(x)
    with no_synchronisation():
        fused(x)


def test_nan_reaches_its_own_samples_only() -> None:
    fused = fuse(_settled(), images(2))
    x = images(6)
    x[2] = math.nan
    assert fused(x).isnan().all(1).tolist() == [False, False, True, False, False, False]


def test_what_cannot_be_captured_runs_without_a_graph() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y.masked_select(y > 0).sum() + y

    model = Sorted().to(DEVICE).eval()
    fused = fuse(model, images(2))
    x = images(6)
    with pytest.warns(UserWarning, match="cannot be captured as a CUDA graph"):
        got = fused(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fused(x)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))
        torch.testing.assert_close(again, model(x))
