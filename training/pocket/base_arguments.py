"""What `python -m training.pocket base` is asked for: its options and its trainings."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from training.pocket.base_data import Places
from training.pocket.base_weights import POCKET

AGAIN_STEPS = 2200
FIRST = "first"


class _Help(argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and each default that there is."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        given = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if given else action.help


def parse(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """The command's arguments; exits with 2 where they do not go together."""
    parser = argparse.ArgumentParser(
        prog="python -m training.pocket base",
        description=description,
        formatter_class=_Help,
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=POCKET,
        help="where the weights go; by default over what is shipped",
    )
    add("--start", type=Path, help="folder of a base whose weights and tokenizer to go on from")
    add("--work", type=Path, required=True, help="where a run keeps what it has")
    add("--codec", type=Path, default=POCKET, help="folder of the pocket codec")
    add("--steps", type=int, default=3150, help="updates in all")
    add("--reading-steps", type=int, default=150, help="first steps, of prompts and words alone")
    add(
        "--word-steps", type=int, default=1400, help="steps behind them: dialogues, but words alone"
    )
    add("--seed", type=int, default=1, help="of utterances, first weights and dialogues")
    add(
        "--again", type=int, metavar="STEPS",
        help="updates of a second training, which speaks from the start: from the first's weights, "
        "at two thirds of its rate and with the next seed; 0: none (default: "
        f"{AGAIN_STEPS}, none with --start)",
    )  # fmt: skip
    add("--processes", type=int, default=2, help="which share the work; each takes a core")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one process trains on it")
    add(
        "--ahead", type=int, default=0,
        help="processes that draw batches ahead, for a GPU: each holds sixteen steps in shared "
        "memory, by its sizes some 170 MB at 64 dialogues a batch",
    )  # fmt: skip
    add("--checkpoint-every", type=int, default=200, help="updates")
    add("--codes-only", action="store_true", help="stop when WORK/bank.safetensors is made")
    add("--bank", type=Path, help="such a file; then nothing is spoken or encoded here")
    add("--batch-size", type=int, default=12, help="dialogues of an update")
    add("--learning-rate", type=float, default=1.5e-3, help="of AdamW, at its highest")
    add(
        "--muon-rate", type=float, default=2.0,
        help="update the temporal layers' matrices by Muon, at so many times AdamW's rate; 0: no",
    )  # fmt: skip
    add("--small", action="store_true", help="a fifth of the utterances, to try it out")
    arguments = parser.parse_args(argv)
    if arguments.again is None:
        arguments.again = 0 if arguments.start else AGAIN_STEPS
    for name, least in (
        ("again", 0),
        ("steps", 1),
        ("reading_steps", 0),
        ("word_steps", 0),
        ("batch_size", 1),
        ("ahead", 0),
        ("checkpoint_every", 1),
    ):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= arguments.muon_rate <= 100:
        parser.error(f"--muon-rate must lie between 0 and 100, found {arguments.muon_rate}")
    if not 0 < arguments.learning_rate < 1:
        parser.error(f"--learning-rate must lie between 0 and 1, found {arguments.learning_rate}")
    start = None if arguments.codes_only else arguments.start
    if start is not None and arguments.out.resolve() == start.resolve():
        parser.error(
            f"--out must be another folder than --start, found {start} for both: a killed run "
            "would go on from what it has written"
        )
    first = arguments.work / FIRST
    if arguments.again and first.resolve() in {
        path.resolve() for path in (arguments.out, start) if path is not None
    }:
        parser.error(
            f"--out and --start must be other folders than {first}, where the first training's "
            "base lies until the second is done"
        )
    if arguments.codes_only and arguments.bank:
        parser.error("--codes-only makes what --bank names: give one of them")
    if arguments.device == "cuda" and not arguments.codes_only:
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that torch can use, found none")
        if arguments.processes != 1:
            parser.error("--device cuda trains in one process: give --processes 1")
    if arguments.reading_steps + arguments.word_steps >= arguments.steps:
        parser.error(
            "--steps must be more than --reading-steps and --word-steps, on which nothing is "
            f"spoken: found {arguments.steps}, {arguments.reading_steps} and "
            f"{arguments.word_steps}"
        )
    if not arguments.codes_only and not 1 <= arguments.processes <= arguments.batch_size:
        parser.error(
            "--processes must be 1 to --batch-size, so that each has a dialogue of every batch, "
            f"found {arguments.processes} and {arguments.batch_size}"
        )
    return arguments


def trainings(argv: list[str], arguments: argparse.Namespace) -> list[list[str]]:
    """The arguments of each training, in order: the first, and one that speaks from the start.

    arguments: those of `argv`. The first then writes to WORK/first, and its own files lie in WORK;
    the second's lie in WORK/again.
    """
    if arguments.codes_only or not arguments.again:
        return [argv]
    first = arguments.work / FIRST
    changes = {
        "start": first,
        "bank": arguments.bank or Places(arguments.work).pack,
        "work": arguments.work / "again",
        "steps": arguments.again,
        "reading-steps": 0,
        "word-steps": 0,
        "learning-rate": arguments.learning_rate * 2 / 3,
        "seed": arguments.seed + 1,
    }
    again = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    return [[*argv, "--again", "0", "--out", str(first)], [*argv, "--again", "0", *again]]
