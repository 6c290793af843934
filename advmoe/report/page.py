# SPDX-License-Identifier: Apache-2.0
"""Runs as one HTML page that opens from disk: everything is in it, and nothing in it is fetched or run."""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import math
import platform
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from moe_kernels import __version__

from ..analysis import Finding, style
from ..attacks import PGD, from_name
from ..config import RunConfig
from ..data import load
from ..evaluation import SUSPECT
from ..files import write_text
from ..models.base import PLACED, ROUTED, WHOLE
from ..recipes import Catalog
from ..recipes.sweep import differences, plain
from ..registry import shown
from ..tables import percent
from ..training import Run, RunError
from ..training.engine import device_of
from ..training.evaluation import Opened, open_source
from .analyses import ANALYSES, Analyzed, analyze, source_labels
from .examples import Example, class_name, find_examples

__all__ = ["write_report"]

NOTHING = "-"
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d):\d\d,\d+ ")  # of a line in log.txt
_PGD50 = re.compile(r"pgd50(x\d+)?(-ce)?")
_FIRST = ("training", "stability", "curve", "epsilons", "per_class")  # the pictures that come before the others
_HATCHES = ("", "///", "...", "xx")
_MANY = 20  # classes from which on there is no room for their names


@dataclass(frozen=True)
class _Subject:
    """A run of the page.

    Args:
        record: of its evaluation; None where there is none.
        record_path: where that is, or would be.
    """

    label: str
    run: Run
    config: RunConfig
    metrics: list[dict[str, Any]]
    record: dict[str, Any] | None
    record_path: Path


def write_report(
    sources: Sequence[str | Path],
    out: Path | None = None,
    data_dir: str | Path | None = None,
    limit: int = 200,
    examples: int = 8,
    attack: str = "pgd50",
    device: str = "auto",
    seed: int = 0,
    checkpoint: str = "best",
    progress: bool = False,
) -> Path:
    """Writes the page of these runs and returns its path.

    What was measured before is read from the runs' files; the examples and the analyses of routing are made now, on test
    images.

    Args:
        sources: run folders.
        out: the file; ``RUN/report.html`` by default, for one run.
        data_dir: where the data is, if not where the runs had it.
        limit: the first so many test images are attacked for the analyses, and at most so many looked through for
            examples.
        examples: adversarial images that are shown of each run; 0 for none.
        attack: its name, at the run's radius.
        seed: of the attack's random starts.
        checkpoint: ``best`` or ``last``: whose evaluation is shown, and whose model is attacked.

    Raises:
        ValueError: for arguments that do not fit, and if a run, its checkpoint or its data is not there or damaged
            (RunError, DataError among them).
        NonFiniteGradientError: as the attack.
    """
    folders = [Path(source) for source in sources]
    if not folders:
        raise ValueError("sources: expected at least one run, got none")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError(f"sources: expected different runs, got {', '.join(map(str, folders))}")
    if out is None:
        if len(folders) > 1:
            raise ValueError(f"out: expected a file for the page of {len(folders)} runs, got none")
        out = folders[0] / "report.html"
    for name, value, least in (("limit", limit, 1), ("examples", examples, 0)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    labels = source_labels(folders)
    subjects = [_subject(folder, label, checkpoint) for folder, label in zip(folders, labels, strict=True)]
    if out.is_dir() or not out.parent.is_dir():  # before anything is computed
        raise ValueError(f"out: expected a file in a folder that is there, got {out}")
    several = len(subjects) > 1
    catalog = Catalog()
    views = [_view(s, catalog, checkpoint) for s in subjects]
    where = None if data_dir is None else str(data_dir)
    with tempfile.TemporaryDirectory() as folder:
        analyzed = analyze(
            folders, Path(folder), _wanted(subjects), attack, limit, against=_mask(subjects), checkpoint=checkpoint,
            data_dir=where, seed=seed, device=device, progress=progress, require=False,
        )  # fmt: skip
        pictures = _pictures(subjects, analyzed)
    if examples:
        read = functools.cache(load)  # several runs have one data set
        for subject, view in zip(subjects, views, strict=True):
            opened = open_source(subject.run.folder, checkpoint, data_dir=where, read=read)
            view["examples"] = _examples(opened, attack, device, examples, limit, seed)
    page = {
        "title": f"{len(subjects)} runs" if several else _summary(subjects[0].config),
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {
            "moe_kernels": __version__,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "settings": _settings([s.config for s in subjects]),
        "runs": views,
        "pictures": pictures,
        "skipped": analyzed.skipped,
        "suspect": SUSPECT,
    }
    write_text(out, _template().render(page))
    return out


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


# --- what a run is ------------------------------------------------------------------------------------------------------


def _subject(folder: Path, label: str, checkpoint: str) -> _Subject:
    run = Run(folder)
    path = folder / ("evaluation.json" if checkpoint == "best" else f"evaluation-{checkpoint}.json")
    record = None
    if path.is_file():
        try:
            record = json.loads(path.read_text(errors="replace"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read: {error}; evaluate the run anew") from error
        if not isinstance(record, dict):
            raise RunError(f"{path}: expected an evaluation, got {shown(record)}; evaluate the run anew")
        lacking = [key for key in ("images", "sa", "attacks") if key not in record]
        if lacking:
            raise RunError(f"{path}: expected an evaluation, got one without {', '.join(lacking)}; evaluate the run anew")
    return _Subject(label, run, run.config(), run.metrics(), record, path)


def _summary(config: RunConfig) -> str:
    return f"{config.model.arch} ({config.model.kind}) by {config.method.name} on {config.data.name}"


def _flat(config: RunConfig) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain(config).items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _settings(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """By name the value of each run: first what is asked for first, of several runs what they differ in, and then all."""
    flat = [_flat(config) for config in configs]
    rows = {name: [_text(each[name], name) for each in flat] for name in flat[0]}
    if len(configs) > 1:
        return {"first": {name: row for name, row in rows.items() if len(set(row)) > 1}, "all": rows}
    c = configs[0]
    routed = c.model.kind in ROUTED
    first = {
        "data": c.data.name,
        "training images": "all" if c.data.train_limit is None else str(c.data.train_limit),
        "architecture": f"{c.model.arch}, kind {c.model.kind}",
        "width": "the architecture's own" if c.model.width is None else str(c.model.width),
        "experts": str(c.model.num_experts) if routed else NOTHING,
        "ratio": NOTHING if c.model.kind in ("dense", *WHOLE, *PLACED) else f"{c.model.ratio:g}",
        "router": f"{c.model.router}, layout {c.model.layout}" if routed else NOTHING,
        "method": c.method.name,
        "epochs": str(c.epochs),
        "batch size": str(c.batch_size),
        "training attack": f"{_attack(c)}, L-inf epsilon {_radius(c.attack.epsilon)}",
        "seed": str(c.seed),
    }
    return {"first": {name: [value] for name, value in first.items()}, "all": rows}


def _attack(c: RunConfig) -> str:
    """The attack of its training, by name."""
    if c.method.name == "free-at":
        return f"free, {c.method.replays} replays"
    return "one step" if c.method.name == "fast-at" else f"PGD-{c.attack.steps}"


def _text(value: Any, name: str = "") -> str:
    if value is None:
        return NOTHING
    if name == "attack.epsilon":
        return _radius(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _radius(epsilon: float | None) -> str:
    """As people write it: 8/255."""
    if epsilon is None:
        return NOTHING
    steps = 255 * epsilon
    return f"{round(steps)}/255" if round(steps) and abs(steps - round(steps)) < 1e-6 else f"{epsilon:.4g}"


def _trained(subject: _Subject) -> str:
    epochs = f"{len(subject.metrics)} of {subject.config.epochs} epochs"
    log = subject.run.folder / "log.txt"
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    stamps = [match[1] for line in lines if (match := _STAMP.match(line))]
    minutes = sum(line.get("seconds", 0.0) for line in subject.metrics) / 60
    when = f", {stamps[0]} to {stamps[-1]} by its log" if stamps else ""
    return f"{epochs}{when}, {minutes:.1f} minutes of training steps"


# --- its figures --------------------------------------------------------------------------------------------------------


def _view(subject: _Subject, catalog: Catalog, checkpoint: str) -> dict[str, Any]:
    try:
        return _run_view(subject, catalog, checkpoint)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # JSON of other kinds
        files = f"{subject.record_path} or {subject.run.metrics_path}"
        raise RunError(f"{files} is not what a run writes ({type(error).__name__}: {error})") from error


def _run_view(subject: _Subject, catalog: Catalog, checkpoint: str) -> dict[str, Any]:
    folder = shlex.quote(str(subject.run.folder))
    more = "" if checkpoint == "best" else f" --checkpoint {checkpoint}"
    view: dict[str, Any] = {
        "label": subject.label,
        "folder": str(subject.run.folder),
        "summary": _summary(subject.config),
        "trained": _trained(subject),
        "file": subject.record_path.name,
        "command": f"advmoe evaluate {folder}{more}",
        "evaluated": None,
        "examples": None,
    }
    r = subject.record
    if r is None:
        return view
    paper = _paper(subject, catalog)
    made = {"torch": r.get("torch"), "machine": r.get("machine"), "threads": r.get("threads"), "seed": r.get("seed")}
    about = [f"checkpoint {r['checkpoint']}"] if "checkpoint" in r else []
    about += [
        f"{r['images']} test images of {r.get('data', subject.config.data.name)}",
        f"epsilon {_radius(r.get('epsilon'))}",
    ]
    about += [f"recipe {r['recipe']} at scale {r['scale']}"] if "recipe" in r else []
    return view | {
        "evaluated": ", ".join([*about, *(f"{name} {value}" for name, value in made.items() if value is not None)]),
        "sa": _share(r["sa"], r.get("sa_interval")),
        "gflops": NOTHING if r.get("gflops") is None else f"{r['gflops']:.4g}",
        "routers": _routers(r),
        "latency": [_latency(each) for each in r.get("latency") or []],
        "attacks": [_attack_view(name, outcome, r, paper) for name, outcome in r["attacks"].items()],
        "checks": r.get("checks"),
        "paper": paper,
    }


def _attack_view(name: str, outcome: Mapping[str, Any], record: Mapping[str, Any], paper: Any) -> dict[str, Any]:
    column = "ra_pgd50" if _PGD50.fullmatch(name) else "ra_autoattack" if name == "autoattack" else None
    images = outcome.get("images", record["images"])
    stages = ", ".join(f"after {stage} {percent(ra)}" for stage, ra in (outcome.get("stages") or {}).items())
    notes = [outcome["description"], f"on {images} test images", *([stages] if stages else [])]
    return {
        "name": name,
        "ra": _share(outcome["ra"], outcome.get("interval")),
        "suspect": outcome.get("suspect") or record.get("suspect") or [],
        "flips": _percent_or_nothing(outcome.get("flip_rate")),
        "blind": _percent_or_nothing(outcome.get("zero_gradient")),
        "note": "; ".join([*notes, *(outcome.get("warnings") or [])]),
        "paper": NOTHING if paper is None or column is None else paper[column],
    }


def _share(share: float, interval: Sequence[float] | None) -> dict[str, str]:
    between = "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return {"share": percent(share), "interval": between}


def _percent_or_nothing(share: float | None) -> str:
    return NOTHING if share is None else percent(share)


def _routers(record: Mapping[str, Any]) -> str:
    """Their part of the operations; empty where it is not on record."""
    routers = record.get("router_gflops")
    return f"routers {100 * routers / record['gflops']:.2g} % of it" if routers else ""


def _latency(each: Mapping[str, Any]) -> dict[str, str]:
    median = f"batch {each['batch_size']}: {each['median_ms']:.2f} ms"
    return {"median": median, "between": f"[{each['low_ms']:.2f}, {each['high_ms']:.2f}]"}


def _paper(subject: _Subject, catalog: Catalog) -> dict[str, Any] | None:
    """What the paper prints for this data, architecture, method, ratio and radius; None where it prints nothing."""
    wanted = _identity(subject.config)
    radius = (subject.record or {}).get("epsilon")
    row: dict[str, str] = {}
    recipes = []
    for recipe in catalog.recipes.values():
        plan = catalog.plan(recipe.name, "paper")
        epsilon = plan.evaluation.epsilon
        same_radius = radius is not None and epsilon is not None and math.isclose(epsilon, radius)
        if _identity(plan.config) == wanted and same_radius and (printed := catalog.paper(recipe)):
            row = {**printed, **row}
            recipes.append(recipe.name)
    if not recipes:
        return None
    deviations = {"sa": "sa_std", "ra_pgd50": "ra_std"}
    figures = {
        name: _printed(row.get(name), row.get(deviations.get(name, "")))
        for name in ("sa", "ra_pgd50", "ra_autoattack", "gflops")
    }
    # the recipe's seed is one of several
    others = differences(plain(subject.config) | {"seed": 0}, plain(catalog.plan(recipes[0], "paper").config))
    return {**figures, "recipes": recipes, "differences": others}


def _identity(config: RunConfig) -> tuple[Any, ...]:
    """What tells the paper's rows apart, and settings of ours for which it has no row."""
    m, t = config.model, config.method
    ratio = None if m.kind == "dense" else m.ratio
    return config.data.name, m.arch, m.kind, ratio, t.name, t.objective, t.part, config.attack.steps, config.init is None


def _printed(value: str | None, deviation: str | None) -> str:
    """The CSV's numbers leave zeros before points out."""
    if not value:
        return NOTHING
    return " ± ".join(f"{float(part):g}" for part in (value, deviation) if part)


# --- pictures -----------------------------------------------------------------------------------------------------------


def _wanted(subjects: Sequence[_Subject]) -> list[str]:
    """The analyses that these runs may have: the curve only where none was evaluated, since it takes four attacks, and
    not experts_alone, which takes one for each expert."""
    left_out = {"fig2", "fig3", "fig7", "fig8", "experts_alone"}
    left_out |= {"epsilons"} if _curves(subjects) else set()
    left_out |= set() if _mask(subjects) else {"pathways"}
    left_out |= set() if len(subjects) > 1 else {"transfer", "stability"}
    return [name for name in ANALYSES if name not in left_out]


def _mask(subjects: Sequence[_Subject]) -> Path | None:
    """The first run with a mask, which the others' pathways can be compared with."""
    return next((s.run.folder for s in subjects if s.config.model.kind == "sparse" and len(subjects) > 1), None)


def _pictures(subjects: Sequence[_Subject], analyzed: Analyzed) -> list[dict[str, Any]]:
    """All findings: of what was evaluated, and of what was analysed now, whose files are still there."""
    curves = _curves(subjects)
    evaluated: list[tuple[str | None, Finding]] = [(None, _curve(subjects, curves))] if curves else []
    evaluated += [(s.label, finding) for s in subjects if (finding := _classes(s)) is not None]
    found = [(source, finding, finding.png()) for source, finding in evaluated]
    for written in analyzed.written:
        png = next(path for path in written.paths if path.suffix == ".png").read_bytes()
        found.append((written.source, written.finding, png))
    found.sort(key=lambda each: _FIRST.index(each[1].name) if each[1].name in _FIRST else len(_FIRST))
    return [_picture(finding, png, source if len(subjects) > 1 else None) for source, finding, png in found]


def _picture(finding: Finding, png: bytes, source: str | None) -> dict[str, Any]:
    title = finding.title if source is None else f"{source}: {finding.title}"
    header, *rows = csv.reader(io.StringIO(finding.csv()))
    return {"title": title, "note": finding.note, "image": _inline(png), "header": header, "rows": rows}


def _curves(subjects: Sequence[_Subject]) -> list[dict[str, Any]]:
    """RA against the radius as each run's evaluation has it; none if one run has not."""
    curves = [curve for s in subjects if (curve := (s.record or {}).get("curve"))]
    return curves if len(curves) == len(subjects) else []


def _curve(subjects: Sequence[_Subject], curves: Sequence[Mapping[str, Any]]) -> Finding:
    lines = {s.label: list(zip(c["epsilons"], c["ra"], strict=True)) for s, c in zip(subjects, curves, strict=True)}
    rows = [(label, epsilon, ra) for label, line in lines.items() for epsilon, ra in line]

    def draw() -> Figure:
        with style.figure(6.4, 3.6 + 0.2 * math.ceil(len(lines) / 2)) as (fig, axis):
            for at, (label, line) in enumerate(lines.items()):
                points = [(255 * epsilon, 100 * ra) for epsilon, ra in line]
                axis.plot(*zip(*points, strict=True), label=label, clip_on=False, **style.line_style(at))
            axis.set_xlim(0, None)
            axis.set_xlabel("radius of the attack, in 1/255 of the pixel range")
            style.percent_axis(axis, "RA, %")
            if len(lines) > 1:
                fig.legend(loc="outside lower center", ncols=2)
            return fig

    made = {f"{c['attack']}, and with the other radii, on {c['images']} test images" for c in curves}
    return Finding("curve", "RA against the radius", ("run", "epsilon", "ra"), rows, draw, "; ".join(sorted(made)))


def _classes(subject: _Subject) -> Finding | None:
    """Accuracy of each class, clean and attacked, where the evaluation has it."""
    record = subject.record or {}
    shares = {"clean": record.get("class_sa")}
    shares |= {name: outcome.get("class_ra") for name, outcome in record.get("attacks", {}).items()}
    columns = {name: each for name, each in shares.items() if each}
    if "clean" not in columns:
        return None
    there = [i for i, share in enumerate(columns["clean"]) if share is not None]
    rows = [(class_name(subject.config.data.name, i), *(each[i] for each in columns.values())) for i in there]

    def draw() -> Figure:
        best_first = sorted(rows, key=lambda row: -row[1])
        with style.figure(6.4, 3.6 + 0.2 * math.ceil(len(columns) / 3)) as (fig, axis):
            wide = 0.8 / len(columns)
            for at, name in enumerate(columns):
                look = style.line_style(at)
                heights = [_height(row[1 + at]) for row in (rows if len(rows) <= _MANY else best_first)]
                if len(rows) <= _MANY:
                    places = [i - 0.4 + wide * (at + 0.5) for i in range(len(rows))]
                    hatch = _HATCHES[at % len(_HATCHES)]
                    axis.bar(places, heights, wide, label=name, color=look["color"], edgecolor="white", hatch=hatch)
                else:
                    axis.plot(range(1, len(rows) + 1), heights, label=name, **(look | {"marker": "none"}))
            if len(rows) <= _MANY:
                names = [row[0] for row in rows]
                slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
                axis.set_xticks(range(len(rows)), names, **(slant if max(map(len, names)) > 3 else {}))
                axis.grid(axis="x", visible=False)
            else:
                axis.set_xlabel("classes, the best on clean images first")
            style.percent_axis(axis, "right, %")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    note = "The share of each class' test images that is right when clean, and that is right clean and under the attack"
    return Finding("per_class", "Accuracy of each class", ("class", *columns), rows, draw, note)


def _height(share: float | None) -> float:
    """In percent; a gap where a class had no image."""
    return math.nan if share is None else 100 * share


# --- examples -----------------------------------------------------------------------------------------------------------


def _examples(opened: Opened, attack: str, device: str, count: int, limit: int, seed: int) -> dict[str, Any]:
    pgd = from_name(attack, opened.epsilon, retire=False)
    assert isinstance(pgd, PGD)  # as the analyses want it
    torch.manual_seed(seed)  # of routers that draw
    model, data = opened.model.to(device_of(device)), opened.data
    found = find_examples(model, data.test, pgd, count, limit, seed)
    return {
        "attack": found.attack,
        "magnified": f"{found.magnified:.3g}",
        "searched": found.searched,
        "layers": [sent.layers for sent in found.examples[0].sent] if found.examples else [],
        "each": [_example_view(example, data.name) for example in found.examples],
    }


def _example_view(example: Example, data: str) -> dict[str, Any]:
    clean, attacked = (
        f"{class_name(data, each.label)}, {percent(each.probability)}" for each in (example.clean, example.attacked)
    )
    captions = ("clean", "attacked", "difference")
    return {
        "index": example.index,
        "label": class_name(data, example.label),
        "fell": example.fell,
        "clean": clean,
        "attacked": attacked,
        "pictures": [(word, _inline(png)) for word, png in zip(captions, example.pictures, strict=True)],
        "sent": example.sent,
        "changed": sum(sent.changed for sent in example.sent),
    }
