"""What the pocket base is trained with: codec, utterances' codes, tokenizer; and where they lie."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from duplex.memory import keep_freed_memory
from pipeline.engines.pocket import POCKET
from training.pocket.base_bank import Bank, Codec, build_bank
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_espeak import Espeak
from training.pocket.base_parallel import shared_out
from training.pocket.base_units import Unit, UnitIndex
from training.pocket.roles import Grammar
from training.pocket.weights import codes_digest, load_codec

CORPUS_DIALOGUES, COFFEE_TIMES = 800, 2  # about as much of each
REPORT_EVERY_S = 20.0


@dataclass(frozen=True)
class Places:
    """Where a run keeps what it has."""

    work: Path
    codec: Path = POCKET

    @property
    def codes(self) -> Path:
        return self.work / "codes"

    @property
    def pack(self) -> Path:
        return self.work / "bank.safetensors"

    @property
    def timing(self) -> Path:
        """How long calls that spoke and encoded took."""
        return self.work / "codes.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.work / "checkpoints"

    @property
    def log(self) -> Path:
        return self.work / "losses.jsonl"


def load_pocket_codec(folder: Path) -> Codec:
    """The codec of a folder, as the bank takes it.

    Raises:
        MissingInputError, CorruptFileError
    """
    from pipeline.engines.codec import measure_tokens

    mimi = load_codec(folder)
    return Codec(mimi, codes_digest(mimi), measure_tokens(mimi))


def speak_and_encode(
    units: Sequence[Unit],
    grammar: Grammar,
    codec: Codec,
    places: Places,
    report: Callable[[str], None],
    processes: int = 1,
) -> Bank:
    """The bank of all units; says every 20 s how far it is.

    Args:
        codec: of `places.codec`.
        processes: share the work, by speakers.
    """
    if processes > 1:
        by_speaker: dict[str, list[Unit]] = {}
        for unit in units:
            by_speaker.setdefault(unit.speaker.id, []).append(unit)
        speakers = list(by_speaker.values())
        encode = partial(_encode_speakers, grammar=grammar, places=places)
        shared_out(encode, speakers, processes, lambda n: report(f"{n} of {len(speakers)} voices"))
    keep_freed_memory()
    last_s = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last_s
        if time.monotonic() - last_s > REPORT_EVERY_S or done == total:
            last_s = time.monotonic()
            report(f"encoded {done} of {total} utterances")

    with Espeak() as speak:
        return build_bank(units, grammar, codec, places.codes, speak, speak.revision, progress)


def _encode_speakers(
    speakers: Sequence[Sequence[Unit]], grammar: Grammar, places: Places
) -> list[None]:
    """Leave the codes of these speakers' units in the work folder."""
    codec = load_pocket_codec(places.codec)
    units = [unit for own in speakers for unit in own]
    speak_and_encode(units, grammar, codec, places, lambda line: None)
    return [None] * len(speakers)


def corpus_of(grammar: Grammar, units: Sequence[Unit], seed: int) -> str:
    """Text that the tokenizer is made for: prompts and sentences of the grammar, as often as the
    dialogues need them, and the coffee set's corpus."""
    from pipeline.engines.pocket import CORPUS

    index = UnitIndex(units)
    lines = CORPUS.read_text(encoding="utf-8").splitlines() * COFFEE_TIMES
    for number in range(CORPUS_DIALOGUES):
        dialogue = draw_dialogue(grammar, index, random.Random(f"{seed}/corpus/{number}"))
        lines.append(f"<system> {dialogue.prompt.text} <system>")
        for said in dialogue.said:
            if said.role == "agent":
                lines.append(" ".join(units[unit].text for unit in said.units))
    return "\n".join(lines)


def train_tokenizer(grammar: Grammar, units: Sequence[Unit], seed: int) -> bytes:
    """A SentencePiece model of `TEXT_CARD` pieces, always the same for the same grammar."""
    from pipeline.engines import pocket

    return pocket.train_tokenizer(corpus_of(grammar, units, seed), pocket.TEXT_CARD)
