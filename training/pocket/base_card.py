"""BASE.md: the pocket base's model card, with the figures of the run that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from duplex.files import write_atomic
from duplex.frames import FRAME_RATE
from training.device import cpu_name
from training.distributed import Ranks
from training.pocket.base_bank import Bank
from training.pocket.base_loop import Trained
from training.pocket.base_source import LoopSettings
from training.pocket.base_voices import AGENT_VOICES, HELD_USER_VOICES, ROOMS, USER_VOICES
from training.pocket.base_weights import CONFIG, TOKENIZER, WEIGHTS
from training.pocket.roles import Grammar
from training.prompt_swap import Margin

NAME = "BASE.md"


@dataclass(frozen=True)
class Made:
    """What a run made. final, stored: held-out likelihoods of the weights as trained and as they
    are stored; lessons: nats a word piece of lessons by name;
    margin: of words, prompt against swapped prompt; encoded_s: seconds of speech and codes;
    machine: what trained, and how: the options that said so; starts: the bases that it went on
    from, the oldest first."""

    settings: LoopSettings
    grammar: Grammar
    bank: Bank
    num_weights: int
    trained: Trained
    final: dict[str, float]
    stored: dict[str, float]
    lessons: dict[str, float]
    encoded_s: float
    machine: str
    how: str
    margin: Margin | None
    starts: Sequence[dict[str, Any]]


def write_card(folder: Path, made: Made) -> None:
    """Write the card beside the weights, which are there."""
    write_atomic(folder / NAME, card(folder, made).encode())


def card(folder: Path, made: Made) -> str:
    settings, bank, grammar, trained = made.settings, made.bank, made.grammar, made.trained
    size_mb = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG, TOKENIZER)) / 1e6
    minutes = bank.num_frames / FRAME_RATE / 60
    lines = [
        "# Pocket base",
        "",
        f"A Moshi `LMModel` of {made.num_weights / 1e6:.1f} M weights, trained from nothing to "
        "talk: to read a prompt in PersonaPlex's style, to listen, to take turns, to answer with "
        "the prompt's facts and to speak. How much of that it has learnt stands below and in "
        "docs/results/pocket_base.md, how it is made from nothing in docs/pocket.md. Made for "
        "tests, demos and LoRA on a laptop. Nothing in it "
        "was recorded or downloaded: text by a grammar, sound by espeak-ng, codes by the pocket "
        "codec.",
        "",
        "```",
        "python -m training.pocket base "
        f"--steps {settings.steps} --batch-size {settings.batch_size} "
        f"--reading-steps {settings.reading_steps} --word-steps {settings.word_steps} "
        f"--learning-rate {settings.learning_rate:g} "
        + f"--muon-rate {settings.muon_rate:g} "
        + f"--seed {settings.seed} {made.how} "
        f"{'--start START' if made.starts else '--again 0'} --work WORK",
        "```",
        "",
        "| | |",
        "| --- | --- |",
        f"| files | `{WEIGHTS}` (int8 with a scale a row), `{CONFIG}`, `{TOKENIZER}`: "
        f"{size_mb:.1f} MB |",
        f"| roles | {len(grammar.roles.businesses)} businesses, {len(grammar.roles.personal)} "
        "personal; no customers |",
        f"| facts | {len(grammar.talk.topics)} topics |",
        f"| utterances | {len(bank.units)}, {minutes:.0f} minutes with their tails; "
        f"{len(AGENT_VOICES)} agent voices in {len(grammar.talk.moods)} moods, "
        f"{len(USER_VOICES) + len(HELD_USER_VOICES)} user voices in {len(ROOMS)} rooms, "
        f"{len(HELD_USER_VOICES)} of them held out |",
        f"| training | {settings.steps} steps: {settings.reading_steps} of prompts and words "
        f"alone, {settings.word_steps} of dialogues and lessons in reading and hearing with loss "
        f"on words alone, the others of {settings.batch_size} dialogues drawn anew; "
        f"{'Muon and ' if settings.muon_rate else ''}AdamW at {settings.learning_rate:g}, "
        "bfloat16 over float32 weights |",
        f"| first weights | {_first(made.starts)} |",
        f"| time | {made.encoded_s / 60:.0f} min for speech and codes, "
        f"{trained.seconds / 60:.0f} min of training ({_speed(trained.frames_per_second)}, "
        f"{made.machine}) |",
        "",
        "| held-out dialogues, teacher-forced, nats | as trained | as stored |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {made.final[f'held_{key}']:.3f} | {made.stored[f'held_{key}']:.3f} |"
            for name, key in (
                ("words", "words"),
                ("text padding", "padding"),
                ("semantic codes", "semantic"),
                ("acoustic codes", "acoustic"),
            )
        ),
        "",
        f"Prompt-swap margin on them: {made.margin or 'not measured'} per word token. 0: it does "
        "not read its prompt, and the facts that it tells are likely ones, not the prompt's.",
        "",
        "Lessons, nats a word piece with the weights as stored: "
        + "; ".join(f"{name} {nats:.2f}" for name, nats in made.lessons.items())
        + ".",
        "",
        "Held out: about one value in eight of each slot, some wordings of prompts and questions, "
        f"{len(HELD_USER_VOICES)} user voices.",
        "",
        "It knows nothing but its grammar: English, short questions about facts in its prompt, "
        "small talk. It is no assistant, and what it says about the world means nothing.",
        "",
        "Licence: Apache-2.0, as this repository. espeak-ng, which made the speech, is "
        "GPL-3.0-or-later; its sound is not covered by that.",
        "",
    ]
    return "\n".join(lines)


def _first(starts: Sequence[dict[str, Any]]) -> str:
    if not starts:
        return "drawn, with heads that copy (training/pocket/base_initial.py)"
    return "; then ".join(
        f"those of a base of {one['steps']} steps (sha256 {one['weights'][:12]}…)" for one in starts
    )


def machine_name(ranks: Ranks) -> str:
    """What trains, as a card says it."""
    if ranks.device.type == "cuda":
        return f"one {torch.cuda.get_device_name(ranks.device)}"
    return f"{cpu_name()}, {ranks.count} processes"


def _speed(frames_per_second: float | None) -> str:
    if frames_per_second is None:
        return "nothing was left to do"
    return f"{frames_per_second:.0f} frames a second"
