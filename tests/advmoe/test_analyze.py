# SPDX-License-Identifier: Apache-2.0
"""``analyze`` on small runs: what is written where, what is skipped and why."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_runs import SMALL, small_architecture, tiny

from advmoe.config import MethodConfig, ModelConfig
from advmoe.recipes import Catalog, Sweep, SweepOptions
from advmoe.report import analyses as driver
from advmoe.report.analyses import ANALYSES, Analyzed, analyze
from advmoe.training import train

ROUTED = ["dissection", "usage", "classes", "entropy", "flips"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``moe/seed0``, ``linear/seed0`` (one linear router), ``dense/seed0`` and ``sparse/seed0``."""
    folder, threads = tmp_path_factory.mktemp("analyze"), torch.get_num_threads()
    with small_architecture():
        for name, method, kind, options in (
            ("moe", "advmoe", "moe", {}),
            ("linear", "at", "moe", {"router": "linear", "num_experts": 4, "ratio": 0.25}),
            ("dense", "at", "dense", {}),
            ("sparse", "at_sparse", "sparse", {}),
        ):
            config = tiny(method, kind, model=ModelConfig(SMALL, kind, width=8, **options))
            if name == "sparse":
                config = dataclasses.replace(
                    config, epochs=3, method=MethodConfig(method, pretrain_epochs=1, mask_epochs=1)
                )
            train(config, folder / name / "seed0", quiet=True)
        torch.set_num_threads(threads)
        yield folder


def small(*sources: Path, **options: object) -> Analyzed:
    settings = {"attack": "pgd2", "limit": 40, "device": "cpu", **options}
    return analyze(sources, **settings)  # type: ignore[arg-type]


def names(found: Analyzed, source: str | None) -> list[str]:
    return [each.finding.name for each in found.written if each.source == source]


def reasons(found: Analyzed, source: str | None) -> dict[str, str]:
    return {each.name: each.reason for each in found.skipped if each.source == source}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_run(runs: Path) -> None:
    found = small(runs / "moe" / "seed0")
    folder = runs / "moe" / "seed0" / "analysis"
    made = [*ROUTED, "training", "collapse", "epsilons"]
    assert names(found, "moe/seed0") == made == [each.finding.name for each in found.written]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.{e}" for n in made for e in ("csv", "png"))
    assert [path for each in found.written for path in each.paths] == [
        folder / f"{n}.{e}" for n in made for e in ("csv", "png")
    ]
    assert sum(int(row["images"]) for row in rows(folder / "dissection.csv")) == 40
    assert [float(row["epsilon"]) for row in rows(folder / "epsilons.csv")] == pytest.approx(
        [0, 0.0375, 0.075, 0.1125, 0.15]
    )
    assert len(rows(folder / "training.csv")) == 2
    why = reasons(found, "moe/seed0")
    assert (
        why.keys() == {"pathways", "radius", "certified", "experts_alone"}
        and "--against" in why["pathways"]
        and "LightRouter" in why["radius"]
    )
    assert "got one" in reasons(found, None)["transfer"] and "got one" in reasons(found, None)["stability"]


def test_another_checkpoint_goes_elsewhere(runs: Path) -> None:
    found = small(runs / "moe" / "seed0" / "last.pt", only=["usage"])
    assert found.written[0].source == "moe/seed0/last.pt"
    assert found.written[0].paths[0] == runs / "moe" / "seed0" / "analysis-last" / "usage.csv"
    other = small(runs / "moe" / "seed0", checkpoint="last", only=["usage"])
    assert other.written[0].paths == found.written[0].paths


def test_several_runs(runs: Path, tmp_path: Path) -> None:
    sources = [runs / name / "seed0" for name in ("moe", "linear", "dense")]
    found = small(*sources, out=tmp_path, against=runs / "sparse" / "seed0")
    assert names(found, None) == ["epsilons", "transfer", "stability"]
    assert {row["model"] for row in rows(tmp_path / "stability.csv")} == {
        f"{n}/seed0" for n in ("moe", "linear", "dense")
    }
    assert names(found, "moe/seed0") == [*ROUTED, "pathways", "training", "collapse"]
    assert names(found, "linear/seed0") == [*ROUTED, "pathways", "radius", "training", "collapse"]
    assert names(found, "dense/seed0") == ["training"]
    assert {why for name, why in reasons(found, "dense/seed0").items() if name != "experts_alone"} == {
        "the model has no routed layers"
    }
    assert (tmp_path / "linear" / "seed0" / "radius.png").is_file() and (tmp_path / "transfer.csv").is_file()
    assert not any(path.suffix for path in tmp_path.glob("dense/seed0/usage.*"))
    matrix = {(r["attacked_on"], r["judged_by"]): r["ra"] for r in rows(tmp_path / "transfer.csv")}
    curve = {(r["model"], r["epsilon"]): r["ra"] for r in rows(tmp_path / "epsilons.csv")}
    assert len(matrix) == 9 and len(curve) == 15
    for label in ("moe/seed0", "linear/seed0", "dense/seed0"):  # the same attack, once
        assert matrix[label, label] == curve[label, "0.15"]


def test_a_sparse_run_says_where_its_phases_begin(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[int, str]] = []
    original = driver.analysis.history
    monkeypatch.setattr(
        driver.analysis,
        "history",
        lambda metrics, phases, attack: seen.append(phases) or original(metrics, phases, attack),
    )
    small(runs / "sparse" / "seed0", only=["training"])
    assert seen == [{1: "mask", 2: "fine-tuning"}]


def test_nothing_is_attacked_for_what_cannot_be_done(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("attacked")

    monkeypatch.setattr(driver, "observe", never)
    with pytest.raises(ValueError, match="nothing could be written; usage: the model has no routed layers; radius: the"):
        small(runs / "dense" / "seed0", only=["usage", "radius"])
    with pytest.raises(ValueError, match="fig3: --reproduced says where"):
        small(runs / "dense" / "seed0", only=["fig3"])
    both = [runs / name / "seed0" for name in ("moe", "dense")]
    with pytest.raises(ValueError, match="transfer: --out says where what concerns several runs goes"):
        small(*both, only=["transfer"])


def test_runs_that_are_not_alike_are_not_compared(runs: Path, tmp_path: Path) -> None:
    moe, other = runs / "moe" / "seed0", tmp_path / "other"
    other.mkdir()
    shutil.copy(moe / "best.pt", other)
    text = (moe / "config.yaml").read_text()
    assert "epsilon: 0.15" in text
    (other / "config.yaml").write_text(text.replace("epsilon: 0.15", "epsilon: 0.05"))
    found = small(moe, other, out=tmp_path / "out", only=["usage", "transfer", "epsilons"])
    assert [each.finding.name for each in found.written] == ["usage", "usage"]
    assert reasons(found, None).keys() == {"transfer", "epsilons"}
    for reason in reasons(found, None).values():
        assert "the same test images and radius" in reason and "epsilon 0.05" in reason


def test_wrong_words(runs: Path) -> None:
    run = runs / "moe" / "seed0"
    with pytest.raises(ValueError, match=r"analysis: expected one of dissection.*did you mean dissection"):
        small(run, only=["disection"])
    with pytest.raises(ValueError, match="at least one run"):
        small()
    with pytest.raises(ValueError, match="expected each run once"):
        small(run, run)
    with pytest.raises(ValueError, match="moves every image, such as pgd50; got 'pgd2-l2'"):
        small(run, attack="pgd2-l2")
    assert set(driver._OF_ONE) | {"epsilons", "transfer", "stability", "experts_alone"} | set(driver._REPRODUCED) == set(
        ANALYSES
    )


def test_figures_of_reproduced_runs(tmp_path: Path) -> None:
    """Records as ``advmoe reproduce`` writes them, found under the recipe whose evaluation they share."""
    sweep = Sweep(Catalog(), "cpu", SweepOptions(tmp_path))

    def write(name: str, seed: int, sa: float, ra: float) -> None:
        plan = sweep.catalog.plan(name, "cpu")
        folder = sweep.folder(plan.source, seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = {**sweep._wanted(plan, seed), "sa": sa, "ra": ra}
        (folder / "evaluation.json").write_text(json.dumps(record))

    with pytest.raises(ValueError, match="nothing of it is done yet; advmoe reproduce fig7 runs it"):
        small(reproduced=tmp_path)
    write("table1/cifar10/resnet18/advmoe", 0, 0.5, 0.3)
    write("table1/cifar10/resnet18/advmoe", 3, 0.6, 0.2)
    write("fig3/cifar10/resnet18/router_only/r0.5", 0, 0.7, 0.1)
    write("fig3/cifar10/resnet18/standard_dense/r0.5", 0, 0.9, 0.0)
    found = small(reproduced=tmp_path)
    assert names(found, None) == ["fig3", "fig7", "fig8"] and "fig2" in reasons(found, None)
    folder = tmp_path / "cpu" / "analysis"
    (seven,) = rows(folder / "fig7.csv")
    assert (seven["recipe"], seven["method"]) == ("fig7/cifar10/resnet18/advmoe/n2/r0.5", "AdvMoE")
    assert (seven["seeds"], seven["experts"], seven["ratio"], float(seven["ra"])) == ("2", "2", "0.5", 0.25)
    eight = {(row["arch"], row["method"], row["ratio"]): row for row in rows(folder / "fig8.csv")}
    own = eight["ResNet-18", "AdvMoE", "0.5"]
    assert (float(own["ra"]), float(own["paper_ra"]), float(own["paper_sa"])) == (0.25, 0.5183, 0.8015)
    assert eight["WRN-28-10", "AT (Sparse)", "0.2"]["seeds"] == "0"
    three = {row["method"]: row for row in rows(folder / "fig3.csv") if row["ratio"] == "0.5"}
    assert (three["MoE, AT of the routers only"]["ra"], three["MoE, AT of the routers only"]["paper_ra"]) == (
        "0.1",
        "0.3764",
    )
    assert three["M2: AT (S-Dense)"]["paper_ra"] == "0.4768" and three["standard_dense"]["ra"] == "0"
    assert "not comparable with the paper" in found.written[0].finding.note
