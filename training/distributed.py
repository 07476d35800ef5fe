"""One process or many: the base sharded by FSDP2, the adapters whole on each of them.

**What is sharded.** The frozen base is nearly all of the memory: 15 GB of a 7B model in bfloat16.
Each module of `forward.shardable_modules()` is a unit of `fully_shard`: gathered when it is
called, freed after. Adapters stay whole on each rank, outside of FSDP (`ignored_params`):
they are about a hundredth of the base, gathering them would cost more messages than it saves
memory, and AdamW, clipping, the liveness check, checkpoints and the hand-in are then those of
one process, with plain tensors. Their gradients are added up over ranks once a step, as one
vector, so all ranks make the same update. `check_equal` proves it at each checkpoint.
Memory of a rank: base / ranks, one gathered unit, and adapters x 16 bytes (weight, gradient,
two moments, float32).

**Why not `Accelerator.prepare`.** accelerate 1.15 reads a `FullyShardedDataParallelPlugin` only on
accelerators: on CPUs (MULTI_CPU) it is dropped without a word, and `prepare` wraps the model in
DDP. What is tested here on two CPU processes has to be what runs on GPUs, so both use torch's
`fully_shard`, on the process group that accelerate has made.

A weight that is used outside its module's `forward` raises (Tensor and DTensor mixed): a
forward pass must call modules.
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from duplex.errors import WorkError


@dataclass(frozen=True)
class Ranks:
    """This process among its like. One process has rank 0 of 1, and its sums cost nothing."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise sum over ranks, on the device of `values`."""
        if self.count == 1:
            return values
        total = values.detach().to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by the sum over ranks; a missing one counts as 0."""
        if self.count == 1:
            return
        chosen = list(parameters)
        flat = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float()
                for p in chosen
            ]
        )
        distributed.all_reduce(flat)
        offset = 0
        for parameter in chosen:
            size = parameter.numel()
            parameter.grad = flat[offset : offset + size].view_as(parameter).to(parameter.dtype)
            offset += size

    def from_first(self, value: Any) -> Any:
        """What the first rank has, on all of them. `value` must be picklable."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()

    def tensors_from_first(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first rank's tensors on all of them, on the CPU. The others' argument is unused."""
        if self.count == 1:
            return tensors
        shapes = self.from_first({name: (t.shape, t.dtype) for name, t in tensors.items()})
        found = {}
        for name, (shape, dtype) in shapes.items():
            if self.first:
                sent = tensors[name].to(self.device).contiguous()
            else:
                sent = torch.empty(shape, dtype=dtype, device=self.device)
            distributed.broadcast(sent, src=0)
            found[name] = sent.cpu()
        return found

    def check_equal(self, tensors: dict[str, torch.Tensor], what: str) -> None:
        """
        Raises:
            WorkError: the ranks hold different bytes; each of them raises it.
        """
        if self.count == 1:
            return
        mine = digest_of(tensors)
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        if len(set(found)) > 1:
            shown = ", ".join(f"rank {i}: {value[:12]}…" for i, value in enumerate(found))
            raise WorkError(
                f"{what} must be the same on all {self.count} processes, found {shown}. Nothing "
                "was written; the checkpoint before this one is kept. Run on one process, or on "
                "GPUs of one kind."
            )


def meet(cpu: bool) -> None:
    """Make the process group that accelerate will find, and wait until all ranks are in it.

    Before anything is loaded: ranks on several machines may not reach each other. It ends by
    itself after torch's own timeouts, 10 to 30 minutes; whoever started this process ends it
    sooner.
    """
    if cpu:
        distributed.init_process_group("gloo")
        distributed.barrier()
        return
    place = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(place)
    distributed.init_process_group("nccl")
    distributed.barrier(device_ids=[place])


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names and bytes of tensors on the CPU."""
    state = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        state.update(name.encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def shard(
    modules: Sequence[nn.Module], ranks: Ranks, whole: Iterable[nn.Parameter]
) -> list[nn.Module]:
    """Put `fully_shard` on each of `modules`, the root last; moves them to the device.

    Args:
        whole: parameters that stay as they are on each rank: the adapters.

    Returns:
        The sharded modules; none where there is one process.
    """
    if ranks.count == 1:
        return []
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    kept = set(whole)
    for parameter in kept:
        parameter.data = parameter.data.to(ranks.device)
    for module in modules:
        _prepare_class(type(module))
        fully_shard(module, mesh=mesh, ignored_params=kept)
    return list(modules)


def _prepare_class(kind: type[nn.Module]) -> None:
    """Make the class that `fully_shard` gives a module of class `kind`, where its own way fails.

    It derives from (FSDPModule, kind). moshi's streaming modules put `abc.ABC` before `nn.Module`,
    after which CPython takes the two for different layouts and refuses to assign `__class__`. With
    `kind` first the layout is that of `kind`. torch (2.9, which pyproject.toml pins) keeps these
    classes in a private table and makes one only where there is none.
    """
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fully_shard as internals

    table = internals.cls_to_fsdp_cls
    if kind in table or issubclass(kind, FSDPModule) or abc.ABC not in kind.__mro__:
        return
    # `.to` and its like are the one thing that both have; FSDP's does not work from behind.
    table[kind] = type(f"FSDP{kind.__name__}", (kind, FSDPModule), {"_apply": _stay})


def _stay(self: nn.Module, *_: Any, **__: Any) -> nn.Module:
    raise RuntimeError(f"{type(self).__name__} is sharded: it stays on its device, in its dtype")


@contextmanager
def gathered(sharded: Sequence[Any]) -> Iterator[None]:
    """All weights whole on each rank, for work that does not go through `forward`: generation.

    All ranks must enter it and do the same work inside. Memory: the whole base on each.
    """
    for module in sharded:
        # Else a forward pass inside would free what it gathers.
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not sharded[-1], recurse=False)
            module.set_reshard_after_backward(True, recurse=False)
            module.reshard()
