"""`python -m training.pocket regression`: what the pocket base could do before it was tuned.

Dialogues of the grammar's held-out side as `.pt` tensors, for `evaluate.base_clips`: user voices
that no training of the base has heard, and values and wordings held out from its dialogues, as far
as a slot has such ones. A customer of a coffee shop comes up in none of them. The first of those
that the base's card is measured on, cut shorter.

Codes are int16 in the files, which hold them as well as int64 does, at a quarter of the size.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch

from duplex.errors import MissingInputError, RequestError
from duplex.files import write_atomic
from training.batches import Clip
from training.pocket.base_clips import ClipMaker
from training.pocket.base_data import Places, load_pocket_codec
from training.pocket.base_pack import Pack, load_pack
from training.pocket.base_source import LoopSettings, Source
from training.pocket.base_voices import voices_digest
from training.pocket.base_weights import POCKET, TOKENIZER, base_config
from training.pocket.roles import Grammar, load_grammar

FOLDER = POCKET / "regression"
CLIPS, LONGEST_FRAMES = 16, 400
MAKE_IT = "Make it: python -m training.pocket base --codes-only --start data/pocket --work WORK"


def main(argv: list[str]) -> int:
    """Write the clips; 0 when it is done.

    Raises:
        MissingInputError, CorruptFileError: no pack of utterances in WORK, or a damaged one.
        RequestError: one of another grammar, codec, voices, tokenizer or seed than the shipped
            base's.
    """
    parser = argparse.ArgumentParser(prog="python -m training.pocket regression")
    add = parser.add_argument
    add(
        "--work",
        type=Path,
        required=True,
        help="of `base --codes-only --start data/pocket`: holds bank.safetensors",
    )
    add("--out", type=Path, default=FOLDER, help="where the clips go")
    arguments = parser.parse_args(argv)
    path = Places(arguments.work).pack
    if not path.exists():
        raise MissingInputError(f"{path}: must be there, found none. {MAKE_IT}")
    pack, grammar = load_pack(path), load_grammar()
    check_pack(path, pack, grammar)
    contents = {clip.id: clip_bytes(clip) for clip in held_out_dialogues(pack, grammar)}
    for name, content in contents.items():
        write_atomic(arguments.out / f"{name}.pt", content)
    size = sum(map(len, contents.values()))
    print(f"{len(contents)} clips, {size / 1e3:.0f} kB, in {arguments.out}")
    return 0


def check_pack(path: Path, pack: Pack, grammar: Grammar) -> None:
    """
    Raises:
        RequestError: it does not go with the base in data/pocket.
    """
    due = {
        "grammar": (pack.grammar, grammar.digest),
        "codec": (pack.codec, load_pocket_codec(POCKET).digest),
        "tokenizer": (pack.tokenizer, (POCKET / TOKENIZER).read_bytes()),
        "voices": (pack.voices, voices_digest()),
        "utterances": (pack.drawn_by, base_config(POCKET)["utterances"]),
    }
    for name, (found, expected) in due.items():
        if found != expected:
            raise RequestError(
                f"{path}: must be of the {name} in data/pocket, found another. {MAKE_IT}"
            )


def held_out_dialogues(
    pack: Pack, grammar: Grammar, count: int = CLIPS, longest: int = LONGEST_FRAMES
) -> list[Clip]:
    """`count` dialogues, each with its prompt: int16 [17, T <= longest]."""
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=pack.tokenizer)
    maker = ClipMaker(pack.bank, tokenizer, pack.phones)
    settings = LoopSettings(1, longest_frames=longest, seed=pack.seed)
    return [one.clip for one in Source(grammar, maker, settings).held_out(count)]


def clip_bytes(clip: Clip) -> bytes:
    """A `.pt` that holds the clip's codes."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(clip.codes.astype("int16")), buffer)
    return buffer.getvalue()
