# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.deployment``: whole networks as they are, compiled, exported and packaged, in turn in one process.

Each form of each network is timed round by round, after an untimed call of its own, so that they share what else the
machine does; the network as it is stands among them twice. Compiling, which is not timed, takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.deployment import export_program, package_program, write_onnx
from advmoe.models import create_model
from advmoe.tables import table

from .machine import describe

KINDS = ("dense", "s_dense", "moe")
SIZE = 32
UNIT, AGAIN = "eager", "eager again"


def forms(model: nn.Module, folder: Path) -> dict[str, Callable[[Tensor], object]]:
    """What is timed, by name: each takes contiguous images."""
    torch._dynamo.reset()
    program = export_program(model, torch.zeros(1, 3, SIZE, SIZE))
    made: dict[str, Callable[[Tensor], object]] = {
        UNIT: model,
        "torch.compile": torch.compile(model, fullgraph=True, dynamic=False),  # once for each batch
        "torch.export": program.module(),
    }
    for name, frozen in (("AOTInductor, freezing", True), ("AOTInductor", False)):
        path = package_program(program, folder / f"{name}.pt2", freezing=frozen)
        made[name] = torch._inductor.aoti_load_package(str(path))
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if onnxruntime is not None and model.spec.kind != "moe":  # type: ignore[union-attr]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        path = write_onnx(program, folder / "net.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        made["onnxruntime"] = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    made[AGAIN] = model
    return made


def check(made: dict[str, Callable[[Tensor], object]], batch: int) -> None:
    """Calls each form, which compiles what is compiled at a first call.

    Raises:
        AssertionError: if a form's logits are not the network's.
    """
    with torch.inference_mode():
        expected = made[UNIT](_images(batch))
        for function in made.values():
            for _ in range(2):
                torch.testing.assert_close(function(_images(batch)), expected, rtol=1e-3, atol=1e-5)


def measure(made: dict[str, Callable[[Tensor], object]], batch: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call."""
    images = _images(batch)
    times: dict[str, list[float]] = {name: [] for name in made}
    with torch.inference_mode():
        for _ in range(repeats):
            for name, function in made.items():
                function(images)
                start = time.perf_counter()
                function(images)
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _images(batch: int) -> Tensor:
    return torch.rand((batch, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def report(record: dict[str, Any]) -> str:
    rows = []
    names = list(dict.fromkeys(name for result in record["results"] for name in result["ms"]))
    for result in record["results"]:
        medians = {name: statistics.median(each) for name, each in result["ms"].items()}
        cells = [f"{medians[n] / medians[UNIT]:.2f}" if n in medians else "-" for n in names if n != UNIT]
        rows.append([result["kind"], str(result["batch"]), f"{medians[UNIT]:.2f}", *cells])
    machine, settings = record["machine"], record["settings"]
    extra = "" if machine["onnxruntime"] is None else f", onnxruntime {machine['onnxruntime']}"
    return (
        table(["network", "batch", "eager, ms", *(n for n in names if n != UNIT)], rows)
        + f"\n\n{settings['arch']} of width {settings['width']}, {SIZE}x{SIZE} images, N = 2, r = 0.5, eval mode, "
        f"weights channels_last; medians of n = {settings['repeats']} calls in turn, ratios to eager\n"
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}{extra}, Python "
        f"{machine['python']}, float32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (64)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=21, help="timings of each, in turn (21)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write all figures there")
    o = parser.parse_args()
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in o.kinds:
            torch.manual_seed(0)
            model = create_model(o.arch, kind=kind, width=o.width).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            (Path(folder) / kind).mkdir()
            made = forms(model, Path(folder) / kind)
            for batch in o.batch:
                check(made, batch)
                results.append({"kind": kind, "batch": batch, "ms": measure(made, batch, o.repeats)})
    try:
        import onnxruntime

        version = onnxruntime.__version__
    except ImportError:
        version = None
    settings = {name: value for name, value in vars(o).items() if name != "json"}
    record = {"machine": {**describe(), "onnxruntime": version}, "settings": settings, "results": results}
    print(report(record))
    if o.json is not None:
        o.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
