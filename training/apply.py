"""Applies a merge plan: W + scale · B A, block by block, on all cores, in bounded memory.

    one thread      reads the base from front to back, and digests it as it goes
    a thread a core up to float32, + scale · B A, round once, and what became of the update
    the caller      writes in order, and digests what it writes

A block is a million weights of one module, so that its float32 copies stay in the processor's
cache; 16 blocks are under way at most, in buffers that are used again: fresh ones would cost a
page fault for every 4 kB. Memory hangs on neither model nor tensor. Blocks are cut by the plan
alone, so the bytes are the same whatever the number of threads.

What rounding leaves is measured on what is written, W':

    survived = <W' - W, Δ> / |Δ|²     1: all of the update; 0: none of it
    changed  = share of the weights whose bits differ from the base's in the output's type

|Δ| needs no Δ: |s·B A|² = s² · trace(BᵀB · A Aᵀ), in float64.
"""

from __future__ import annotations

import errno
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duplex.errors import MergeError
from training.adapter import Adapter
from training.mergeplan import Plan, Target
from training.tensorfile import ReadDigest, TensorFile, TensorSpec, tensor_writer

BLOCK_ELEMENTS = 1 << 20
_AHEAD = 16  # blocks
_KEEP_BYTES = 1 << 26  # of the base, in the system's cache
_BITS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
Tell = Callable[[str, int, int], None]  # (what is done, bytes done, bytes in all)


def silent(what: str, done: int, total: int) -> None:
    """A `Tell` that says nothing."""


@dataclass(frozen=True)
class Change:
    """What the merge did to one module. Norms are Frobenius norms.

    changed: share of its weights that differ from the base's after rounding.
    survived: share of the update along its own direction that is left after rounding.
    """

    module: str
    delta_norm: float
    weight_norm: float
    changed: float
    survived: float


@dataclass(frozen=True)
class Written:
    """The changes by module name, and the digests of what was read and written."""

    changes: list[Change]
    base_sha256: str
    sha256: str


@dataclass(frozen=True)
class _Update:
    """Rows of a module's delta: A [rank, in] and scale · B [rows, rank]."""

    module: str
    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class _Block:
    """Elements [first, first + count) of a tensor; `update`: of exactly these rows."""

    spec: TensorSpec
    first: int
    count: int
    update: _Update | None


@dataclass(frozen=True)
class _Slot:
    """Buffers of a block under way, uint8: what was read, and what is to be written."""

    read: torch.Tensor
    write: torch.Tensor

    @classmethod
    def for_plan(cls, base: TensorFile, plan: Plan) -> _Slot:
        # Blocks of a targeted tensor are of whole rows; others are cut anywhere.
        widest = max((plan.specs[key].shape[-1] for key in plan.targets), default=1)
        sizes = [
            max(BLOCK_ELEMENTS, widest)
            * max(base_or_out[name].dtype.itemsize for name in plan.specs)
            for base_or_out in (base.specs, plan.specs)
        ]
        return cls(*(torch.empty(size, dtype=torch.uint8) for size in sizes))


@dataclass
class _Sums:
    """Over the weights of a module: <W' - W, Δ>, |W|², weights changed, weights."""

    along: float = 0.0
    weight: float = 0.0
    changed: int = 0
    count: int = 0

    def add(self, other: _Sums) -> None:
        self.along += other.along
        self.weight += other.weight
        self.changed += other.changed
        self.count += other.count


@dataclass(frozen=True)
class _Done:
    """A block whose `result`, flat, is to be written; its buffers are free after that."""

    block: _Block
    slot: _Slot
    result: torch.Tensor
    sums: _Sums | None


def scaled_sides(lora: Adapter, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and scale · B [out, rank], float32: the delta is their product."""
    a, b = lora.sides(module)
    return a, lora.scale * b


def apply_plan(
    base: TensorFile, lora: Adapter | None, plan: Plan, path: Path, tell: Tell = silent
) -> Written:
    """Write the output's weights to `path`.

    Args:
        lora: None where the plan has no targets.

    Raises:
        MergeError: the disk is full.
        CorruptFileError: the base was cut off while it was read.
    """
    sums: dict[str, _Sums] = {}
    norms: dict[str, float] = {}
    digest = ReadDigest(base)
    scratch = threading.local()
    done = 0
    forgotten = [0]  # the base up to this byte

    def read(block: _Block, slot: _Slot) -> torch.Tensor:
        kind = base.specs[block.spec.name].dtype
        start = base.start_of(block.spec.name, block.first)
        piece = base.read_into(slot.read[: block.count * kind.itemsize], start)
        digest.feed(start, piece)
        if start - forgotten[0] > _KEEP_BYTES:
            base.forget(forgotten[0], start)
            forgotten[0] = start
        return piece.view(kind)

    def work(block: _Block, slot: _Slot, reading: Future[torch.Tensor]) -> _Done:
        piece, kind = reading.result(), block.spec.dtype
        result = slot.write[: block.count * kind.itemsize].view(kind)
        if block.update is not None:
            return _Done(block, slot, result, _merge(piece, block.update, result, scratch))
        return _Done(block, slot, piece if piece.dtype == kind else result.copy_(piece), None)

    with (
        room_needed(path, plan.num_bytes),
        _one_thread_each() as cores,
        tensor_writer(path, list(plan.specs.values())) as writer,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(cores, initializer=_lone) as team,
    ):
        free = [_Slot.for_plan(base, plan) for _ in range(_AHEAD)]

        def submit(block: _Block) -> Future[_Done]:
            slot = free.pop()
            return team.submit(work, block, slot, reader.submit(read, block, slot))

        for one in _in_order(_blocks(lora, plan, norms), submit):
            writer.write(one.result)
            free.append(one.slot)
            if one.block.update is not None and one.sums is not None:
                sums.setdefault(one.block.update.module, _Sums()).add(one.sums)
            done += one.result.numel() * one.result.dtype.itemsize
            tell("writing", done, plan.num_bytes)
        sha256 = writer.sha256
    changes = [
        Change(
            module,
            norms[module],
            math.sqrt(found.weight),
            found.changed / found.count,
            found.along / norms[module] ** 2 if norms[module] else 0.0,
        )
        for module, found in sorted(sums.items())
    ]
    return Written(changes, digest.hexdigest(), sha256)


@contextmanager
def room_needed(path: Path, num_bytes: int) -> Iterator[None]:
    """Turns the system's word for a full disk into ours.

    Raises:
        MergeError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MergeError(
            f"{path.parent.parent}: the weights need {num_bytes / 1e9:.2f} GB, and the disk is "
            "full. Nothing was kept: free some space, or write to another disk, then merge again."
        ) from error


# -- the work on one block


def _merge(
    piece: torch.Tensor, update: _Update, result: torch.Tensor, scratch: threading.local
) -> _Sums:
    """Merged weights into `result`, from the base's in `piece`, both flat; and what became of the
    update."""
    base = piece.view(update.b.shape[0], update.a.shape[1])
    wide, delta, merged, differs = _buffers(scratch, base)
    wide.copy_(base)
    torch.mm(update.b, update.a, out=delta)
    torch.add(wide, delta, out=merged)
    result.view(base.shape).copy_(merged)
    plain = piece if piece.dtype == result.dtype else piece.to(result.dtype)
    changed = np.count_nonzero(np.not_equal(_bits(plain), _bits(result), out=differs))
    moved = merged.copy_(result.view(base.shape)).sub_(wide).view(-1)  # W' - W
    flat = wide.view(-1)
    along, weight = torch.dot(moved, delta.view(-1)).item(), torch.dot(flat, flat).item()
    return _Sums(along, weight, int(changed), flat.numel())


def _buffers(
    scratch: threading.local, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Buffers of a thread's own: three float32 in the shape of `like`, and a flat bool."""
    kept: Any = getattr(scratch, "buffers", None)
    size = like.numel()
    if kept is None or kept[0].numel() < size:
        room = max(BLOCK_ELEMENTS, size)
        kept = (*(torch.empty(room) for _ in range(3)), np.empty(room, dtype=bool))
        scratch.buffers = kept
    wide, delta, merged = (buffer[:size].view(like.shape) for buffer in kept[:3])
    return wide, delta, merged, kept[3][:size]


def _bits(tensor: torch.Tensor) -> np.ndarray:
    kind = _BITS[tensor.dtype.itemsize]
    return tensor.reshape(-1).view(torch.uint8).numpy().view(kind)


def _norm_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frobenius norm of b @ a, without the product."""
    a, b = a.double(), b.double()
    return math.sqrt(max(0.0, ((b.T @ b) * (a @ a.T)).sum().item()))


# -- which blocks, and their order


def _blocks(lora: Adapter | None, plan: Plan, norms: dict[str, float]) -> Iterator[_Block]:
    """The blocks of the output in its order; fills in the norm of each delta on the way."""
    for spec in plan.specs.values():
        columns = spec.num_elements // spec.shape[0] if spec.shape and spec.shape[0] else 1
        row = 0
        for target in plan.targets.get(spec.name, []):
            yield from _plain(spec, row * columns, target.row * columns)
            assert lora is not None
            a, b = scaled_sides(lora, target.module)
            norms[target.module] = _norm_of_product(a, b)
            yield from _of_module(spec, target, a, b)
            row = target.row + target.rows
        yield from _plain(spec, row * columns, spec.num_elements)


def _plain(spec: TensorSpec, first: int, end: int) -> Iterator[_Block]:
    for start in range(first, end, BLOCK_ELEMENTS):
        yield _Block(spec, start, min(BLOCK_ELEMENTS, end - start), None)


def _of_module(
    spec: TensorSpec, target: Target, a: torch.Tensor, b: torch.Tensor
) -> Iterator[_Block]:
    columns = a.shape[1]
    step = max(1, BLOCK_ELEMENTS // columns)
    for row in range(0, target.rows, step):
        part = _Update(target.module, a, b[row : row + step])
        count = part.b.shape[0] * columns
        yield _Block(spec, (target.row + row) * columns, count, part)


def _in_order(
    blocks: Iterator[_Block], submit: Callable[[_Block], Future[_Done]]
) -> Iterator[_Done]:
    """Results in the order of the blocks, `_AHEAD` of them under way."""
    pending: deque[Future[_Done]] = deque()
    try:
        for block in blocks:
            pending.append(submit(block))
            if len(pending) >= _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _one_thread_each() -> Iterator[int]:
    """How many threads to start; torch's own number is put back afterwards."""
    threads = torch.get_num_threads()
    try:
        yield max(1, threads)
    finally:
        torch.set_num_threads(threads)


def _lone() -> None:
    torch.set_num_threads(1)
