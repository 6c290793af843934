# SPDX-License-Identifier: Apache-2.0
"""Recipes: their names and settings, and sweeps of tiny ones that are interrupted, resumed, skipped and refused."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from setuptools import Distribution

from advmoe.attacks import PGD
from advmoe.cli import main
from advmoe.config import OptimConfig, RunConfig
from advmoe.models import create_model, router_parameters
from advmoe.profiling import profile
from advmoe.recipes import SCALES, Catalog, catalog, results, sweep
from advmoe.sparse import masked_convolutions
from advmoe.training import AT, AdvMoE, Run, Standard, build_method, load_checkpoint, load_model
from advmoe.training.methods import Batch, Method, StepResult
from advmoe.training.runs import build_model

ROOT = Path(__file__).parents[2]
DATA = {"CIFAR-10": "cifar10", "CIFAR-100": "cifar100", "Tiny-ImageNet": "tiny_imagenet", "ImageNet": "imagenet"}
ARCHS = {"ResNet-18": "resnet18", "WRN-28-10": "wrn28_10", "VGG-16": "vgg16_bn", "DenseNet": "densenet40"}
METHODS = {
    "AT (Dense)": "at_dense",
    "AT (S-Dense)": "at_s_dense",
    "AT (Sparse)": "at_sparse",
    "AT (MoE)": "at_moe",
    "AdvMoE": "advmoe",
}
FILES = {
    "table1": "table1.csv",
    "table2": "table2_autoattack.csv",
    "tableA1": "tableA1_pgd10_training_cifar10.csv",
    "tableA2": "tableA2_model_scale_cifar10.csv",
}
ROW = "table1/cifar10/resnet18"
NO_NUMBERS = (  # of the paper's
    "fig2/cifar10/resnet18/at_moe/eps8",
    "fig3/cifar10/resnet18/router_only/r0.8",
    "fig3/cifar10/resnet18/standard_dense/r0.5",
    "fig7/cifar10/resnet18/advmoe/n2/r0.5",
)
# on digits, of which the first 64 images are trained on for one epoch
TINY = """
cpu:
  label: "a label of the scale"
  seeds: [0]
  config:
    model: {width: 8}
    data: {name: digits, train_limit: 64, validation: 20}
    batch_size: 32
    epochs: 1
    validation_attack: pgd1
  evaluation: {attack: pgd2, limit: 20, checks: 0}
  data: {cifar100: {config: {data: {name: cifar100}}}}
  methods:
    at_sparse: {config: {epochs: 3, method: {pretrain_epochs: 1, mask_epochs: 1}}}
    robust_mask: {config: {epochs: 2, method: {mask_epochs: 2}}}
gpu: {label: "", seeds: [0]}
paper: {label: "", seeds: [0, 1]}
"""


@pytest.fixture(scope="module")
def recipes() -> Catalog:
    return Catalog()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recipes' files, which the command reads now, with a tiny scale."""
    folder = tmp_path / "files"
    shutil.copytree(catalog.FOLDER, folder)
    (folder / "scales.yaml").write_text(TINY)
    monkeypatch.setattr(catalog, "FOLDER", folder)
    return folder


@pytest.fixture
def reproduce(files: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        try:
            return main(["reproduce", *arguments, "--out", str(tmp_path / "out"), "--threads", "1"])
        except SystemExit as done:
            assert isinstance(done.code, int)
            return done.code

    return run


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def planted(*_: object, **__: object) -> Any:
    raise AssertionError("this must not be called")


@pytest.mark.parametrize("table", FILES)
def test_names_cover_exactly_the_papers_rows(recipes: Catalog, table: str) -> None:
    with (catalog.FOLDER / "paper" / FILES[table]).open() as file:
        rows = list(csv.DictReader(file))
    expected = []
    for row in rows:
        parts = [table, DATA[row.get("dataset", "CIFAR-10")], ARCHS[row["backbone"]], METHODS[row["method"]]]
        expected.append("/".join(parts + ([f"r{row['ratio']}"] if "ratio" in row else [])))
    assert [r.name for r in recipes.select(table)] != []
    assert sorted(r.name for r in recipes.select(table)) == sorted(expected)
    for recipe in recipes.select(table):
        assert recipes.paper(recipe) == rows[expected.index(recipe.name)]


def test_names_of_the_figures(recipes: Catalog) -> None:
    def below(prefix: str) -> set[str]:
        return {r.name.removeprefix(prefix + "/") for r in recipes.select(prefix)}

    assert below("fig2/cifar10/resnet18") == {f"{m}/eps{e}" for m in ("at_s_dense", "at_moe") for e in (2, 4, 6, 8)}
    studied = (
        "m1_standard_moe", "m2_at_s_dense", "standard_dense", "m3_robust_mask", "router_only", "theta_double_bar",
    )  # fmt: skip
    assert below("fig3/cifar10/resnet18") == {f"{m}/r{r}" for m in studied for r in (0.8, 0.5, 0.2)}
    scales = [f"r{tenths / 10}" for tenths in range(1, 11)]
    assert "r1.0" in scales and "r0.1" in scales
    assert below("fig7/cifar10/resnet18") == {"at_dense"} | {f"advmoe/n{n}/{r}" for n in (2, 5, 8, 10) for r in scales}
    of_table = {r.name.removeprefix("tableA2/") for r in recipes.select("tableA2")}
    assert below("fig8") == of_table | {"cifar10/resnet18/at_dense", "cifar10/wrn28_10/at_dense"}


def test_a_prefix_means_all_below_it(recipes: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    assert [r.name for r in recipes.select(f"{ROW}/advmoe")] == [f"{ROW}/advmoe"]
    assert len(recipes.select(ROW)) == 5 and len(recipes.select("table1/")) == 60
    assert len(recipes.select("fig7/cifar10/resnet18/advmoe/n10")) == 10
    assert main(["reproduce", "--list", "fig2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0] == f"fig2/cifar10/resnet18/at_s_dense/eps2  # the run of {ROW}/at_s_dense"
    assert main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    assert [line.split(" ")[0] for line in out.splitlines()] == list(recipes.recipes)
    assert re.search(r"^table2/cifar100/resnet18/advmoe  # the run of table1/cifar100/resnet18/advmoe$", out, re.M)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tabel1", "did you mean table1"),
        ("table1/cifar10/resnet81/advmoe", "got 'table1/cifar10/resnet81'; did you mean table1/cifar10/resnet18"),
        ("table1/imagenet/vgg16_bn", "expected one of table1/imagenet/resnet18, table1/imagenet/wrn28_10, got"),
        (f"{ROW}/advmo", f"did you mean {ROW}/advmoe"),
        (f"{ROW}/advmoe/r0.5", f"got '{ROW}/advmoe/r0.5'"),
        ("table", "expected one of table1, table2"),
    ],
)
def test_unknown_names_get_near_matches(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", name]) == 2
    assert message in capsys.readouterr().err


def test_a_name_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 2
    assert "a recipe is needed" in capsys.readouterr().err


@pytest.mark.parametrize("scale", SCALES)
def test_every_recipe_resolves(recipes: Catalog, scale: str) -> None:
    for name, recipe in recipes.recipes.items():
        plan = recipes.plan(name, scale)
        c = plan.config
        assert c.model.arch == recipe.arch and c.data.name == recipe.data
        assert plan.run in recipes.recipes and plan.source in recipes.recipes
        assert recipes.plan(plan.run, scale).run == plan.run
        if recipe.ratio is not None and c.model.kind != "dense":
            assert c.model.ratio == recipe.ratio
        if recipe.experts is not None:
            assert c.model.num_experts == recipe.experts
        if recipe.method == "at_sparse":  # three phases of the same length
            assert c.epochs == 3 * c.method.pretrain_epochs == 3 * c.method.mask_epochs
        assert (c.init is None) == (recipe.method not in ("router_only", "theta_double_bar", "robust_mask"))
        assert plan.evaluation.epsilon == (recipe.epsilon or c.attack.epsilon)


def test_the_models_and_methods_go_together(recipes: Catalog) -> None:
    """At cpu scale each combination once, and the extremes of experts."""
    extremes = ["fig7/cifar10/resnet18/advmoe/n10/r0.1", "tableA2/cifar10/wrn28_10/at_moe/r0.2"]
    configs = [recipes.plan(name, "cpu").config for name in [*recipes.recipes, *extremes]]
    chosen = {(c.model.arch, c.model.kind, c.method.name, c.method.part): c for c in configs[: -len(extremes)]}
    pairs = {(arch, kind) for arch in ARCHS.values() for kind in ("dense", "s_dense", "sparse", "moe")}
    pairs |= {("resnet18", kind) for kind in ("network_moe", "dual_moe", "block_moe", "conv_moe")}
    assert {key[:2] for key in chosen} == pairs
    with torch.device("meta"):
        for c in [*chosen.values(), *configs[-len(extremes) :]]:
            model = build_model(c.model)
            build_method(model, c.method, c.optim, PGD(0.1, 0.1, 1), c.routing)
            if (c.model.arch, c.model.kind) in pairs:
                pairs.remove((c.model.arch, c.model.kind))
                assert profile(model).gflops < 0.1, c.model


def test_the_papers_settings(recipes: Catalog) -> None:
    for recipe in recipes.select("table1"):
        plan = recipes.plan(recipe.name, "paper")
        c = plan.config
        large = recipe.data in ("tiny_imagenet", "imagenet")
        assert c.attack.epsilon == (2 / 255 if large else 8 / 255) and c.attack.step_size == 5 / 255
        assert (c.attack.steps, c.attack.loss, c.method.objective, c.method.beta) == (2, "kl", "trades", 6.0)
        assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay) == (0.1, 0.9, 5e-4)
        assert c.batch_size == (512 if recipe.data == "imagenet" else 128)
        assert c.epochs == (300 if recipe.method == "at_sparse" else 100)
        assert (c.data.train_limit, c.data.test_limit, c.model.width) == (None, None, None)
        assert (c.model.num_experts, c.model.ratio) == (2, 0.5)
        assert (plan.evaluation.attack, plan.evaluation.limit) == ("pgd50x5", None)
    assert recipes.seeds("paper") == [0, 1, 2]
    for recipe in recipes.select("tableA1"):
        a = recipes.plan(recipe.name, "paper").config.attack
        assert (a.steps, a.step_size, a.epsilon) == (10, 2 / 255, 8 / 255)
    advmoe = recipes.plan(f"{ROW}/advmoe", "paper").config
    assert advmoe == RunConfig(  # the defaults are the paper's
        data=advmoe.data,
        attack=dataclasses.replace(RunConfig().attack, epsilon=8 / 255, step_size=5 / 255, steps=2, loss="kl"),
    )


def test_the_settings_of_rt_er(recipes: Catalog) -> None:
    names = [r.name.removeprefix("rter/cifar10/resnet18/") for r in recipes.select("rter")]
    assert names == ["st", "at", "rt_er", "jtdmoe", "trades", "advmoe"]
    for name in names:
        plan = recipes.plan(f"rter/cifar10/resnet18/{name}", "paper")
        c = plan.config
        assert c.optim == OptimConfig.cyclic_adam(low_lr=5e-5) and (c.batch_size, c.epochs) == (512, 130)
        assert (c.attack.steps, c.attack.step_size, c.attack.epsilon) == (10, 2 / 255, 8 / 255)
        assert c.attack.loss == ("kl" if name in ("st", "trades", "advmoe") else "ce")
        assert (c.data.augment, c.data.shift, c.data.cutout) == (True, 2, 8) and c.data.train_limit is None
        assert (c.model.num_experts, c.model.width, c.model.alpha) == (4, None, 0.7)
        assert c.model.frozen_router == (name != "advmoe")
        assert (c.method.beta, c.method.robust_experts, plan.evaluation.attack) == (6.0, "second", "pgd50")
    methods = {name: recipes.plan(f"rter/cifar10/resnet18/{name}", "cpu").config.method for name in names}
    assert [m.name for m in methods.values()] == ["standard", "at", "rt-er", "jtdmoe", "at", "advmoe"]
    assert methods["at"].objective == "cross_entropy" and methods["trades"].objective == "trades"


def test_the_settings_of_robust_sparse_layers(recipes: Catalog) -> None:
    names = [r.name.removeprefix("robust_experts/cifar100/resnet18/") for r in recipes.select("robust_experts")]
    assert names == ["at", "block_switch", "block_entropy", "conv_switch", "conv_entropy"]
    for name in names:
        plan = recipes.plan(f"robust_experts/cifar100/resnet18/{name}", "paper")
        c = plan.config
        o = c.optim
        assert (o.optimizer, o.lr, o.momentum, o.nesterov, o.weight_decay) == ("sgd", 0.1, 0.9, True, 5e-4)
        assert (o.schedule, o.power, c.batch_size, c.epochs) == ("polynomial", 0.9, 640, 200)
        assert (c.attack.steps, c.attack.step_size, c.attack.epsilon, c.attack.loss) == (7, 2 / 255, 8 / 255, "ce")
        assert (c.method.name, c.method.objective, plan.evaluation.attack) == ("at", "cross_entropy", "pgd20")
        assert c.data.color_jitter == 0.3 and c.data.train_limit is None
        if name == "at":
            assert (c.model.kind, c.routing.balance) == ("dense", "none")
            continue
        kind, balance = name.split("_")
        assert (c.model.kind, c.model.num_experts, c.model.router) == (f"{kind}_moe", 4, "gap-fc")
        assert (c.model.top_k, c.model.moe_at) == (1, None)
        assert (c.routing.balance, c.routing.balance_weight) == (balance, 1.0 if kind == "block" else 2.0)


def test_the_other_scales_say_what_they_are(recipes: Catalog) -> None:
    gpu, cpu = (recipes.plan(f"{ROW}/at_dense", scale) for scale in ("gpu", "cpu"))
    assert (gpu.config.epochs, gpu.config.model.width, gpu.config.data.train_limit) == (30, None, None)
    assert gpu.evaluation.attack == "pgd50x2" and gpu.evaluation.limit is None and recipes.seeds("gpu") == [0]
    assert "one seed instead of three" in recipes.label("gpu") and "30 of its 100 epochs" in recipes.label("gpu")
    assert (cpu.config.epochs, cpu.config.model.width, cpu.config.data.train_limit) == (8, 16, 10_000)
    assert cpu.evaluation.attack == "pgd50x2" and cpu.evaluation.limit == 1000 and recipes.seeds("cpu") == [0]
    label = "cpu scale: narrow network, part of the data: not comparable with the paper's figures"
    assert recipes.label("cpu") == label
    for recipe in recipes.recipes.values():
        c = recipes.plan(recipe.name, "cpu").config
        assert c.model.width is not None and c.data.train_limit is not None


def test_nothing_is_trained_or_evaluated_twice(recipes: Catalog) -> None:
    def run(name: str) -> str:
        return recipes.plan(name, "cpu").run

    def source(name: str) -> str:
        return recipes.plan(name, "cpu").source

    for recipe in recipes.select("table2"):
        assert run(recipe.name) == recipe.name.replace("table2", "table1") and source(recipe.name) == recipe.name
    for method in ("at_s_dense", "at_moe"):
        names = [f"fig2/cifar10/resnet18/{method}/eps{e}" for e in (2, 4, 6, 8)]
        assert {run(n) for n in names} == {f"{ROW}/{method}"}
        assert [source(n) for n in names] == [*names[:3], f"{ROW}/{method}"]
        assert [recipes.plan(n, "cpu").evaluation.epsilon for n in names] == [e / 255 for e in (2, 4, 6, 8)]
    assert source("tableA2/cifar10/resnet18/advmoe/r0.5") == f"{ROW}/advmoe"
    assert source("fig7/cifar10/resnet18/advmoe/n2/r0.8") == "tableA2/cifar10/resnet18/advmoe/r0.8"
    assert source("fig3/cifar10/resnet18/m2_at_s_dense/r0.5") == f"{ROW}/at_s_dense"
    assert all(not source(r.name).startswith("fig8") for r in recipes.select("fig8"))
    assert run("tableA1/cifar10/resnet18/advmoe") == "tableA1/cifar10/resnet18/advmoe"
    configs = [recipes.plan(name, "cpu").config for name in {recipes.plan(n, "cpu").run for n in recipes.recipes}]
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("common.yaml", "momentum", "momentun", r"common.yaml: config: optim: setting: .*did you mean momentum"),
        (
            "data.yaml",
            "step_size: 5/255",
            "step_size: 5/f",
            r"data.yaml: cifar10: config: attack: step_size: expected float",
        ),
        (
            "methods.yaml",
            "kind: s_dense",
            "kin: s_dense",
            r"methods.yaml: at_s_dense: config: model: .*did you mean kind",
        ),
        ("methods.yaml", "init: router_only", "init: routers", r"methods.yaml: theta_double_bar: init: .*router_only"),
        ("methods.yaml", "paper: AdvMoE", "papre: AdvMoE", r"methods.yaml: advmoe: setting: .*did you mean paper"),
        ("scales.yaml", "limit: 20,", "limits: 20,", r"scales.yaml: cpu: evaluation: .*did you mean limit"),
        ("scales.yaml", "    at_sparse: {", "    at_spares: {", r"scales.yaml: cpu: methods: .*at_sparse"),
        ("scales.yaml", "paper:", "papers:", r"scales.yaml: expected the scale paper"),
        ("tableA1.yaml", "steps: 10", "step: 10", r"tableA1.yaml: config: attack: .*did you mean steps"),
        ("tableA1.yaml", "resnet18: {", "resnet81: {", r"tableA1.yaml: cpu: archs: .*did you mean resnet18"),
        ("table2.yaml", "attack:", "atack:", r"table2.yaml: evaluation: .*did you mean attack"),
        ("table1.yaml", "method:", "methods:", r"table1.yaml: axis: .*did you mean method"),
        ("table1.yaml", "[resnet18", "[resnet81", r"table1.yaml: arch: .*did you mean resnet18"),
        ("fig3.yaml", "m1_standard_moe: standard_moe", "m1: advmoe", r"fig3.yaml: .*standard_moe, which has no row here"),
        (
            "fig3.yaml",
            "m1_standard_moe: s",
            "early: router_only\n      m1: s",
            r"fig3.yaml: fig3/\S*/m1/r0.8 must come",
        ),
        ("fig7.yaml", "rows:", "rows: [", r"fig7.yaml: not YAML"),
    ],
)
def test_a_wrong_key_names_its_file(
    reproduce: Callable[..., int],
    files: Path,
    capsys: pytest.CaptureFixture[str],
    file: str,
    old: str,
    new: str,
    message: str,
) -> None:
    edit(files / file, old, new)
    assert reproduce(f"{ROW}/advmoe", "--dry-run") == 2
    assert re.search(message, capsys.readouterr().err)


def test_dry_run_prints_the_settings_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "train", planted)
    monkeypatch.setattr(sweep, "evaluate_run", planted)
    out = tmp_path / "out"
    arguments = ["fig3/cifar10/resnet18/router_only/r0.5", "table2/cifar10/resnet18/advmoe", "--seeds", "3", "4"]
    places = ["--out", str(out), "--data-dir", "somewhere", "--threads", "2", "--device", "cpu"]
    assert main(["reproduce", *arguments, *places, "--scale", "gpu", "--dry-run"]) == 0
    text = capsys.readouterr().out
    configs = []
    for i, document in enumerate(yaml.safe_load_all(text)):
        path = tmp_path / f"{i}.yaml"
        path.write_text(yaml.safe_dump(document))
        configs.append(RunConfig.load(path))
    assert [c.seed for c in configs] == [3, 4, 3, 4]
    assert configs[1].init == str(out / "gpu/fig3/cifar10/resnet18/m1_standard_moe/r0.5/seed4")
    assert {(c.data.folder, c.threads, c.device, c.epochs) for c in configs} == {("somewhere", 2, "cpu", 30)}
    assert f"# {out}/gpu/table1/cifar10/resnet18/advmoe/seed4" in text
    assert "# evaluation: attack autoattack, limit None" in text
    assert not out.exists()


def interrupting(method: type[Method]) -> Callable[..., StepResult]:
    original = method.step

    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)  # type: ignore[arg-type]

    return step


def test_a_sweep_is_interrupted_resumed_and_skipped(
    reproduce: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{ROW}/at_s_dense", f"{ROW}/advmoe"]
    dense, moe = (tmp_path / "out" / "cpu" / name / "seed0" for name in names)
    with monkeypatch.context() as patch:
        patch.setattr(AdvMoE, "step", interrupting(AdvMoE))
        assert reproduce(*names) == 3
    err = capsys.readouterr().err
    assert f"go on with: advmoe reproduce {names[0]} {names[1]} --scale cpu --seeds 0 --out {tmp_path / 'out'}" in err
    assert (dense / "evaluation.json").exists() and load_checkpoint(moe / "last.pt")["step"] == 1
    assert not (moe / "evaluation.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "train", planted)
        patch.setattr(AT, "step", planted)
        assert reproduce(*names) == 0
    out = capsys.readouterr().out
    assert f"[1/2] {names[0]}, seed 0: skipped" in out and f"resuming {moe}" in out
    assert f"[2/2] {names[1]}, seed 0: done" in out
    assert load_checkpoint(moe / "last.pt")["epoch"] == 1

    monkeypatch.setattr(sweep, "train", planted)
    monkeypatch.setattr(sweep, "resume", planted)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "evaluate_run", planted)
        assert reproduce(*names) == 0
        assert capsys.readouterr().out.count("skipped, as done before") == 2
        assert reproduce(ROW, "--table") == 0
        table = capsys.readouterr().out
        assert reproduce("fig7/cifar10/resnet18/advmoe/n2/r0.5") == 0  # the same again by another name
    record = json.loads((moe / "evaluation.json").read_text())
    assert (record["recipe"], record["scale"], record["seed"]) == (names[1], "cpu", 0)
    assert (record["attack"], record["epsilon"], record["images"]) == ("pgd2", 8 / 255, 20)
    assert record["ra"] == record["attacks"]["pgd2"]["ra"] <= record["sa"]
    assert record["torch"] == torch.__version__ and record["threads"] == 1 and record["label"] == "a label of the scale"
    assert record["gflops"] == pytest.approx(record["pathway_gflops"] + record["router_gflops"])
    row = next(line for line in table.splitlines() if line.startswith(f"| {names[1]} "))
    ours = [f"{100 * record['sa']:.2f}", f"{100 * record['ra']:.2f}", f"{record['gflops']:.4f}"]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["1", *ours, "80.15 ± 0.11", "51.83 ± 0.12", "0.15"]
    assert re.search(rf"^\| {ROW}/at_dense +\| +0 \| +- \| +- \| +- \| 82.99 ± 0.11 \| 50.13 ± 0.13 \|", table, re.M)
    assert "\na label of the scale\n" in table and "on 20 test images" in table

    # another evaluation of the same run has a place of its own
    assert reproduce("fig2/cifar10/resnet18/at_s_dense/eps2") == 0
    place = tmp_path / "out" / "cpu" / "fig2/cifar10/resnet18/at_s_dense/eps2/seed0"
    assert json.loads((place / "evaluation.json").read_text())["epsilon"] == 2 / 255
    assert [p.name for p in place.iterdir()] == ["evaluation.json"]


def test_a_recipe_in_use_is_left_to_its_process(
    reproduce: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{ROW}/at_s_dense"
    run = Run(tmp_path / "out" / "cpu" / name / "seed0")
    with run.locked(new=True):  # while it is trained
        assert reproduce(name) == 2
    assert f"failed: {run.folder} is in use by process {os.getpid()} on " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sweep.Sweep, "_evaluate", lambda *_: None)
        assert reproduce(name) == 0
    with run.locked():  # while it is evaluated
        assert reproduce(name) == 2
    assert "is in use by process" in capsys.readouterr().err


def test_several_seeds(reproduce: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{ROW}/at_s_dense"
    assert reproduce(name, "--seeds", "5", "2", "5") == 0
    out = capsys.readouterr().out
    shares = []
    for seed in (2, 5):
        folder = tmp_path / "out" / "cpu" / name / f"seed{seed}"
        assert RunConfig.load(folder / "config.yaml").seed == seed
        shares.append(json.loads((folder / "evaluation.json").read_text())["sa"])
    deviation = 100 * abs(shares[0] - shares[1]) / 2**0.5
    assert re.search(rf"^\| {name} \| 2 \| {50 * sum(shares):.2f} ± {deviation:.2f} \|", out, re.M)
    assert reproduce(name, "--seeds", "2", "7", "--table") == 0  # one of them is there
    assert re.search(rf"^\| {name} \| 1 \| {100 * shares[0]:.2f} \|", capsys.readouterr().out, re.M)


def test_a_changed_setting_is_refused(
    reproduce: Callable[..., int],
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"{ROW}/at_s_dense"
    with monkeypatch.context() as patch:
        patch.setattr(AT, "step", interrupting(AT))
        assert reproduce(name) == 3
    scales = files / "scales.yaml"
    for old, new, message in (
        ("{width: 8}", "{width: 4}", "model.width is 8 there and 4 in the recipe"),
        ("epochs: 1\n", "epochs: 2\n", "epochs is 1 there and 2 in the recipe"),
    ):
        text = scales.read_text()
        edit(scales, old, new)
        assert reproduce(name) == 2  # of a run that was begun
        assert message in capsys.readouterr().err
        scales.write_text(text)
    assert reproduce(name, "--device", "cpu", "--data-dir", "elsewhere") == 0  # no settings of the run
    evaluation = tmp_path / "out" / "cpu" / name / "seed0" / "evaluation.json"
    before = evaluation.read_text()
    for old, new, message in (
        ("{width: 8}", "{width: 4}", "model.width is 8 there and 4 in the recipe"),
        ("attack: pgd2", "attack: pgd3", "attack is pgd2 there and pgd3 in the recipe"),
        ("limit: 20", "limit: 10", "limit is 20 there and 10 in the recipe"),
    ):
        text = scales.read_text()
        edit(scales, old, new)
        for more in ([], ["--table"]):
            assert reproduce(name, *more) == 2
            captured = capsys.readouterr()
            assert message in captured.err and f"| {name} | 0 |" in captured.out
        scales.write_text(text)
    assert evaluation.read_text() == before
    evaluation.write_text("{torn")
    assert reproduce(name) == 2
    assert "evaluation.json cannot be read" in capsys.readouterr().err
    # of a user's own making
    assert (
        main(["evaluate", str(evaluation.parent), "--checks", "0", "--attack", "pgd1", "--limit", "3", "--threads", "1"])
        == 0
    )
    assert reproduce(name) == 0
    assert json.loads(evaluation.read_text())["images"] == 20


def test_table_2_is_autoattack_on_table_1s_runs(
    files: Path, reproduce: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(files / "table2.yaml", "limit: 256", "limit: 12")
    assert reproduce("table2/cifar10/resnet18/at_s_dense") == 0
    out = capsys.readouterr().out
    assert "[1/1] table2/cifar10/resnet18/at_s_dense, seed 0: done" in out
    assert "AutoAttack standard, L-inf epsilon 0.03137" in out and "on 12 test images" in out and "42.24" in out
    folder = tmp_path / "out" / "cpu"
    assert (folder / ROW / "at_s_dense" / "seed0" / "best.pt").exists()
    record = json.loads((folder / "table2/cifar10/resnet18/at_s_dense/seed0/evaluation.json").read_text())
    assert list(record["attacks"]["autoattack"]["stages"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert record["attacks"]["autoattack"]["images"] == 12 and record["checks"] == []


def test_a_red_check_marks_the_figure_in_the_table(
    reproduce: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{ROW}/at_s_dense"
    assert reproduce(name) == 0
    assert "suspect" not in capsys.readouterr().out
    path = tmp_path / "out" / "cpu" / name / "seed0" / "evaluation.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "suspect": ["black_box"]}))
    assert reproduce(name, "--table") == 0
    out = capsys.readouterr().out
    assert f"! {name}, seed 0: suspect: gradient masking (black_box)" in out
    assert re.search(rf"\| {name} +\| +1 \| +\S+ \| +\S+ ! \|", out)


def test_a_setting_that_came_later_is_no_difference(reproduce: Callable[..., int], tmp_path: Path) -> None:
    """A record made before the setting was there has had its default."""
    name = f"{ROW}/at_s_dense"
    assert reproduce(name) == 0
    path = tmp_path / "out" / "cpu" / name / "seed0" / "evaluation.json"
    record = json.loads(path.read_text())
    del record["config"]["optim"]["accumulate"]
    path.write_text(json.dumps(record))
    assert reproduce(name, "--table") == 0
    record["config"]["optim"]["accumulate"] = 2
    path.write_text(json.dumps(record))
    assert reproduce(name, "--table") == 2


def test_missing_data_is_reported_for_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    rows = [f"{ROW}/at_dense", f"{ROW}/advmoe"]
    assert main(["reproduce", *rows, "--out", str(out), "--data-dir", str(nowhere)]) == 2
    captured = capsys.readouterr()
    for number, name in enumerate(("at_dense", "advmoe"), start=1):
        assert f"[{number}/2] {ROW}/{name}, seed 0: failed: cifar10: {nowhere} has no data_" in captured.err
    assert "cpu scale: narrow network, part of the data: not comparable with the paper's figures" in captured.out
    assert not list(out.rglob("config.yaml"))


def test_a_fault_is_1_and_the_others_go_on(
    reproduce: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        raise ValueError("planted")

    names = [f"fig3/cifar10/resnet18/{method}/r0.5" for method in ("router_only", "theta_double_bar", "m2_at_s_dense")]
    with monkeypatch.context() as patch:
        patch.setattr(Standard, "step", step)
        assert reproduce(*names) == 1
    captured = capsys.readouterr()
    failures = re.findall(r"^\[(\d)/3\] \S+, seed 0: failed: epoch 1, step 1: planted", captured.err, re.M)
    assert failures == ["1", "2"]  # what begins with the weights of M1; M1 itself was tried once
    assert captured.out.count("training ") == 2 and f"[3/3] {names[2]}, seed 0: done" in captured.out


def test_a_bug_is_not_hidden(reproduce: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        raise KeyError("a bug")

    monkeypatch.setattr(AT, "step", step)
    with pytest.raises(KeyError, match="a bug"):
        reproduce(f"{ROW}/at_s_dense")


def test_the_study_of_figure_3_goes_on_from_run_to_run(reproduce: Callable[..., int], tmp_path: Path) -> None:
    assert reproduce("fig3/cifar10/resnet18/theta_double_bar/r0.5") == 0

    def weights(method: str) -> Iterator[dict[str, torch.Tensor]]:
        model, config = load_model(tmp_path / f"out/cpu/fig3/cifar10/resnet18/{method}/r0.5/seed0")
        assert config is not None
        routers = {id(p) for p in router_parameters(model)}
        for mine in (True, False):
            yield {name: p for name, p in model.named_parameters() if (id(p) in routers) == mine}

    def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    (phi, psi), (phi_bar, psi_bar), (phi_both, psi_both) = map(
        weights, ("m1_standard_moe", "router_only", "theta_double_bar")
    )
    assert not same(phi, phi_bar) and same(psi, psi_bar)
    assert same(phi_bar, phi_both) and not same(psi_bar, psi_both)


def test_a_robust_mask_leaves_the_weights_of_standard_training(reproduce: Callable[..., int], tmp_path: Path) -> None:
    assert reproduce("fig3/cifar10/resnet18/m3_robust_mask/r0.5") == 0
    runs = tmp_path / "out" / "cpu" / "fig3" / "cifar10" / "resnet18"
    record = json.loads((runs / "m3_robust_mask" / "r0.5" / "seed0" / "evaluation.json").read_text())
    mask, dense = (
        load_model(runs / name / "seed0", "last")[0] for name in ("m3_robust_mask/r0.5", "standard_dense/r0.8")
    )
    weights = dict(dense.named_parameters())
    for name, layer in masked_convolutions(mask).items():
        assert torch.equal(layer.weight, weights[f"{name}.weight"]) and layer.mask.sum() == layer.kept
    with torch.device("meta"):
        whole = profile(create_model("resnet18", "dense", width=8, image_size=8), 8)
    assert record["gflops"] < 0.6 * whole.gflops


def test_at_sparse_is_counted_without_what_it_removed(reproduce: Callable[..., int], tmp_path: Path) -> None:
    assert reproduce(f"{ROW}/at_sparse") == 0
    record = json.loads((tmp_path / "out" / "cpu" / ROW / "at_sparse" / "seed0" / "evaluation.json").read_text())
    dense = profile(create_model("resnet18", "dense", width=8, image_size=8), 8).gflops
    assert 0.15 * dense < record["gflops"] < 0.75 * dense


def test_what_the_table_says(recipes: Catalog) -> None:
    def record(sa: float, ra: float, blind: float = 0.0) -> dict[str, Any]:
        attack = {"description": "PGD-50 as it was", "zero_gradient": blind}
        return {
            "sa": sa,
            "ra": ra,
            "gflops": 0.1,
            "seed": 1,
            "images": 9,
            "attack": "pgd50",
            "attacks": {"pgd50": attack},
        }

    plan = recipes.plan("fig3/cifar10/resnet18/router_only/r0.5", "cpu")
    text = results.result_table(recipes, "cpu", [(plan, [record(0.5, 0.25), record(0.6, 0.25, blind=0.3)])])
    assert "| 2 | 55.00 ± 7.07 | 25.00 ± 0.00 | 0.1000 |          - |      37.64 |            - |" in text
    assert "router_only/r0.5, seed 1: 30.0% of the attacked images gave no gradient" in text
    assert recipes.label("cpu") in text and "RA: PGD-50 as it was; on 9 test images" in text
    assert "M3 is read as a mask learned adversarially" in text
    for name in NO_NUMBERS:
        assert recipes.paper(recipes.recipes[name]) == {}
    aa = results.result_table(recipes, "paper", [(recipes.plan("table2/cifar10/resnet18/at_dense", "paper"), [])])
    assert "| 0 |    - |    - |      - |          - |      44.72 |" in aa


def test_the_files_are_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    build: Any = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}
    assert "advmoe.recipes" in distribution.packages
    packed = {Path(name).resolve() for name in build.find_data_files("advmoe.recipes", "advmoe/recipes")}
    folder = ROOT / "advmoe" / "recipes"
    assert packed == {*folder.glob("*.yaml"), *folder.glob("paper/*")} and len(packed) == 21
