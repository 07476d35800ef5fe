"""A process that trains a tiny base with its like, and answers with what came of it."""

from pathlib import Path
from typing import Any

import torch

from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import measure_tokens
from pipeline.engines.pocket import build_lm
from tests.stages.conftest import TINY_LM_CONFIG
from tests.stages.pocket.conftest import random_bank, random_phones
from training.distributed import digest_of
from training.launch import work
from training.pocket.base_clips import ClipMaker
from training.pocket.base_loop import train
from training.pocket.base_source import LoopSettings, Source
from training.pocket.base_worker import join_group
from training.pocket.roles import load_grammar

SETTINGS = LoopSettings(
    5, batch_size=4, warmup_steps=2, longest_frames=200, reading_steps=1, word_steps=1, mixed=False
)


def trained(checkpoint: Path, folder: Path, ranks: Any, stops: list[int | None]) -> Any:
    """The model after runs to each of `stops`, the last one to the end."""
    opened, grammar = Checkpoint.open(checkpoint), load_grammar()
    bank = random_bank(grammar, measure_tokens(opened.load_mimi()))
    source = Source(
        grammar, ClipMaker(bank, opened.load_tokenizer(), random_phones(bank)), SETTINGS
    )
    valid = source.held_out(3)
    for until in stops:
        lm = build_lm(TINY_LM_CONFIG, 1)
        run = train(
            lm, source, SETTINGS, folder, "run", valid=valid, valid_every=2, checkpoint_every=2,
            until=until, ranks=ranks,
        )  # fmt: skip
    return lm, run.log


def do(job: dict[str, Any], report: Any) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks, checkpoint = join_group(), Path(job["checkpoint"])
    found = {}
    for name, stops in (("whole", [None]), ("resumed", [3, None])):
        lm, log = trained(checkpoint, Path(job["folder"]) / name, ranks, stops)
        found[name] = {"digest": digest_of(dict(lm.state_dict())), "log": log}
    found["text_linear"] = lm.text_linear.weight.flatten()[:500].tolist()
    return found


if __name__ == "__main__":
    work(do)
