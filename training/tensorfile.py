"""Safetensors files read and written piece by piece, so that 15 GB never stand in memory.

The library's own writer wants all tensors at once, and what its reader maps counts as resident
memory of the process once it was touched. Here files are read by `pread` and written front to
back. The format: a header length (8 bytes, little endian), a JSON header of dtype, shape and
byte range of each tensor, then the bytes without gaps. Source: the safetensors format
description; a header is checked by the library's reader before it is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from duplex.errors import CorruptFileError
from training.diskfile import DiskFile

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
_PIECE_BYTES = 1 << 23  # read at once where a tensor is cast on the way


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        elements = 1
        for size in self.shape:
            elements *= size
        return elements

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


# -- reading


class TensorFile:
    """A safetensors file that is read by `pread`: nothing is mapped, nothing is kept.

    specs: by name; starts: the byte of the file at which each tensor begins. May be used by
    several threads at once.
    """

    def __init__(self, path: Path):
        """
        Raises:
            CorruptFileError: no safetensors file, or it has a type that torch has not.
        """
        self.path = path
        try:
            with safe_open(path, "pt"), path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise CorruptFileError(f"{path}: must be a safetensors file: {error}") from None
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        unknown = sorted(n for n, entry in header.items() if entry["dtype"] not in DTYPE_OF_NAME)
        if unknown:
            raise CorruptFileError(
                f"{path}: tensors must be of a type that torch has, found others in "
                f"{', '.join(unknown[:5])}. Give an unquantised checkpoint."
            )
        # In the order of the file.
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        self.specs = {
            name: TensorSpec(name, DTYPE_OF_NAME[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in ordered
        }
        self.data_start = 8 + size
        self.starts = {n: self.data_start + entry["data_offsets"][0] for n, entry in ordered}
        self._descriptor = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_into(self, buffer: torch.Tensor, start: int) -> torch.Tensor:
        """Fill a uint8 buffer from byte `start` of the file, and return it.

        Raises:
            CorruptFileError: the file ends before.
        """
        view, done = buffer.numpy().data, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], start + done)
            if count == 0:
                raise CorruptFileError(
                    f"{self.path}: must hold {start + len(view)} bytes, ends at {start + done}. "
                    "It was cut off while it was read."
                )
            done += count
        return buffer

    def forget(self, start: int, end: int) -> None:
        """Tell the system that these bytes are not needed again soon. Else a file of 15 GB takes
        a new page for all that is read of it: that costs time, and others lose theirs."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def read_bytes(self, start: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] from byte `start` of the file; raises as `read_into`."""
        return self.read_into(torch.empty(num_bytes, dtype=torch.uint8), start)

    def read_elements(self, name: str, first: int, count: int) -> torch.Tensor:
        """`count` elements of a tensor from its element `first`, flat, in the file's own type."""
        size = self.specs[name].dtype.itemsize
        return self.read_bytes(self.start_of(name, first), count * size).view(
            self.specs[name].dtype
        )

    def start_of(self, name: str, first: int) -> int:
        """The byte of the file at which element `first` of a tensor begins."""
        return self.starts[name] + first * self.specs[name].dtype.itemsize

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A whole tensor, cast on the way, so that no second copy stands beside it."""
        spec = self.specs[name]
        if dtype in (None, spec.dtype):
            return self.read_elements(name, 0, spec.num_elements).view(spec.shape)
        result = torch.empty(spec.num_elements, dtype=dtype)
        piece = _PIECE_BYTES // spec.dtype.itemsize
        for first in range(0, spec.num_elements, piece):
            part = result[first : first + piece]
            part.copy_(self.read_elements(name, first, part.numel()))
        return result.view(spec.shape)


class ReadDigest:
    """sha256 of a file whose pieces are read in its own order, without reading it again.

    Pieces that come out of order make `hexdigest` read the whole file by itself.
    """

    def __init__(self, file: TensorFile):
        self._file, self._sha, self._position = file, hashlib.sha256(), 0

    def feed(self, start: int, piece: torch.Tensor) -> None:
        """Take in the uint8 `piece` that was read at byte `start`, and what was left out before."""
        if self._position < 0 or start < self._position:
            self._position = -1
            return
        self._take_up_to(start)
        self._sha.update(piece.numpy().data)
        self._position += piece.numel()

    def _take_up_to(self, end: int) -> None:
        while self._position < end:
            count = min(_PIECE_BYTES, end - self._position)
            self._sha.update(self._file.read_bytes(self._position, count).numpy().data)
            self._position += count

    def hexdigest(self) -> str:
        if self._position < 0:
            self._sha, self._position = hashlib.sha256(), 0
        self._take_up_to(self._file.path.stat().st_size)
        return self._sha.hexdigest()


# -- writing


class TensorWriter:
    """Writes the data of a safetensors file front to back; `sha256` grows with it."""

    def __init__(self, path: Path, ordered: list[TensorSpec], metadata: dict[str, str] | None):
        self._expected = sum(spec.num_bytes for spec in ordered)
        self._sha, self._done = hashlib.sha256(), 0
        header = _header(ordered, metadata)
        self._file = DiskFile(path, len(header) + self._expected)
        self._put(memoryview(header))

    def write(self, piece: torch.Tensor) -> None:
        """Append the bytes of a contiguous tensor.

        Raises:
            OSError: as the file system has it, a full disk among it.
        """
        if piece.numel():
            data = piece.reshape(-1).view(torch.uint8).numpy().data
            self._put(data)
            self._done += len(data)

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._sha.update(data)

    def finish(self) -> None:
        self._file.finish()

    def close(self) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of the whole file; call it when all is written."""
        assert self._done == self._expected, "not all tensors are written"
        return self._sha.hexdigest()


@contextmanager
def tensor_writer(
    path: Path, ordered: list[TensorSpec], metadata: dict[str, str] | None = None
) -> Iterator[TensorWriter]:
    """A writer for the tensors of `ordered`, in that order (`aligned_order` gives a fit one)."""
    writer = TensorWriter(path, ordered, metadata)
    try:
        yield writer
        writer.finish()
    finally:
        writer.close()


def aligned_order(specs: Iterable[TensorSpec], place: Callable[[TensorSpec], object]) -> list:
    """Larger elements first, so that each tensor begins at a multiple of its element's size;
    then by `place`."""
    return sorted(specs, key=lambda spec: (-spec.dtype.itemsize, place(spec)))


def write_tensors(
    path: Path,
    specs: Iterable[TensorSpec],
    make: Callable[[TensorSpec], torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the tensors of `specs`, by name, each made when its turn comes.

    Args:
        make: returns the tensor of a spec, on the CPU, with its dtype and shape.
    """
    ordered = aligned_order(specs, lambda spec: spec.name)
    with tensor_writer(path, ordered, metadata) as writer:
        for spec in ordered:
            tensor = make(spec).contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            writer.write(tensor)


def _header(ordered: list[TensorSpec], metadata: dict[str, str] | None) -> bytes:
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
    return len(text).to_bytes(8, "little") + text
