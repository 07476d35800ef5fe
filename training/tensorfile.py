"""Writes a safetensors file one tensor at a time, so that 15 GB never stand in memory.

The library's own writer wants all tensors at once. The format: a header length (8 bytes,
little endian), a JSON header of dtype, shape and byte range of each tensor, then the bytes
without gaps. Source: the safetensors format description, and checked by its reader.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_NAME = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_ALIGNMENT = 8  # bytes, of the header's end


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements * self.dtype.itemsize


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    make: Callable[[TensorSpec], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the tensors of `specs`, each made when its turn comes.

    Args:
        make: returns the tensor of a spec, on the CPU, with its dtype and shape.
    """
    # Larger elements first, so that each tensor begins at a multiple of its element's size.
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for spec in ordered:
        end = offset + spec.num_bytes
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in ordered:
            tensor = make(spec).contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
