"""Failures that a person has mended -> dialogues that `duplex import --stage dialogues` takes.

A report's failures.jsonl has a line for each reply with a fault. Who fills in its `better`, what
the agent should have said, makes training data of it: the conversation up to there, with the better
reply as its last turn and those of earlier lines in place of the earlier faults.

One dialogue for each conversation. The line of an earlier turn is the beginning of a later one's,
and would be trained on twice, or stand on both sides of the split. A conversation ends before its
first fault that has no `better`: what comes after it rests on a wrong reply, so a mended line there
is refused, not cut to what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationError

from duplex.base import Frozen, Role, Slug, Text, canonical_json
from duplex.characters import GapRange, Persona
from duplex.datafiles import describe_faults, load_personas
from duplex.errors import RequestError
from duplex.files import require_free, write_atomic
from duplex.metrics import is_echo, says_any
from duplex.records import Dialogue, Turn, record_line
from duplex.words import words_of
from pipeline.converters.common import ConversionReport
from pipeline.evaluation.grounding import invented
from pipeline.imported import json_values, slug

GAP_AFTER_USER, GAP_OTHER = GapRange(low=2, high=8), GapRange(low=4, high=12)  # as an import has
LONGEST_NAME = 80  # of an id, which has a digest behind it


class Said(Frozen):
    """faults: of an agent's reply."""

    role: Role
    text: str
    faults: tuple[str, ...] = ()


class Failure(Frozen):
    """A line of failures.jsonl as `pipeline.evaluation.found.failures` writes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item: Slug
    seed: int
    model: Slug
    persona: Slug | None = None
    persona_type: Slug
    turn: Annotated[int, Field(ge=0)]
    system_prompt: str
    history: Annotated[tuple[Said, ...], Field(strict=False)]
    user: Text
    reply: str
    faults: Annotated[tuple[str, ...], Field(strict=False)]
    due: Annotated[tuple[str, ...], Field(strict=False)] = ()
    audio: str = ""
    better: str | None = None

    @property
    def conversation(self) -> tuple[str, int, str]:
        return self.item, self.seed, self.model

    @property
    def name(self) -> str:
        return f"{self.item}, seed {self.seed}, {self.model}, turn {self.turn + 1}"

    @property
    def mended(self) -> str | None:
        """The better reply; None where none was filled in."""
        return (self.better or "").strip() or None


@dataclass
class Mended:
    """dialogues: one for each conversation that has any; waiting: lines without `better`; refused:
    (line, why); doubts: what our own rules would blame in a better reply."""

    dialogues: list[Dialogue] = field(default_factory=list)
    waiting: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def convert_failures(
    source: Path, out: Path, *, personas: Sequence[Path] = (), skip_refused: bool = False
) -> ConversionReport:
    """Write the mended lines of `source` as dialogues, one a line, to the new file `out`.

    Args:
        personas: folders of persona files, which give names and pauses.

    Raises:
        RequestError: `out` is taken or no .jsonl, a line is none of ours, or no `better` is
            filled in.
        StageFailedError: a mended line was refused, and may not be left out.
        DataFileError: the personas.
    """
    if out.suffix != ".jsonl":
        raise RequestError(f"OUT must be a file that ends in .jsonl, found {out}")
    require_free(out)
    known = {one.id: one for folder in personas for one in load_personas(folder)}
    failures = read_failures(source)
    found = mend(failures, known)
    outcome = ConversionReport(written=len(found.dialogues), refused=found.refused)
    if not found.dialogues and not found.refused:
        raise RequestError(
            f"{source}: at least one line must have `better`, what the agent should have said; "
            f"found none in {len(failures)} lines. Write it in place of null"
        )
    outcome.check(source, skip_refused=skip_refused)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [record_line(dialogue) for dialogue in found.dialogues]
    write_atomic(out, "".join(f"{line}\n" for line in lines).encode())
    outcome.rows = [{"id": d.id, "turns": len(d.turns)} for d in found.dialogues]
    outcome.notes = [
        *([f"lines without `better`, left out: {found.waiting}"] if found.waiting else []),
        *found.doubts,
        "what was trained on proves nothing: evaluate the next model on other items",
    ]
    return outcome


def read_failures(path: Path) -> list[Failure]:
    """
    Raises:
        RequestError: a line that is none, or two of one reply.
    """
    found: list[Failure] = []
    seen: dict[tuple[tuple[str, int, str], int], int] = {}
    for number, value in enumerate(json_values(path), start=1):
        try:
            line = Failure.model_validate(value)
        except ValidationError as error:
            raise RequestError(
                f"{path}: record {number} must be a line of failures.jsonl, of which `better` "
                f"alone is changed: {describe_faults(error)}"
            ) from None
        first = seen.setdefault((line.conversation, line.turn), number)
        if first != number:
            raise RequestError(
                f"{path}: each reply must be there once, found {line.name} in records {first} and "
                f"{number}. Convert each report's file by itself"
            )
        found.append(line)
    return found


def mend(failures: Iterable[Failure], personas: Mapping[str, Persona]) -> Mended:
    """Pure: the conversations of the mended lines, in the order in which they first appear."""
    found = Mended()
    by_conversation: dict[tuple[str, int, str], dict[int, Failure]] = {}
    for line in failures:
        by_conversation.setdefault(line.conversation, {})[line.turn] = line
    for lines in by_conversation.values():
        found.waiting += sum(line.mended is None for line in lines.values())
        whole: Dialogue | None = None
        for line in sorted(lines.values(), key=lambda line: line.turn):
            if line.mended is None:
                continue
            try:
                whole = _dialogue(line, lines, personas)
            except ValueError as error:
                found.refused.append((line.name, str(error)))
                continue
            found.doubts += [f"{line.name}: {doubt}" for doubt in _doubts(line)]
        if whole is not None:
            found.dialogues.append(whole)
    return found


def _dialogue(
    line: Failure, lines: Mapping[int, Failure], personas: Mapping[str, Persona]
) -> Dialogue:
    """
    Raises:
        ValueError: its history holds a fault that is not mended, or it makes no dialogue.
    """
    turns = _turns(line, lines)
    persona = personas.get(line.persona or "")
    if personas and line.persona and persona is None:
        raise ValueError(f"persona must be one of --personas, found {line.persona}")
    digest = hashlib.sha256(canonical_json([line.system_prompt, turns]).encode()).hexdigest()[:8]
    name = slug(".".join(map(str, line.conversation)))[:LONGEST_NAME].rstrip("-._")
    try:
        return Dialogue(
            id=f"{name}.{digest}",
            persona_id=line.persona or line.item,
            persona_name=persona.name if persona else line.persona or line.item,
            scenario_id=line.item,
            system_prompt=line.system_prompt,
            mood=line.persona_type,
            first_speaker=turns[0][0],
            gap_after_user=persona.gap_after_user if persona else GAP_AFTER_USER,
            gap_other=persona.gap_other if persona else GAP_OTHER,
            turns=tuple(Turn(role=role, text=text) for role, text in turns),
            writer="mended",
        )
    except ValidationError as error:
        raise ValueError(describe_faults(error)) from None


def _check_mended(line: Failure) -> None:
    """
    Raises:
        ValueError: a better reply that is none.
    """
    if not words_of(line.mended or ""):
        raise ValueError(f"`better` of turn {line.turn + 1} must hold words, found none")
    if words_of(line.mended or "") == words_of(line.reply):
        raise ValueError(
            f"`better` of turn {line.turn + 1} must be another reply, found the same words"
        )


def _turns(line: Failure, lines: Mapping[int, Failure]) -> list[tuple[Role, str]]:
    """Who says what, up to the better reply; raises as `_dialogue`."""
    _check_mended(line)
    assert line.mended is not None
    found: list[tuple[Role, str]] = []
    turn = -1  # an agent that speaks before it is the opening
    for said in line.history:
        turn += said.role == "user"
        text = said.text
        if said.role == "agent" and said.faults:
            earlier = lines.get(turn)
            if earlier is None or earlier.mended is None:
                raise ValueError(
                    f"all faults before it must be mended, turn {turn + 1} is not "
                    f"({', '.join(said.faults)}); fill in `better` of its line too"
                )
            _check_mended(earlier)
            text = earlier.mended
        found.append((said.role, text.strip()))
    if turn + 1 != line.turn:
        raise ValueError(
            f"history must hold the {line.turn} turns before it, found {turn + 1} of the user's"
        )
    return [*found, ("user", line.user), ("agent", line.mended)]


def _doubts(line: Failure) -> list[str]:
    """What the report's rules would blame in the better reply too; a person may know better."""
    assert line.mended is not None
    given = (line.system_prompt, *(s.text for s in line.history if s.role == "user"), line.user)
    new = invented(line.mended, given)
    return [
        *(["`better` says the user's words back"] if is_echo(line.user, line.mended) else []),
        *([f"`better` names what nobody has given: {', '.join(new)}"] if new else []),
        *(
            [f"`better` does not say what was due: {line.due[0]}"]
            if line.due and not says_any(line.mended, line.due)
            else []
        ),
    ]
