# SPDX-License-Identifier: Apache-2.0
"""The command, end to end on tiny runs, and its exit codes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_cifar10

from advmoe import __version__
from advmoe.attacks import NonFiniteGradientError
from advmoe.cli import _method_config, _model_config, _optim_config, _parser, main
from advmoe.config import (
    METHODS,
    AttackConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    RunConfig,
)
from advmoe.routers import NonFiniteRouterError, routers_of
from advmoe.training import Run, engine, load_model
from advmoe.training.methods import AT, Batch, Method, Standard, StepResult
from advmoe.training.parallel import World


def options_of(arguments: list[str]) -> argparse.Namespace:
    options = _parser().parse_args(arguments)
    options.given = arguments
    return options


TINY = ["--width", "8", "--train-limit", "64", "--batch-size", "32", "--epochs", "1", "--validation-attack", "pgd2"]


def train(out: Path, *more: str) -> int:
    return main(["train", "--method", "at", "--out", str(out), *TINY, *more])


def test_train_evaluate_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    assert f"next: advmoe evaluate {run}" in capsys.readouterr().out
    assert (
        main(["evaluate", str(run), "--checks", "0", "--attack", "pgd3", "--attack", "pgd2-margin", "--limit", "20"]) == 0
    )
    out = capsys.readouterr().out
    assert "| pgd3 " in out and "| pgd2-margin" in out and "20 test images" in out and "epsilon 0.15" in out
    record = json.loads((run / "evaluation.json").read_text())
    assert record["images"] == 20 and set(record["attacks"]) == {"pgd3", "pgd2-margin"}
    assert record["attacks"]["pgd3"]["ra"] <= record["sa"]
    assert main(["evaluate", str(run / "last.pt"), "--attack", "pgd2", "--limit", "5"]) == 0
    assert main(["profile", "--width", "8", "--batch-size", "1", "--repeats", "2", "--layers"]) == 0
    assert main(["profile", "--width", "8", "--batch-size", "1", "5", "--repeats", "2", "--fused", "--steps"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1.router.linear" in out and "multiply-accumulate as 1" in out
    assert "| moe ms" in out and "| dense ms" in out and "| s_dense ms" in out


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (
        "--method advmoe --objective cross_entropy --beta 3 --order backbone_first --batches one "
        "--router-objective pseudo_label --router-alpha 4 --attack-routers --kind moe --experts 3 "
        "--ratio 0.25 --width 8 --router global "
        "--bn shared --gate softmax --gate-after norm --data digits --test-limit 30 --train-limit 64 --no-augment "
        "--epsilon 0.1 --step-size 0.05 --attack-steps 1 --attack-loss ce --epochs 1 --batch-size 32 --lr 0.03 "
        "--router-lr 0.02 --momentum 0.8 --weight-decay 1e-4 --freeze-unused --seed 5 --device cpu --threads 1 "
        "--validation-attack pgd1-margin"
    )
    assert main(["train", "--out", str(run), *arguments.split()]) == 0
    config = RunConfig.load(run / "config.yaml")
    assert config.method == MethodConfig(
        "advmoe", "cross_entropy", 3.0, "backbone_first", "one", "pseudo_label", 4.0, attack_routers=True
    )
    m = config.model
    assert (m.kind, m.num_experts, m.ratio, m.width, m.router) == ("moe", 3, 0.25, 8, "global")
    assert (m.bn, m.gate, m.gate_after, m.image_size, m.num_classes) == ("shared", "softmax", "norm", 8, 10)
    assert config.data == DataConfig("digits", None, 64, 30, augment=False)
    assert config.attack == AttackConfig(0.1, 0.05, 1, "ce")
    assert config.optim == OptimConfig(0.03, 0.02, 0.8, 1e-4, True)
    assert (config.epochs, config.batch_size, config.seed, config.device) == (1, 32, 5, "cpu")
    assert (config.threads, config.validation_attack) == (1, "pgd1-margin")


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The settings of each run that the command would have made."""
    configs: list[RunConfig] = []

    def take(config: RunConfig, out: Path, world: World) -> Run:
        configs.append(config)
        return Run(out)

    monkeypatch.setattr("advmoe.cli.train", take)
    return configs


def test_options_of_cheaper_steps_and_of_routing_reach_the_run(asked: list[RunConfig]) -> None:
    arguments = (
        "--share-attack --router-every 4 --temperature 2 --noise 0.3 --route-per block --moe-at 3 4 --balance switch "
        "--balance-weight 0.02 --experts-start alike --share-epochs 2 --init somewhere --attack-steps 10"
    )
    assert main(["train", "--out", "run", *arguments.split()]) == 0
    (config,) = asked
    assert config.method == MethodConfig(share_attack=True, router_every=4)
    assert config.routing == RoutingConfig("switch", 0.02, "alike", 2)
    assert config.model == ModelConfig(temperature=2.0, noise=0.3, route_per="block", moe_at=(3, 4))
    assert (config.init, config.attack.steps) == ("somewhere", 10)


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ("--method at --part routers", MethodConfig("at", part="routers")),
        ("--method at --part experts --init run", MethodConfig("at", part="experts")),
        (
            "--method at_sparse --kind sparse --pretrain-epochs 2 --mask-epochs 3",
            MethodConfig("at_sparse", pretrain_epochs=2, mask_epochs=3),
        ),
        ("--method free_at --replays 8 --reset-noise 0.2", MethodConfig("free-at", replays=8, reset_noise=0.2)),
        ("--method fast-at --drop-start", MethodConfig("fast-at", keep_start=False)),
        ("--method advmoe --as-released", MethodConfig.as_released()),
        (
            "--as-released --beta 2 --router-alpha 1 --router-every 2",
            MethodConfig.as_released(beta=2.0, router_alpha=1.0, router_every=2),
        ),
    ],
)
def test_options_of_the_methods_reach_the_run(asked: list[RunConfig], arguments: str, method: MethodConfig) -> None:
    assert main(["train", "--out", "run", *arguments.split()]) == 0
    assert asked[0].method == method
    assert asked[0].attack.random_start == ("gaussian" if "--as-released" in arguments else True)
    assert asked[0].model.router == ("global" if "--as-released" in arguments else "light")
    assert asked[0].routing.share_epochs == (0 if "--as-released" in arguments else None)


def test_another_router_may_be_trained_as_released(asked: list[RunConfig]) -> None:
    for given in ("--router light", "--router=light", "--router light --route-per stage"):
        assert main(["train", "--out", "run", "--as-released", *given.split()]) == 0
        assert asked.pop().model.router == "light"


def test_each_difference_of_the_released_code_has_an_option_too(asked: list[RunConfig]) -> None:
    arguments = (
        "--order backbone_first --batches one --router-objective pseudo_label --attack-routers --attack-start gaussian "
        "--router global --share-epochs 0"
    )
    for given in (["--as-released"], arguments.split()):
        assert main(["train", "--out", "run", *given]) == 0
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("--order router_first", "--order"),
        ("--batches=two", "--batches"),
        ("--router-objective trades", "--router-objective"),
        ("--attack-routers", "--attack-routers"),
        ("--share-attack", "--share-attack"),
        ("--attack-start uniform", "--attack-start"),
        ("--method at", "--method at"),
    ],
)
def test_as_released_refuses_what_contradicts_it(
    asked: list[RunConfig], capsys: pytest.CaptureFixture[str], given: str, named: str
) -> None:
    assert main(["train", "--out", "run", "--as-released", *given.split()]) == 2
    assert (
        f"--as-released: sets what advmoe's released code does, and does not go with {named}" in capsys.readouterr().err
    )
    assert not asked


def test_the_defaults_are_those_of_the_settings() -> None:
    options = _parser().parse_args(["train", "--out", "run"])
    assert _model_config(options) == ModelConfig()
    assert (options.epochs, options.batch_size) == (100, 128) and _optim_config(options) == OptimConfig()
    assert (options.beta, options.attack_steps, options.method) == (6.0, None, "advmoe")
    adam = _parser().parse_args(["train", "--out", "run", "--optimizer", "adam"])
    assert _optim_config(adam) == OptimConfig.cyclic_adam()
    assert options.epsilon is None and options.step_size is None  # the data's own
    asked = [options.balance, options.balance_weight, options.experts_start, options.share_epochs]
    assert RoutingConfig(*asked) == RoutingConfig() and options.init is None
    assert _method_config(options_of(["train", "--out", "run"])) == MethodConfig()


def untimed(run: Path) -> dict[str, Any]:
    """Its evaluation's record, but for the measured time."""
    record = json.loads((run / "evaluation.json").read_text())
    assert [t["batch_size"] for t in record.pop("latency")] == [1, 32]
    return record


def test_evaluate_takes_what_the_run_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--epsilon", "0.07", "--test-limit", "25", "--kind", "dense") == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2"]) == 0
    out = capsys.readouterr().out
    assert "epsilon 0.07, step 0.0175" in out and "25 test images" in out
    first = untimed(run)
    assert main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2"]) == 0  # the same again
    assert untimed(run) == first
    assert (
        main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2", "--epsilon", "0.2", "--checkpoint", "last"]) == 0
    )
    record = json.loads((run / "evaluation-last.json").read_text())
    assert record["epsilon"] == 0.2 and record["checkpoint"] == "last"
    assert "flip_rate" in record["attacks"]["pgd2"] and record["attacks"]["pgd2"]["flip_rate"] is None
    write_cifar10(tmp_path)
    other = ["--data", "cifar10", "--data-dir", str(tmp_path)]
    assert main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2", "--limit", "5", *other]) == 0
    assert json.loads((run / "evaluation-cifar10.json").read_text())["data"] == "cifar10"
    assert untimed(run) == first
    (run / "best.pt").write_bytes(b"damaged")
    assert main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2"]) == 2
    assert "best.pt cannot be read as a checkpoint" in capsys.readouterr().err


def test_evaluate_takes_any_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build(classes=10):\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, classes))\n"
        "def few():\n    return build(5)\n"
        "def sized(classes):\n    return build(classes)\n"
        "def raising():\n    raise RuntimeError('no weights')\n"
        "class Pair(torch.nn.Module):\n    def forward(self, x):\n        return x, x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["evaluate", "mine:build", "--checks", "0", "--data", "digits", "--attack", "pgd2", "--limit", "10"]) == 0
    assert "flip rate" in capsys.readouterr().out
    assert main(["evaluate", "mine:build", "--checks", "0", "--attack", "pgd2"]) == 2
    assert "--data is needed" in capsys.readouterr().err
    capsys.readouterr()
    for source, message in {
        "mine:absent": "mine:absent cannot be loaded: AttributeError",
        "mine:few": "model: expected scores [128, classes] with a score for class 9, got shape (128, 5)",
        "mine:Pair": "model: expected scores [128, classes] with a score for class 9, got tuple",
        "mine:raising": "mine:raising raised RuntimeError: no weights",
        "mine:sized": "mine:sized: expected a function that is called without arguments: missing a required argument",
        "absent_mine:build": "run it where absent_mine is, or name its folder in PYTHONPATH",
        str(tmp_path / "mine.py"): "expected a run folder, a checkpoint file or module:function, such as mine:model",
    }.items():
        assert main(["evaluate", source, "--data", "digits"]) == 2
        assert message in capsys.readouterr().err
    wanted = ["evaluate", "mine:build", "--checks", "0", "--data", "digits", "--attack", "pgd1", "--out"]
    for nowhere in (tmp_path, tmp_path / "absent" / "mine.json"):
        assert main([*wanted, str(nowhere)]) == 2
        assert f"--out: expected a file in a folder that is there, got {nowhere}" in capsys.readouterr().err
    out = tmp_path / "mine.json"
    assert main([*wanted, str(out)]) == 0
    assert f"written to {out}" in capsys.readouterr().out and json.loads(out.read_text())["data"] == "digits"


def test_interrupted_is_3_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AT.step

    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)  # type: ignore[arg-type]

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(AT, "step", step)
        assert train(run) == 3
        assert f"advmoe train --resume {run}" in capsys.readouterr().err
        assert main(["train", "--resume", str(run)]) == 3  # again, a step further
    assert f"advmoe train --resume {run}" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_interrupted_between_steps_is_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", interrupted)
        assert train(run) == 3
    assert "interrupted" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0


def test_an_interrupted_command_that_cannot_go_on_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("advmoe.cli.measure_latency", interrupted)
    assert main(["profile", "--width", "8"]) == 130


def test_a_model_of_the_working_folder_is_found(tmp_path: Path) -> None:
    """As a console script, whose own folder stands where the working folder does under python -m."""
    (tmp_path / "mine.py").write_text(
        "from torch.nn import *\ndef build(): return Sequential(Flatten(), Linear(192, 10))"
    )
    code = f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(tmp_path)!r})]\n"
    code += "from advmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["evaluate", "mine:build", "--checks", "0", "--data", "digits", "--limit", "8", "--attack", "pgd1"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 test images" in done.stdout


def test_an_interrupted_demo_names_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)  # type: ignore[arg-type]

    original = Standard.step
    monkeypatch.setattr(Standard, "step", step)
    assert main(["demo", "--fast", "--out", str(tmp_path / "demo")]) == 3
    run = tmp_path / "demo" / "dense-standard"
    assert f"advmoe train --resume {run}" in capsys.readouterr().err and (run / "last.pt").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("standard", r"epoch 1, step \d: .*(nan|inf)"),
        ("at", r"epoch 1, step \d: the gradient of 32 of 32 samples is not finite"),
    ],
)
def test_a_fault_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, message: str) -> None:
    wild = ["--kind", "dense", "--lr", "1e30", "--train-limit", "256"]
    assert train(tmp_path / "run", *wild, "--method", method) == 1
    assert re.search(f"^advmoe: {message}", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    "fault",
    [NonFiniteGradientError("planted"), NonFiniteRouterError("planted"), ValueError("planted"), OSError("planted")],
    ids=repr,
)
def test_faults_have_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        raise fault

    monkeypatch.setattr(AT, "step", step)
    assert train(tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    where = "" if isinstance(fault, OSError) else "epoch 1, step 1: "
    assert f"\nadvmoe: {where}planted" in f"\n{err}"


def test_a_fault_of_the_program_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        raise KeyError("a bug")

    monkeypatch.setattr(AT, "step", step)
    with pytest.raises(KeyError, match="a bug"):
        train(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--out RUN is needed"),
        (["train", "--out", "RUN", "--arch", "resnet81"], "did you mean resnet18"),
        (["train", "--out", "RUN", "--router", "lite"], "did you mean light"),
        (["train", "--out", "RUN", "--data", "cifar10"], "no folder given"),
        (["train", "--out", "RUN", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere has no data_batch_1"),
        (["train", "--out", "RUN", "--kind", "dense"], "advmoe needs a model with trainable routers"),
        (["train", "--out", "RUN", "--gate", "none"], "gate: 'none' lets no gradient"),
        (["train", "--out", "RUN", "--router", "random"], "advmoe needs a model with trainable routers"),
        (["train", "--out", "RUN", "--part", "routers"], "part: a setting of the method at, without effect on advmoe"),
        (["train", "--out", "RUN", "--as-released", "--part", "routers"], "part: a setting of the method at, without"),
        (
            ["train", "--out", "RUN", "--as-released", "--mask-epochs", "1"],
            "mask_epochs: a setting of the method at_sparse",
        ),
        (["train", "--out", "RUN", "--method", "free-at", "--attack-steps", "7"], "attack.steps: free-at takes one step"),
        (["train", "--out", "RUN", "--method", "fast-at", "--replays", "2"], "replays: a setting of the method free-at"),
        (["train", "--out", "RUN", "--as-released", "--drop-start"], "keep_start: a setting of the method fast-at"),
        (
            ["train", "--out", "RUN", "--kind", "dense", "--capacity", "0.1"],
            "--capacity: without effect on kind dense; an option of moe, upcycled, network_moe",
        ),
        (
            ["train", "--out", "RUN", "--moe-at", "layer4", "--method", "rt-er"],
            "--moe-at: without effect on kind network",
        ),
        (["train", "--out", "RUN", "--power", "2"], "power: without effect with schedule 'cosine'"),
        (["train", "--out", "RUN", "--nesterov", "--optimizer", "adam"], "nesterov: needs optimizer 'sgd'"),
        (["train", "--out", "RUN", "--color-jitter", "1"], "color_jitter: expected a number from 0 to 0.5, got 1.0"),
        (
            ["train", "--out", "RUN", "--router-alpha", "2"],
            "router_alpha: a setting of the router objective pseudo_label",
        ),
        (
            ["train", "--out", "RUN", "--router-every", "2", "--method", "at"],
            "router_every: a setting of the method advmoe",
        ),
        (["train", "--out", "RUN", "--method", "at_sparse", "--mask-epochs", "1"], "needs a model of kind sparse"),
        (["train", "--out", "RUN", "--balance-weight", "1"], "balance_weight: without effect with balance 'none'"),
        (["train", "--out", "RUN", "--share-epochs", "1", "--layout", "windows"], "experts: only those of layout"),
        (["train", "--out", "RUN", "--init", "RUN"], "expected a run folder, a checkpoint file or module:function"),
        (["train", "--out", "RUN", "--validation-attack", "pgd"], "attack: expected fgsm, or pgd<steps>"),
        (["train", "--out", "RUN", "--device", "nonsense"], "device: expected auto or a device"),
        (["train", "--out", "RUN", "--train-limit", "0"], "train_limit: expected at least 1, got 0"),
        (["train", "--out", "RUN", "--train-limit", "9999"], "train_limit: digits has 1294 training images"),
        (["train", "--out", "RUN", "--batch-size", "5000"], "batch_size: expected at most the 1294"),
        (["train", "--out", "RUN", "--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["train", "--out", "RUN", "--epsilon", "-1"], "epsilon: expected a finite number of at least 0"),
        (["train", "--resume", "RUN"], "is no run"),
        (
            ["evaluate", "absent_module:function", "--checks", "0", "--data", "digits"],
            "absent_module:function cannot be loaded",
        ),
        (
            ["evaluate", "json:JSONEncoder", "--checks", "0", "--data", "digits"],
            "returned JSONEncoder, expected an nn.Module",
        ),
        (["profile", "--repeats", "0"], "repeats: expected at least 1, got 0"),
        (["profile", "--batch-size", "0"], "batch_size: expected at least 1, got 0"),
        (["profile", "--image-size", "4"], "image_size: resnet18 takes images from 8 pixels on; got 4"),
        (["evaluate", "RUN"], "expected a run folder, a checkpoint file or module:function"),
        (["profile", "--ratio", "2"], "ratio: expected 0 < ratio <= 1"),
    ],
)
def test_usage_is_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def commands() -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))


def test_every_option_says_what_it_is() -> None:
    for name, parser in commands().items():
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings}"


def test_help_and_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], *([name] for name in commands())):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
    out = capsys.readouterr().out
    assert "default: None" not in out and "default: False" not in out
    assert "pgd<steps>" in out and f"--method {{{','.join(METHODS)}}}" in out and "at_sparse" in METHODS
    for wrong in (
        [],
        ["trian"],
        ["train", "--epoch-count", "3"],
        ["train", "--kind", "mo"],
        ["profile", "--threads", "0"],
    ):
        with pytest.raises(SystemExit) as done:
            main(wrong)
        assert done.value.code == 2
    assert "expected a whole number of at least 1, got '0'" in capsys.readouterr().err


COMMAND = """
import os, sys
from advmoe.__main__ import main
print("torch" in sys.modules)
sys.argv[1:] = ["--version"]
try:
    main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


def test_waiting_threads_soon_sleep_unless_told_otherwise() -> None:
    """OpenMP reads it when torch is loaded, so it has to be there before."""
    ways: list[tuple[dict[str, str], str]] = [
        ({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7"),
    ]  # fmt: skip
    for given, found in ways:
        environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
        done = subprocess.run(
            [sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.split() == ["False", "advmoe", __version__, found]


def test_ctrl_c_while_torch_is_loaded() -> None:
    stub = "import sys\nclass Stub:\n    def find_spec(self, name, *rest):\n        if name == 'advmoe.cli':\n" \
           "            raise KeyboardInterrupt\nsys.meta_path.insert(0, Stub())\n" \
           "from advmoe.__main__ import main\nsys.exit(main())\n"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", stub], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_the_package_shows_what_is_in_it() -> None:
    code = "import advmoe\nassert 'upcycle' in dir(advmoe)\nprint(advmoe.routers.__name__, hasattr(advmoe, 'absent'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["advmoe.routers", "False"]


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "advmoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"advmoe {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "advmoe", "train"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "advmoe: train: --out RUN is needed (or --resume RUN)\n"


@pytest.mark.nightly
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):  # the second replaces the first
        assert main(["demo", "--fast", "--out", str(folder)]) == 0
    text = (folder / "table.md").read_text()
    assert text in capsys.readouterr().out
    for name in ("standard (Dense)", "AT (Dense)", "AT (S-Dense)", "AT (MoE)", "AdvMoE"):
        assert f"| {name}" in text
    assert len(list(folder.glob("*/last.pt"))) == 5


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == 2
    assert "is not empty and no earlier demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_resume_refuses_an_option_that_equals_its_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--seed", "3") == 0
    for given in (["--seed", "0"], ["--seed=0"], ["--out", str(run)], ["--lr", "0.1"]):
        assert main(["train", "--resume", str(run), *given]) == 2
        assert f"got {given[0].split('=')[0]} too" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        main(["train", "--res", str(run)])
    assert exit.value.code == 2  # no abbreviations
    assert main(["train", "--resume", str(run)]) == 0


def test_a_run_may_be_resumed_where_its_data_is_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after, run = tmp_path / "before", tmp_path / "after", tmp_path / "run"
    before.mkdir()
    write_cifar10(before)
    assert train(run, "--data", "cifar10", "--data-dir", str(before), "--kind", "dense") == 0
    before.rename(after)
    assert main(["train", "--resume", str(run)]) == 2
    assert str(before) in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--data-dir", str(after)]) == 0
    assert main(["evaluate", str(run), "--checks", "0", "--attack", "pgd1", "--limit", "5"]) == 0


def test_a_router_of_a_module_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "routers_of_mine.py").write_text(
        "import torch\nfrom advmoe.routers import LightRouter\nclass Other: pass\nclass Mine(LightRouter):\n"
        "    standardized = False\n    def __init__(self, *sizes):\n        super().__init__(*sizes)\n"
        "        self.groups = torch.nn.GroupNorm(4, sizes[0])\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "run", "--router", "routers_of_mine:Mine") == 0
    assert main(["evaluate", "run", "--checks", "0", "--attack", "pgd1", "--limit", "5"]) == 0
    assert type(next(iter(routers_of(load_model("run")[0]).values()))).__name__ == "Mine"
    capsys.readouterr()
    for name, message in (
        ("routers_of_mine:Other", "expected a subclass of Router"),
        ("absent:Mine", "cannot be loaded"),
    ):
        assert train(tmp_path / "other", "--router", name) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kind sparse", "no channel"),
        ("--part routers --share-epochs 0", "without init the experts rest as they were drawn"),
        ("--epochs 2", "images/s, experts shared"),
    ],
)
def test_what_is_hardly_meant_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    assert train(tmp_path / "run", *options.split()) == 0
    assert message in capsys.readouterr().err


def test_a_closed_pipe_is_no_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "advmoe", "reproduce", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_run_that_fails_at_once_leaves_its_folder_free(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run, "--lr", "1e30") == 1
    assert "there is no checkpoint yet" in capsys.readouterr().err
    assert train(run) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epsilon", "nan"), ("epsilon", "-1"), ("step-size", "inf"), ("lr", "nan"), ("lr", "-0.1"), ("router-lr", "nan"),
        ("momentum", "2"), ("momentum", "1"), ("weight-decay", "-1"), ("beta", "-1"), ("beta", "nan"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert train(tmp_path / "run", f"--{option}={value}") == 2
    assert f"{option.replace('-', '_')}: expected a" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluate_refuses_a_radius_that_is_not_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    assert main(["evaluate", str(run), "--checks", "0", "--epsilon", "nan", "--limit", "4"]) == 2
    assert "epsilon" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert train(tmp_path / "file" / "run") == 2
    assert "cannot be written" in capsys.readouterr().err


FAULTS = """
import resource
import torch
from advmoe.memory import keep_freed_memory
kept = keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(10):  # as the features of a network come and go
    a, b = torch.ones(9 << 20), torch.ones(8 << 20)
    c = a[: 8 << 20] + b
    d = c.relu()
    a = b = None
    e = d * 2
    c = d = e = None
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept_unless_the_environment_says_how() -> None:
    """Then the kernel maps a part of the pages anew that it maps each time otherwise."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    faults = []
    for given, kept in (({}, "True"), ({"MALLOC_ARENA_MAX": "4"}, "False")):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=clean | given
        )
        said, count = done.stdout.split()
        assert said == kept
        faults.append(int(count))
    assert faults[0] < 0.7 * faults[1]


def test_images_too_small_for_a_router_are_found_before_the_first_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--kind", "block_moe", "--moe-at", "layer3.1", "--gate", "conv-gap"]
    assert train(tmp_path / "run", *options) == 2
    assert (
        capsys.readouterr().err == "advmoe: router: conv-gap has no padding and takes features from 3x3 on, got (2, 2)\n"
    )
    assert not (tmp_path / "run").exists()
