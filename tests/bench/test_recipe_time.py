# SPDX-License-Identifier: Apache-2.0
"""A row's time from an epoch of each of its phases."""

import dataclasses

import pytest

from advmoe.config import DataConfig, MethodConfig, ModelConfig, RoutingConfig, RunConfig
from advmoe.recipes import Catalog, EvaluationSettings
from bench.recipe_time import RowTime, in_order, measure, shortened

MOE = RunConfig(epochs=8, routing=RoutingConfig(share_epochs=6))
SPARSE = RunConfig(
    ModelConfig(kind="sparse"), method=MethodConfig("at_sparse", pretrain_epochs=8, mask_epochs=6), epochs=24
)


@pytest.mark.parametrize(
    "config, phases",
    [
        (MOE, (6, 2)),
        (SPARSE, (8, 6, 10)),
        (dataclasses.replace(MOE, routing=RoutingConfig(share_epochs=0)), (8,)),
        (dataclasses.replace(SPARSE, method=MethodConfig("at_sparse", mask_epochs=6)), (6, 18)),
    ],
)
def test_an_epoch_of_each_phase(config: RunConfig, phases: tuple[int, ...]) -> None:
    short, epochs = shortened(config)
    assert epochs == phases
    assert short.epochs == len(phases)
    assert shortened(short)[1] == (1,) * len(phases)


def test_a_row_is_its_epochs_and_its_evaluation() -> None:
    assert RowTime("a", (6, 2), (10.0, 20.0), 1.0, 5.0).total == 6 * 11 + 2 * 21 + 5


def test_a_run_goes_behind_the_one_it_begins_with() -> None:
    fig3 = "fig3/cifar10/resnet18/"
    names = [f"{fig3}theta_double_bar/r0.5", f"{fig3}router_only/r0.5", "tableA2/cifar10/resnet18/at_moe/r0.5"]
    plans = in_order(Catalog(), [*names, "table2/cifar10/resnet18/advmoe"], "cpu")
    assert [plan.recipe.name for plan in plans] == [
        f"{fig3}m1_standard_moe/r0.5", f"{fig3}router_only/r0.5", f"{fig3}theta_double_bar/r0.5",
        "tableA2/cifar10/resnet18/at_moe/r0.5", "table2/cifar10/resnet18/advmoe",
    ]  # fmt: skip
    assert [plan.evaluation.attack for plan in plans[-2:]] == ["pgd50x2", "autoattack"]


def test_measured_on_digits(tmp_path) -> None:
    small = dataclasses.replace(
        MOE, model=ModelConfig(width=4), data=DataConfig(train_limit=256, validation=64), validation_attack="pgd1"
    )
    time = measure("small", small, EvaluationSettings("pgd1", limit=32), tmp_path / "run")
    assert time.epochs == (6, 2)
    assert len(time.phases) == 2
    assert min(*time.phases, time.around, time.evaluation) > 0
