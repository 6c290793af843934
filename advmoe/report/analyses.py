# SPDX-License-Identifier: Apache-2.0
"""The analyses of runs: chooses what makes sense of them, runs each attack once, and writes rows and pictures."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moe_kernels import RoutedConv2d, RoutedLinear

from .. import analysis
from ..analysis import Finding, Observation, Result, observe
from ..attacks import PGD, from_name
from ..config import RunConfig
from ..data import DataSet, load
from ..models import DualModel, NetworkMoE
from ..recipes import Catalog, Recipe, Sweep, SweepOptions
from ..registry import unknown_name
from ..routers import routers_of
from ..training import Run
from ..training.engine import device_of
from ..training.evaluation import open_source
from ..training.runs import load_model

__all__ = ["ANALYSES", "Analyzed", "Skipped", "Written", "analyze", "source_labels"]

ANALYSES = {  # each by its name, which its files have too
    "dissection": "does the attack fool the routers, the prediction, or both (figures 4 and 5)",
    "usage": "each layer's use of its experts, clean and attacked",
    "classes": "which classes go to which experts",
    "entropy": "how even the use of the experts is, and how decided the routers are",
    "flips": "which layers' choices the attack changes",
    "pathways": "IoU of the pathways and the mask of a sparse run (figure 6)",
    "radius": "within which radius a linear router's choice cannot change",
    "experts_alone": "SA and RA of each expert of a layer alone, attacked anew",
    "certified": "within which radius mixtures of whole networks are certain to stay right",
    "epsilons": "RA against the radius of the attack, of all runs (figure 2)",
    "transfer": "every run on the images that were attacked on every other one",
    "training": "SA, RA and loss over the epochs (figure A2)",
    "collapse": "how evenly each layer's experts are used, over the epochs",
    "stability": "SA and RA over the epochs, of all runs",
    "fig2": "RA against the radius of the attack, of reproduced runs",
    "fig3": "a MoE of which only the routers are trained adversarially, of reproduced runs",
    "fig7": "RA against r and N, of reproduced runs",
    "fig8": "RA and SA against r, of reproduced runs (and table A2)",
}
_REPRODUCED = ("fig2", "fig3", "fig7", "fig8")
_OF_OBSERVATION: dict[str, Callable[[Observation], Finding]] = {
    "dissection": analysis.dissection,
    "usage": analysis.usage,
    "classes": analysis.classes,
    "entropy": analysis.entropy,
    "flips": analysis.flips,
}
_OF_ONE = (*_OF_OBSERVATION, "pathways", "radius", "certified", "training", "collapse")
_ON_RECORD = ("training", "collapse", "stability")  # no image is looked at
_RADII = (0.25, 0.5, 0.75, 1.0)  # of figure 2, against the attack's: 2, 4, 6 and 8 / 255 of 8 / 255
_QUICK = 2_000_000  # parameters of an expert up to which certified bounds are made unasked
_UNTOLD = re.compile(r"seed\d+|.*\.pt")  # names that do not say which run it is
_FIG3 = {  # what figure 3 shows: the recipes' names, and the paper's
    "m1_standard_moe": "M1: MoE, standard training",
    "m2_at_s_dense": "M2: AT (S-Dense)",
    "m3_robust_mask": "M3: robust mask",
    "router_only": "MoE, AT of the routers only",
}


@dataclass(frozen=True)
class Written:
    """source: the run's label; None for what concerns several. paths: of the CSV file and the picture."""

    finding: Finding
    paths: tuple[Path, ...]
    source: str | None


@dataclass(frozen=True)
class Skipped:
    name: str
    source: str | None
    reason: str


@dataclass(frozen=True)
class Analyzed:
    written: tuple[Written, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Source:
    """A model to be analysed, and where what is found goes."""

    label: str
    model: nn.Module
    config: RunConfig | None
    run: Run | None
    data: DataSet
    epsilon: float
    folder: Path | None

    @property
    def images(self) -> tuple[object, ...]:
        """Sources for which it is equal are attacked on the same images with the same radius."""
        return self.data.name, self.data.image_size, len(self.data.test), self.epsilon


_Make = Callable[["_Attacks"], Finding]


@dataclass(frozen=True)
class _Task:
    """An analysis of one source, or of all if ``source`` is None; ``attacks``: it looks at attacked images."""

    name: str
    source: str | None
    folder: Path
    make: _Make
    attacks: bool = True


def analyze(
    sources: Sequence[str | Path],
    out: Path | None = None,
    only: Sequence[str] | None = None,
    attack: str = "pgd50",
    limit: int | None = None,
    epsilon: float | None = None,
    against: str | Path | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    test_limit: int | None = None,
    reproduced: Path | None = None,
    scale: str = "cpu",
    checkpoint: str = "best",
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
    require: bool = True,
    layers: Sequence[str] | None = None,
) -> Analyzed:
    """Analyses runs, and writes ``<name>.csv`` and ``<name>.png`` of each of :data:`ANALYSES` that can be made.

    What does not make sense of a run, or lacks something, is skipped, with the reason.

    Args:
        sources: run folders, checkpoints or ``module:function``; none for the figures of reproduced runs alone.
        out: a folder. Of one source: for all files; by default ``RUN/analysis``. Of several: what concerns them together
            goes there and is skipped without it; what concerns one goes to ``out/<label>``, by default ``RUN/analysis``.
        only: names of :data:`ANALYSES`; all by default.
        attack: a PGD's name for :func:`advmoe.attacks.from_name`, in L-inf. Every start is followed to its last step.
        limit: the first so many test images.
        epsilon: of the attack; by default that of the run's training, or the data's own.
        against: the run of kind sparse whose mask ``pathways`` compares with.
        data, data_dir, test_limit: the run's own by default.
        reproduced: the ``--out`` of ``advmoe reproduce``, and ``scale`` the one to look at; the figures go to ``out`` or
            ``<reproduced>/<scale>/analysis``.
        checkpoint: ``"best"`` or ``"last"``, of run folders.
        seed: of random starts, and of routers that draw: torch's generator is seeded by it.
        progress: show it on stderr.
        require: nothing to write is an error.
        layers: whose experts ``experts_alone`` looks at: patterns as ``moe_at``; all of kinds block_moe and conv_moe by
            default.

    Returns:
        what was written, in its order, and what was skipped.

    Raises:
        ValueError: for an unknown name, data or attack, a source that is none (RunError), or, with ``require``, if
            nothing could be written; then with the reasons.
        NonFiniteGradientError: as the attack.
        NonFiniteRouterError: if a router's scores are not finite.
    """
    wanted = list(ANALYSES) if only is None else list(dict.fromkeys(only))
    for name in wanted:
        if name not in ANALYSES:
            raise unknown_name("analysis", name, ANALYSES)
    if not sources and reproduced is None:
        raise ValueError("analyze: expected at least one run, or the folder of reproduced ones, got neither")
    if layers is not None and "experts_alone" not in (only or ()):
        raise ValueError("layers: of experts_alone, which is made where it is named (--only experts_alone)")
    found = from_name(attack, 0.0)
    if not isinstance(found, PGD) or found.norm != "linf":
        raise ValueError(f"attack: expected a PGD in L-inf, which moves every image, such as pgd50; got {attack!r}")
    labels = source_labels(sources)
    read = functools.cache(load)  # of several runs mostly the same
    on = device_of(device)
    loaded = []
    for source, label in zip(sources, labels, strict=True):
        place = out if len(sources) == 1 or out is None else out / label
        loaded.append(_open(source, label, place, checkpoint, data, data_dir, test_limit, limit, epsilon, on, read))
    sparse = None if against is None else load_model(against, checkpoint)[0]
    torch.manual_seed(seed)
    tasks, skipped = _plan(wanted, loaded, sparse, out, only is not None, layers)
    if reproduced is not None:
        where = reproduced / scale / "analysis" if out is None else out
        sweep = Sweep(Catalog(), scale, SweepOptions(reproduced))
        tasks += [
            _Task(name, None, where, partial(_figure, name, sweep), attacks=False)
            for name in wanted
            if name in _REPRODUCED
        ]
    elif only is not None:
        reason = "--reproduced says where the runs of advmoe reproduce are"
        skipped += [Skipped(name, None, reason) for name in wanted if name in _REPRODUCED]
    attacks = _Attacks(loaded, attack, batch_size, seed, "transfer" in (task.name for task in tasks), progress)
    for each in loaded:  # now: what is wrong with a model's output is no matter of one analysis
        if any(task.attacks and task.source in (None, each.label) for task in tasks):
            attacks.of(each)
    written = []
    for task in tasks:
        try:
            finding = task.make(attacks)
        except ValueError as error:
            skipped.append(Skipped(task.name, task.source, str(error)))
        else:
            written.append(Written(finding, tuple(finding.save(task.folder)), task.source))
    if not written and require:
        reasons = "; ".join(dict.fromkeys(f"{why.name}: {why.reason}" for why in skipped))
        raise ValueError(f"analyze: nothing could be written; {reasons}")
    return Analyzed(tuple(written), tuple(skipped))


class _Attacks:
    """Attacks each source with each radius once, when it is first asked for.

    Args:
        name: of the attack.
        cross: look at each source's attacked images with all others too, which all have the same images then.
    """

    def __init__(
        self, sources: Sequence[_Source], name: str, batch_size: int, seed: int, cross: bool, progress: bool
    ) -> None:
        self.sources, self.name, self.batch_size, self.seed = sources, name, batch_size, seed
        self.cross, self.progress = cross, progress
        self._made: dict[tuple[str, float], Observation] = {}

    def of(self, source: _Source, factor: float = 1.0) -> Observation:
        """At ``factor`` times the source's radius."""
        if (source.label, factor) not in self._made:
            pgd = self._pgd(factor * source.epsilon)
            cross = self.cross and factor == 1
            models = {each.label: each.model for each in (self.sources if cross else [source])}
            made = observe(models, source.data.test, pgd, self.batch_size, self.seed, cross, self.progress)
            self._made |= {(label, factor): each for label, each in made.items()}
        return self._made[source.label, factor]

    def alone(self, source: _Source, layers: Sequence[str] | None) -> analysis.FixedExperts:
        """With one layer's expert fixed, for each expert of each layer."""
        return analysis.fixed_experts(
            source.model, source.data.test, self._pgd(source.epsilon), layers, self.of(source), self.batch_size,
            self.seed, self.progress,
        )  # fmt: skip

    def _pgd(self, epsilon: float) -> PGD:
        pgd = from_name(self.name, epsilon, retire=False)
        assert isinstance(pgd, PGD)
        return pgd


def _plan(
    wanted: Sequence[str],
    loaded: Sequence[_Source],
    sparse: nn.Module | None,
    out: Path | None,
    named: bool,
    layers: Sequence[str] | None,
) -> tuple[list[_Task], list[Skipped]]:
    """What can be done with the sources, as far as is known before any attack, and why the rest cannot; ``named``:
    somebody asked for these by name, also for what takes long."""
    tasks: list[_Task] = []
    skipped: list[Skipped] = []

    def add(name: str, source: _Source | None, folder: Path | None, obstacle: str | None, make: _Make) -> None:
        label = None if source is None else source.label
        if folder is None and obstacle is None:
            whose = "what concerns several runs" if source is None else "a model's that is no run"
            obstacle = f"--out says where {whose} goes"
        if obstacle is not None:
            skipped.append(Skipped(name, label, obstacle))
        else:
            assert folder is not None
            tasks.append(_Task(name, label, folder, make, attacks=name not in _ON_RECORD))

    several = len(loaded) > 1
    alike = None if len({source.images for source in loaded}) == 1 else _not_alike(loaded)
    for source in loaded:
        for name in (name for name in wanted if name in _OF_ONE):
            add(
                name,
                source,
                source.folder,
                _obstacle(name, source, sparse, named),
                partial(_of_one, name, source, sparse),
            )
    for name, make in (("epsilons", _curve), ("transfer", _transfer)):
        if loaded and name in wanted:
            if not several and name == "transfer":
                add(name, None, out, "it compares several runs, got one", make)
            elif several:
                add(name, None, out, alike, make)
            else:
                add(name, loaded[0], loaded[0].folder, None, make)
    if "experts_alone" in wanted:
        whys = [_without_layers(source, named, layers) for source in loaded]
        skipped += [
            Skipped("experts_alone", s.label, why) for s, why in zip(loaded, whys, strict=True) if why is not None
        ]
        fit = [source for source, why in zip(loaded, whys, strict=True) if why is None]
        if fit:
            one = None if several else fit[0]
            folder = out if one is None else one.folder
            add("experts_alone", one, folder, alike, partial(_experts_alone, fit, layers))
    if loaded and "stability" in wanted:
        unlike = _not_on_record(loaded) if several else "it compares several runs, got one"
        add("stability", None, out, unlike, partial(_stability, loaded))
    return tasks, skipped


def _not_on_record(loaded: Sequence[_Source]) -> str | None:
    lacking = [source.label for source in loaded if source.config is None]
    if lacking:
        return f"a model that is not a run's has no epochs on record; {', '.join(lacking)} is none"
    attacks = {source.config.validation_attack: source.label for source in loaded if source.config is not None}
    if len(attacks) > 1:
        return f"it takes runs validated alike; {', '.join(f'{label} by {name}' for name, label in attacks.items())}"
    return None


def _stability(loaded: Sequence[_Source], attacks: _Attacks) -> Finding:
    lines = {source.label: source.run.metrics() for source in loaded if source.run is not None}
    config = loaded[0].config
    return analysis.stability(lines, None if config is None else config.validation_attack)


def _without_layers(source: _Source, named: bool, layers: Sequence[str] | None) -> str | None:
    """Why a source's experts cannot be looked at alone."""
    if not named:
        return "an attack for each expert of each layer takes long; --only experts_alone asks for it"
    try:
        analysis.layer_routers(source.model, layers)
    except ValueError as error:
        return str(error)
    return None


def _experts_alone(sources: Sequence[_Source], layers: Sequence[str] | None, attacks: _Attacks) -> Finding:
    return analysis.experts_alone({source.label: attacks.alone(source, layers) for source in sources})


def _obstacle(name: str, source: _Source, sparse: nn.Module | None, named: bool) -> str | None:
    """Why it cannot be asked of this source."""
    if name in _ON_RECORD and source.run is None:
        return "a model that is not a run's has no epochs on record"
    if name == "training":
        return None
    if not any(isinstance(module, RoutedConv2d | RoutedLinear) for module in source.model.modules()):
        return "the model has no routed layers"
    if name == "pathways" and sparse is None:
        return "--against says which sparse run's mask to compare with"
    if name == "certified":
        if not isinstance(source.model, NetworkMoE | DualModel):
            return "it takes mixtures of whole networks, kinds network_moe and dual_moe"
        size = max(
            sum(p.numel() for p in module.experts.parameters()) // module.num_experts
            for module in source.model.modules()
            if isinstance(module, NetworkMoE)
        )
        if size > _QUICK and not named:
            return f"bounds of experts of {size / 1e6:.0f} M parameters take minutes; --only certified asks for them"
    if name == "radius" or (name == "certified" and isinstance(source.model, NetworkMoE)):
        try:
            analysis.linear_map(source.model)
        except ValueError as error:
            return str(error)
    return None


def _of_one(name: str, source: _Source, sparse: nn.Module | None, attacks: _Attacks) -> Finding:
    if name in _ON_RECORD:
        return _history(name, source)
    observed = attacks.of(source)
    if name == "pathways":
        assert sparse is not None
        return analysis.pathways(observed, source.model, sparse)
    if name == "certified":
        return analysis.certified(observed, source.model, source.data.test)
    return analysis.radius(observed, source.model) if name == "radius" else _OF_OBSERVATION[name](observed)


def _curve(attacks: _Attacks) -> Finding:
    return analysis.epsilons(
        {source.label: [attacks.of(source, factor) for factor in _RADII] for source in attacks.sources}
    )


def _transfer(attacks: _Attacks) -> Finding:
    return analysis.transfer({source.label: attacks.of(source) for source in attacks.sources})


def _not_alike(loaded: Sequence[_Source]) -> str:
    each = ", ".join(f"{s.label} has {s.data.name}, {len(s.data.test)} images, epsilon {s.epsilon:.4g}" for s in loaded)
    return f"it takes runs with the same test images and radius; {each}"


def _history(name: str, source: _Source) -> Finding:
    assert source.run is not None and source.config is not None
    c = source.config
    phases = {}
    if c.routing.share_epochs:
        phases[c.routing.share_epochs] = "experts apart"
    if c.method.name == "at_sparse":
        if c.method.pretrain_epochs:
            phases[c.method.pretrain_epochs] = "mask"
        phases[c.method.pretrain_epochs + c.method.mask_epochs] = "fine-tuning"
    if name == "collapse":
        metrics = source.run.metrics()
        routers = {router.routes for router in routers_of(source.model).values()}
        layers = dict.fromkeys(layer for line in metrics for layer in line.get("expert_usage", ()))
        return analysis.collapse(metrics, {layer: _followed(layer, routers) for layer in layers}, phases)
    return analysis.history(source.run.metrics(), phases, c.validation_attack)


def _followed(layer: str, routers: Collection[str]) -> str:
    """What the router routes whose choice a layer follows: the layer itself, or what it lies in; the layer also where its
    name does not say (of VGG a router lies beside what it routes, a shortcut between windows has none)."""
    around = layer
    while around and around not in routers:
        around = around.rpartition(".")[0]
    return around if around in routers else layer


def _open(
    source: str | Path,
    label: str,
    out: Path | None,
    checkpoint: str,
    data: str | None,
    data_dir: str | None,
    test_limit: int | None,
    limit: int | None,
    epsilon: float | None,
    device: torch.device,
    read: Callable[..., DataSet],
) -> _Source:
    opened = open_source(source, checkpoint, data, data_dir, test_limit, epsilon, read)
    run = None if opened.folder is None else Run(opened.folder)
    images = dataclasses.replace(opened.data, test=opened.data.test.first(limit))
    folder = opened.path("analysis") if out is None else out
    return _Source(label, opened.model.to(device), opened.config, run, images, opened.epsilon, folder)


def source_labels(sources: Sequence[str | Path]) -> list[str]:
    """Short names of sources: so many of a path's last parts that all are distinct and none begins with its seed or
    checkpoint.

    Raises:
        ValueError: if a source is there twice.
    """
    parts = [_parts(source) for source in sources]
    if len(set(parts)) < len(parts):
        raise ValueError(f"analyze: expected each run once, got {', '.join(map(str, sources))}")
    short: list[tuple[str, ...]] = []
    for count in range(1, 1 + max(map(len, parts), default=0)):
        short = [each[-count:] for each in parts]
        if len(set(short)) == len(short) and not any(_UNTOLD.fullmatch(each[0]) for each in short):
            break
    return ["/".join(each) for each in short]


def _parts(source: str | Path) -> tuple[str, ...]:
    path = Path(source)
    return path.resolve().parts[1:] if path.exists() else (str(source),)


def _figure(name: str, sweep: Sweep, attacks: _Attacks) -> Finding:
    label = sweep.catalog.label(sweep.scale)
    recipes = sweep.catalog.select(name)
    results = list(_results(sweep, recipes))
    if name == "fig2":
        return analysis.fig2(results, label)
    if name == "fig7":
        return analysis.fig7(results, label)
    if name == "fig8":
        return analysis.fig8(results, label)
    return analysis.fig3(results, list(_FIG3.values()), label)


def _results(sweep: Sweep, recipes: Sequence[Recipe]) -> Iterator[Result]:
    """Each recipe's evaluations of all seeds that are there, beside the paper's."""
    catalog = sweep.catalog
    methods: dict[str, str] = {}  # the paper's names, which the rows of other tables have too
    archs: dict[str, str] = {}
    for recipe in catalog.recipes.values():
        row = catalog.paper(recipe)
        if row:
            methods.setdefault(recipe.method, row["method"])
            archs.setdefault(recipe.arch, row.get("backbone", recipe.arch))
    for recipe in recipes:
        row = catalog.paper(recipe)
        plan = catalog.plan(recipe.name, sweep.scale)
        records = [record for seed in _seeds(sweep, plan.source) if (record := sweep.record(plan, seed)) is not None]
        called = dict(recipe.labels)["method"]
        yield Result(
            recipe.name,
            archs.get(recipe.arch, recipe.arch),
            _FIG3.get(called, called) if recipe.table == "fig3" else methods.get(recipe.method, recipe.method),
            recipe.experts,
            recipe.ratio,
            recipe.epsilon,
            tuple(record["sa"] for record in records),
            tuple(record["ra"] for record in records),
            _share(row.get("sa")),
            _share(row.get("ra_pgd50")),
        )


def _seeds(sweep: Sweep, name: str) -> list[int]:
    folders = sweep.folder(name, 0).parent.glob("seed*")
    return sorted(int(number) for folder in folders if (number := folder.name.removeprefix("seed")).isdecimal())


def _share(percent: str | None) -> float | None:
    return float(percent) / 100 if percent else None
