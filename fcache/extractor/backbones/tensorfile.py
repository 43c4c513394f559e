"""Reading and writing .safetensors a tensor at a time: whoever holds gigabytes of weights holds them once.

The library maps a file into memory to read it, and copies all tensors to write them.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from fcache.cache_spec import DataError

_TYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 8


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a .safetensors file in its order, each in memory of its own and in the type of the file.

    Raises DataError for a type that torch cannot compute with, safetensors.SafetensorError for a file of another form.
    """
    # The library checks the header: sizes, types, and that the tensors cover the file without gaps.
    with safetensors.safe_open(path, framework="np"):
        pass
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _TYPES:
                raise DataError(f"{path}: {name!r} has the type {entry['dtype']}; known are {', '.join(_TYPES)}")
            tensor = torch.empty(entry["shape"], dtype=_TYPES[entry["dtype"]])
            file.seek(8 + length + entry["data_offsets"][0])
            _fill(file, _bytes(tensor), path)
            yield name, tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of the CPU as a .safetensors file, which appears whole or not at all.

    Raises DataError for a type that such a file does not have, OSError if it cannot be written.
    """
    header = json.dumps(dict(_entries(tensors)), separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for tensor in tensors.values():
                file.write(_bytes(tensor.detach().contiguous()))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _entries(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Any]]]:
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise DataError(f"{name!r} has the type {tensor.dtype}; a weights file takes {', '.join(_TYPES)}")
        size = math.prod(tensor.shape) * tensor.element_size()
        yield (
            name,
            {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size],
            },
        )
        offset += size


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else np.empty(0, np.uint8).data


def _fill(file: Any, into: memoryview, path: Path) -> None:
    while into:
        count = file.readinto(into)
        if not count:
            raise DataError(f"{path} ends before its last tensor; fetch the file again")
        into = into[count:]
