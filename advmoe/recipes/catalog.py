# SPDX-License-Identifier: Apache-2.0
"""Names to settings: reads the YAML files of this folder, whose axes span the recipes."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..attacks import from_name
from ..config import RunConfig, read_room, read_yaml
from ..registry import unknown_name

__all__ = ["SCALES", "Catalog", "EvaluationSettings", "Plan", "Recipe"]

FOLDER = Path(__file__).parent
SCALES = ("cpu", "gpu", "paper")
TABLES = ("table1", "table2", "tableA1", "tableA2", "fig2", "fig3", "fig7", "fig8", "rter", "robust_experts")
_FRACTION = re.compile(r"(\d+)/(\d+)")
# an axis, and how a value that has no name of its own is written
_AXES: dict[str, Any] = {
    "data": str,
    "arch": str,
    "method": str,
    "experts": "n{}".format,
    "ratio": "r{}".format,
    "epsilon": str,
}


@dataclass(frozen=True)
class EvaluationSettings:
    """attack: a name as ``advmoe evaluate`` takes it; limit: the first so many test images; epsilon: the training's by
    default; checks: images for the signs of gradient masking."""

    attack: str = "pgd50x2"
    limit: int | None = None
    epsilon: float | None = None
    checks: int = 128

    def __post_init__(self) -> None:
        from_name(self.attack, 0.0)  # a name that is none shows when the files are read


@dataclass(frozen=True)
class Recipe:
    """A row of a table or a point of a figure.

    Args:
        labels: the parts of the name behind the table's: an axis and how its value is written.
        method: the key in ``methods.yaml``, for which a table may have a name of its own.
    """

    table: str
    labels: tuple[tuple[str, str], ...]
    data: str
    arch: str
    method: str
    experts: int | None = None
    ratio: float | None = None
    epsilon: float | None = None

    @property
    def name(self) -> str:
        return "/".join([self.table, *(label for _, label in self.labels)])


@dataclass(frozen=True)
class Plan:
    """A recipe at a scale: what is trained, and how that is evaluated.

    Args:
        config: with seed 0, and no place in it: ``init`` is the name of a recipe, ``data.folder`` is None.
        run: the recipe whose run this is: the first whose config is equal.
        source: the recipe whose evaluation this is: the first of that run whose evaluation is equal.
    """

    recipe: Recipe
    config: RunConfig
    evaluation: EvaluationSettings
    run: str
    source: str


@dataclass(frozen=True)
class _Data:
    paper: str
    config: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Arch:
    paper: str


@dataclass(frozen=True)
class _Method:
    paper: str
    config: dict = field(default_factory=dict)
    init: str | None = None


@dataclass(frozen=True)
class _Overlay:
    """Goes over the settings of all recipes, then over those of an arch, a data set and a method."""

    config: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    archs: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    methods: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Scale(_Overlay):
    label: str = ""
    seeds: list = field(default_factory=list)


@dataclass(frozen=True)
class _Common:
    config: dict = field(default_factory=dict)


@dataclass(frozen=True)
class _Table:
    title: str
    rows: list
    paper: list = field(default_factory=list)
    note: str | None = None
    config: dict = field(default_factory=dict)
    evaluation: dict = field(default_factory=dict)
    scales: dict = field(default_factory=dict)


class Catalog:
    """All recipes, in the order of the paper's tables and figures.

    Raises:
        ValueError: if a file has a key that no setting has, or a value of another type; the message names the file.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = FOLDER if folder is None else folder
        self._common = self._read("common", _Common)
        self._data = self._read_all("data", _Data)
        self._archs = self._read_all("archs", _Arch)
        self._methods = self._read_all("methods", _Method)
        self._scales = self._read_all("scales", _Scale)
        self._tables = {name: self._read(name, _Table) for name in TABLES}
        for name, method in self._methods.items():
            if method.init is not None and method.init not in self._methods:
                raise unknown_name(f"methods.yaml: {name}: init", method.init, self._methods)
        for scale in SCALES:
            if scale not in self._scales:
                raise ValueError(f"scales.yaml: expected the scale {scale}, got {', '.join(self._scales)}")
        for name, overlay in self._scales.items():
            self._check_overlay(overlay, f"scales.yaml: {name}")
        self._overlays = {table: self._table_overlays(table) for table in TABLES}
        self.recipes = {r.name: r for table in TABLES for r in self._rows(table)}
        self._paper = {file: _read_csv(self.folder / "paper" / file) for t in self._tables.values() for file in t.paper}
        self._plans: dict[str, dict[str, Plan]] = {}

    def select(self, name: str) -> list[Recipe]:
        """The recipe of this name, or all below it.

        Raises:
            ValueError: if there is none; of its first part that is not there the near matches are named.
        """
        wanted = name.strip("/").split("/")
        below = {r: r.name.split("/") for r in self.recipes.values()}
        for i in range(len(wanted)):
            known = dict.fromkeys("/".join(parts[: i + 1]) for parts in below.values())
            below = {r: parts for r, parts in below.items() if parts[: i + 1] == wanted[: i + 1]}
            if not below:
                raise unknown_name("recipe", "/".join(wanted[: i + 1]), known)
        return list(below)

    def label(self, scale: str) -> str:
        return self._scale(scale).label

    def seeds(self, scale: str) -> list[int]:
        return list(self._scale(scale).seeds)

    def title(self, table: str) -> str:
        return self._tables[table].title

    def note(self, table: str) -> str | None:
        return self._tables[table].note

    def plan(self, name: str, scale: str) -> Plan:
        """What the recipe is at this scale.

        Raises:
            ValueError: for an unknown name or scale.
        """
        if scale not in self._plans:
            self._plans[scale] = self._all_plans(scale)
        if name not in self.recipes:
            raise unknown_name("recipe", name, self.recipes)
        return self._plans[scale][name]

    def _all_plans(self, scale: str) -> dict[str, Plan]:
        plans: dict[str, Plan] = {}
        runs: dict[RunConfig, str] = {}
        sources: dict[tuple[str, EvaluationSettings], str] = {}
        configs: dict[str, RunConfig] = {}
        for recipe in self.recipes.values():
            config, evaluation = self._settings(recipe, scale)
            if config.init is not None:
                if config.init not in configs:
                    raise ValueError(f"{recipe.table}.yaml: {config.init} must come before {recipe.name}, which needs it")
                config = dataclasses.replace(config, init=runs[configs[config.init]])
            configs[recipe.name] = config
            run = runs.setdefault(config, recipe.name)
            source = sources.setdefault((run, evaluation), recipe.name)
            plans[recipe.name] = Plan(recipe, config, evaluation, run, source)
        return plans

    def _settings(self, recipe: Recipe, scale: str) -> tuple[RunConfig, EvaluationSettings]:
        table, method = self._tables[recipe.table], self._methods[recipe.method]
        config: dict[str, Any] = {}
        evaluation: dict[str, Any] = {}
        for more in (self._common.config, self._data[recipe.data].config, method.config):
            config = _merged(config, more)
        model = {"arch": recipe.arch, "num_experts": recipe.experts, "ratio": recipe.ratio}
        if config.get("model", {}).get("kind") == "dense":
            model |= {"num_experts": None, "ratio": None}  # it has neither: one run serves all
        config = _merged(config, {"model": {key: value for key, value in model.items() if value is not None}})
        overlays = [self._scale(scale), _Overlay(table.config, table.evaluation)]
        if scale in self._overlays[recipe.table]:
            overlays.append(self._overlays[recipe.table][scale])
        for overlay in overlays:
            for part in _applied(overlay, recipe):
                config, evaluation = _merged(config, part.config), _merged(evaluation, part.evaluation)
        if method.init is not None:
            config["init"] = self._sibling(recipe, method.init).name
        if recipe.epsilon is not None:
            evaluation["epsilon"] = recipe.epsilon
        built = read_room(RunConfig, config, f"{recipe.name} at scale {scale}")
        evaluation.setdefault("epsilon", built.attack.epsilon)
        return built, read_room(EvaluationSettings, evaluation, f"{recipe.name} at scale {scale}: evaluation")

    def _sibling(self, recipe: Recipe, method: str) -> Recipe:
        """The recipe of the same table that differs in the method alone."""
        plain = dataclasses.replace(recipe, labels=(), method=method)
        for other in self.recipes.values():
            if dataclasses.replace(other, labels=()) == plain:
                return other
        raise ValueError(f"{recipe.table}.yaml: {recipe.name} begins with weights of {method}, which has no row here")

    def _scale(self, scale: str) -> _Scale:
        if scale not in self._scales:
            raise unknown_name("scale", scale, self._scales)
        return self._scales[scale]

    def paper(self, recipe: Recipe) -> dict[str, str]:
        """The paper's row as its CSV has it, by column; empty where it prints no such number."""
        names = {
            "dataset": self._data[recipe.data].paper,
            "backbone": self._archs[recipe.arch].paper,
            "method": self._methods[recipe.method].paper,
            "ratio": recipe.ratio,
            "experts": recipe.experts,
            "epsilon": recipe.epsilon,
        }
        own = [axis for axis in ("ratio", "experts", "epsilon") if names[axis] is not None]
        for file in self._tables[recipe.table].paper:
            for row in self._paper[file]:
                if all(axis in row for axis in own) and all(_same(row[key], names[key]) for key in names if key in row):
                    return row
        return {}

    def _read(self, name: str, kind: type) -> Any:
        file = f"{name}.yaml"
        built: Any = read_room(kind, _yaml(self.folder / file), file)
        self._check_config(getattr(built, "config", {}), file)
        return built

    def _read_all(self, name: str, kind: type) -> dict[str, Any]:
        file = f"{name}.yaml"
        built: dict[str, Any] = {}
        for key, values in _yaml(self.folder / file).items():
            built[str(key)] = read_room(kind, values, f"{file}: {key}")
            self._check_config(getattr(built[str(key)], "config", {}), f"{file}: {key}")
        return built

    def _check_config(self, config: dict, where: str, evaluation: dict | None = None) -> None:
        """Each fragment by itself: merged with others, nobody knows which file a wrong key came from."""
        read_room(RunConfig, config, f"{where}: config")
        read_room(EvaluationSettings, evaluation or {}, f"{where}: evaluation")

    def _check_overlay(self, overlay: _Overlay, where: str) -> None:
        self._check_config(overlay.config, where, overlay.evaluation)
        for axis, known in (("archs", self._archs), ("data", self._data), ("methods", self._methods)):
            for key, values in getattr(overlay, axis).items():
                if key not in known:
                    raise unknown_name(f"{where}: {axis}", key, known)
                part = read_room(_Overlay, values, f"{where}: {axis}: {key}")
                self._check_config(part.config, f"{where}: {axis}: {key}", part.evaluation)

    def _table_overlays(self, table: str) -> dict[str, _Overlay]:
        file = f"{table}.yaml"
        self._check_config({}, file, self._tables[table].evaluation)
        overlays = {}
        for scale, values in self._tables[table].scales.items():
            if scale not in self._scales:
                raise unknown_name(f"{file}: scales", scale, self._scales)
            overlays[scale] = read_room(_Overlay, values, f"{file}: {scale}")
            self._check_overlay(overlays[scale], f"{file}: {scale}")
        return overlays

    def _rows(self, table: str) -> Iterator[Recipe]:
        """The products of each block's axes."""
        file = f"{table}.yaml"
        known = {"data": self._data, "arch": self._archs, "method": self._methods}
        for block in self._tables[table].rows:
            for axis in block:
                if axis not in _AXES:
                    raise unknown_name(f"{file}: axis", axis, _AXES)
            axes = []
            for axis, write in _AXES.items():
                values = block.get(axis)
                if values is None and axis in known:
                    raise ValueError(f"{file}: expected the axis {axis} in each block of rows, got {', '.join(block)}")
                if values is None:
                    continue
                named = values if isinstance(values, dict) else {write(value): value for value in values}
                for value in named.values():
                    if axis in known and value not in known[axis]:
                        raise unknown_name(f"{file}: {axis}", value, known[axis])
                axes.append([(axis, label, value) for label, value in named.items()])
            for row in itertools.product(*axes):
                labels = tuple((axis, label) for axis, label, _ in row)
                yield Recipe(table, labels, **{axis: value for axis, _, value in row})


def _yaml(path: Path) -> dict:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name}: expected a mapping, got {type(values).__name__}")
    return _numbers(values)


def _numbers(value: Any) -> Any:
    """Fractions such as 8/255, as people write radii, become numbers."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    match = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else int(match[1]) / int(match[2])


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _applied(overlay: _Overlay, recipe: Recipe) -> Iterator[_Overlay]:
    """The parts of an overlay that a recipe has, the more general first."""
    yield overlay
    for parts, key in ((overlay.archs, recipe.arch), (overlay.data, recipe.data), (overlay.methods, recipe.method)):
        if key in parts:
            yield _Overlay(**parts[key])


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _same(cell: str, value: str | float | None) -> bool:
    if value is None or isinstance(value, str):
        return cell == value
    return float(cell) == value
