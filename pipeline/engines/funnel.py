"""The candidates that were not kept, with their reasons, and how many were: the funnel.

    candidates.jsonl    a line for each, in the stage's folder: task, attempt, number, code,
                        message, turns

The file only grows. A line is written before the next candidate is asked for, so what a kill
leaves out is one candidate at most; a candidate that is met again after it is not written twice.
It is no part of the stage's digest: a run that was killed may count one more.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duplex.base import canonical_json
from duplex.files import append_line, read_lines
from duplex.records import Turn
from duplex.store import StageFolder
from pipeline.engines.writers import Candidate, Fault

CANDIDATES = "candidates.jsonl"


@dataclass(frozen=True)
class Funnel:
    """What was written, what became of it. `reasons`: code -> candidates, most first."""

    written: int
    kept: int
    reasons: dict[str, int]

    @property
    def rejected(self) -> int:
        return self.written - self.kept

    def to_json(self) -> dict[str, Any]:
        return {"written": self.written, "kept": self.kept, "reasons": self.reasons}


class CandidateLog:
    """Appends to one folder's `candidates.jsonl`; may be called from several threads."""

    def __init__(self, folder: Path):
        self._path = folder / CANDIDATES
        self._lock = threading.Lock()
        self._seen: set[tuple[str, int, int]] = set()
        self._next: Counter[tuple[str, int]] = Counter()  # by task and attempt: a number to give
        self._sent_back: set[tuple[str, str]] = set()
        self._returns: Counter[str] = Counter()  # by task: how many were sent back
        for line in read_lines(self._path):
            if not _is_whole(line):
                continue
            self._note(_key(line))
            if line.get("by") == "review":
                self._note_return(line["task"], line["turns_digest"])

    def add(self, candidate: Candidate) -> None:
        """Note one that a check did not let pass."""
        self._append(candidate, "check")

    def send_back(self, task_id: str, turns: tuple[Turn, ...], fault: Fault) -> None:
        """Note a dialogue that passed by itself and not beside the others.

        A review that is repeated after a kill sends the same dialogue back again: one line.
        """
        with self._lock:
            attempt = self._returns[task_id]
            if not self._note_return(task_id, turns_digest(turns)):
                return
            number = self._next[task_id, attempt]
        self._append(Candidate(task_id, attempt, number, fault, turns), "review")

    def _append(self, candidate: Candidate, by: str) -> None:
        line = {
            "task": candidate.task_id,
            "attempt": candidate.attempt,
            "number": candidate.number,
            "by": by,
            "code": candidate.fault.code,
            "message": candidate.fault.message,
            "turns": [turn.model_dump(mode="json", exclude_none=True) for turn in candidate.turns],
            "turns_digest": turns_digest(candidate.turns),
        }
        with self._lock:
            if _key(line) in self._seen:
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self._path, canonical_json(line))
            self._note(_key(line))

    def _note(self, key: tuple[str, int, int]) -> None:
        task, attempt, number = key
        self._seen.add(key)
        self._next[task, attempt] = max(self._next[task, attempt], number + 1)

    def _note_return(self, task: str, digest: str) -> bool:
        """False: it was sent back before."""
        if (task, digest) in self._sent_back:
            return False
        self._sent_back.add((task, digest))
        self._returns[task] += 1
        return True


def turns_digest(turns: tuple[Turn, ...]) -> str:
    spelled = "\n".join(f"{turn.role}: {turn.text}" for turn in turns)
    return hashlib.sha256(spelled.encode()).hexdigest()[:16]


def read_candidates(folder: StageFolder) -> list[dict[str, Any]]:
    """The lines of a folder's `candidates.jsonl`, each candidate once, by task and number."""
    lines = {_key(line): line for line in read_lines(folder.path / CANDIDATES) if _is_whole(line)}
    return [lines[key] for key in sorted(lines)]


def read_funnel(folder: StageFolder) -> Funnel:
    """How many candidates were written for what the folder keeps, and why the others are not.

    Dialogues that were adopted from another folder count as kept; what was rejected on the way to
    them is told there.
    """
    kept = len(folder.finished())
    reasons = Counter(line["code"] for line in read_candidates(folder))
    ordered = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
    return Funnel(written=kept + reasons.total(), kept=kept, reasons=ordered)


def _key(line: dict[str, Any]) -> tuple[str, int, int]:
    return line["task"], line["attempt"], line["number"]


def _is_whole(line: dict[str, Any]) -> bool:
    wanted = {"task": str, "attempt": int, "number": int, "code": str, "turns_digest": str}
    return all(isinstance(line.get(key), kind) for key, kind in wanted.items())
