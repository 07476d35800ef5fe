"""The findings that an inspection may have: severity, what must hold, what to do. Pure.

`harm`: training on it would teach what inference never sees, or lose what was said. `warn`:
likely not what was wanted. `note`: good to know. docs/inspect.md lists them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["harm", "warn", "note"]
SEVERITIES: tuple[Severity, ...] = ("harm", "warn", "note")


@dataclass(frozen=True)
class Kind:
    """A finding's severity, what must hold, and what to do when it does not."""

    severity: Severity
    must: str
    remedy: str


FINDINGS: dict[str, Kind] = {
    "not-codes": Kind(
        "harm", "a `.pt` holds one dense integer tensor", "write it again with `torch.save(codes)`"
    ),
    "packaged-voice": Kind(
        "harm",
        "a training tensor holds codes",
        "give a packaged voice to a server, in its `--voices`; take it out of the training folder",
    ),
    "shape": Kind("harm", "the shape is [17, T], T at least 1", "make the file again"),
    "dtype": Kind("harm", "the type is int64, or int16 on disk", "convert it, then check ranges"),
    "out-of-range": Kind(
        "harm",
        "audio codes are below the codec's card, text ids below the text card, none negative",
        "make the file again with the codec and tokenizer of the model that is trained",
    ),
    "record-mismatch": Kind(
        "harm", "the record describes the file", "remove the stage folder and run again"
    ),
    "zero-text": Kind(
        "harm",
        "silent frames hold PAD: with -1 silence gets no loss, and inference never feeds -1",
        "convert the file, or set `tensors.padding: pad` and make it again",
    ),
    "closing-tag": Kind(
        "harm",
        "the system text ends with `<system>`, as the server sends it",
        "set `tensors.layout: personaplex` and make it again",
    ),
    "no-tags": Kind(
        "harm",
        "the system text stands between `<system>` tags, as the server sends it",
        "make the file again",
    ),
    "prompt-rows": Kind(
        "harm",
        "in the prompt user rows hold the codec's sine and agent rows its silence",
        "make the file again with the codec of the model that is trained",
    ),
    "frame-0-mismatch": Kind(
        "harm",
        "the first frame is dropped or kept as the record's layout says",
        "make the file again: every prompt frame is shifted by one",
    ),
    "dropped-tokens": Kind(
        "harm",
        "every token of the agent's words stands in the text row",
        "set `tensors.overflow: continue`",
    ),
    "silent-agent": Kind(
        "harm",
        "the agent speaks, in text and in audio",
        "look for speech that failed, or take it out",
    ),
    "no-dialogue": Kind(
        "harm", "a dialogue follows the prompt", "take the file out: there is nothing to learn"
    ),
    "too-long": Kind(
        "harm",
        "prompt and dialogue fit the model's context",
        "shorten the dialogue, or set `tensors.long: cut`",
    ),
    "foreign-tokenizer": Kind(
        "harm",
        "the text ids are those of the model's tokenizer",
        "make the file again with the model that is trained",
    ),
    "foreign-codec": Kind(
        "harm",
        "the audio codes are those of the model's codec",
        "make the file again with the model that is trained",
    ),
    "split-overlap": Kind(
        "harm",
        "no text, voice or conversation is in training and validation",
        "run the tensors stage again: it ties what belongs together",
    ),
    "frame-0-kept": Kind(
        "warn",
        "a tensor starts with the second prompt frame: the model never sees what is passed first",
        "drop the first column",
    ),
    "prompt-silence": Kind(
        "warn",
        "6 silent frames stand on each side of the system text (5 before it, frame 0 dropped)",
        "make the file again",
    ),
    "window-full": Kind(
        "warn",
        "a turn's tokens do not end exactly where its first 30 % end",
        "tokens were probably cut there: make the file again with `tensors.overflow: continue`",
    ),
    "long-prompt": Kind(
        "warn", "the prompt takes less than half of the model's context", "shorten the system text"
    ),
    "user-silent": Kind("warn", "the other side speaks", "look at the recording's right channel"),
    "turn-without-text": Kind("warn", "each of the agent's turns has tokens", "look at its words"),
    "loudness": Kind(
        "warn", "each channel is within 6 LU of -24 LUFS", "normalise the recording's channels"
    ),
    "personas-on-both-sides": Kind(
        "warn",
        "validation holds personas that training never sees",
        "set `tensors.split: persona`, unless a split by conversation was wanted",
    ),
    "duplicate": Kind("warn", "no two files hold the same codes", "keep one of them"),
    "one-sided": Kind("warn", "both sides of the split have clips", "see `tensors.split`"),
    "late-text": Kind(
        "note",
        "with onset alignment, 70 % of the tokens stand in the first 40 % of their turns",
        "fast speech does that; nothing is lost",
    ),
    "several-stages": Kind(
        "note",
        "a run folder has one tensors stage; else the newest is looked at",
        "name the stage folder that is meant, as `duplex status CONFIG` shows it",
    ),
    "late-tokens": Kind("note", "tokens stand where their alignment wants them", "nothing is lost"),
    "constant-silence": Kind(
        "note",
        "silence is encoded with the conversation",
        "`tensors.encoding: conversation` does that",
    ),
    "prompt-ties": Kind(
        "note",
        "the prompt's silence and sine are those that the model's codec gives here",
        "nothing: some codebooks waver between near-equal codes from machine to machine",
    ),
    "no-prompt": Kind("note", "the tensor starts with a prompt", "fine for Moshi's own form"),
    "tags-unread": Kind(
        "note", "the system text's tags can be read", "give `--model` or `--tokenizer`"
    ),
    "shared-user-voice": Kind("note", "user voices are on one side of the split", "nothing"),
    "shared-sentence": Kind("note", "sentences are on one side of the split", "nothing"),
}


@dataclass(frozen=True)
class Finding:
    severity: Severity
    code: str
    message: str


def finding(code: str, found: str) -> Finding:
    """A finding of a kind, worded as what must hold, what was found, what to do."""
    kind = FINDINGS[code]
    return Finding(
        kind.severity, code, f"must hold: {kind.must}; found {found}. Do: {kind.remedy}."
    )
