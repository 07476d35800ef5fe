"""A long list of independent work, shared out among processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
PARTS_A_PROCESS = 8  # so that none waits long for the last one


def shared_out(
    work: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    processes: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """`work(items)`, done part by part; results in the order of the items.

    Args:
        work: a function of a module, of any slice of the items; a result for each.
        progress: told how many items are done.
    """
    if processes == 1 or len(items) < 2:
        return work(items)
    size = -(-len(items) // (processes * PARTS_A_PROCESS))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    context = multiprocessing.get_context("spawn")  # a fork may hang on what torch has started
    with ProcessPoolExecutor(processes, context, initializer=_one_thread) as pool:
        results: list[Result] = []
        for part in pool.map(work, parts):
            results += part
            progress(len(results))
        return results


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
