# SPDX-License-Identifier: Apache-2.0
"""Models as files that run without their code: a program of torch.export, a package of AOTInductor, ONNX.

For any module of one tensor whose first axis is the batch. What is written computes logits in eval mode and has no
gradient of the routers; attacks need the model itself. docs/deployment.md says what each form needs to be loaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from moe_kernels.inference.capture import unused_size

from .modes import undisturbed

__all__ = ["export_program", "package_program", "routed_nodes", "write_onnx"]


def export_program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model's eval mode as a graph of torch.export that takes any number of images; routed operators stay one node.

    The program shares the model's parameters; the model's modes are restored.

    Args:
        model: a module of one tensor.
        example: ``[B, ...]``, of which shape, dtype, device and memory format count, and B does not.

    Raises:
        ValueError: if ``example`` has no batch axis.
        Exception: what torch.export raises for a model that it cannot trace.
    """
    if example.dim() < 2:
        raise ValueError(f"example: expected a batch axis and at least one more, got shape {tuple(example.shape)}")
    # Inductor's freezing (torch 2.13) compares shapes by the example's numbers: of scores [B, N] less a mean [N], with
    # B = N = 2, it made what is right for a batch of 2 alone
    images = example.new_zeros((unused_size(model, [example]), *example.shape[1:]))
    if example.dim() == 4 and not example.is_contiguous():
        images = images.contiguous(memory_format=torch.channels_last)
    with undisturbed(model), torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)


def routed_nodes(program: ExportedProgram) -> list[str]:
    """The operators of moe_kernels in a program, by name, in order."""
    nodes = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return [str(target) for target in nodes if str(target).startswith("moe_kernels.")]


def package_program(program: ExportedProgram, path: str | Path, freezing: bool = False) -> Path:
    """Compiles a program by AOTInductor into one ``.pt2`` file for ``torch._inductor.aoti_load_package``.

    Takes a C++ compiler and half a minute or so. The package is for this kind of processor, and for images in the memory
    format of the program's example: it reads others wrongly without a word, unless AOTI_RUNTIME_CHECK_INPUTS=1 is in the
    environment.

    Args:
        freezing: fold BatchNorms and lay out ordinary layers' weights for the processor; they can no longer be replaced
            in the package. Not faster where it was timed (docs/deployment.md).

    Raises:
        ValueError: for a path that does not end in ``.pt2``.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"path: expected a name that ends in .pt2, got {path}")
    temporary = path.with_name(f"{path.stem}.tmp.pt2")
    # check_lowerbound: with AOTI_RUNTIME_CHECK_INPUTS=1, batch 1 would be refused although it is right
    settings = {"freezing": freezing, "aot_inductor.check_lowerbound": False}
    with torch.no_grad():  # inductor freezes nothing where gradients are enabled
        torch._inductor.aoti_compile_and_package(program, package_path=str(temporary), inductor_configs=settings)
    temporary.replace(path)
    return path


def write_onnx(program: ExportedProgram, path: str | Path) -> Path:
    """Writes a program as one ONNX file, with input ``images`` and output ``logits`` of any batch.

    Raises:
        ValueError: for a routed model, or if the packages onnx and onnxscript are not installed.
    """
    routed = routed_nodes(program)
    if routed:
        raise ValueError(
            f"onnx: routed operators have no ONNX form, and the model has {len(routed)} of them ({routed[0]}, ...); "
            "dense, s_dense and sparse models can be written, a routed one as torch_export or aotinductor"
        )
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"onnx: needs the packages {' and '.join(missing)}; pip install 'moe-kernels[onnx]'")
    path = Path(path)
    made = torch.onnx.export(
        program,
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert made is not None
    temporary = path.with_name(path.name + ".tmp")
    made.save(temporary, external_data=False)
    temporary.replace(path)
    return path
