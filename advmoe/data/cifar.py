# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their official Python batches."""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..registry import shown
from .download import ARCHIVES, missing
from .sets import DATA, DataError, Source, TensorSplit

AGAIN = "unpack the archive again"
_VALUES = 3 * 32 * 32  # of an image
_LARGEST = 1 << 30  # bytes of a file; the official ones have at most 155 MB


@DATA.register("cifar10")
def _cifar10(folder: Path | None) -> Source:
    return _read("cifar10", folder, [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10)


@DATA.register("cifar100")
def _cifar100(folder: Path | None) -> Source:
    return _read("cifar100", folder, ["train"], "test", b"fine_labels", 100)


def _read(name: str, folder: Path | None, training: list[str], test: str, labels: bytes, classes: int) -> Source:
    """The batches in the folder itself or in the one that the archive unpacks to."""
    if folder is None:
        raise missing(name)
    if (folder / ARCHIVES[name].folder).is_dir():
        folder = folder / ARCHIVES[name].folder
    absent = [each for each in [*training, test] if not (folder / each).is_file()]
    if absent:
        raise missing(name, f"{folder} has no {', '.join(absent)}")
    parts = [_batch(name, folder / each, labels, classes) for each in training]
    images, targets = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    train = TensorSplit(images, targets, padding=4, flip=True)
    return Source(train, TensorSplit(*_batch(name, folder / test, labels, classes)), classes, 32, 8 / 255, 5 / 255)


class _Named(Enum):
    """What a pickled array names, without being it: nothing of numpy is called on a file's word."""

    RECONSTRUCT = "_reconstruct"
    NDARRAY = "ndarray"
    DTYPE = "dtype"
    ENCODE = "encode"


@dataclass(eq=False)
class _DType:
    name: str


@dataclass(eq=False)
class _Array:
    """An array as its file describes it."""

    shape: object = None
    dtype: object = None
    fortran: object = None
    content: object = None

    def pixels(self) -> np.ndarray | None:
        """uint8 ``[n, 3072]``, or None if it is anything else."""
        shape, content = self.shape, self.content
        if not isinstance(self.dtype, _DType) or self.dtype.name != "u1" or not isinstance(content, bytes):
            return None
        if not isinstance(shape, tuple) or len(shape) != 2 or shape[1] != _VALUES or type(shape[0]) is not int:
            return None
        if shape[0] < 1 or len(content) != shape[0] * _VALUES:
            return None
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if self.fortran else "C")


class _Admitted(dict):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"it has the opcode {bytes([code])!r}, which no batch of images needs")


class _ArrayUnpickler(pickle._Unpickler):  # in Python: the one in C makes a table as long as a file says that it is
    """Admits numpy arrays and plain containers: a batch file has no business to name anything else. What it names is
    never called, imported or looked up."""

    _OPCODES = (
        "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
        "BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE "
        "SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT "
        "SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD"
    )
    _NAMES = {
        (module, name.value): name
        for name in (_Named.RECONSTRUCT, _Named.NDARRAY, _Named.DTYPE)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
    } | {("_codecs", "encode"): _Named.ENCODE}

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no batch of images needs")
        return self._NAMES[module, name]

    def load_dict(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.stack.append(_with({}, items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _with(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        _with(self.stack[-1], items)

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        self.stack[-1] = _made(function, arguments)

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, _DType):  # its byte order and fields, of which a byte has none
            return
        if not isinstance(made, _Array) or not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("it sets the state of what is no array")
        made.shape, made.dtype, made.fortran, made.content = state[1:]

    dispatch = _Admitted(
        {code: pickle._Unpickler.dispatch[code] for name in _OPCODES.split() for code in getattr(pickle, name)}
    )
    dispatch |= {
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
    }


def _with(mapping: object, items: list[Any]) -> dict[Any, Any]:
    """The mapping, with these keys and values in turn."""
    keys, values = items[::2], items[1::2]
    # names alone: the hash of a deep tuple ends the process
    if not isinstance(mapping, dict) or not all(isinstance(key, (bytes, str)) for key in keys):
        raise pickle.UnpicklingError("it sets an item of what is no mapping of names")
    mapping.update(zip(keys, values, strict=True))
    return mapping


def _made(function: object, arguments: object) -> object:
    if isinstance(arguments, tuple):
        if function is _Named.RECONSTRUCT and arguments[:1] == (_Named.NDARRAY,):
            return _Array()
        if function is _Named.DTYPE and arguments and isinstance(arguments[0], str):
            return _DType(arguments[0])
        if function is _Named.DTYPE and arguments and isinstance(arguments[0], bytes):  # of Python 2
            return _DType(arguments[0].decode("latin1"))
        if (
            function is _Named.ENCODE
            and len(arguments) == 2
            and isinstance(arguments[0], str)
            and arguments[1] == "latin1"
        ):
            return arguments[0].encode("latin1")  # bytes, as protocol 2 has them
    raise pickle.UnpicklingError("it calls something in a way that no batch of images needs")


def _batch(name: str, path: Path, key: bytes, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 ``[n, 3, 32, 32]`` and labels."""
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than any batch of images")
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{name}: {path} cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: {path} has no images and labels: it is no mapping; {AGAIN}")
    for each in (b"data", key):
        if each not in content:
            raise DataError(f"{name}: {path} has no key {each.decode()!r}; {AGAIN}")
    data, labels = content[b"data"], content[key]
    pixels = data.pixels() if isinstance(data, _Array) else None
    if pixels is None:
        raise DataError(f"{name}: {path} holds no uint8 array [n, {_VALUES}] as 'data'; {AGAIN}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        count = f"{len(labels)} of them" if isinstance(labels, list) else "no list"
        raise DataError(
            f"{name}: {path} has not one label for each of its {len(pixels)} images as {key.decode()!r}, but {count}; "
            f"{AGAIN}"
        )
    wrong = next((i for i, label in enumerate(labels) if type(label) is not int or not 0 <= label < classes), None)
    if wrong is not None:
        got = shown(labels[wrong])
        raise DataError(
            f"{name}: {path} has a label in {key.decode()!r} that is not one of 0 .. {classes - 1}: {got}, of image "
            f"{wrong}; {AGAIN}"
        )
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.tensor(labels, dtype=torch.int64)
