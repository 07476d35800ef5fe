"""Plays the items to a checkpoint without a server (`batch`), by as many processes as help.

On a CPU each core takes a process of one thread, as far as memory holds the weights that often; a
GPU takes one. Every conversation is measured as one over a WebSocket is.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from duplex.errors import CorruptFileError
from duplex.frames import SAMPLE_RATE
from pipeline.evaluation.batch import Call
from pipeline.evaluation.batch_worker import read_conversation, write_call
from pipeline.evaluation.items import SpokenItem
from pipeline.evaluation.play import Played, PlaySettings, Taken, measured_call, same_answer
from pipeline.serving.model import pick_device
from training.launch import run_workers

WORKER = "pipeline.evaluation.batch_worker"
ADVICE = (
    "Signal 9 that nobody sent is most often the system short of memory: lower "
    "evaluate.runtime.slots."
)
SECONDS_A_PROCESS = 60.0  # of conversation: each imports and loads for some seconds
_MEMORY_SHARE = 0.4  # of all there is, for the weights of all processes


def play_checkpoint(
    label: str,
    checkpoint: Path,
    items: Sequence[SpokenItem],
    settings: PlaySettings,
    report: Callable[[str], None] = print,
    *,
    tokenizer: bytes,
    device: str = "auto",
    voices: Mapping[str, Path] | None = None,
    slots: int = 16,
    processes: int | None = None,
) -> Played:
    """Play `items` with each seed to a checkpoint folder, and the first one again.

    Args:
        tokenizer: SentencePiece model that prompts are proven by.
        slots: conversations at a time in one process, at most.
        processes: None: as many as the device, the memory and what is to be held suggest.

    Raises:
        DuplexError: what loading the checkpoint or holding a conversation raised.
        WorkError: a process died.
    """
    started_s = time.perf_counter()
    taken = [Taken(spoken, seed) for seed in settings.seeds for spoken in items]
    calls = [_call(one, settings) for one in taken]
    place = pick_device(device)
    if processes is None:
        seconds = sum(len(call.user) for call in calls) / SAMPLE_RATE
        processes = worthwhile_processes(seconds, fitting_processes(checkpoint, place))
    processes = min(processes, len(calls))
    slots = _even_slots(-(-len(calls) // processes), slots, settings.again)
    with tempfile.TemporaryDirectory(prefix="duplex-evaluate-") as name:
        folder = Path(name)
        for index, call in enumerate(calls):
            write_call(folder, index, call)
        job = {
            "checkpoint": str(checkpoint.resolve()),
            "device": place,
            "voices": {key: str(path.resolve()) for key, path in (voices or {}).items()},
            "bare": settings.bare,
            "slots": slots,
            "sampling": settings.sampling.model_dump(),
            "folder": name,
            "names": [f"{label} {one.name}" for one in taken],
            "again": settings.again and bool(taken),
        }
        run_workers(WORKER, job, processes, report, advice=ADVICE)
        try:
            found = [read_conversation(folder, index) for index in range(len(calls))]
            again = read_conversation(folder, len(calls)) if job["again"] else None
        except OSError as error:
            raise CorruptFileError(f"each conversation must come back: {error}") from None
    measured = [
        measured_call(label, one, conversation, tokenizer, settings)
        for one, conversation in zip(taken, found, strict=True)
    ]
    repeats = same_answer(found[0], again) if again else None
    wall_s = time.perf_counter() - started_s
    info = {"device": place, "slots": slots, "processes": processes}
    return Played(label, info, tuple(measured), repeats, wall_s)


def _call(taken: Taken, settings: PlaySettings) -> Call:
    audio = settings.prompt_audio.get(taken.spoken.item.id, {})
    return Call(
        user=taken.spoken.samples,
        prompt=settings.prompt_of(taken.spoken),
        seed=taken.draws,
        voice=audio.get("voice_prompt", ""),
        greeting=audio.get("greeting", ""),
    )


def _even_slots(calls: int, most: int, again: bool) -> int:
    """The fewest slots of a process that need no more rounds than `most` of them: a slot costs
    time while nobody is in it. The repeat is a call too, and there is none before the second
    round."""
    calls += again
    rounds = max(-(-calls // most), 1 + again)
    return -(-calls // rounds)


def worthwhile_processes(seconds: float, most: int) -> int:
    """Up to `most`, each with `SECONDS_A_PROCESS` of conversation or more."""
    return max(1, min(most, int(seconds / SECONDS_A_PROCESS)))


def fitting_processes(checkpoint: Path, device: str) -> int:
    """How many processes may hold the weights at once: one on a GPU, a core each on a CPU."""
    if device != "cpu":
        return 1
    weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # Of all memory, not of what is free just now: how sums are rounded hangs on the slots of a
    # process, and those on the number of processes.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # float32 in memory takes twice what bfloat16 takes on disk.
    fitting = int(_MEMORY_SHARE * memory // max(1, 2 * weights))
    return max(1, min(os.cpu_count() or 1, fitting))
