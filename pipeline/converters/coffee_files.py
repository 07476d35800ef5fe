"""The predecessor's `.pt` files and the current contract, file by file (`duplex/coffee.py`).

    coffee     a bare int64 [17, T] for each conversation
    workbench  the same, and beside each `<stem>.pt` a `<stem>.json` with its TensorClip record

Each result is converted back before it is written and must equal its source, so a file whose
form cannot be restored is refused, not bent. `conversion.jsonl` says of each file how much
text it holds and how much is missing. Files are read with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from duplex.base import canonical_json
from duplex.clips import text_digest
from duplex.coffee import (
    Conversion,
    TextCoder,
    missing_tokens,
    read_prompt,
    to_coffee,
    to_current,
    turn_spans,
)
from duplex.config import ModelSection
from duplex.configfile import load_config
from duplex.errors import DuplexError, RecordError, RequestError
from duplex.files import new_folder, sha256_bytes, write_atomic
from duplex.records import Dialogue, FrameSpan, TensorClip
from duplex.splits import Member, assign_splits
from duplex.streams import (
    TEXT_EPAD,
    TEXT_PAD,
    TEXT_ROW,
    ZERO_TOKEN,
    CodecTokens,
    check_codes,
    coffee_text,
    system_text,
)
from pipeline.converters.common import ConversionReport, is_config, track
from pipeline.converters.tensor_sources import Model, Source, find_sources, load_model
from pipeline.imported import slug
from pipeline.imports import read_dialogues

Form = Literal["workbench", "coffee"]
REPORT = "conversion.jsonl"
UNKNOWN_ALIGNMENT = "onset, loss unknown"
UNKNOWN_LOSS = "unknown: the file does not hold the text that was dropped"
VALID_FRACTION = 0.1
SPLIT_SEED = 42


@dataclass(frozen=True)
class Converted:
    source: Source
    content: bytes  # the .pt
    codes: np.ndarray
    made: Conversion
    dialogue: Dialogue | None
    missing: list[int] | None  # tokens of each agent turn that the file does not hold
    dropped: int | None  # None: unknown
    note: str


def convert_tensors(
    source: Path,
    out: Path,
    form: str,
    *,
    model: str | None,
    dialogues: Path | None,
    prompt_fill: str,
    skip_refused: bool,
    runs: Path,
    overrides: list[str] | None = None,
) -> ConversionReport:
    """Convert a .pt file, a folder of them, or a tensors stage's clips into the folder `out`.

    Args:
        model: `pocket`, a checkpoint folder or a hub name; a config as `source` names its own.
        dialogues: the predecessor's training.json, to say what text is missing.
        prompt_fill: `pad` or `zero`, what stands beside a coffee prompt's text.

    Raises:
        RequestError: the request is wrong, or there is no tensor at `source`.
        StageFailedError: a file cannot be converted; nothing was written.
    """
    if form not in ("workbench", "coffee"):
        raise RequestError(f"--to must be workbench or coffee, found {form}")
    if prompt_fill not in ("pad", "zero"):
        raise RequestError(f"--prompt-fill must be pad or zero, found {prompt_fill}")
    section = load_config(source, overrides).model if is_config(source) else None
    section = ModelSection(base=model) if model else section
    if section is None:
        raise RequestError(
            "--model must be given: without the model's tokenizer the prompt's tokens cannot be "
            "given the other closing tag"
        )
    sources = find_sources(source, runs, overrides)
    texts = _dialogues_by_id(dialogues)
    if texts is not None and not any(slug(item.name) in texts for item in sources):
        raise RequestError(
            f"{dialogues} must hold the conversations of {source} by their ids, which are the "
            f"files' names; found none of {len(sources)}, first {slug(sources[0].name)}"
        )
    with new_folder(out) as folder:
        outcome = ConversionReport()
        loaded = load_model(section, runs)
        fill = TEXT_PAD if prompt_fill == "pad" else ZERO_TOKEN
        finished = []
        for item in track("convert", sources):
            try:
                dialogue = texts.get(slug(item.name)) if texts is not None else None
                converted = _convert(item, form, loaded, fill, dialogue, texts is not None)
            except (DuplexError, ValueError, OSError) as error:
                outcome.refused.append((item.name, str(error)))
                continue
            write_atomic(folder / f"{item.name}.pt", converted.content)
            outcome.written += 1
            outcome.rows.append(_row(converted, form))
            if form == "workbench":
                finished.append(_record(converted, loaded))
        outcome.check(source, skip_refused=skip_refused)
        for name, clip in _with_splits(finished):
            write_atomic(folder / f"{name}.json", f"{clip.to_json()}\n".encode())
        lines = "".join(f"{canonical_json(row)}\n" for row in outcome.rows)
        write_atomic(folder / REPORT, lines.encode())
    return outcome


def _dialogues_by_id(path: Path | None) -> dict[str, Dialogue] | None:
    if path is None:
        return None
    records = read_dialogues(path).records
    return {record.id: record for record in records if isinstance(record, Dialogue)}


# -- one file


def _convert(
    source: Source, form: str, model: Model, fill: int, dialogue: Dialogue | None, asked: bool
) -> Converted:
    import torch

    codes = source.read()
    faults = check_codes(codes, card=model.card, text_card=model.text_card, zero_text=True)
    if faults:
        raise RecordError("; ".join(faults))
    _check_record(source.clip, form, model)
    parts = read_prompt(codes, coffee=form == "workbench")
    _check_codec(parts.codec, model.codec)
    word_aligned = source.clip is None or source.clip.alignment == "word"
    if form == "workbench":
        made = to_current(codes, model.coder)
        back = to_coffee(made.codes, model.coder, fill=parts.fill, has_epad=False).codes
        wanted = codes
    else:
        made = to_coffee(codes, model.coder, fill=fill, has_epad=word_aligned)
        back, wanted = to_current(made.codes, model.coder).codes, codes.copy()
        wanted[TEXT_ROW][wanted[TEXT_ROW] == ZERO_TOKEN] = TEXT_PAD
    if not np.array_equal(back, wanted):
        raise RecordError("the way back must give the same tensor, and does not")
    missing, dropped, note = _loss(source, made, form, dialogue, model.coder, asked)
    if form == "workbench" and parts.fill == ZERO_TOKEN:
        note += "; the prompt was filled with -1, so go back with --prompt-fill zero"
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(made.codes), buffer)
    return Converted(
        source, buffer.getvalue(), made.codes, made, dialogue, missing, dropped, note.lstrip("; ")
    )


def _loss(
    source: Source,
    made: Conversion,
    form: str,
    dialogue: Dialogue | None,
    coder: TextCoder,
    asked: bool,
) -> tuple[list[int] | None, int | None, str]:
    """Tokens missing of each turn and of all, None where unknown, and what to say about it."""
    note = UNKNOWN_LOSS
    if dialogue is not None:
        try:
            missing = _missing(made, form, dialogue, coder)
            return missing, sum(missing), ""
        except ValueError as error:
            note = f"unknown: the dialogue of this id does not fit: {error}"
    elif asked:
        note = f"unknown: --dialogues holds no conversation {slug(source.name)}"
    if source.clip is not None and source.clip.alignment != UNKNOWN_ALIGNMENT:
        return None, source.clip.dropped_tokens, "by the clip's own record"
    return None, None, note


def _check_record(clip: TensorClip | None, form: str, model: Model) -> None:
    """What the record beside a tensor says must fit the model and the target."""
    if clip is None:
        return
    if (clip.codec_digest, clip.tokenizer_digest) != (model.codec_digest, model.tokenizer_digest):
        raise RecordError("must be made by the model's own codec and tokenizer, its record names "
                          "others: give the --model that it was made for")  # fmt: skip
    if form == "coffee":
        phases = {span.label for span in clip.prompt} & {"voice", "greeting"}
        if phases:
            raise RecordError(
                f"the predecessor's prompt has no {' and no '.join(sorted(phases))}: make the clip "
                "again without it"
            )


def _check_codec(found: CodecTokens, wanted: CodecTokens) -> None:
    for name in ("silence", "sine"):
        if getattr(found, name) != getattr(wanted, name):
            raise RecordError(
                f"the prompt's {name} must be that of the model's codec, "
                f"{list(getattr(wanted, name))}; found {list(getattr(found, name))}: another codec "
                "made this file"
            )


def _missing(made: Conversion, form: str, dialogue: Dialogue, coder: TextCoder) -> list[int]:
    tagged = (system_text if form == "workbench" else coffee_text)(dialogue.system_prompt)
    if tuple(coder.encode(tagged)) != made.tokens:
        raise ValueError("its system prompt is another")
    turns = [coder.encode(turn.text) for turn in dialogue.turns if turn.role == "agent"]
    return missing_tokens(made.codes[TEXT_ROW, made.prompt[-1][2] :], turns)


# -- what is said about it


def _row(converted: Converted, form: str) -> dict[str, Any]:
    start = converted.made.prompt[-1][2]
    text = converted.codes[TEXT_ROW, start:]
    row: dict[str, Any] = {
        "file": f"{converted.source.name}.pt",
        "form": form,
        "frames": converted.codes.shape[1],
        "prompt_tokens": len(converted.made.tokens),
        "text_tokens": int(((text != TEXT_PAD) & (text != ZERO_TOKEN)).sum()),
        "dropped_tokens": converted.dropped,
    }
    if converted.missing is not None:
        row["dropped_by_turn"] = converted.missing
    unknown_ids = int((text == TEXT_EPAD).sum())
    if unknown_ids:
        row["zero_ids"] = unknown_ids
    if converted.note:
        row["note"] = converted.note
    return row


def _record(converted: Converted, model: Model) -> tuple[str, Member, TensorClip]:
    """The sidecar of a workbench file. A loss that is unknown is named in `alignment`."""
    name, dialogue, made = slug(converted.source.name), converted.dialogue, converted.made
    start = made.prompt[-1][2]
    text = converted.codes[TEXT_ROW, start:]
    present = int((text != TEXT_PAD).sum())
    clip = TensorClip(
        id=name,
        speech_id=name,
        dialogue_id=dialogue.id if dialogue else None,
        persona_id=dialogue.persona_id if dialogue else _persona_of(made.tokens),
        text_digest=text_digest(dialogue.turns) if dialogue else None,
        tensor=sha256_bytes(converted.content),
        num_frames=converted.codes.shape[1],
        prompt=_spans(made.prompt),
        turns=_spans(turn_spans(converted.codes, start, model.codec.silence)),
        text_tokens=present + (converted.dropped or 0),
        dropped_tokens=converted.dropped,
        alignment=UNKNOWN_ALIGNMENT if converted.dropped is None else "onset",
        split="train",
        codec_digest=model.codec_digest,
        tokenizer_digest=model.tokenizer_digest,
    )
    member = Member(
        id=name,
        persona=clip.persona_id,
        conversation=name,
        text=clip.text_digest or name,
    )
    return converted.source.name, member, clip


def _persona_of(tokens: Sequence[int]) -> str:
    """Whose clip it is where no dialogue says so: that of the system text, so that one prompt
    is never on both sides of the split."""
    return f"prompt-{sha256_bytes(canonical_json(list(tokens)).encode())[:12]}"


def _spans(spans: tuple[tuple[str, int, int], ...]) -> tuple[FrameSpan, ...]:
    return tuple(FrameSpan(label=label, start=start, end=end) for label, start, end in spans)


def _with_splits(
    finished: list[tuple[str, Member, TensorClip]],
) -> Iterator[tuple[str, TensorClip]]:
    """A tenth of the personas is held out, of the conversations where there is but one persona;
    without dialogues each file counts as a persona."""
    members = [member for _, member, _ in finished]
    several = len({member.persona for member in members}) > 1
    by = "persona" if several else "conversation"
    split = assign_splits(members, by, VALID_FRACTION, SPLIT_SEED)
    for name, member, clip in finished:
        yield name, clip.model_copy(update={"split": split[member.id], "split_by": by})
