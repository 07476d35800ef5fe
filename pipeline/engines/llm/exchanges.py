"""The log of an endpoint: each request before it is sent, each reply when it is whole.

    {"event": "sent", "send": …, "id": …, "for": task, "bound": {…}, "request": {…}}
    {"event": "reply", "send": …, "id": …, "text": …, "usage": {…} or null, "usd": …}
    {"event": "failed", "send": …, "id": …, "reason": …, "billed": "no" or "unknown"}
    {"event": "reused", "id": …, "for": task, "from": file}

`id` is the sha256 of the request's body, so a request whose reply is in a log is answered from
there and never paid twice. A `sent` line without its end is a request that a kill cut off: what
it cost is not known, and it stays counted at its bound. Headers, and so keys, are never here.

One line costs an fsync, about 0.2 ms; a dialogue takes about 10 kB.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duplex.base import canonical_json
from duplex.files import append_line, read_lines, sync_folder
from pipeline.engines.llm.budget import NOTHING, Cost

FILE = "exchanges.jsonl"
KEPT_FOLDER = "exchanges"  # in the run folder: logs whose stage folder was cleaned away


@dataclass(frozen=True)
class Reply:
    """A whole answer. `tokens_in` and `tokens_out` are None where the endpoint gave no usage."""

    text: str
    finish: str = "stop"
    refusal: str = ""
    tokens_in: int | None = None
    tokens_out: int | None = None
    answer_id: str = ""


@dataclass
class Account:
    """What the lines of a log add up to. `unknown` is at its bound."""

    requests: int = 0
    replies: int = 0
    reused: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    spent: Cost = NOTHING
    unknown: Cost = NOTHING
    unknown_requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Account) -> Account:
        return Account(
            self.requests + other.requests,
            self.replies + other.replies,
            self.reused + other.reused,
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.spent + other.spent,
            self.unknown + other.unknown,
            self.unknown_requests + other.unknown_requests,
            self.failures + other.failures,
        )

    def notes(self) -> dict[str, Any]:
        """As a manifest's provenance shows it."""
        return {
            "requests": self.requests,
            "replies": self.replies,
            "answered_from_other_logs": self.reused,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "usd": round(self.spent.usd, 6),
            "unknown": {
                "requests": self.unknown_requests,
                "tokens_at_most": self.unknown.tokens,
                "usd_at_most": round(self.unknown.usd, 6),
            },
            "retries": dict(sorted(self.failures.items())),
        }


def account(lines: Iterable[dict[str, Any]]) -> Account:
    """Adds up one log; lines that are not of its form are passed over.

    A send has its name within its file alone: two files are added up apart and then summed.
    """
    total = Account()
    open_sends: dict[str, Cost] = {}
    for line in lines:
        try:
            _add(total, open_sends, line)
        except (KeyError, TypeError, ValueError):
            continue
    for bound in open_sends.values():  # cut off by a kill
        total.unknown += bound
        total.unknown_requests += 1
        total.failures["killed"] += 1
    return total


def _add(total: Account, open_sends: dict[str, Cost], line: dict[str, Any]) -> None:
    match line["event"]:
        case "sent":
            bound = line["bound"]
            open_sends[line["send"]] = Cost(int(bound["tokens"]), float(bound["usd"]))
            total.requests += 1
        case "reply":
            bound = open_sends.pop(line["send"])
            total.replies += 1
            usage = line["usage"]
            if usage is None:
                total.unknown += bound
                total.unknown_requests += 1
                return
            total.tokens_in += int(usage["in"])
            total.tokens_out += int(usage["out"])
            total.spent += Cost(int(usage["in"]) + int(usage["out"]), float(line["usd"]))
        case "failed":
            bound = open_sends.pop(line["send"])
            total.failures[str(line["reason"])] += 1
            if line["billed"] != "no":
                total.unknown += bound
                total.unknown_requests += 1
        case "reused":
            total.reused += 1


class Exchanges:
    """The log of a stage folder, and the replies of `others`: logs that are only read.

    Thread-safe. Replies are held in memory, about 5 kB each.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()):
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, tuple[Reply, str]] = {}
        self._sends: Counter[str] = Counter()
        for other in others:
            for line in read_lines(other):
                self._take_reply(line, other.parent.name if other.name == FILE else other.name)
        for line in read_lines(path):
            self._take_reply(line, "")
            if line.get("event") == "sent":
                self._sends[str(line.get("id"))] += 1
        self.before = Account()
        for file in (path, *others):  # one by one: the names of sends begin anew in each file
            self.before += account(read_lines(file))

    def _take_reply(self, line: dict[str, Any], source: str) -> None:
        if line.get("event") != "reply":
            return
        usage = line.get("usage") or {}
        try:
            reply = Reply(
                str(line["text"]), str(line["finish"]), str(line["refusal"]),
                usage.get("in"), usage.get("out"), str(line.get("answer_id", "")),
            )  # fmt: skip
            self._replies[line["id"]] = (reply, source)
        except (KeyError, TypeError):
            return

    def find(self, request_id: str, task_id: str) -> Reply | None:
        """The reply that a request has had, in this log or another one."""
        with self._lock:
            found = self._replies.get(request_id)
            if found is None:
                return None
            reply, source = found
            if source:
                self._replies[request_id] = (reply, "")
                self._write({"event": "reused", "id": request_id, "for": task_id, "from": source})
            return reply

    def sent(self, request_id: str, task_id: str, body: dict[str, Any], bound: Cost) -> str:
        """Note a request that is about to be sent; returns the name of this send."""
        with self._lock:
            send = f"{request_id[:16]}-{self._sends[request_id]}"
            self._sends[request_id] += 1
            self._write(
                {
                    "event": "sent",
                    "send": send,
                    "id": request_id,
                    "for": task_id,
                    "bound": {"tokens": bound.tokens, "usd": bound.usd},
                    "request": body,
                }
            )
        return send

    def replied(self, send: str, request_id: str, reply: Reply, usd: float, seconds: float) -> None:
        known = reply.tokens_in is not None and reply.tokens_out is not None
        with self._lock:
            self._write(
                {
                    "event": "reply",
                    "send": send,
                    "id": request_id,
                    "text": reply.text,
                    "finish": reply.finish,
                    "refusal": reply.refusal,
                    "answer_id": reply.answer_id,
                    "usage": {"in": reply.tokens_in, "out": reply.tokens_out} if known else None,
                    "usd": usd,
                    "seconds": round(seconds, 3),
                }
            )
            self._replies[request_id] = (reply, "")

    def failed(self, send: str, request_id: str, reason: str, *, billed: str) -> None:
        with self._lock:
            self._write(
                {
                    "event": "failed",
                    "send": send,
                    "id": request_id,
                    "reason": reason,
                    "billed": billed,
                }
            )

    def _write(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which JSON may carry, has no UTF-8.
        append_line(self.path, canonical_json(line).encode("utf-8", "replace").decode())


def keep_log(stage_folder: Path) -> Path | None:
    """Move the log of a stage folder, which is about to be removed, to where logs are kept."""
    source = stage_folder / FILE
    if not source.is_file():
        return None
    kept = stage_folder.parent / KEPT_FOLDER
    kept.mkdir(exist_ok=True)
    number = 0
    while (target := kept / f"{stage_folder.name}-{number}.jsonl").exists():
        number += 1
    source.replace(target)
    sync_folder(kept)
    return target


def logs_of(run_folder: Path, stage_folders: Iterable[Path], own: Path) -> list[Path]:
    """All other logs of a run: of the stage's other folders, and those that clean kept."""
    kept = run_folder / KEPT_FOLDER
    found = [folder / FILE for folder in stage_folders if (folder / FILE) != own]
    found += sorted(kept.glob("*.jsonl")) if kept.is_dir() else []
    return [path for path in found if path.is_file()]
