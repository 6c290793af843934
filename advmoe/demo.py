# SPDX-License-Identifier: Apache-2.0
"""``advmoe demo``: five models on scikit-learn's digits, trained, attacked, timed and reported on."""

from __future__ import annotations

import platform
import shutil
import time
from pathlib import Path

import torch

from moe_kernels import fuse

from .config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from .evaluation import SUSPECT
from .profiling import measure_latency
from .tables import percent, table
from .training import train
from .training.evaluation import evaluate_run, write_record
from .training.runs import RunError

__all__ = ["METHODS", "run"]

# name, kind, method
METHODS = (
    ("standard (Dense)", "dense", "standard"),
    ("AT (Dense)", "dense", "at"),
    ("AT (S-Dense)", "s_dense", "at"),
    ("AT (MoE)", "moe", "at"),
    ("AdvMoE", "moe", "advmoe"),
)
_MARK = "demo.txt"


def _config(kind: str, method: str, fast: bool, seed: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(kind=kind, width=32),
        data=DataConfig("digits", validation=140),
        attack=AttackConfig(),
        optim=OptimConfig(lr=0.05),
        method=MethodConfig(name=method),
        epochs=4 if fast else 15,
        batch_size=64,
        seed=seed,
        validation_attack="pgd5" if fast else "pgd10",
    )


def run(folder: Path, fast: bool = False, seed: int = 0) -> str:
    """Trains each method into ``folder/<method>``, prints the table of SA, RA, GFLOPs and latency, and returns it; writes
    ``folder/report.html``.

    A folder that an earlier demo left is replaced; any other folder with content is refused.

    Raises:
        RunError: if the folder holds something else.
    """
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise RunError(f"{folder} is not empty and no earlier demo's; choose another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).write_text("made by `advmoe demo`, which may replace this folder\n")
    from .report import write_report  # here, since drawing takes longer to import than other commands need

    attack_name = "pgd10" if fast else "pgd50x2"
    limit = 100 if fast else None
    start = time.perf_counter()
    results, folders = [], []
    models = {}  # of each kind the last: a method changes little of what a network costs
    for index, (name, kind, method) in enumerate(METHODS):
        print(f"[{index + 1}/{len(METHODS)}] {name}", flush=True)
        done = train(_config(kind, method, fast, seed), folder / f"{kind}-{method}")
        print(f"    trained; attacking ({attack_name}) and timing", flush=True)
        # last: 140 validation images are too few to choose an epoch by
        result = evaluate_run(
            done.folder, [attack_name], "last", limit=limit, seed=seed, checks=32 if fast else 96, latency=(1, 32)
        )
        assert result.path is not None
        write_record(result.path, result.record)
        folders.append(done.folder)
        results.append(result)
        models[kind] = result.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = 128
    size = results[0].data.image_size
    device = next(models["moe"].parameters()).device
    forms = [fuse(model.eval(), torch.rand(1, 3, size, size, device=device)) for model in models.values()]
    timed = measure_latency(forms, size, batch, repeats=10 if fast else 30, device=device)
    latency = {kind: t.median_ms for kind, t in zip(models, timed, strict=True)}

    def of_dense(kind: str) -> str:
        return f"{latency[kind] / latency['dense']:.2f} x"

    rows = [
        [
            name,
            percent(r.result.sa),
            percent(r.result.attacks[attack_name].ra) + (" !" if r.record["suspect"] else ""),
            f"{r.cost.gflops:.4f}",
            f"{latency[kind]:.2f} ms",
            of_dense(kind),
        ]
        for (name, kind, _), r in zip(METHODS, results, strict=True)
    ]
    text = table(["method", "SA", f"RA ({attack_name})", "GFLOPs", f"latency, batch {batch}", "of Dense"], rows)
    first = results[0].result
    marked = [
        f"{name} ({', '.join(r.record['suspect'])})"
        for (name, _, _), r in zip(METHODS, results, strict=True)
        if r.record["suspect"]
    ]
    page = write_report(folders, folder / "report.html", limit=40 if fast else 100, checkpoint="last", seed=seed)
    minutes = (time.perf_counter() - start) / 60
    lines = [
        f"{first.images} test images of scikit-learn's digits, seed {seed}; {first.attacks[attack_name].description}.",
        "SA: accuracy on clean images, RA: on attacked ones; GFLOPs: of an image, a multiply-accumulate as 1.",
        f"Latency: of each network's fused form (moe_kernels.fuse), median on {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; networks this narrow on 8x8 images save less "
        "time than operations.",
        "One short run each on so few small images is no comparison of methods; docs/results.md has larger runs.",
        *([f"! {SUSPECT}: {', '.join(marked)}; the page and docs/evaluation.md say more"] if marked else []),
        *(["--fast: even fewer epochs and weaker attacks."] if fast else []),
        f"{minutes:.1f} minutes in all.",
    ]
    notes = "\n".join(lines)
    (folder / "table.md").write_text(f"{text}\n\n{notes}\n")
    print(f"\n{text}\n\n{notes}\nruns: {folder.resolve()}\npage: {page.resolve()}")
    return text
