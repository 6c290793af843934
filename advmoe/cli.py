# SPDX-License-Identifier: Apache-2.0
"""The ``advmoe`` command. Exit codes: 0 done, 1 fault, 2 usage or input, 3 interrupted and resumable, 130 interrupted;
docs/training.md says more of them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from moe_kernels import BackendUnavailable, FusedModel, __version__, fuse
from moe_kernels.routing import GATES

from . import demo
from .attacks import NAMES
from .config import (
    ALIASES,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    ROBUST_EXPERTS,
    SCHEDULES,
    AttackConfig,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RoutingConfig,
    RunConfig,
)
from .data import download, list_data
from .evaluation import SUSPECT
from .export import FORMATS, export
from .files import write_text
from .models import MODEL_OPTIONS, list_models, router_parameters
from .models.base import KINDS, LAYOUTS, ROUTE_PER, STEMS, default_router
from .models.network_moe import MIXES
from .objectives import BALANCE_LOSSES
from .profiling import backbone_costs, measure_latency, profile
from .recipes import SCALES, SweepOptions, reproduce
from .registry import shown, unknown_name
from .routers import list_routers, routers_of
from .tables import percent, table
from .training import Interrupted, Run, StepError, resume, train
from .training.evaluation import EvaluatedRun, evaluate_dual, evaluate_run, write_record
from .training.faults import NON_FINITE
from .training.parallel import ProcessLost, joined, resume_command, sigterm_interrupts
from .training.replay import replay
from .training.runs import build_model

__all__ = ["main"]

DONE, FAULT, USAGE, RESUMABLE, INTERRUPTED = 0, 1, 2, 3, 130

_KIND_OF = {"rt-er": "network_moe", "jtdmoe": "dual_moe"}  # the one kind that a method is for

_FAULTS = (ProcessLost, StepError, *NON_FINITE, BackendUnavailable)  # and OSError, WriteError among it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown)
    options.given = [a.split("=")[0] for a in arguments if a.startswith("--")]  # also where a default was given
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several have a way of their own, in `joined`
    with sigterm_interrupts(several=False) if alone else nullcontext():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    try:
        code: int = options.run(options) or DONE
        sys.stdout.flush()  # a closed pipe shows here at the latest
        return code
    except Interrupted as error:
        if int(os.environ.get("RANK", "0")) == 0:  # of several processes the first reports
            print(f"interrupted; go on with: {resume_command(error.args[0])}", file=sys.stderr)
        return RESUMABLE
    except KeyboardInterrupt:
        again = "; the same command goes on with AutoAttack, if that had begun" if options.run is _evaluate else ""
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"interrupted{again}", file=sys.stderr)
        return INTERRUPTED
    except ValueError as error:  # RunError and DataError are such
        print(f"advmoe: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # whoever read the output, `head` say, has enough; what is left cannot be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except (*_FAULTS, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whoever gave it can mend it
            print(f"advmoe: {shown(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return USAGE
        print(f"advmoe: {error}", file=sys.stderr)
        return FAULT


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; the usage of some commands fills a page."""

    def error(self, message: str) -> NoReturn:
        line = " ".join(message.split())
        self.exit(USAGE, f"{self.prog}: {line[:1000]} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            _, _, message = str(unknown_name("", value, action.choices)).partition(": ")
            raise argparse.ArgumentError(action, message)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Arguments that nothing takes."""
        options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        first = next((each for each in unknown if each.startswith("-")), unknown[0]).split("=")[0]
        near = difflib.get_close_matches(first[:100], options, n=1) if first.startswith("-") else []
        self.error(f"unknown argument {shown(first)}" + (f"; did you mean {near[0]}?" if near else ""))


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that there are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False
        return action.help if nothing else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="advmoe",
        description="Adversarially robust mixture-of-experts CNNs.",
        allow_abbrev=False,
        epilog="exit codes: 0 done, 1 fault, 2 usage or input, 3 interrupted and resumable, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"advmoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    # no abbreviations: an option that comes later would change what they mean
    common: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}

    p = commands.add_parser("demo", help="train, attack and time five models on embedded data", **common)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the run folders")
    p.add_argument("--fast", action="store_true", help="fewer epochs and weaker attacks: shows that everything runs")
    p.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    p.set_defaults(run=_demo)

    p = commands.add_parser("train", help="train a model", **common)
    r, m, o, t = RunConfig(), MethodConfig(), OptimConfig(), RoutingConfig()
    p.add_argument("--out", type=Path, help="the run folder to make")
    p.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="continue this run; all other options come from it, but --data-dir, which may have moved",
    )
    g = p.add_argument_group("method")
    g.add_argument(
        "--method", type=lambda name: ALIASES.get(name, name), choices=METHODS, default=m.name, help="how to train"
    )
    g.add_argument(
        "--objective",
        choices=("trades", "cross_entropy"),
        default=m.objective,
        help="trades, or cross_entropy on attacked images (PGD-AT)",
    )
    g.add_argument("--beta", type=float, default=m.beta, help="TRADES' and RT-ER's weight of the robust term")
    g.add_argument(
        "--robust-experts",
        choices=ROBUST_EXPERTS,
        default=m.robust_experts,
        help="rt-er, jtdmoe: which are made robust besides the mixture: each image's second one, another drawn, or all",
    )
    g.add_argument("--order", choices=("router_first", "backbone_first"), default=m.order, help="advmoe: of the levels")
    g.add_argument("--batches", choices=("two", "one"), default=m.batches, help="advmoe: a batch for each level, or one")
    g.add_argument(
        "--router-objective",
        choices=("trades", "pseudo_label"),
        default=m.router_objective,
        help="advmoe: what routers learn by",
    )
    g.add_argument("--router-alpha", type=float, default=m.router_alpha, help="pseudo_label's weight of the label")
    g.add_argument("--attack-routers", action="store_true", help="add the routers' divergence to the training attack")
    g.add_argument(
        "--as-released",
        action="store_true",
        help="advmoe as its released code: --order backbone_first --batches one --router-objective pseudo_label "
        "--attack-routers --attack-start gaussian --share-epochs 0, and --router global if no router is given",
    )
    g.add_argument("--share-attack", action="store_true", help="advmoe: one batch and one attack for both levels")
    g.add_argument(
        "--router-every", type=_positive, default=m.router_every, metavar="T", help="advmoe: routers in every T-th step"
    )
    g.add_argument("--part", choices=("all", "routers", "experts"), default=m.part, help="at: what is trained")
    g.add_argument("--pretrain-epochs", type=int, default=m.pretrain_epochs, help="at_sparse: of the dense network")
    g.add_argument("--mask-epochs", type=int, default=m.mask_epochs, help="at_sparse: of the mask; the rest fine-tunes")
    g.add_argument(
        "--replays", type=_positive, default=m.replays, metavar="M", help="free-at: steps that each batch makes"
    )
    g.add_argument(
        "--reset-noise",
        type=float,
        default=m.reset_noise,
        metavar="P",
        help="free-at: how likely the perturbation begins at 0 again",
    )
    g.add_argument(
        "--drop-start", action="store_true", help="fast-at: the step goes from the image, not from the random start"
    )
    g.add_argument("--init", metavar="RUN", help="begin with the weights of this run or checkpoint")
    g.add_argument("--standard-run", metavar="RUN", help="of kind dual_moe: begin with this run's as the standard one")
    g.add_argument("--robust-run", metavar="RUN", help="of kind dual_moe: begin with this run's as the robust one")
    g = p.add_argument_group("routing")
    g.add_argument("--balance", choices=("none", *BALANCE_LOSSES), default=t.balance, help="loss of the routers")
    g.add_argument("--balance-weight", type=float, default=t.balance_weight, help="of that loss")
    g.add_argument("--experts-start", choices=("apart", "alike"), default=t.experts, help="alike: as copies of the first")
    g.add_argument(
        "--share-epochs",
        type=int,
        metavar="E",
        help="train one expert for E epochs, then copy it; three quarters of the epochs by default, 0 with --as-released",
    )
    _model_options(p)
    _data_options(p)
    p.add_argument("--train-limit", type=int, metavar="N", help="use N training images")
    p.add_argument("--no-augment", action="store_true", help="no random crop and mirror")
    p.add_argument("--shift", type=int, metavar="PIXELS", help="of the random crop; the data's own by default")
    p.add_argument(
        "--color-jitter",
        type=float,
        default=0.0,
        metavar="C",
        help="brightness, contrast, saturation and hue by up to C, in any order",
    )
    p.add_argument(
        "--cutout", type=int, default=0, metavar="PIXELS", help="side of a square of each image that becomes the mean"
    )
    p.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that decode images ahead; one for each core but one, if in files",
    )
    p.add_argument("--tensorboard", action="store_true", help="write the epochs' metrics to RUN/tensorboard too")
    g = p.add_argument_group("training attack")
    g.add_argument("--epsilon", type=float, help="radius, of pixel range 1; the data's own by default")
    g.add_argument("--step-size", type=float, help="the data's own by default; free-at: epsilon, fast-at: 1.25 epsilon")
    g.add_argument("--attack-steps", type=int, metavar="K", help="of PGD, 2 by default; free-at and fast-at take one")
    g.add_argument(
        "--attack-loss", choices=("kl", "ce", "margin"), help="kl by default, ce with --objective cross_entropy"
    )
    g.add_argument("--attack-start", choices=("uniform", "gaussian"), default="uniform", help="gaussian: TRADES' own")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=r.epochs, help="passes over the training images")
    g.add_argument("--batch-size", type=int, default=r.batch_size, help="images a step")
    g.add_argument(
        "--accumulate",
        type=_positive,
        default=o.accumulate,
        metavar="K",
        help="go through a batch in K parts, to save memory",
    )
    g.add_argument(
        "--precision", choices=PRECISIONS, default=o.precision, help="of forwards in training; bfloat16 by autocast"
    )
    g.add_argument("--compile", action="store_true", help="training's forwards through torch.compile (minutes at first)")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default=o.optimizer, help="what makes a step of the gradients")
    g.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="of the rate: a cosine or (1 - t)^power to 0, or a triangle over and over; cyclic with adam",
    )
    g.add_argument("--power", type=float, default=o.power, help="of schedule polynomial")
    g.add_argument("--lr", type=float, help="the highest rate; 0.1 by default, 1e-4 with adam")
    g.add_argument("--low-lr", type=float, help="the lowest rate of schedule cyclic; half of --lr by default")
    g.add_argument(
        "--cycle-steps", type=_positive, default=o.cycle_steps, metavar="N", help="of schedule cyclic: each way"
    )
    g.add_argument("--router-lr", type=float, help="the routers' own rate; --lr by default")
    g.add_argument("--momentum", type=float, default=o.momentum, help="of SGD; Adam's first beta")
    g.add_argument("--nesterov", action="store_true", help="SGD's momentum in Nesterov's form")
    g.add_argument("--weight-decay", type=float, help="5e-4 by default, 0 with adam")
    g.add_argument(
        "--freeze-unused", action="store_true", help="no decay and momentum for experts nobody chose in a step"
    )
    g.add_argument("--seed", type=int, default=r.seed, help="of everything that is drawn")
    g.add_argument("--device", default=r.device, help="auto is a CUDA device where there is one")
    g.add_argument("--threads", type=_positive, help="CPU threads; torch's own choice by default")
    g.add_argument("--validation-attack", default=r.validation_attack, help="the attack of each epoch's validation")
    p.set_defaults(run=_train)

    p = commands.add_parser(
        "replay",
        help="make the step again that stopped a run by a number that is not finite: 0 reproduced, 1 not",
        **common,
    )
    p.add_argument("source", type=Path, metavar="RUN", help="the run folder, which has a fault.pt")
    p.add_argument("--data-dir", help="the folder that holds the data, if it has moved")
    p.set_defaults(run=_replay)

    p = commands.add_parser("evaluate", help="SA and RA on the test set, and whether RA can be believed", **common)
    p.add_argument("source", metavar="RUN", help="a run folder, a checkpoint in one, or module:function")
    p.add_argument("--attack", action="append", help=f"repeatable; pgd50x5 and autoattack if none. {NAMES}")
    p.add_argument(
        "--autoattack-limit",
        type=_positive,
        default=1000,
        metavar="N",
        help="at most N images for AutoAttack, which is slow",
    )
    p.add_argument(
        "--checks",
        type=int,
        default=128,
        metavar="N",
        help="images for the curve over the radius and for the signs of gradient masking; 0: neither",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write; a run has one in its folder by default")
    _evaluation_options(p)
    _data_options(p, default=None)
    p.set_defaults(run=_evaluate)

    p = commands.add_parser("dual", help="SA and RA of the Dual-Model of two runs against alpha", **common)
    p.add_argument("standard", metavar="STANDARD_RUN", help="a run folder or checkpoint, of standard training")
    p.add_argument("robust", metavar="ROBUST_RUN", help="another, of rt-er say")
    p.add_argument(
        "--alphas", type=_shares, default="0.5,0.6,0.7,0.8,0.9,1", metavar="A,A,…", help="the robust one's shares"
    )
    p.add_argument("--on", choices=MIXES, default="logits", help="what of the two is mixed")
    p.add_argument("--attack", action="append", help=f"repeatable; pgd50 if none. {NAMES}")
    p.add_argument(
        "--autoattack-limit", type=_positive, default=1000, metavar="N", help="at most N images for AutoAttack"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for dual.json, dual.csv and dual.png")
    _evaluation_options(p)
    p.add_argument("--data-dir", help="the folder that holds the data, if it has moved")
    p.set_defaults(run=_dual)

    p = commands.add_parser("analyze", help="the paper's analyses: a CSV file and a picture each", **common)
    p.add_argument("sources", nargs="*", metavar="RUN", help="run folders, checkpoints in such, or module:function")
    p.add_argument("--list", action="store_true", help="names the analyses")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these of them; all that can be made by default")
    p.add_argument("--layers", nargs="+", metavar="NAME", help="whose experts experts_alone looks at, such as layer4.1")
    p.add_argument("--against", metavar="RUN", help="the sparse run whose mask pathways are compared with")
    p.add_argument("--reproduced", type=Path, metavar="DIR", help="the --out of advmoe reproduce: figures 2, 3, 7 and 8")
    p.add_argument("--scale", choices=SCALES, default="cpu", help="of --reproduced")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the files; RUN/analysis by default")
    p.add_argument("--attack", default="pgd50", help="a PGD of the L-infinity ball; every start goes to its last step")
    _evaluation_options(p)
    _data_options(p, default=None)
    p.set_defaults(run=_analyze)

    p = commands.add_parser("report", help="a page to look at: settings, tables, checks, pictures, examples", **common)
    p.add_argument("sources", nargs="+", metavar="RUN", help="run folders")
    p.add_argument(
        "--out", type=Path, metavar="FILE", help="the page; RUN/report.html by default, needed for several runs"
    )
    p.add_argument("--attack", default="pgd50", help="of pictures and examples")
    p.add_argument(
        "--examples", type=int, default=8, metavar="N", help="images to show with what the attack made of them"
    )
    p.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of the run folders")
    p.add_argument("--limit", type=_positive, default=200, metavar="N", help="test images that are attacked for the page")
    p.add_argument("--threads", type=_positive, help="CPU threads; torch's own choice by default")
    p.add_argument("--device", default="auto", help="auto is a CUDA device where there is one")
    p.add_argument("--seed", type=int, default=0, help="of the attacks")
    p.add_argument("--data-dir", help="the folder that holds the data, if it has moved")
    p.set_defaults(run=_report)

    p = commands.add_parser("export", help="write a trained model as one file", **common)
    p.add_argument("source", metavar="RUN", help="a run folder or a checkpoint in one")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="to write; .safetensors, .pt2 or .onnx")
    p.add_argument(
        "--format",
        choices=FORMATS,
        default="safetensors",
        help="weights and settings; or the network itself, which needs no advmoe: torch_export and aotinductor (compiled "
        "for this kind of processor) with any kind, onnx without routed operators",
    )
    p.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run folder")
    p.set_defaults(run=_export)

    p = commands.add_parser("reproduce", help="rows of the paper's tables and figures", **common)
    p.add_argument("recipe", nargs="*", help="such as table1/cifar10/resnet18/advmoe, or a prefix: all below it")
    p.add_argument("--scale", choices=SCALES, default="cpu", help="paper: as printed; cpu: a row within an hour")
    p.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="the scale's own by default")
    p.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="folder of all runs, which are gone on with")
    p.add_argument("--data-dir", help="where the data sets' files are")
    p.add_argument("--download", action="store_true", help="fetch the data into --data-dir if it is not there")
    p.add_argument("--threads", type=_positive, help="CPU threads; torch's own choice by default")
    p.add_argument("--device", default="auto", help="auto is a CUDA device where there is one")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--list", action="store_true", help="names the recipes")
    g.add_argument("--dry-run", action="store_true", help="prints the settings of each, nothing is run")
    g.add_argument("--table", action="store_true", help="prints the table of what is there, nothing is run")
    p.set_defaults(run=_reproduce)

    p = commands.add_parser("profile", help="multiply-accumulates and latency of a model", **common)
    _model_options(p)
    p.add_argument("--image-size", type=int, default=32, help="pixels of a side")
    p.add_argument("--num-classes", type=int, default=10, help="of the classifier")
    p.add_argument("--batch-size", type=int, nargs="+", default=[1, 32], help="batches to time")
    p.add_argument("--repeats", type=int, default=20, help="forwards that are timed")
    p.add_argument("--threads", type=_positive, help="CPU threads; torch's own choice by default")
    p.add_argument("--layers", action="store_true", help="a line for each layer")
    p.add_argument("--fused", action="store_true", help="times the inference forms of the models (moe_kernels.fuse)")
    p.add_argument("--steps", action="store_true", help="what each kind of step of the fused model takes, on the CPU")
    p.add_argument("--routers", action="store_true", help="what each registered router costs here, nothing timed")
    p.add_argument(
        "--table", action="store_true", help="what every backbone costs at --ratios and --image-sizes, nothing timed"
    )
    p.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5, 0.8], help="of --table")
    p.add_argument("--image-sizes", type=int, nargs="+", default=[32], help="of --table")
    p.set_defaults(run=_profile)
    for p in commands.choices.values():
        p.set_defaults(parser=p)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _shares(text: str) -> list[float]:
    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers with commas between them, got {text!r}") from None


def _evaluation_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--checkpoint", choices=("best", "last"), default="best", help="of a run folder")
    p.add_argument("--limit", type=int, metavar="N", help="the first N test images")
    p.add_argument("--batch-size", type=_positive, default=128, help="images at once")
    p.add_argument("--epsilon", type=float, help="the run's training radius, or the data's, by default")
    p.add_argument("--threads", type=_positive, help="CPU threads; torch's own choice by default")
    p.add_argument("--device", default="auto", help="auto is a CUDA device where there is one")
    p.add_argument("--seed", type=int, default=0, help="of the attacks")


def _model_options(parser: argparse.ArgumentParser) -> None:
    d = ModelConfig()
    g = parser.add_argument_group("model")
    g.add_argument("--arch", default=d.arch, help=f"one of {', '.join(list_models())}")
    g.add_argument(
        "--kind",
        choices=KINDS,
        default=d.kind,
        help="s_dense: the network of a pathway's width; network_moe: whole networks and a router of the image (that of "
        "rt-er); dual_moe: two such (that of jtdmoe); block_moe, conv_moe: mixtures in place of the blocks or "
        "convolutions of --moe-at",
    )
    g.add_argument(
        "--experts", type=int, default=d.num_experts, metavar="N", help="experts of each routed layer, or networks"
    )
    g.add_argument("--ratio", type=float, default=d.ratio, help="width of an expert against the dense layer's")
    g.add_argument("--width", type=int, help="channels of the first stage; the architecture's own by default")
    g.add_argument("--layout", choices=LAYOUTS, default=d.layout, help="where the experts' channels lie")
    g.add_argument(
        "--router",
        help=f"{', '.join(list_routers())}, or module:Class, a Router of yours; light by default, linear for "
        "network_moe, gap-fc for block_moe and conv_moe",
    )
    g.add_argument("--route-per", choices=ROUTE_PER, help="what a router chooses for; layer by default")
    g.add_argument(
        "--moe-at",
        type=lambda text: int(text) if text.isdecimal() else text,
        nargs="+",
        metavar="AT",
        help="the routed stages, by number, all by default; of block_moe and conv_moe patterns of the names of blocks or "
        "convolutions, such as layer4.1",
    )
    g.add_argument(
        "--top-k",
        type=_positive,
        default=d.top_k,
        metavar="K",
        help="experts of each image of network_moe, block_moe and conv_moe, or token of a ViT",
    )
    g.add_argument(
        "--capacity",
        type=float,
        metavar="C",
        help="in training an expert takes at most C equal shares of a batch",
    )
    g.add_argument("--mix", choices=MIXES, default=d.mix, help="of network_moe: what of the chosen experts is mixed")
    g.add_argument("--frozen-router", action="store_true", help="of network_moe: the router stays as it is drawn")
    g.add_argument("--alpha", type=float, default=d.alpha, help="of dual_moe: the robust one's share")
    g.add_argument("--dual-on", choices=MIXES, default=d.dual_on, help="of dual_moe: what of the two is mixed")
    g.add_argument("--temperature", type=float, default=d.temperature, help="of the routers' probabilities")
    g.add_argument("--noise", type=float, default=d.noise, help="deviation of noise on the scores in training")
    g.add_argument(
        "--standardize",
        action=argparse.BooleanOptionalAction,
        help="scores of mean 0 and variance 1 over the images; by default all routers' but global's",
    )
    g.add_argument("--stem", choices=STEMS, help="imagenet from 128 pixels on by default")
    g.add_argument("--bn", choices=("shared", "per_expert"), help="shared by default; per_expert with layout windows")
    g.add_argument(
        "--gate",
        metavar="GATE",
        help=f"how gradients reach a router: {', '.join(GATES)}; straight_through, with several choices softmax, by "
        "default; of block_moe and conv_moe also a router's name",
    )
    g.add_argument("--gate-after", choices=("conv", "norm"), default=d.gate_after, help="where the gate sits")


def _data_options(parser: argparse.ArgumentParser, default: str | None = "digits") -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--data", default=default, help=f"one of {', '.join(list_data())}")
    g.add_argument("--data-dir", help="the folder that holds theirs, such as cifar-10-batches-py")
    g.add_argument("--download", action="store_true", help="fetch the data into --data-dir if it is not there")
    g.add_argument("--test-limit", type=int, metavar="N", help="use the first N test images")


def _model_config(o: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        arch=o.arch, kind=o.kind, num_experts=o.experts, ratio=o.ratio, width=o.width, layout=o.layout, router=o.router,
        route_per=o.route_per, moe_at=None if o.moe_at is None else tuple(o.moe_at), bn=o.bn, gate=o.gate,
        gate_after=o.gate_after, temperature=o.temperature, noise=o.noise, standardize=o.standardize,
        top_k=o.top_k, capacity=o.capacity, stem=o.stem, mix=o.mix, frozen_router=o.frozen_router, alpha=o.alpha,
        dual_on=o.dual_on,
    )  # fmt: skip


def _refuse_options_of_other_kinds(o: argparse.Namespace) -> None:
    every = {name for options in MODEL_OPTIONS.values() for name in options}
    for flag in o.given:
        name = flag.removeprefix("--").replace("-", "_")
        if name in every and name not in MODEL_OPTIONS[o.kind]:
            kinds = ", ".join(kind for kind, options in MODEL_OPTIONS.items() if name in options)
            raise ValueError(f"{flag}: without effect on kind {o.kind}; an option of {kinds}")


def _method_config(o: argparse.Namespace) -> MethodConfig:
    if o.as_released:
        others = ("--order", "--batches", "--router-objective", "--attack-routers", "--share-attack", "--attack-start")
        given = [name for name in others if name in o.given]
        if o.method != "advmoe" or given:
            what = f"--method {o.method}" if o.method != "advmoe" else given[0]
            raise ValueError(f"--as-released: sets what advmoe's released code does, and does not go with {what}")
        return MethodConfig.as_released(
            objective=o.objective, beta=o.beta, router_alpha=o.router_alpha, router_every=o.router_every, part=o.part,
            pretrain_epochs=o.pretrain_epochs, mask_epochs=o.mask_epochs, replays=o.replays, reset_noise=o.reset_noise,
            keep_start=not o.drop_start,
        )  # fmt: skip
    return MethodConfig(
        o.method, o.objective, o.beta, o.order, o.batches, o.router_objective, o.router_alpha, o.attack_routers,
        share_attack=o.share_attack, router_every=o.router_every, part=o.part, pretrain_epochs=o.pretrain_epochs,
        mask_epochs=o.mask_epochs, robust_experts=o.robust_experts, replays=o.replays, reset_noise=o.reset_noise,
        keep_start=not o.drop_start,
    )  # fmt: skip


def _optim_config(o: argparse.Namespace) -> OptimConfig:
    rates = {"lr": o.lr, "weight_decay": o.weight_decay, "schedule": o.schedule}
    given = {name: value for name, value in rates.items() if value is not None}
    make = OptimConfig.cyclic_adam if o.optimizer == "adam" else OptimConfig
    return make(
        router_lr=o.router_lr, momentum=o.momentum, freeze_unused=o.freeze_unused, accumulate=o.accumulate,
        precision=o.precision, compile=o.compile, low_lr=o.low_lr, cycle_steps=o.cycle_steps, nesterov=o.nesterov,
        power=o.power, **given,
    )  # fmt: skip


def _fetch(o: argparse.Namespace) -> None:
    if o.download:
        for option, value in (("--data", o.data), ("--data-dir", o.data_dir)):
            if value is None:
                raise ValueError(f"--download: needs {option}")
        download(o.data, o.data_dir)


def _train(o: argparse.Namespace) -> None:
    if o.resume is not None:
        others = [name for name in o.given if name not in ("--resume", "--data-dir")]
        if others:
            raise ValueError(f"train: --resume takes all settings from the run; got {', '.join(others)} too")
        with joined(Run(o.resume).config().device) as world:
            run = resume(o.resume, data_dir=o.data_dir, world=world)
    else:
        if o.out is None:
            raise ValueError("train: --out RUN is needed (or --resume RUN)")
        gaussian = o.attack_start == "gaussian" or o.as_released
        share_epochs = o.share_epochs
        if "--kind" not in o.given:  # first: the default router is the kind's
            o.kind = _KIND_OF.get(o.method, o.kind)
        _refuse_options_of_other_kinds(o)
        model = _model_config(o)
        if o.as_released:
            share_epochs = share_epochs or 0
            if "--router" not in o.given:
                model = dataclasses.replace(model, router="global")
        data = DataConfig(
            o.data, o.data_dir, o.train_limit, o.test_limit, augment=not o.no_augment, shift=o.shift, cutout=o.cutout,
            workers=o.workers, color_jitter=o.color_jitter,
        )  # fmt: skip
        config = RunConfig(
            model=model,
            data=data,
            attack=AttackConfig(o.epsilon, o.step_size, o.attack_steps, o.attack_loss, "gaussian" if gaussian else True),
            optim=_optim_config(o),
            method=_method_config(o),
            routing=RoutingConfig(o.balance, o.balance_weight, o.experts_start, share_epochs),
            init=o.init,
            standard_run=o.standard_run,
            robust_run=o.robust_run,
            epochs=o.epochs,
            batch_size=o.batch_size,
            seed=o.seed,
            device=o.device,
            threads=o.threads,
            validation_attack=o.validation_attack,
            tensorboard=o.tensorboard,
        )
        with joined(o.device) as world:
            with world.leading():
                _fetch(o)
            run = train(config, o.out, world=world)
    if world.first:
        print(f"done: {run.folder} (config.yaml, metrics.jsonl, best.pt, last.pt); next: advmoe evaluate {run.folder}")


def _replay(o: argparse.Namespace) -> int:
    done = replay(o.source, o.data_dir)
    fault, now = done.fault, done.now
    state = fault["state"]
    print(f"epoch {state['epoch'] + 1}, step {state['step'] + 1}, on images")
    for indices in now.indices:
        print(f"  {', '.join(map(str, indices.tolist()))}")
    print(f"then: {fault['message']}\n  first not finite: {fault['where'] or 'not looked for'}")
    print(f"now: {now.error or 'the step went through'}\n  first not finite: {now.where or 'nothing'}")
    if now.trail:
        print("  before it:", *now.trail, sep="\n    ")
    if done.reproduced:
        print("reproduced")
        return DONE
    print("not reproduced:", *done.differences, sep="\n  ")
    return FAULT


def _evaluate(o: argparse.Namespace) -> None:
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    if o.out is not None and (o.out.is_dir() or not o.out.parent.is_dir()):  # not only behind hours of attacks
        raise ValueError(f"--out: expected a file in a folder that is there, got {o.out}")
    if o.checks < 0:
        raise ValueError(f"--checks: expected at least 0, got {o.checks}")
    with joined(o.device) as world:
        with world.leading():
            _fetch(o)
        done = evaluate_run(
            o.source, o.attack or ["pgd50x5", "autoattack"], checkpoint=o.checkpoint, data=o.data, data_dir=o.data_dir,
            test_limit=o.test_limit, limit=o.limit, epsilon=o.epsilon, batch_size=o.batch_size, seed=o.seed,
            device=o.device, progress=world.first, autoattack_limit=o.autoattack_limit, checks=o.checks, latency=(1, 32),
            state=None if o.out is None else o.out.parent, world=world,
        )  # fmt: skip
    if not world.first:
        return
    _print_evaluation(done)
    path = o.out or done.path
    if path is not None:
        replaced = ", in place of an earlier one (another file: --out)" if path.exists() else ""
        write_record(path, done.record)
        print(f"written to {path}{replaced}")


def _dual(o: argparse.Namespace) -> None:
    from .analysis import alphas  # here, since drawing takes longer to import than other commands need

    if o.threads is not None:
        torch.set_num_threads(o.threads)
    o.out.mkdir(parents=True, exist_ok=True)  # not only behind hours of attacks
    found = {}
    records = []
    for alpha, record, result in evaluate_dual(
        o.standard, o.robust, o.alphas, o.attack or ["pgd50"], o.on, checkpoint=o.checkpoint, data_dir=o.data_dir,
        limit=o.limit, epsilon=o.epsilon, batch_size=o.batch_size, seed=o.seed, device=o.device, progress=True,
        autoattack_limit=o.autoattack_limit,
    ):  # fmt: skip
        outcomes = ", ".join(f"RA {percent(each.ra)} ({name})" for name, each in result.attacks.items())
        print(f"alpha {alpha:g}: SA {percent(result.sa)}, {outcomes}", flush=True)
        found[alpha] = result
        records.append(record)
        write_text(o.out / "dual.json", json.dumps(records, indent=1) + "\n")
    finding = alphas(found)
    paths = finding.save(o.out)
    print(f"{finding.note}\nwritten: {o.out / 'dual.json'}, {paths[0]}, {paths[1].name}")


def _print_evaluation(done: EvaluatedRun) -> None:
    result, scrutiny = done.result, done.scrutiny
    red = done.record["suspect"]
    rows = [
        [
            name,
            str(a.images),
            percent(a.ra) + (" !" if red else ""),
            "-".join(f"{100 * end:.1f}" for end in a.interval),
            "-" if a.flip_rate is None else percent(a.flip_rate),
            "-" if a.zero_gradient is None else percent(a.zero_gradient),
        ]
        for name, a in result.attacks.items()
    ]
    low, high = result.sa_interval
    print(f"SA {percent(result.sa)} (95 %: {100 * low:.1f} to {100 * high:.1f}) of {result.images} test images\n")
    print(table(["attack", "images", "RA", "95 %", "flip rate", "no gradient"], rows))
    if red:
        print(f"! {SUSPECT} ({', '.join(red)})")
    if scrutiny is not None and any(c.name == "converged" and c.passed is False for c in scrutiny.checks):
        print("the attack of the checks has not converged: RA is lower than that")
    for name, outcome in result.attacks.items():
        print(f"{name}: {outcome.description}")
        if len(outcome.stages) > 1:
            print("  RA after " + ", ".join(f"{attack} {percent(ra)}" for attack, ra in outcome.stages.items()))
        for warning in outcome.warnings:
            print(f"  warning: {warning}")
    print("\nflip rate, no gradient: of the attacked images, which are those that are right when clean")
    if scrutiny is not None:
        print(f"\nchecks on {scrutiny.curve.images} images")
        for c in scrutiny.checks:
            state = {True: "passed", False: "FAILED", None: "not asked"}[c.passed]
            print(f"  {state:9s}  {c.name}: {c.measured}" + (f"; {c.means}" if c.passed is False else ""))
    first = next(iter(result.attacks.values()), None)
    classes = [
        [str(i), "-" if sa is None else percent(sa), "-" if first is None or ra is None else percent(ra)]
        for i, (sa, ra) in enumerate(zip(result.class_sa, first.class_ra if first else result.class_sa, strict=True))
    ]
    if len(classes) <= 20 and result.images >= 10 * len(classes):  # of fewer images the shares say nothing
        print(f"\n{table(['class', 'SA', f'RA {next(iter(result.attacks), None)}'], classes)}")
    print(
        f"\n{done.cost.gflops:.4f} GFLOPs an image (a multiply-accumulate as 1), {done.cost.params / 1e6:.2f} M "
        "parameters; "
        + ", ".join(f"{t.median_ms:.2f} ms for a batch of {t.batch_size}" for t in done.latency)
        + f" (median of {done.latency[0].repeats}, {torch.get_num_threads()} threads, torch {torch.__version__})"
    )


def _analyze(o: argparse.Namespace) -> None:
    from .report import ANALYSES, analyze  # here, since drawing takes longer to import than other commands need

    if o.list:
        print("\n".join(f"{name:13s}  {what}" for name, what in ANALYSES.items()))
        return
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    _fetch(o)
    done = analyze(
        o.sources, o.out, o.only, o.attack, o.limit, o.epsilon, o.against, o.data, o.data_dir, o.test_limit,
        o.reproduced, o.scale, o.checkpoint, o.batch_size, o.seed, o.device, progress=True, layers=o.layers,
    )  # fmt: skip
    for each in done.written:
        whose = f" of {each.source}" if each.source is not None and len(o.sources) > 1 else ""
        print(f"{each.finding.title}{whose}: {each.paths[0]}, {each.paths[1].name}")
    for skipped in done.skipped:
        whose = f" of {skipped.source}" if skipped.source is not None and len(o.sources) > 1 else ""
        print(f"left out: {skipped.name}{whose}: {skipped.reason}", file=sys.stderr)


def _report(o: argparse.Namespace) -> None:
    from .report import write_report

    if o.threads is not None:
        torch.set_num_threads(o.threads)
    path = write_report(
        o.sources, o.out, o.data_dir, o.limit, o.examples, o.attack, o.device, o.seed, o.checkpoint, progress=True
    )
    print(f"written: {path}")


def _export(o: argparse.Namespace) -> None:
    model = export(o.source, o.out, o.checkpoint, o.format)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"written to {o.out}: {parameters / 1e6:.3f} M parameters, {o.out.stat().st_size / 1e6:.2f} MB")


def _reproduce(o: argparse.Namespace) -> int:
    action = next((name for name in ("list", "dry_run", "table") if getattr(o, name)), "run")
    if o.download and o.data_dir is None:
        raise ValueError("--download: needs --data-dir")
    options = SweepOptions(o.out, o.data_dir, o.threads, o.device, o.download)
    return reproduce(o.recipe, o.scale, o.seeds, options, action, (*_FAULTS, OSError, torch.OutOfMemoryError))


def _profile(o: argparse.Namespace) -> None:
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    if o.table:
        _print_costs(o)
        return
    config = _model_config(o)
    common = {"num_classes": o.num_classes, "image_size": o.image_size}
    if o.routers:
        _print_routers(dataclasses.replace(config, **common))
        return
    model = build_model(dataclasses.replace(config, **common)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    cost = profile(model, o.image_size)
    if o.layers:
        rows = [[c.name, f"{c.macs / 1e6:.3f}", "router" if c.router else "pathway"] for c in cost.layers]
        print(table(["layer", "MMAC", "part"], rows), end="\n\n")
    print(
        f"{o.arch} {o.kind}: {cost.params / 1e6:.2f} M parameters, {cost.gflops:.4f} GFLOPs an image (a "
        f"multiply-accumulate as 1; convolutions, linear layers, attention): pathway {cost.pathway_gflops:.4f}, "
        f"routers {cost.router_gflops:.4f}"
    )
    others = []
    kinds = [kind for kind in ("dense", "s_dense") if kind != config.kind]  # all channels, and those of one pathway
    for kind in kinds:
        plain = ModelConfig(config.arch, kind, ratio=config.ratio, width=config.width, stem=config.stem, **common)
        others.append(build_model(plain).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    example = torch.rand(1, 3, o.image_size, o.image_size)
    fused = [fuse(m.eval(), example) for m in (model, *others)] if o.fused or o.steps else []
    timed = fused or [model, *others]
    rows = []
    for batch in o.batch_size:
        mine, *rest = (each.median_ms for each in measure_latency(timed, o.image_size, batch, o.repeats))
        rows.append([str(batch), f"{mine:.2f}", *(text for t in rest for text in (f"{t:.2f}", f"{mine / t:.2f}"))])
    heads = (head for kind in kinds for head in (f"{kind} ms", "ratio"))
    print(table(["batch", f"{o.kind} ms", *heads], rows))
    form = "fused, " if fused else ""
    print(
        f"median of {o.repeats} forwards in turn, {form}{torch.get_num_threads()} threads, torch {torch.__version__}, "
        "float32"
    )
    if o.steps:
        for batch in o.batch_size:
            _print_steps(fused[0], o.image_size, batch, o.repeats)


def _print_steps(model: FusedModel, image_size: int, batch: int, repeats: int) -> None:
    """Summed by operation and by whether a router asks for it; medians of each step."""
    images = torch.rand(batch, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    runs = [model.profile(images) for _ in range(repeats)]
    seconds: dict[str, float] = {}
    for step in zip(*runs, strict=True):
        part = " (router)" if "router" in step[0].module.split(".") else ""
        name = step[0].operation + part
        seconds[name] = seconds.get(name, 0.0) + statistics.median(s.seconds for s in step)
    total = sum(seconds.values())
    rows = [[n, f"{1e3 * s:.3f}", f"{100 * s / total:.1f} %"] for n, s in sorted(seconds.items(), key=lambda i: -i[1])]
    print(f"\nbatch {batch}: milliseconds of all threads, medians of {repeats}")
    print(table(["step", "ms", "share"], rows))


def _print_costs(o: argparse.Namespace) -> None:
    names = ("width", "stem", "layout", "route_per", "moe_at", "bn", "gate", "gate_after", "standardize", "capacity")
    options = {name: value for name in names if (value := getattr(o, name)) is not None}
    archs = [o.arch] if "--arch" in o.given else list_models()
    costs = backbone_costs(archs, o.ratios, o.image_sizes, o.experts, o.router, o.num_classes, **options)
    rows = [
        [c.arch, str(c.image_size), f"{c.ratio:g}"]
        + [f"{v:.4f}" for v in (c.dense, c.s_dense, c.pathway, c.pathway + c.routers)]
        for c in costs
    ]
    print(table(["arch", "image", "r", "Dense", "S-Dense", "pathway", "pathway + routers"], rows))
    print(
        "GFLOPs an image (a multiply-accumulate as 1; convolutions, linear layers, attention), "
        f"{o.num_classes} classes, layout {o.layout}, routers {o.router or default_router('moe')}; a pathway's "
        f"cost does not depend on the number of experts, {o.experts} here"
    )


def _print_routers(config: ModelConfig) -> None:
    rows = []
    for name in dict.fromkeys([*list_routers(), config.router or default_router("moe")]):
        with torch.device("meta"):
            model = build_model(dataclasses.replace(config, kind="moe", router=name, route_per=None))
            cost = profile(model, config.image_size or 32)
        parameters = sum(p.numel() for p in router_parameters(model))
        share, cost_text = cost.router_gflops / cost.pathway_gflops, f"{1e3 * cost.router_gflops:.4f}"
        rows.append([name, str(len(routers_of(model))), str(parameters), cost_text, f"{100 * share:.3f} %"])
    print(table(["router", "routers", "parameters", "MMAC", "of the pathway"], rows))
    of_what = f"{config.arch}, r = {config.ratio:g}, N = {config.num_experts}, {config.image_size} pixels"
    print(f"{of_what}; a multiply-accumulate as 1")


def _demo(o: argparse.Namespace) -> None:
    try:
        demo.run(o.out, fast=o.fast, seed=o.seed)
    except Interrupted:
        print("the demo starts anew when it is called again; this model alone can go on:", file=sys.stderr)
        raise
