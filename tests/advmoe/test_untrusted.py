# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, data, archives, images and configs of anyone: refused with the reason, and nothing in them is run."""

from __future__ import annotations

import argparse
import ast
import copy
import dataclasses
import importlib
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import tiny, write_cifar10

from advmoe import cli
from advmoe.attacks import autoattack
from advmoe.config import RunConfig, read_room
from advmoe.data import DataError, FileSplit, load
from advmoe.data.download import Archive
from advmoe.export import export, load_exported
from advmoe.stored import load_optimizer
from advmoe.training import Run, RunError, Trainer, load_model, resume, train
from advmoe.training.runs import load_checkpoint

ROOT = Path(__file__).parents[2]
fetching = importlib.import_module("advmoe.data.download")  # the package has a function of this name
ARRAY = "numpy.core.multiarray"


class Code:
    """What pickles to a call that leaves the file ``ran`` in the working folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


# --- the sources ---


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _literal(call: ast.Call, name: str) -> object:
    value = next((k.value for k in call.keywords if k.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else None


_NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path", "runpy.run_module",
}  # fmt: skip


def dangers(source: str) -> list[str]:
    """Calls by which a file's or a setting's content could be run."""
    tree = ast.parse(source)
    full = {}  # of names that were imported from a module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            full |= {alias.asname: alias.name for alias in node.names if alias.asname}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, dot, rest = _dotted(node.func).partition(".")
        name = full.get(head, head) + dot + rest
        plain_yaml = len(node.args) > 1 and _dotted(node.args[1]) in ("_OneOfEach", "yaml.SafeLoader")
        wrong = (
            name in _NEVER
            or (name == "torch.load" and _literal(node, "weights_only") is not True)
            or (name == "yaml.load" and not plain_yaml)
            or (name == "numpy.load" and any(k.arg == "allow_pickle" for k in node.keywords))
            or any(k.arg == "shell" for k in node.keywords)
        )
        if wrong:
            found.append(f"{name}:{node.lineno}")
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.load(p)", "import torch\ntorch.load(p, weights_only=False)",
        "from torch import load as l\nl(p)", "import yaml\nyaml.load(t, yaml.Loader)", "import numpy as np\n"
        "np.load(p, allow_pickle=True)", "import subprocess\nsubprocess.run(c, shell=True)", "import os\nos.system(c)",
        "eval(c)", "exec(c)", "import pickle as p\np.loads(c)", "from os import popen\npopen(c)",
    ],
)  # fmt: skip
def test_the_search_finds_what_could_run(line: str) -> None:
    assert dangers(line)


def test_nothing_in_the_sources_runs_what_a_file_says() -> None:
    files = [path for folder in ("advmoe", "moe_kernels", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 120
    found = {str(path.relative_to(ROOT)): dangers(path.read_text()) for path in files}
    assert not {name: calls for name, calls in found.items() if calls}
    loads = [path.name for path in files if "torch.load(" in path.read_text() and ROOT / "advmoe" in path.parents]
    assert loads == ["stored.py"]  # all checkpoints go through one door


def test_code_by_name_is_imported_in_one_place() -> None:
    by = [
        str(path.relative_to(ROOT / "advmoe"))
        for path in sorted((ROOT / "advmoe").rglob("*.py"))
        if "import_module" in path.read_text()
    ]
    assert by == ["__init__.py", "registry.py"]  # the package's own parts, and module:name


# --- checkpoints ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dataclasses.replace(tiny("standard", "dense", epochs=1))
    return train(config, tmp_path_factory.mktemp("trained") / "run", quiet=True).folder


@pytest.fixture()
def run(trained: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(trained, tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line by which a command refuses what it was given."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("advmoe: ")
    assert len(lines[0]) < 1000
    return lines[0]


EVALUATE = ("--attack", "pgd1", "--checks", "0", "--limit", "4")


def _code_in_a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": 1, "model": Code()}, protocol=2))
        archive.writestr("archive/version", "3\n")


def _code_beside_tensors(path: Path) -> None:
    torch.save({"format": 1, "model": {"conv1.weight": torch.zeros(2)}, "more": Code()}, path)


def _code_in_the_old_form(path: Path) -> None:
    torch.save({"format": 1, "model": Code()}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(pickle.dumps(Code())),
        _code_in_a_zip,
        _code_beside_tensors,
        _code_in_the_old_form,
    ],
    ids=["pickle", "zip", "tensors", "old form"],
)
def test_a_checkpoint_with_code_is_refused(
    run: Run, write: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("best", "last"):
        write(run.checkpoint(name))
    for words in (
        ("evaluate", run.folder, *EVALUATE),
        ("evaluate", run.checkpoint("last"), *EVALUATE),
        ("train", "--resume", run.folder),
        ("export", run.folder, "--out", "model.safetensors"),
        ("train", "--init", run.folder, "--out", "other"),
    ):
        line = refused(capsys, *words)
        assert "cannot be read as a checkpoint: it is" in line
        assert "weights_only" not in line  # torch's advice is to load it without the check
    assert not Path("other").exists() and not Path("model.safetensors").exists()


def test_a_checkpoint_cut_short_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.checkpoint()
    whole = path.read_bytes()
    assert load_checkpoint(path)["epoch"] == 1
    lengths = {0, 1, 2, 4, 30, 100, 512, 4096, 65536, len(whole) - 1, len(whole) - 22, len(whole) - 1000}
    for length in sorted(lengths | {int(len(whole) * part / 7) for part in range(1, 7)}):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"last\.pt cannot be read as a checkpoint: it is cut short"):
            load_checkpoint(path)
    assert "it is cut short" in refused(capsys, "train", "--resume", run.folder)
    assert "it is cut short" in refused(capsys, "evaluate", path, *EVALUATE)
    for place in np.random.default_rng(0).integers(0, len(whole), 20).tolist():  # or changed: read or refused
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_model(path)
        except RunError:
            continue


def _packed(source: Path, target: Path) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


def test_a_checkpoint_that_would_grow_when_read_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": 1, "model": {"conv1.weight": torch.zeros(1 << 24)}}, run.checkpoint("zeros"))
    _packed(run.checkpoint("zeros"), run.checkpoint("best"))
    assert run.checkpoint("best").stat().st_size < 1 << 17
    assert "its records are compressed" in refused(capsys, "evaluate", run.folder, *EVALUATE)
    many = run.checkpoint("many")  # two hundred names of one record
    with zipfile.ZipFile(many, "w") as archive:
        archive.writestr("zeros", bytes(1 << 16))
        info = archive.infolist()[0]
        for number in range(200):
            other = copy.copy(info)
            other.filename = f"zeros{number}"
            archive.filelist.append(other)
    assert "its records are more than the file holds" in refused(capsys, "evaluate", many, *EVALUATE)
    short = run.checkpoint("short")  # a tensor of more numbers than its record has
    with zipfile.ZipFile(run.checkpoint("last")) as old, zipfile.ZipFile(short, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data[:8] if member.filename.endswith("/data/0") else data)
    assert "cannot be read as a checkpoint" in refused(capsys, "evaluate", short, *EVALUATE)


@pytest.mark.parametrize("name", ["lock", "log.txt", "metrics.jsonl", "last.pt.tmp", "evaluation.json.tmp"])
def test_a_link_in_a_run_s_folder_does_not_lead_out_of_it(run: Run, name: str, tmp_path: Path) -> None:
    """Of someone else's run, resumed: nothing is written to what a link there names."""
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).symlink_to(victim)
    cli.main(["train", "--resume", str(run.folder)])
    cli.main(["evaluate", str(run.folder), *map(str, EVALUATE)])
    assert victim.read_text() == "precious\n"


RECORD = {"images": 8, "sa": 0.5, "attacks": {}}


@pytest.mark.parametrize(
    "record",
    [
        "3", "null", "[]", "[" * 100_000, '{"images": 8}',
        *(
            json.dumps({**RECORD, **change})
            for change in (
                {"attacks": []}, {"attacks": {"a": {}}}, {"attacks": {"a": 3}}, {"sa": "x"}, {"sa_interval": [1]},
                {"gflops": 0, "router_gflops": 1}, {"gflops": "x"}, {"latency": [{}]}, {"latency": 3},
            )
        ),
    ],
)  # fmt: skip
def test_a_hostile_record_is_refused_by_the_report(run: Run, record: str, capsys: pytest.CaptureFixture[str]) -> None:
    (run.folder / "evaluation.json").write_text(record)
    assert "evaluation.json" in refused(capsys, "report", run.folder)


def test_a_newer_version_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({**load_checkpoint(run.checkpoint()), "format": 2}, run.checkpoint())
    for words in (("evaluate", run.checkpoint(), *EVALUATE), ("train", "--resume", run.folder)):
        line = refused(capsys, *words)
        assert "was written by a newer version of advmoe (format 2, this one's is 1); update" in line
    for found in ("1", 1.0, True, None, [1], 0, -1):
        torch.save({"format": found}, run.checkpoint())
        with pytest.raises(RunError, match="expected format 1, got"):
            load_checkpoint(run.checkpoint())


def _weights(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        state["model"]["conv1.weight"] = change(state["model"]["conv1.weight"])

    return edit


def _momentum(value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(state: dict[str, Any]) -> None:
        state["optimizers"]["all"]["state"][0]["momentum_buffer"] = value

    return edit


def _put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    *path, last, value = keys

    def edit(state: dict[str, Any]) -> None:
        for key in path:
            state = state[key]
        state[last] = value

    return edit


MODEL = [
    (_put("model", None), "model: expected a mapping of weights, got None"),
    (_put("model", []), "model: expected a mapping of weights"),
    (_put("model", {}), "there is no conv1.weight"),
    (_put("model", {1: torch.zeros(1)}), "expected a mapping of names to tensors"),
    (_put("model", "more", torch.zeros(1)), "the model has no more"),
    (_weights(lambda w: w[:2]), "conv1.weight: expected shape (8, 3, 3, 3), got (2, 3, 3, 3)"),
    (_weights(lambda w: w.double()), "conv1.weight: expected dtype torch.float32, got torch.float64"),
    (_weights(lambda w: w.to(torch.complex64)), "conv1.weight: expected dtype"),
    (_weights(lambda w: w.to_sparse()), "conv1.weight: expected layout torch.strided"),
    (_weights(lambda w: w.to("meta")), "conv1.weight: has no values"),
    (_weights(lambda w: w.tolist()), "conv1.weight: expected a tensor, got list"),
    (_put("model", "bn1.running_var", torch.full((8,), -1.0)), "bn1.running_var: a variance below 0"),
    (_weights(lambda w: w * float("nan")), "conv1.weight: 216 of its 216 values are not finite"),
    (_weights(lambda w: w.clone().index_fill_(0, torch.tensor(0), float("inf"))), "conv1.weight: 27 of its 216"),
]
PLACE = [
    (_put("optimizers", None), "optimizers: expected a mapping, got None"),
    (_put("optimizers", {}), "optimizers: expected a mapping with state"),
    (_put("optimizers", "all", "param_groups", [{}]), "optimizers: expected as many parameters"),
    (_put("optimizers", "all", "state", "x", {}), "optimizers: expected a mapping for each parameter, got 'x'"),
    (_put("optimizers", "all", "state", 0, "step", 3), "optimizers: expected momentum_buffer of parameter 0"),
    (_momentum("x"), "momentum_buffer of parameter 0: expected a tensor, got str"),
    (_momentum(torch.zeros(1).expand(1 << 40)), "momentum_buffer of parameter 0: expected shape (8, 3, 3, 3)"),
    (_put("batches", {}), "batches: expected a list"),
    (_put("batches", []), "zip() argument 2 is shorter"),
    (_put("batches", [{"epoch": -1, "index": 0}]), "batches: expected an epoch and a batch of its 3, got (-1, 0)"),
    (_put("batches", [{"epoch": 0, "index": 3}]), "batches: expected an epoch and a batch"),
    (_put("batches", [{"epoch": "0", "index": 0}]), "batches: expected an epoch and a batch"),
    (_put("torch_rng", torch.zeros(3)), "torch_rng: expected a generator's state"),
    (_put("torch_rng", torch.zeros(3, dtype=torch.uint8)), "does not fit"),
    (_put("epoch", -1), "epoch: expected a whole number of at least 0, got -1"),
    (_put("epoch", "1"), "epoch: expected a whole number"),
    (_put("step", 4), "step: expected at most the 3 of an epoch, got 4"),
    (_put("sums", {"loss": "x"}), "sums: expected finite numbers by name"),
    (_put("sums", {"loss": float("nan")}), "sums: expected finite numbers by name"),
    (_put("sums", {"loss": 10**400}), "sums: expected finite numbers by name"),
    (_put("sums", {3: 1.0}), "sums: expected finite numbers by name"),
    (_put("seconds", 10**400), "seconds: expected a finite number"),
    (_put("batches", [3]), "batches: expected a list of mappings"),
    (_put("seconds", float("nan")), "seconds: expected a finite number, got nan"),
    (_put("best", None), "best: expected a finite number"),
    (_put("method", 3), "method: expected a mapping, got 3"),
]


@pytest.mark.parametrize(("edit", "message"), [*MODEL, *PLACE])
def test_a_hostile_state_is_refused(
    run: Run, edit: Callable[[dict[str, Any]], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(run.checkpoint())
    edit(state)
    torch.save(state, run.checkpoint())
    assert message in refused(capsys, "train", "--resume", run.folder)
    if (edit, message) in MODEL:
        assert message in refused(capsys, "evaluate", run.checkpoint(), *EVALUATE)


def test_a_checkpoint_without_a_part_is_refused(run: Run) -> None:
    whole = load_checkpoint(run.checkpoint())
    for key in ("model", "optimizers", "batches", "torch_rng", "epoch", "step", "sums"):
        torch.save({name: value for name, value in whole.items() if name != key}, run.checkpoint())
        with pytest.raises(RunError, match=f"there is no {key}"):
            resume(run.folder, quiet=True)


def test_a_checkpoint_of_another_architecture_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig.load(run.config_path)
    dataclasses.replace(config, model=dataclasses.replace(config.model, arch="resnet34")).save(run.config_path)
    for words in (("evaluate", run.folder, *EVALUATE), ("train", "--resume", run.folder)):
        assert "does not fit" in refused(capsys, *words)


def test_settings_of_an_optimiser_are_not_a_files() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ours = torch.optim.Adam([parameter], lr=0.5)
    parameter.sum().backward()
    ours.step()
    state = ours.state_dict()
    state["param_groups"][0] |= {"lr": "x", "betas": None, "more": 3}
    other = torch.optim.Adam([parameter], lr=0.25)
    load_optimizer(other, state)
    assert other.param_groups[0]["lr"] == 0.25 and "more" not in other.param_groups[0]
    assert torch.equal(other.state[parameter]["exp_avg"], ours.state[parameter]["exp_avg"])
    state["state"][0]["step"] = torch.tensor(float("nan"))
    with pytest.raises(ValueError, match="step of parameter 0: 1 of its 1 values are not finite"):
        load_optimizer(other, state)


def test_the_perturbation_of_free_at_is_looked_at(run: Run) -> None:
    config = dataclasses.replace(tiny("free-at", "dense", epochs=1))
    free = train(config, run.folder.parent / "free", quiet=True)
    whole = load_checkpoint(free.checkpoint())
    for delta in ("x", torch.zeros(3), torch.zeros(1).expand(1 << 30, 3, 8, 8)):
        torch.save({**whole, "method": {"delta": delta}}, free.checkpoint())
        with pytest.raises(RunError, match="delta: expected a perturbation"):
            resume(free.folder, quiet=True)


def test_a_hostile_state_of_autoattack_is_refused(tmp_path: Path) -> None:
    path, key = tmp_path / "state.pt", ["a", "b"]
    fell_to, found = torch.tensor([-1, -1, -2]), torch.rand(3, 3, 2, 2)
    good = {"key": key, "done": (0, 1), "fell_to": torch.tensor([0, -1, -2]), "found": torch.zeros(1, 3, 2, 2)}
    for content in (Code(), {**good, "done": Code()}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"state\.pt cannot be read: it is damaged, or holds more .*to attack anew"):
            autoattack._resume(path, key, fell_to, found)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"state\.pt cannot be read: it is cut short, or no file of torch"):
        autoattack._resume(path, key, fell_to, found)
    for content, message in (
        ([good], "it is no state of AutoAttack"),
        ({"key": key}, "it is no state of AutoAttack"),
        ({**good, "key": ["a", "c"]}, "other weights, images or settings"),
        ({**good, "done": 3}, "does not fit its own images"),
        ({**good, "done": ("x", 1)}, "does not fit its own images"),
        ({**good, "fell_to": torch.zeros(2, dtype=torch.int64)}, "does not fit its own images"),
        ({**good, "fell_to": [0]}, "does not fit its own images"),
        ({**good, "found": torch.zeros(2, 3, 2, 2)}, "does not fit its own images"),
        ({**good, "found": torch.zeros(1, 3, 2, 2, dtype=torch.int8)}, "does not fit its own images"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            autoattack._resume(path, key, fell_to, found)
    assert fell_to.tolist() == [-1, -1, -2]  # as it was
    torch.save(good, path)
    assert autoattack._resume(path, key, fell_to, found) == (0, 1)
    assert fell_to.tolist() == [0, -1, -2] and not found[0].any()


def test_a_hostile_exported_file_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    export(run.folder, path)
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # the file is mapped, and written again
    settings = json.dumps(dataclasses.asdict(load_exported(path)[1]))
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match="cannot be read as an exported model"):
            load_exported(path)
    for content in (pickle.dumps(Code()), struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]"):
        path.write_bytes(content)
        with pytest.raises(RunError, match="cannot be read as an exported model"):
            load_exported(path)
    code = json.dumps({**json.loads(settings), "kind": "moe", "router": "antigravity:Router"})
    for metadata, message in (
        ({"format": "advmoe-2", "model": settings}, "written by a newer version of advmoe"),
        ({"format": "advmoe-x", "model": settings}, "expected a file of advmoe export"),
        ({"format": "advmoe-1"}, "its settings cannot be read"),
        ({"format": "advmoe-1", "model": "{"}, "its settings cannot be read"),
        ({"format": "advmoe-1", "model": "[" * 100_000}, "its settings cannot be read"),
        ({"format": "advmoe-1", "model": '{"widht": 8}'}, "did you mean width"),
        ({"format": "advmoe-1", "model": code}, "names code, antigravity:Router"),
    ):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(RunError, match=message):
            load_exported(path)
    good = {"format": "advmoe-1", "model": settings}
    for name, value, message in (
        ("conv1.weight", torch.zeros(2), "expected shape"),
        ("conv1.weight", tensors["conv1.weight"].half(), "expected dtype"),
        ("conv1.weight", tensors["conv1.weight"] * float("nan"), "values are not finite"),
        ("mask:conv1", torch.zeros(3), "does not fit"),
    ):
        save_file({**tensors, name: value}, path, metadata=good)
        with pytest.raises(RunError, match=message):
            load_exported(path)
    assert "antigravity" not in sys.modules


# --- configs ---

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("init: !!python/object/apply:os.system ['touch ran']", "not YAML: could not determine a constructor"),
        ("!!python/object/new:os.system ['touch ran']", "not YAML: could not determine a constructor"),
        ("init: !!python/name:os.system", "not YAML: could not determine a constructor"),
        ("init: !!python/module:antigravity", "not YAML: could not determine a constructor"),
        ("a: !!bool maybe", "not YAML"),
        ("a: !!timestamp x", "not YAML"),
        ("a: !!int x", "not YAML"),
        ("a: 2001-99-99", "not YAML"),
        ("a: &a [*b]", "not YAML"),
        ("? [a]\n: 1", "not YAML"),
        ("epochs: 3\nepochs: 5", "the key 'epochs' is there twice"),
        ("model: {width: 8, width: 4}", "the key 'width' is there twice"),
        ("[" * 1500, "not YAML: it is too deep"),
        ("#" * (1 << 20) + "\n", "expected at most 1048576 bytes"),
        ("\x00", "not YAML"),
        (LAUGHS + "init: *i", "setting: expected one of"),
        ("model: &a {arch: *a}", "model: arch: expected str, got {'arch': {"),
        (f"epochs: 0x{'f' * 5000}", "epochs: expected a number of at most 63 bits"),
        (f"optim: {{lr: 0x{'f' * 5000}}}", "optim: lr: expected float, got a large int"),
        (f"? {'k' * 9000}\n: 1", "setting: expected one of"),
        ("threads: 100000", "threads: expected at most 1024"),
        ("data: {workers: 100000}", "workers: expected at most 1024"),
        ("model: {num_experts: 1000000}", "num_experts: expected at most 1024"),
    ],
)
def test_a_hostile_config_is_refused(run: Run, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    run.config_path.write_text(text)
    for words in (("train", "--resume", run.folder), ("evaluate", run.folder, *EVALUATE)):
        line = refused(capsys, *words)
        assert message in line
    assert "antigravity" not in sys.modules


def test_bytes_that_are_no_text_are_no_config(run: Run) -> None:
    run.config_path.write_bytes(b"init: \xff\xfe")
    with pytest.raises(ValueError, match=r"config\.yaml: not YAML: .*codec"):
        run.config()


def test_a_config_imports_code_only_where_it_may(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder of a stranger's, with a module beside it that the working folder would give."""
    Path("strange.py").write_text(
        "open('ran', 'w')\nfrom advmoe.routers import LightRouter\nclass Mine(LightRouter): pass\ndef model(): pass\n"
    )
    config = RunConfig.load(run.config_path)
    moe = dataclasses.replace(config.model, kind="moe", router="strange:Mine", gate="straight_through")
    dataclasses.replace(config, model=moe).save(run.config_path)
    for words in (
        ("train", "--resume", run.folder),
        ("evaluate", run.folder, *EVALUATE),
        ("export", run.folder, "--out", "x.safetensors"),
        ("train", "--init", run.folder, "--out", "other"),
    ):
        line = refused(capsys, *words)
        assert "names code, strange:Mine" in line and "set ADVMOE_IMPORT=strange in the environment" in line
    run.checkpoint().unlink()
    for source in ("strange:model", "os:abort"):  # called too, so that it does not matter whether it is there already
        dataclasses.replace(config, init=source).save(run.config_path)
        assert f"names code, {source}" in refused(capsys, "train", "--resume", run.folder)
    assert not Path("ran").exists() and "strange" not in sys.modules
    dataclasses.replace(config, model=moe).save(run.config_path)
    monkeypatch.setenv("ADVMOE_IMPORT", "other,strange")
    assert "does not fit" in refused(capsys, "evaluate", run.folder, *EVALUATE)  # a dense one's weights
    assert Path("ran").exists()
    Path("ran").unlink()
    del sys.modules["strange"]


@pytest.mark.parametrize("line", [b"[" * 100_000, b"[1]", b"x", b"\xff", b"NaN"])
def test_hostile_metrics_are_refused(run: Run, line: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    run.metrics_path.write_bytes(line + b"\n")
    for words in (("analyze", run.folder, "--only", "training"), ("report", run.folder)):
        assert "metrics.jsonl, line 1: " in refused(capsys, *words)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 300), st.floats(), st.text(max_size=8),
    st.sampled_from(["advmoe", "at", "moe", "dense", "light", "1e-3", "none", "kl", "cyclic", "adam"]),
)  # fmt: skip
names = st.sampled_from(
    [f.name for f in dataclasses.fields(RunConfig)]
    + [f.name for room in vars(RunConfig()).values() if dataclasses.is_dataclass(room) for f in dataclasses.fields(room)]
)
trees = st.recursive(
    scalars,
    lambda below: st.one_of(
        st.lists(below, max_size=4), st.dictionaries(names | st.text(max_size=5) | st.integers(), below, max_size=5)
    ),
    max_leaves=20,
)
rooms = st.dictionaries(
    st.sampled_from([f.name for f in dataclasses.fields(RunConfig)]), st.dictionaries(names, scalars) | trees
)


def _loaded(path: Path, text: str) -> None:
    path.write_text(text, errors="surrogatepass")
    try:
        config = RunConfig.load(path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    else:
        config.save(path)
        again = RunConfig.load(path)
        assert repr(again) == repr(config)  # NaN is not NaN


def few_or(count: int) -> Callable[..., Any]:
    hidden = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, deadline=None, derandomize=count < 500, database=None, suppress_health_check=hidden
    )


def _any_tree(tmp_path: Path, tree: Any) -> None:
    _loaded(tmp_path / "config.yaml", yaml.safe_dump(tree))


@few_or(80)
@given(rooms | trees)
def test_any_yaml_is_a_config_or_one_line(tmp_path: Path, tree: Any) -> None:
    _any_tree(tmp_path, tree)


@pytest.mark.nightly
@few_or(20_000)
@given(rooms | trees)
def test_any_yaml_is_a_config_or_one_line_many(tmp_path: Path, tree: Any) -> None:
    _any_tree(tmp_path, tree)


def _values(hint: str) -> list[Any]:
    """Of the right type, and mostly nonsense."""
    if "tuple" in hint:
        return [
            None,
            [],
            [0],
            [1, 2],
            [0.5] * 3,
            [0.0] * 3,
            [-1.0] * 3,
            [float("nan")] * 3,
            ["x"],
            ["*"],
            ["["],
            [1] * 50,
        ]
    values: list[Any] = [None]
    if "int" in hint:
        values += [0, -1, 1, 3, 10**9]
    if "float" in hint:
        values += [0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), 1.5]
    if "str" in hint:
        values += ["", "x", "a:b", "../x", "\0", "é", "10", "nan"]
    return values + [True, False] * ("bool" in hint)


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "kind"), [("advmoe", "moe"), ("at", "block_moe"), ("free-at", "dense")])
def test_any_value_of_a_setting_is_taken_or_refused_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    class Begun(Exception):
        pass

    def begun(self: Trainer) -> None:
        raise Begun

    monkeypatch.setattr(Trainer, "_train_epoch", begun)
    base = json.loads(json.dumps(dataclasses.asdict(tiny(method, kind))))
    base["routing"]["share_epochs"] = None
    if kind == "block_moe":
        base["model"]["moe_at"] = ["layer4.1"]
    count = 0
    for room, holder in [
        ("", RunConfig()),
        *((f.name, getattr(RunConfig(), f.name)) for f in dataclasses.fields(RunConfig)),
    ]:
        if not dataclasses.is_dataclass(holder):
            continue
        for f in dataclasses.fields(holder):
            for value in _values(str(f.type)):
                config = json.loads(json.dumps(base))
                (config[room] if room else config)[f.name] = value
                count += 1
                try:
                    train(read_room(RunConfig, config, "it"), tmp_path / f"{count}", quiet=True)
                except Begun:
                    continue
                except ValueError as error:
                    assert "\n" not in str(error), (f.name, value)
    assert count > 500


YAML_BITS = st.sampled_from(
    ["model", "epochs", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!python/name:os.system",
     "!!binary ", "!!set ", "!!omap ", "!!timestamp ", "<<: ", "? ", "| ", "> ", "'", '"', "#", "%YAML 1.1", "---\n",
     "...\n", "0x", "1:30", "1e3", ".nan", "~", "\t", "\\x", "\u2028", "é"]
)  # fmt: skip


def _any_text(tmp_path: Path, parts: list[str]) -> None:
    _loaded(tmp_path / "config.yaml", "".join(parts))


@few_or(150)
@given(st.lists(YAML_BITS | st.text(max_size=3), max_size=25))
def test_any_text_is_a_config_or_one_line(tmp_path: Path, parts: list[str]) -> None:
    _any_text(tmp_path, parts)


@pytest.mark.nightly
@few_or(20_000)
@given(st.lists(YAML_BITS | st.text(max_size=3), max_size=25))
def test_any_text_is_a_config_or_one_line_many(tmp_path: Path, parts: list[str]) -> None:
    _any_text(tmp_path, parts)


# --- the command line ---


def _commands() -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))


LONG = "9" * 5000
OPTIONS = sorted(
    {option for parser in _commands().values() for option in parser._option_string_actions} - {"-h", "--help"}
)
words = st.lists(
    st.one_of(
        st.sampled_from(OPTIONS),
        st.sampled_from(OPTIONS).map(lambda option: option[:-1] + "x"),
        st.tuples(st.sampled_from(OPTIONS), st.text(max_size=6)).map("=".join),
        st.sampled_from(["0", "-1", "1", "nan", "inf", "1e400", "x", "", "--", "-", "dense", "moe", "at", LONG, "\0"]),
        st.text(max_size=6),
    ),
    max_size=8,
)


def _command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, given: list[str]) -> None:
    """Parsed, and for train made into settings; nothing is run."""
    with monkeypatch.context() as patch:
        for name in ("demo", "evaluate", "dual", "analyze", "report", "export", "reproduce", "profile"):
            patch.setattr(cli, f"_{name}", lambda o: None)
        patch.setattr(cli, "train", lambda config, out, **rest: Run(out))
        patch.setattr(cli, "resume", lambda folder, **rest: Run(folder))
        patch.setattr(cli, "download", lambda name, folder: None)
        capsys.readouterr()
        try:
            code = cli.main([command, *given])
        except SystemExit as done:
            assert isinstance(done.code, int)
            code = done.code
    err = capsys.readouterr().err
    assert (code, err) == (0, "") or (code == 2 and len(err.splitlines()) == 1 and err.startswith("advmoe"))


@few_or(150)
@given(st.sampled_from(sorted(_commands())) | st.just("train"), words)
def test_any_words_are_a_command_or_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, given: list[str]
) -> None:
    _command(monkeypatch, capsys, command, given)


@pytest.mark.nightly
@few_or(5_000)
@given(st.sampled_from(sorted(_commands())) | st.just("train"), words)
def test_any_words_are_a_command_or_one_line_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, given: list[str]
) -> None:
    _command(monkeypatch, capsys, command, given)


def test_a_refusal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def report(options: argparse.Namespace) -> None:
        raise ValueError("first\n\tsecond")

    monkeypatch.setattr(cli, "_report", report)
    assert refused(capsys, "report", "run") == "advmoe: first second"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trian"], "got 'trian'; did you mean train?"),
        (["train", "--epoch", "3"], "unknown argument '--epoch'; did you mean --epochs?"),
        (["train", "--metod=at"], "unknown argument '--metod'; did you mean --method?"),
        (["train", "--method", "fre-at"], "got 'fre-at'; did you mean free-at"),
        (["evaluate", "run", "more"], "unknown argument 'more'"),
        (["profile", "--table", "--ratio", "x"], "invalid float value: 'x'"),
    ],
)
def test_a_near_name_is_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(given)
    err = capsys.readouterr().err
    assert done.value.code == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "given",
    [
        ["replay", LONG],
        ["evaluate", LONG],
        ["evaluate", "run", "--out", LONG],
        ["train", "--resume", LONG],
        ["train", "--out", LONG],
        ["train", "--out", "run", "--data", "cifar10", "--data-dir", LONG],
        ["train", "--out", "run", "--init", LONG],
        ["dual", LONG, LONG, "--out", "dual"],
        ["export", LONG, "--out", "model"],
        ["report", LONG, "--out", "report"],
        ["demo", "--out", LONG],
    ],
    ids=lambda given: " ".join(word[:9] for word in given),
)
def test_a_name_that_no_file_can_have_is_the_callers(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *given)
    assert message.startswith("advmoe: '9999") and "File name too long" in message and len(message) < 250


def test_the_exit_codes_are_the_documented_ones() -> None:
    """What each is given for is tested in test_cli.py."""
    page = (ROOT / "docs" / "training.md").read_text().partition("## Exit codes")[2].partition("## ")[0]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")]
    codes = {int(code): what.strip() for code, what in rows if code.strip().isdecimal()}
    assert list(codes) == [cli.DONE, cli.FAULT, cli.USAGE, cli.RESUMABLE, cli.INTERRUPTED] == [0, 1, 2, 3, 130]
    said = cli._parser().epilog or ""
    assert all(f" {code} " in said for code in codes)


# --- pickles of CIFAR ---

PIXELS = bytes(range(256)) * 12  # of one image


def _array(content: bytes, shape: bytes = b"K\x01M\x00\x0c\x86", dtype: bytes = b"U\x02u1", name: str = ARRAY) -> bytes:
    """Opcodes of an array as protocol 2 of Python 2 writes it; arguments are opcodes too."""
    return (
        b"c" + name.encode() + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape
        + b"cnumpy\ndtype\n" + dtype + b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + content + b"tb"
    )  # fmt: skip


def _text(value: bytes) -> bytes:
    return b"T" + struct.pack("<I", len(value)) + value


def _file(data: bytes, labels: bytes = b"]K\x07a", before: bytes = b"") -> bytes:
    return b"\x80\x02" + before + b"}(" + _text(b"data") + data + _text(b"labels") + labels + b"u."


GOOD = _array(_text(PIXELS))
CALL = b"(U\x09touch rantR"  # what is on the stack, with a command


def _cifar(folder: Path, content: bytes) -> torch.Tensor:
    if not (folder / "cifar-10-batches-py").exists():
        write_cifar10(folder)
    (folder / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    test = load("cifar10", folder, validation=0).test
    return test.batch(torch.arange(len(test)))[0]


def test_the_pickles_of_these_tests_are_read_where_nothing_is_wrong(tmp_path: Path) -> None:
    expected = torch.tensor(list(PIXELS)).reshape(1, 3, 32, 32) / 255
    assert torch.equal(_cifar(tmp_path, _file(GOOD)), expected)
    array = np.frombuffer(PIXELS, np.uint8).reshape(1, 3072)
    for protocol in range(5):
        for value in (array, np.asfortranarray(array)):
            content = pickle.dumps({b"data": value, b"labels": [7]}, protocol)
            assert torch.equal(_cifar(tmp_path, content), expected)
    two = np.arange(6144, dtype=np.int64).astype(np.uint8).reshape(3072, 2).T  # in Fortran's order
    images = _cifar(tmp_path, pickle.dumps({b"data": two, b"labels": [1, 2]}, 2))
    assert torch.equal((images * 255).round().to(torch.uint8).flatten(1), torch.tensor(two))


HOSTILE = {
    "os.system": (b"cos\nsystem\n" + CALL + b"0", "it wants os.system"),
    "posix.system": (b"cposix\nsystem\n" + CALL + b"0", "it wants posix.system"),
    "eval": (b"cbuiltins\neval\n" + CALL + b"0", "it wants builtins.eval"),
    "python 2's eval": (b"c__builtin__\neval\n" + CALL + b"0", "it wants __builtin__.eval"),
    "getattr": (b"cbuiltins\ngetattr\n0", "it wants builtins.getattr"),
    "numpy.load": (b"cnumpy\nload\n" + CALL + b"0", "it wants numpy.load"),
    "numpy.fromfile": (b"cnumpy\nfromfile\n" + CALL + b"0", "it wants numpy.fromfile"),
    "numpy.memmap": (b"cnumpy\nmemmap\n0", "it wants numpy.memmap"),
    "numpy.f2py": (b"cnumpy.f2py\ncompile\n0", "it wants numpy.f2py.compile"),
    "a dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0blib.npyio.f\x930", "it wants numpy.lib.npyio.f"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93" + CALL + b"0", "it wants os.system"),
    "an extension": (b"\x82\x01", r"it has the opcode b'\x82'"),
    "INST": (b"(U\x09touch ranios\nsystem\n", "it has the opcode b'i'"),
    "OBJ": (b"(cnumpy\nndarray\no", "it has the opcode b'o'"),
    "NEWOBJ": (b"cnumpy\nndarray\n(t\x81", r"it has the opcode b'\x81'"),
    "a persistent id": (b"Pname\n", "it has the opcode b'P'"),
    "a buffer outside": (b"\x97", r"it has the opcode b'\x97'"),
    "a set": (b"\x8f", r"it has the opcode b'\x8f'"),
    "_reconstruct of another class": (
        b"c" + ARRAY.encode() + b"\n_reconstruct\ncnumpy\ndtype\nK\x00\x85U\x01b\x87R0", "it calls something",
    ),
    "a call of an array": (GOOD + b"(tR0", "it calls something"),
    "a call of ndarray": (b"cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R0", "it calls something"),
    "a codec": (b"c_codecs\nencode\nX\x03\x00\x00\x00abcU\x04zlib\x86R0", "it calls something"),
    "BUILD of a name": (b"cnumpy\nndarray\n}U\x08__name__U\x01xsb0", "it sets the state of what is no array"),
    "BUILD of a dict": (b"}}b0", "it sets the state of what is no array"),
    "a state too short": (GOOD + b"(K\x01tb0", "it sets the state of what is no array"),
    "an item of an array": (GOOD + b"U\x01aK\x01s0", "it sets an item of what is no mapping"),
    "a deep key": (b"}" + b")" + b"\x85" * 100_000 + b"K\x01s0", "it sets an item of what is no mapping"),
    "a memo of 16 GB": (b"Nr\xff\xff\xff\x7f0", None),
    "a string of 2 GB": (b"T\xff\xff\xff\x7f", "cannot be read"),
    "bytes of 1 EB": (b"\x8e" + struct.pack("<Q", 1 << 60), "cannot be read"),
    "a frame of 1 EB": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 60), None),
    "an empty stack": (b"0", "cannot be read"),
    "a memo that is not there": (b"h\x09", "cannot be read"),
    "a large number": (b"I" + b"9" * 5000 + b"\n0", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("before", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused(tmp_path: Path, before: bytes, message: str | None) -> None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if message is None:
        _cifar(tmp_path, _file(GOOD, before=before))  # harmless to a reader that makes no table of it
    else:
        with pytest.raises(
            DataError, match=r"^cifar10: .*test_batch cannot be read \(.*; unpack the archive again$"
        ) as e:
            _cifar(tmp_path, _file(GOOD, before=before))
        assert message in str(e.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 1 << 20  # KiB


OBJECT = b"U\x01O"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_file(_array(_text(PIXELS), dtype=OBJECT)), r"holds no uint8 array \[n, 3072\] as 'data'"),
        (_file(_array(b"]K\x01a", dtype=OBJECT)), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), dtype=b"U\x05V3072")), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), dtype=b"U\x02f4")), "holds no uint8 array"),
        (_file(_array(_text(PIXELS[1:]))), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), shape=b"J\xff\xff\xff\x7fM\x00\x0c\x86")), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), shape=b"J\xff\xff\xff\xffM\x00\x0c\x86")), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), shape=b"M\x00\x0cK\x01\x86")), "holds no uint8 array"),
        (_file(_array(_text(PIXELS), shape=b"]")), "holds no uint8 array"),
        (_file(_array(b"N")), "holds no uint8 array"),
        (_file(b"c" + ARRAY.encode() + b"\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"), "holds no uint8"),
        (_file(b"cnumpy\nndarray\n"), "holds no uint8 array"),
        (_file(b"]"), "holds no uint8 array"),
        (_file(GOOD, b"]K\x0aa"), "has a label in 'labels' that is not one of 0 .. 9: 10, of image 0"),
        (_file(GOOD, b"]J\xff\xff\xff\xffa"), "not one of 0 .. 9: -1, of image 0"),
        (_file(GOOD, b"]\x88a"), "not one of 0 .. 9: True, of image 0"),
        (_file(GOOD, b"]G" + struct.pack(">d", 7) + b"a"), "not one of 0 .. 9: 7.0, of image 0"),
        (_file(GOOD, b"]U\x017a"), "not one of 0 .. 9: b'7', of image 0"),
        (_file(GOOD, b"]\x8b" + struct.pack("<I", 9000) + b"\x7f" * 9000 + b"a"), "a large int, of image 0"),
        (_file(GOOD, b"]2aa"), "cannot be read"),
        (_file(GOOD, b"]"), "has not one label for each of its 1 images as 'labels', but 0 of them"),
        (_file(GOOD, b"K\x07\x85"), "has not one label for each of its 1 images as 'labels', but no list"),
        (b"\x80\x02}" + _text(b"data") + GOOD + b"s.", "has no key 'labels'"),
        (b"\x80\x02}" + _text(b"labels") + b"]s.", "has no key 'data'"),
        (b"\x80\x02].", "has no images and labels: it is no mapping"),
        (b"\x80\x02N.", "has no images and labels: it is no mapping"),
        (b"\x80\x09N.", "cannot be read"),
    ],
)
def test_a_batch_of_other_content_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^cifar10: .*test_batch .*{message}.*; unpack the archive again$"):
        _cifar(tmp_path, content)


def test_a_file_larger_than_any_batch_is_not_read(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    with (tmp_path / "cifar-10-batches-py" / "test_batch").open("wb") as file:
        file.truncate(2 << 30)  # a hole
    with pytest.raises(DataError, match="2147483648 bytes, more than any batch of images"):
        load("cifar10", tmp_path)


BATCH = pickle.dumps({b"data": np.frombuffer(PIXELS, np.uint8).reshape(1, 3072), b"labels": [7]}, 2)


def _changed(tmp_path: Path, places: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(BATCH)
    for place, value in places:
        content[place % len(content)] = value
    try:
        images = _cifar(tmp_path, bytes(content[: len(content) - cut]))
    except DataError as error:
        assert "test_batch" in str(error)
    else:
        assert images.shape == (1, 3, 32, 32)


# most bytes are pixels: half of the changes are to the opcodes around them
places = st.lists(
    st.tuples(st.integers(0, 200) | st.integers(-400, -1) | st.integers(0, 9999), st.integers(0, 255)), max_size=4
)


@few_or(100)
@given(places, st.integers(0, 3))
def test_a_changed_batch_is_read_or_refused(tmp_path: Path, places: list[tuple[int, int]], cut: int) -> None:
    _changed(tmp_path, places, cut)


@pytest.mark.nightly
@few_or(10_000)
@given(places, st.integers(0, 30))
def test_a_changed_batch_is_read_or_refused_many(tmp_path: Path, places: list[tuple[int, int]], cut: int) -> None:
    _changed(tmp_path, places, cut)


# --- archives ---


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info


def _zip(path: Path, members: list[tuple[str, bytes, int]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def _unpacked(file: Path, into: Path) -> Path:
    fetching._unpack("cifar10", Archive("it", "url", "data", "", ("a",)), file, into)
    return into / "data"


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_an_archive_of_files_and_folders_is_unpacked(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"archive{suffix}"
    if suffix == ".zip":
        _zip(file, [("data/", b"", 0o40755), ("data/a", b"one", 0o100644), ("data/deep/b", b"two", 0)])
    else:
        _tar(file, [(_info("./"), b""), (_info("./data/a"), b"one"), (_info("data/deep/b"), b"two")][1:])
    folder = _unpacked(file, tmp_path / "new")
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        "a": b"one",
        "deep/b": b"two",
    }


def _long() -> list[tuple[tarfile.TarInfo, bytes]]:
    """A chain of links whose path is longer than a system resolves: how tarfile's own filter was got around."""
    part, members, path = "d" * 200, [], "data"
    for letter in "abcdefghijklmnop":
        members += [
            (_info(f"{path}/{part}", tarfile.DIRTYPE), b""),
            (_info(f"{path}/{letter}", tarfile.SYMTYPE, part), b""),
        ]
        path = f"{path}/{letter}"
    return [*members, (_info(f"{path}/out", tarfile.SYMTYPE, "../" * 20), b""), (_info(f"{path}/out/escaped"), b"x")]


OUTSIDE = "would lie outside of its folder"
SPECIAL = "is neither a file nor a folder"
TARS: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "above": ([(_info("../escaped"), b"x")], OUTSIDE),
    "above by way of a folder": ([(_info("data/../../escaped"), b"x")], OUTSIDE),
    "absolute": ([(_info("/ROOT/escaped"), b"x")], OUTSIDE),
    "backslashes": ([(_info("data\\..\\..\\escaped"), b"x")], OUTSIDE),
    "a pax name": ([(_info("data/a", path="../escaped"), b"x")], OUTSIDE),
    "a link": ([(_info("data/a", tarfile.SYMTYPE, "../.."), b"")], SPECIAL),
    "a file through a link": ([(_info("data/a", tarfile.SYMTYPE, ".."), b""), (_info("data/a/escaped"), b"x")], SPECIAL),
    "a link to a file": ([(_info("data/a"), b"x"), (_info("data/b", tarfile.SYMTYPE, "a"), b"")], SPECIAL),
    "a hard link": ([(_info("data/a", tarfile.LNKTYPE, "/etc/passwd"), b"")], SPECIAL),
    "a long chain of links": (_long(), SPECIAL),
    "a device": ([(_info("data/a", tarfile.CHRTYPE), b"")], SPECIAL),
    "a block device": ([(_info("data/a", tarfile.BLKTYPE), b"")], SPECIAL),
    "a pipe": ([(_info("data/a", tarfile.FIFOTYPE), b"")], SPECIAL),
    "twice": ([(_info("data/a"), b"x"), (_info("data/a"), b"y")], "data/a is in it twice"),
    "twice by another name": ([(_info("data/a"), b"x"), (_info("./data//a"), b"y")], "is in it twice"),
    "empty": ([], "has no folder data"),
}


@pytest.mark.parametrize(("members", "message"), TARS.values(), ids=TARS)
def test_a_member_of_a_tar_stays_in_its_folder(
    tmp_path: Path, members: list[tuple[tarfile.TarInfo, bytes]], message: str
) -> None:
    file, below = tmp_path / "archive.tar.gz", tmp_path / "below" / "new"
    for info, _ in members:
        info.name = info.name.replace("/ROOT", str(tmp_path))
    _tar(file, [(_info("good/file"), b"x"), *members] if members else [])
    with pytest.raises(DataError, match=message):
        _unpacked(file, below)
    everything = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if not p.is_dir() or p.is_symlink()}
    assert {name for name in everything if not name.startswith("below/new/")} == {"archive.tar.gz"}
    assert not any(p.is_symlink() for p in tmp_path.rglob("*"))


ZIPS: dict[str, tuple[list[tuple[str, bytes, int]], str]] = {
    "above": ([("../escaped", b"x", 0)], OUTSIDE),
    "absolute": ([("/ROOT/escaped", b"x", 0)], OUTSIDE),
    "backslashes": ([("data\\..\\..\\escaped", b"x", 0)], OUTSIDE),
    "a link": ([("data/a", b"../..", 0o120777)], SPECIAL),
    "a device": ([("data/a", b"", 0o020666)], SPECIAL),
    "twice": ([("data/a", b"x", 0), ("data/./a", b"y", 0)], "is in it twice"),
}


@pytest.mark.parametrize(("members", "message"), ZIPS.values(), ids=ZIPS)
def test_a_member_of_a_zip_stays_in_its_folder(
    tmp_path: Path, members: list[tuple[str, bytes, int]], message: str
) -> None:
    file, below = tmp_path / "archive.zip", tmp_path / "below" / "new"
    _zip(file, [(name.replace("/ROOT", str(tmp_path)), content, mode) for name, content, mode in members])
    with pytest.raises(DataError, match=message):
        _unpacked(file, below)
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and below not in p.parents]
    assert outside == [file]


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_LARGEST", 1 << 20)
    zeros = bytes(1 << 19)
    _tar(tmp_path / "a.tar.gz", [(_info(f"data/{i}"), zeros) for i in range(3)])
    _tar(tmp_path / "header.tar.gz", [(_info("data/a", comment="x" * (2 << 20)), b"")])
    _zip(tmp_path / "a.zip", [(f"data/{i}", zeros, 0) for i in range(3)])
    for name in ("a.tar.gz", "header.tar.gz", "a.zip"):
        assert (tmp_path / name).stat().st_size < 10_000
        with pytest.raises(DataError, match="it unpacks to more than 1048576 bytes"):
            _unpacked(tmp_path / name, tmp_path / name.partition(".")[0])
        assert sum(p.stat().st_size for p in (tmp_path / name.partition(".")[0]).rglob("*") if p.is_file()) <= 1 << 20
    lying = (tmp_path / "a.zip").read_bytes().replace(struct.pack("<I", 1 << 19), struct.pack("<I", 16))
    (tmp_path / "lying.zip").write_bytes(lying)  # about how large they are
    with pytest.raises(DataError, match=r"lying\.zip cannot be unpacked"):
        _unpacked(tmp_path / "lying.zip", tmp_path / "lying")
    monkeypatch.setattr(fetching, "_MOST", 10)
    _zip(tmp_path / "many.zip", [(f"data/{i}", b"", 0) for i in range(11)])
    with pytest.raises(DataError, match="or 10 files"):
        _unpacked(tmp_path / "many.zip", tmp_path / "many")


def test_every_archive_has_its_sha256() -> None:
    for archive in fetching.ARCHIVES.values():
        assert len(archive.sha256) == 64 and int(archive.sha256, 16)


# --- images ---


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = _chunk(b"IDAT", zlib.compress(bytes(3000)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + b"".join(more) + pixels + _chunk(b"IEND", b"")


def _pixels(path: Path, content: bytes, resize: int | None = 256) -> torch.Tensor:
    path.write_bytes(content)
    split = FileSplit("images", path.parent, np.array([path.name]), torch.zeros(1, dtype=torch.int64), 64, resize)
    return split.pixels(torch.tensor([0]))


def _encoded(format: str, **options: Any) -> bytes:
    memory = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(memory, format, **options)
    return memory.getvalue()


def _is_no_image(path: Path, content: bytes, resize: int | None, message: str = "cannot be read as an image") -> None:
    with pytest.raises(DataError, match=rf"^images: .*{path.name} .*{message}"):
        _pixels(path, content, resize)


@pytest.mark.parametrize("resize", [None, 256])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_cut_short_is_refused(tmp_path: Path, format: str, resize: int | None) -> None:
    whole = _encoded(format)
    path = tmp_path / "image.jpeg"
    assert _pixels(path, whole, resize).shape == (1, 64, 64, 3)
    for length in (0, 1, 8, 20, 100, len(whole) // 2, len(whole) - 500):
        _is_no_image(path, whole[:length], resize)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_png(1 << 15, 1 << 15), "cannot be read as an image"),  # Pillow's own limit
        (_png(11_000, 10_000), "11000x10000 pixels, more than any image has"),
        (_png(1 << 30, 1), "cannot be read as an image"),
        (_png(0, 5), "cannot be read as an image"),
        (_png(100, 100, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))), "cannot be read as an image"),
        (_encoded("GIF"), "cannot be read as an image"),
        (_encoded("BMP"), "cannot be read as an image"),
        (_encoded("TIFF"), "cannot be read as an image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(ran) (w) file closefile\nshowpage\n",
            "cannot",
        ),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, "cannot be read as an image"),
        (b"\xff\xd8\xff\xc0\x00\x0b\x08\xff\xff\xff\xff\x01\x01\x11\x00", "cannot be read as an image"),
    ],
    ids=["1 Gpixel", "110 Mpixel", "wide", "empty", "text", "GIF", "BMP", "TIFF", "EPS", "noise", "header"],
)
def test_a_hostile_image_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    _is_no_image(tmp_path / "image.JPEG", content, 256, message)


def _damaged(tmp_path: Path, format: str, places: list[tuple[int, int]]) -> None:
    content = bytearray(_encoded(format))
    for place, value in places:
        content[place % len(content)] = value
    try:
        assert _pixels(tmp_path / "image.png", bytes(content)).shape == (1, 64, 64, 3)
    except DataError as error:
        assert "image.png" in str(error)


bytes_changed = st.lists(st.tuples(st.integers(0, 700) | st.integers(0, 1 << 14), st.integers(0, 255)), max_size=5)


@pytest.mark.filterwarnings("ignore")
@few_or(60)
@given(st.sampled_from(["PNG", "JPEG"]), bytes_changed)
def test_a_damaged_image_is_read_or_refused(tmp_path: Path, format: str, places: list[tuple[int, int]]) -> None:
    _damaged(tmp_path, format, places)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@few_or(10_000)
@given(st.sampled_from(["PNG", "JPEG"]), bytes_changed)
def test_a_damaged_image_is_read_or_refused_many(tmp_path: Path, format: str, places: list[tuple[int, int]]) -> None:
    _damaged(tmp_path, format, places)


@pytest.fixture()
def folders(tmp_path: Path) -> Path:
    """Tiny-ImageNet of one class and one image, and an image that is not of it."""
    root = tmp_path / "tiny-imagenet-200"
    for path in ("train/n01/images/a.JPEG", "val/images/v.JPEG", "../secret.JPEG"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(_encoded("JPEG"))
    (root / "wnids.txt").write_text("n01\n")
    (root / "val" / "val_annotations.txt").write_text("v.JPEG\tn01\t0\t0\t62\t62\n")
    return root


@pytest.mark.parametrize("name", ["../../../secret.JPEG", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b"])
def test_a_list_of_images_names_none_elsewhere(folders: Path, name: str) -> None:
    assert len(load("tiny_imagenet", folders).test) == 1
    (folders / "val" / "val_annotations.txt").write_text(f"{name}\tn01\t0\t0\t62\t62\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt: expected names without a folder, got"):
        load("tiny_imagenet", folders)
    if name:
        (folders / "wnids.txt").write_text(f"n01\n{name}\n")
        with pytest.raises(DataError, match=r"wnids\.txt: expected names without a folder, got"):
            load("tiny_imagenet", folders)


def test_what_is_no_file_is_no_image(folders: Path) -> None:
    os.mkfifo(folders / "train" / "n01" / "images" / "pipe.JPEG")  # reading it would wait for ever
    (folders / "train" / "n01" / "images" / "folder.JPEG").mkdir()
    assert len(load("tiny_imagenet", folders, validation=0).train) == 1


def test_a_hostile_cache_of_images_is_made_anew(folders: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = load("tiny_imagenet", folders, validation=0).train
    path = next(folders.glob(".advmoe-decoded*"))
    with np.load(path) as content:
        good = dict(content)
    for changes in (
        {"images0": np.array([Code()])},
        {"images0": np.zeros((1, 3, 64, 64), np.float32)},
        {"images0": np.zeros((1, 3, 64), np.uint8)},
        {"images0": np.zeros((1 << 24,), np.uint8)},
    ):
        with path.open("wb") as file:
            np.savez_compressed(file, **{**good, **changes})
        caplog.clear()
        again = load("tiny_imagenet", folders, validation=0).train
        assert torch.equal(again.batch(torch.arange(1))[0], expected.batch(torch.arange(1))[0])
        assert "cannot be read" in caplog.text
