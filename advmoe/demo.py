# SPDX-License-Identifier: Apache-2.0
"""``advmoe demo``: five models on scikit-learn's digits, trained, attacked and timed."""

from __future__ import annotations

import platform
import shutil
import time
from pathlib import Path

import torch

from .attacks import from_name
from .config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from .data import load
from .evaluation import evaluate
from .profiling import measure_latency, profile
from .tables import percent, table
from .training import load_model, train
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
    """Trains each method into ``folder/<method>``, prints the table of SA, RA, GFLOPs and latency, and returns it.

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
    attack_name = "pgd10" if fast else "pgd50x2"
    data = load("digits")
    test = data.test
    if fast:
        test = test.first(100)
    start = time.perf_counter()
    results = []
    models = {}  # of each kind the last: a method changes little of what a network costs
    for index, (name, kind, method) in enumerate(METHODS):
        print(f"[{index + 1}/{len(METHODS)}] {name}", flush=True)
        out = folder / f"{kind}-{method}"
        config = _config(kind, method, fast, seed)
        done = train(config, out)
        model, resolved = load_model(done.folder, "last")  # 140 validation images are too few to choose an epoch by
        assert resolved is not None and resolved.attack.epsilon is not None
        attack = from_name(attack_name, resolved.attack.epsilon)
        outcome = evaluate(model, test, {attack_name: attack}, seed=seed)
        results.append((outcome.sa, outcome.attacks[attack_name], profile(model, data.image_size)))
        models[kind] = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batch = 128
    timed = measure_latency(list(models.values()), data.image_size, batch, repeats=10 if fast else 30)
    latency = {kind: t.median_ms for kind, t in zip(models, timed, strict=True)}

    def of_dense(kind: str) -> str:
        return f"{latency[kind] / latency['dense']:.2f} x"

    rows = [
        [name, percent(sa), percent(a.ra), f"{p.gflops:.4f}", f"{latency[kind]:.2f} ms", of_dense(kind)]
        for (name, kind, _), (sa, a, p) in zip(METHODS, results, strict=True)
    ]
    text = table(["method", "SA", f"RA ({attack_name})", "GFLOPs", f"latency, batch {batch}", "of Dense"], rows)
    minutes = (time.perf_counter() - start) / 60
    lines = [
        f"{len(test)} test images of scikit-learn's digits, seed {seed}; {results[0][1].description}.",
        "SA: accuracy on clean images, RA: on attacked ones; GFLOPs: of an image, a multiply-accumulate as 1.",
        f"Latency: of each network once, median on {platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; networks this narrow on 8x8 images save less time than operations.",
        "One short run each on so few small images is no comparison of methods; docs/results.md has larger runs.",
        *(["--fast: even fewer epochs and weaker attacks."] if fast else []),
        f"{minutes:.1f} minutes in all.",
    ]
    notes = "\n".join(lines)
    (folder / "table.md").write_text(f"{text}\n\n{notes}\n")
    print(f"\n{text}\n\n{notes}\nruns: {folder.resolve()}")
    return text
