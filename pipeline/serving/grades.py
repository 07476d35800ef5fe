"""What people thought of their conversations, a line of JSON each, for the report.

    perfect   in character from first to last
    good      small slips
    poor      out of character: made things up, changed sides, repeated the user, fell silent

The recording stays with whoever spoke: the file holds words and times, no audio. What the user said
is in it where the server listens (`--listen`), as its recogniser understood it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from duplex.errors import RequestError
from duplex.files import append_line
from pipeline.serving.bodies import Body, read_body

GradeName = Literal["perfect", "good", "poor"]
GRADES: tuple[GradeName, ...] = get_args(GradeName)  # best first
MAX_FILE_BYTES = 64 << 20


class GradedWords(Body):
    """What the agent said, from one silence to the next; seconds of the conversation. at_s: where
    each of its words begins; empty in lines of before it was kept."""

    start_s: float = Field(ge=0, le=36_000)
    text: str = Field(max_length=4_000)
    at_s: Annotated[tuple[float, ...], Field(max_length=2_000)] = ()


class HeardTurn(Body):
    """What the server's recogniser heard of one turn of the user's; end_s: 0 where not told."""

    start_s: float = Field(ge=0, le=36_000)
    end_s: float = Field(default=0, ge=0, le=36_000)
    text: str = Field(max_length=4_000)


class Grade(Body):
    """What the page sends. prompt_digest: of the tokens that were fed, as `04` gave it;
    text_prompt: what they said, None in lines of before it was kept; heard: only where the server
    listens; conversation: the same for all grades of one, of which the last counts; delays_s: from
    the user's last sound to the answer, in the conversation's own time; waits_s: with what the
    server was behind."""

    grade: GradeName
    note: str = Field(default="", max_length=2_000)
    persona: str = Field(default="", max_length=200)
    conversation: str = Field(default="", pattern=r"^[0-9a-z]*$", max_length=40)
    prompt_digest: str = Field(default="", pattern=r"^[0-9a-f]*$", max_length=64)
    text_prompt: str | None = Field(default=None, max_length=20_000)
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    seconds: float = Field(ge=0, le=36_000)
    words: Annotated[tuple[GradedWords, ...], Field(max_length=2_000)] = ()
    heard: Annotated[tuple[HeardTurn, ...], Field(max_length=2_000)] = ()
    delays_s: Annotated[tuple[float, ...], Field(max_length=2_000)] = ()
    waits_s: Annotated[tuple[float, ...], Field(max_length=2_000)] = ()
    echoes: int = Field(default=0, ge=0)


class GradeBook:
    """A file of grades. Lines are appended whole; a full file takes no more."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, content: dict[str, Any], model_digest: str, label: str) -> None:
        """
        Raises:
            RequestError: it is no grade, or the file is full.
        """
        grade = read_body(Grade, content)
        if self._path.exists() and self._path.stat().st_size > MAX_FILE_BYTES:
            raise RequestError(f"{self._path.name} is full; move it away to keep more grades")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = grade.model_dump(mode="json")
        line |= {"model_digest": model_digest, "label": label, "at": int(time.time())}
        append_line(self._path, json.dumps(line, ensure_ascii=False))
