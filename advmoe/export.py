# SPDX-License-Identifier: Apache-2.0
"""A trained model as one file that holds nothing else of the run: weights and settings (safetensors), or the network
itself in a form of :mod:`advmoe.deployment`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from .config import ModelConfig, read_room
from .deployment import export_program, package_program, write_onnx
from .files import write_whole
from .registry import unknown_name
from .sparse import compact, masked_convolutions, update_alive
from .stored import load_weights, require_version
from .training.runs import RunError, build_model, load_model, require_own_code

__all__ = ["FORMATS", "export", "load_exported"]

FORMATS = {"safetensors": ".safetensors", "torch_export": ".pt2", "aotinductor": ".pt2", "onnx": ".onnx"}
FORMAT = 1  # of the safetensors file
_MASK = "mask:"  # prefix of the masks that a sparse network was made smaller by


def export(source: str | Path, path: str | Path, checkpoint: str = "best", format: str = "safetensors") -> nn.Module:
    """Writes the model of a run or checkpoint to a file and returns it.

    A model of kind sparse is written without its removed channels (:func:`advmoe.sparse.compact`).

    Args:
        format: ``"safetensors"``, which :func:`load_exported` reads; ``"torch_export"``, ``"aotinductor"`` or ``"onnx"``:
            the network for any number of contiguous float32 images, without advmoe (:mod:`advmoe.deployment`).

    Raises:
        RunError: if there is no such run or checkpoint.
        ValueError: for an unknown format, another suffix than the format's (but for safetensors), or a model that has no
            such form.
    """
    path = Path(path)
    if format not in FORMATS:
        raise unknown_name("format", format, FORMATS)
    if format != "safetensors" and path.suffix != FORMATS[format]:
        raise ValueError(f"path: expected a name that ends in {FORMATS[format]} for format {format}, got {path}")
    model, config = load_model(source, checkpoint)
    if config is None:
        raise RunError(
            f"{source}: expected a run folder or its checkpoint file, whose settings are known, and no module:function"
        )
    size = config.model.image_size or 32
    masks = {_MASK + name: conv.mask for name, conv in masked_convolutions(model).items()}
    if masks:
        model = compact(model, size)
    if format == "safetensors":
        _write_tensors(model, masks, config.model, path)
        return model
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    program = export_program(model, torch.zeros(1, 3, size, size))
    if format == "onnx":
        write_onnx(program, path)
    elif format == "aotinductor":
        package_program(program, path)
    else:
        write_whole(path, lambda file: torch.export.save(program, file))
    return model


def _write_tensors(model: nn.Module, masks: dict[str, Any], config: ModelConfig, path: Path) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in {**model.state_dict(), **masks}.items()}
    metadata = {"format": f"advmoe-{FORMAT}", "model": json.dumps(dataclasses.asdict(config))}
    content = save(tensors, metadata=metadata)
    write_whole(path, lambda file: file.write(content))


def load_exported(path: str | Path) -> tuple[nn.Module, ModelConfig]:
    """The model of an exported file, in eval mode, and its settings.

    Raises:
        RunError: if the file is missing, damaged, or not a safetensors file of :func:`export`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read as an exported model: {error}") from error
    name, _, version = metadata.get("format", "").partition("-")
    if name != "advmoe" or not version.isdecimal():
        raise RunError(
            f"{path}: expected a file of advmoe export, format advmoe-{FORMAT}, got {metadata.get('format')!r}"
        )
    try:
        require_version(int(version), FORMAT, str(path))
        config = read_room(ModelConfig, json.loads(metadata.get("model", "")), str(path))
        require_own_code(config, path)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: its settings cannot be read: {error}") from error
    model: nn.Module = build_model(config)
    masks = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    try:
        if masks:
            model = _without_removed(model, masks, config.image_size or 32)
        load_weights(model, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise RunError(f"{path} does not fit the model of its own settings: {error}") from error
    return model.eval(), config


def _without_removed(model: nn.Module, masks: dict[str, Any], image_size: int) -> nn.Module:
    with torch.no_grad():
        for name, conv in masked_convolutions(model).items():
            conv.mask.copy_(masks[_MASK + name])
    update_alive(model, image_size)
    return compact(model, image_size)
