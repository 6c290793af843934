# SPDX-License-Identifier: Apache-2.0
"""Whole models through torch.compile, torch.export, AOTInductor and ONNX: one node for each routed layer, any batch, the
numbers of the model; files that are read where advmoe is not."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, small_architecture, tiny
from torch import Tensor, nn
from torch.export import ExportedProgram

from advmoe import cli
from advmoe.deployment import export_program, package_program, routed_nodes, write_onnx
from advmoe.export import export
from advmoe.models import create_model, record_routing
from advmoe.sparse import compact, masked_convolutions, update_alive
from advmoe.training import load_model, train
from moe_kernels import RoutedConv2d, RoutedLinear, convert

ROUTED: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "resnet18-windows": {"layout": "windows"},  # with statistics of each expert's own
    "resnet18-per_expert": {"bn": "per_expert"},
    "resnet18-image": {"router": "image"},
    "vgg16_bn": {},
    "wrn28_10": {},
    "densenet40": {},
    "deit_tiny": {"width": 24},
}
MORE: dict[str, dict[str, Any]] = {
    "resnet18-softmax": {"gate": "softmax", "gate_after": "norm"},
    "resnet18-global": {"router": "global", "num_experts": 3, "standardize": True},
    "resnet18-stage": {"route_per": "stage"},
    "resnet18-moe_at": {"moe_at": (3, 4)},
    "resnet18-upcycled": {"kind": "upcycled"},
    "resnet50": {},
    "vgg16_bn-windows": {"layout": "windows"},
    "densenet40-windows": {"layout": "windows"},
    "deit_tiny-top_k": {"width": 24, "num_experts": 4, "top_k": 2, "gate": "softmax"},
}
PLAIN: dict[str, dict[str, Any]] = {
    "resnet18-dense": {"kind": "dense"},
    "resnet18-s_dense": {"kind": "s_dense"},
    "resnet18-sparse": {"kind": "sparse"},
}
MORE_PLAIN: dict[str, dict[str, Any]] = {
    "vgg16_bn-dense": {"kind": "dense"},
    "vgg16_bn-sparse": {"kind": "sparse"},
    "wrn28_10-dense": {"kind": "dense"},
    "densenet40-dense": {"kind": "dense"},
    "deit_tiny-dense": {"kind": "dense", "width": 24},
}
ALL = ROUTED | MORE | PLAIN | MORE_PLAIN
SIZE = 16


def cases(quick: dict[str, Any], long: dict[str, Any]) -> list[Any]:
    return [*quick, *(pytest.param(name, marks=pytest.mark.nightly) for name in long)]


def lively(model: nn.Module) -> nn.Module:
    """The model in eval mode with statistics of images, whose logits differ from image to image by about 1."""
    images = torch.rand(16, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for module in model.modules():
        if hasattr(module, "momentum"):
            module.momentum = None  # averages of all batches: routers' scores are soon standardised
    with torch.no_grad():
        for _ in range(4):
            model(images)
        model.eval()
        last = [m for m in model.modules() if isinstance(m, nn.Linear | RoutedLinear)][-1]
        last.weight.div_(model(images).std(0).mean())
        logits = model(images)
    assert logits.isfinite().all() and 0.2 < logits.std(0).mean() < 5
    return model


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = lively(create_model(name.split("-")[0], **{"kind": "moe", "width": 8, "image_size": SIZE, **ALL[name]}))
    if masked_convolutions(model):
        with torch.no_grad():
            for conv in masked_convolutions(model).values():
                conv.mask[::2] = 0
        update_alive(model, SIZE)
        model = compact(model, SIZE)
    return model


def batch_of(count: int) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(count))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def same_for_every_batch(made: Any, model: nn.Module, batches: tuple[int, ...] = (1, 3, 8)) -> None:
    for count in batches:
        with torch.no_grad():
            close(made(batch_of(count)), model(batch_of(count)))


def expected_calls(model: nn.Module) -> tuple[int, int, int]:
    """How often a forward runs routed layers, convolutions and linear layers."""
    kinds = ((RoutedConv2d, RoutedLinear), nn.Conv2d, nn.Linear)
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds)  # type: ignore[return-value,arg-type]


def calls(program: ExportedProgram) -> tuple[int, int, int]:
    aten = torch.ops.aten
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return (
        sum(name.startswith("moe_kernels.conv2d") for name in routed_nodes(program)),
        sum(t in (aten.conv2d.default, aten.convolution.default) for t in targets),
        sum(t in (aten.linear.default, aten.addmm.default, aten.mm.default) for t in targets),
    )


# --- torch.export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(ROUTED, MORE | PLAIN | MORE_PLAIN))
def test_a_program_has_one_node_a_layer_and_takes_any_batch(name: str, tmp_path: Path) -> None:
    """No convolution and no matrix product stands there but those of routed layers, once each, and of ordinary ones: an
    expert has no computation of its own."""
    model = made(name)
    with record_routing(model) as routings, torch.no_grad():
        model(batch_of(8))
    assert not routings or any(len(r.expert.unique()) > 1 for r in routings.values())
    program = export_program(model, batch_of(1))
    assert calls(program) == expected_calls(model)
    torch.export.save(program, tmp_path / "net.pt2")
    for each in (program, torch.export.load(tmp_path / "net.pt2")):
        same_for_every_batch(each.module(), model)


def test_exporting_leaves_the_model_as_it_was() -> None:
    model = made("resnet18").train()
    model.linear.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    program = export_program(model, batch_of(1))
    assert all(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["linear.weight"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not program.example_inputs[0][0].any()  # a file holds an example of the shape, and no image
    same_for_every_batch(program.module(), model.eval())


def test_a_program_has_no_gradient_of_the_routers() -> None:
    """As docs/deployment.md says: an attack needs the model."""
    model = made("resnet18")
    program = export_program(model, batch_of(1)).module()
    x = batch_of(4).requires_grad_()
    (whole,) = torch.autograd.grad(model(x).square().sum(), x)
    (part,) = torch.autograd.grad(program(x).square().sum(), x)
    assert not torch.allclose(part, whole, rtol=0.01)
    program(x).sum().backward()
    assert all(p.grad is None for name, p in program.named_parameters() if ".router." in name)


def test_a_converted_model_is_exported_too() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * SIZE * SIZE, 10),
    )  # fmt: skip
    model = convert(model, num_experts=3).eval()
    program = export_program(model, batch_of(4))
    assert len(routed_nodes(program)) == 1
    same_for_every_batch(program.module(), model)


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"example: expected a batch axis .* got shape \(3,\)"):
        export_program(nn.Linear(3, 3), torch.zeros(3))


# --- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases({"resnet18": {}}, {n: v for n, v in (ROUTED | MORE).items() if n != "resnet18"}))
@pytest.mark.parametrize("marked", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_compiled_once_for_every_batch(name: str, marked: bool) -> None:
    """Of 2 images and more: torch.compile takes a size of 1 for a constant, and dynamic sizes that are equal at the first
    call, 3 images of 3 channels say, for the same one."""
    torch._dynamo.reset()
    model = made(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=None if marked else True)

    def run(x: Tensor) -> Tensor:
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    with torch._dynamo.config.patch(error_on_recompile=True):
        same_for_every_batch(run, model, (5, 8, 3))
    torch._dynamo.reset()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ROUTED | PLAIN)
def test_compiled_by_inductor(name: str) -> None:
    torch._dynamo.reset()
    model = made(name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        same_for_every_batch(compiled, model, (5, 8, 3))
    torch._dynamo.reset()


# --- files in a process of their own ------------------------------------------------------------------------------------

LOADING = """
import os, sys, torch
{imports}
forms = {{"program": lambda path: torch.export.load(path).module(), "package": torch._inductor.aoti_load_package}}
answers = {{}}
for name in sys.argv[1:]:
    answers[name] = []
    try:
        call = forms[name](name + ".pt2")
        for images in torch.load("images.pt"):
            answers[name].append(call(images).detach())
    except Exception as error:
        answers[name].append(repr(error))
assert not any(name.split(".")[0] == "advmoe" for name in sys.modules)
torch.save(answers, "answers.pt")
"""


def in_a_process(
    folder: Path, names: list[str], images: list[Tensor], imports: str = "import moe_kernels", checked: bool = False
) -> dict[str, list[Any]]:
    """For each file of ``program.pt2`` and ``package.pt2`` the logits of each batch, up to the first error."""
    torch.save(images, folder / "images.pt")
    (folder / "load.py").write_text(LOADING.format(imports=imports))
    environment = {**os.environ, "AOTI_RUNTIME_CHECK_INPUTS": "1" if checked else "0"}
    command = [sys.executable, "load.py", *names]
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return torch.load(folder / "answers.pt")


def test_a_run_s_program_and_package_load_without_advmoe(tmp_path: Path) -> None:
    """A package reads other memory formats wrongly; it can be made to look."""
    with small_architecture():
        config = tiny("at", epochs=1)
        train(
            dataclasses.replace(config, model=dataclasses.replace(config.model, arch=SMALL)), tmp_path / "run", quiet=True
        )
        model, _ = load_model(tmp_path / "run")
        for form, name in (("torch_export", "program.pt2"), ("aotinductor", "package.pt2")):
            assert cli.main(["export", str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / name)]) == 0
    images = [torch.rand(count, 3, 8, 8) for count in (1, 3, 8)]
    channels_last = images[1].contiguous(memory_format=torch.channels_last)
    answers = in_a_process(tmp_path, ["program", "package"], [*images, channels_last], checked=True)
    with torch.no_grad():
        expected = [model(x) for x in (*images, channels_last)]
    for logits, mine in zip(answers["program"], expected, strict=True):
        close(logits, mine)
    *logits, refusal = answers["package"]
    for each, mine in zip(logits, expected[:3], strict=True):
        close(each, mine)
    assert refusal.startswith("RuntimeError")  # torch 2.11 writes "unmatched stride" to stderr only
    without = in_a_process(tmp_path, ["program", "package"], images, imports="")
    assert "error when deserializing" in without["program"][0]
    assert "Could not find schema for moe_kernels::conv2d" in without["package"][0]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "freezing"),
    [*((name, False) for name in ROUTED | MORE | PLAIN), *((name, True) for name in (*ROUTED, "resnet18-dense"))],
)
def test_a_package_gives_the_same_in_another_process(name: str, freezing: bool, tmp_path: Path) -> None:
    model = made(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    package_program(export_program(model, batch_of(1)), tmp_path / "package.pt2", freezing)
    images = [batch_of(count) for count in (1, 3, 8)]
    for x, logits in zip(images, in_a_process(tmp_path, ["package"], images)["package"], strict=True):
        with torch.no_grad():
            close(logits, model(x))


# --- ONNX ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(PLAIN, MORE_PLAIN))
def test_onnx_gives_the_same_by_onnxruntime(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the packages of the extra onnx are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the packages of the extra onnx are not installed")
    model = made(name)
    path = write_onnx(export_program(model, batch_of(1)), tmp_path / "net.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, SIZE, SIZE])
    assert (result.name, result.shape) == ("logits", ["batch", 10])
    same_for_every_batch(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model)


def test_what_has_no_such_form_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = export_program(made("resnet18-image"), batch_of(1))
    with pytest.raises(ValueError, match=r"routed operators have no ONNX form, and the model has 16 of them"):
        write_onnx(program, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"a name that ends in \.pt2, got .*net\.so"):
        package_program(program, tmp_path / "net.so")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"needs the packages .*onnxscript; pip install 'moe-kernels\[onnx\]'"):
        write_onnx(export_program(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_formats_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "run", "--format", "onnx", "--out", str(tmp_path / "net.pt2")]) == cli.USAGE
    assert "ends in .onnx for format onnx" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"format: expected one of safetensors, .* got 'onxx'; did you mean onnx"):
        export("run", tmp_path / "net.onnx", format="onxx")
