"""`python -m training.pocket codec`: trains the pocket codec and writes it with its card.

Killed, it goes on from its last checkpoint in `--work`; the same steps and seed give the same
files. One thread, whatever the machine, so that sums are taken in the same order.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from moshi.utils.compile import no_compile

from duplex.files import append_line, read_lines, sha256_file, write_atomic
from pipeline.engines.pocket import POCKET
from training.device import cpu_name
from training.pocket.codec_card import CARD, card
from training.pocket.codec_loop import CodecRecipe, CodecTrainer, record_tapes
from training.pocket.weights import WEIGHTS, load_codec, save_codec

STEPS, DECODER_STEPS, SEED, EVERY = 3_200, 2_000, 1234, 200
TIMING = "timing.jsonl"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.pocket codec",
        description="Train the pocket codec on speech made here.",
        epilog="example: python -m training.pocket codec --out data/pocket --work runs/codec",
    )
    parser.add_argument("--out", type=Path, default=POCKET, help="folder for the codec's files")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help="in which all of it learns")
    parser.add_argument("--decoder-steps", type=int, default=DECODER_STEPS, help="after those")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--minutes", type=float, default=CodecRecipe.minutes, help="of speech")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.decoder_steps < 0 or options.minutes <= 0:
        parser.error("--steps and --minutes must be above 0, --decoder-steps not below")
    recipe = CodecRecipe(
        options.steps, options.decoder_steps, options.seed, minutes=options.minutes
    )
    train(recipe, options.out, options.work)
    return 0


def train(recipe: CodecRecipe, out: Path, work: Path) -> None:
    """Train, or go on training, and write codec.safetensors, codec.json and CODEC.md."""
    torch.set_num_threads(1)
    started, cpu = time.monotonic(), time.process_time()
    print(f"speaking {recipe.minutes:g} minutes …", flush=True)
    tape, valid = record_tapes(recipe)
    trainer = CodecTrainer(recipe, tape, valid, work)

    def report(line: dict[str, Any]) -> None:
        nonlocal started, cpu
        print(" ".join(f"{name} {value}" for name, value in line.items()), flush=True)
        now, now_cpu = time.monotonic(), time.process_time()
        spent = {"step": line["step"], "wall_s": now - started, "cpu_s": now_cpu - cpu}
        append_line(work / TIMING, json.dumps(spent))
        started, cpu = now, now_cpu

    with no_compile():
        trainer.run(every=EVERY, report=report)
    save_codec(trainer.mimi, recipe.config, out)
    rounded = trainer.valid_codes(load_codec(out)) != trainer.valid_codes(trainer.mimi)
    facts = {
        "recipe": recipe,
        "phones": len(tape.phones.names),
        "log": trainer.log,
        "seconds": _seconds(work),
        "parameters": sum(p.numel() for p in trainer.mimi.parameters()),
        "bytes": (out / WEIGHTS).stat().st_size,
        "codes_changed": rounded.float().mean((0, 2)).tolist(),
        "digest": sha256_file(out / WEIGHTS),
        "machine": f"{cpu_name()}, one thread, torch {torch.__version__}",
    }
    write_atomic(out / CARD, card(facts).encode())


def _seconds(work: Path) -> dict[str, float]:
    """Seconds of all runs that led here; the last ones of a step that was done twice."""
    by_step = {line["step"]: line for line in read_lines(work / TIMING)}
    return {kind: sum(line[kind] for line in by_step.values()) for kind in ("wall_s", "cpu_s")}
