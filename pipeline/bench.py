"""`duplex bench`: Full-Duplex-Bench's samples played to a server, its files and its columns.

OUT belongs to one protocol: `protocol.json` is written first and whoever comes with another is
refused. Each sample is written whole before the next is played, so a run that was stopped goes
on where it was. Cost: in lock-step the time of a frame on the server times the frames; voice
activity about 1 s of CPU for 150 s of sound.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from duplex.base import canonical_json
from duplex.duplex_bench import corrected, published, summarize
from duplex.errors import MissingInputError, RecordError, RequestError, ServerError
from duplex.files import sha256_bytes, sha256_file, write_atomic, write_json
from duplex.frames import FRAME_S, FRAME_SAMPLES, frames_covering_seconds
from duplex.lock import RunLock
from pipeline.bench_hearing import Ears
from pipeline.commands import show_json
from pipeline.engines.recogniser import make_recogniser
from pipeline.evaluation.bench_folders import (
    BenchItem,
    Outcome,
    finished,
    read_audio,
    read_items,
    sample_of,
    write_outcome,
)
from pipeline.evaluation.bench_report import (
    LOCK_STEP,
    OTHERS,
    REAL_TIME,
    elsewhere,
    markdown_of,
    notes_of,
    table_of,
)
from pipeline.evaluation.client import Conversation, converse_when_free
from pipeline.evaluation.play import PlaySettings, describe, processor_of
from pipeline.evaluation.scoring import PromptProof, prove_prompt
from pipeline.serving import wire

MAX_LEAD_IN_S = 60.0


@dataclass(frozen=True)
class BenchOptions:
    """What the folders do not say. Prompts None: as the URL has them."""

    text_prompt: str | None = None
    voice_prompt: str | None = None
    recogniser: str | None = None
    recogniser_model: str | None = None
    language: str = "en"
    real_time: bool = False
    lead_in_s: float = 0.0
    token: str | None = None


def show(folder: Path, url: str, out: Path, options: BenchOptions, *, as_json: bool) -> None:
    """Run, and print the table; raises as `bench` does."""

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # stdout may have to be JSON

    result = bench(folder, url, out, options, Ears(*_recogniser(options)), report)
    if as_json:
        show_json(result)
        return
    console = Console()
    console.print(table_of(result))
    print(f"Elsewhere: {OTHERS}.")
    for note in notes_of(result):
        print(note)
    print(f"Written: {out / 'bench.md'}, {out / 'bench.json'}")


def bench(
    folder: Path, url: str, out: Path, options: BenchOptions, ears: Ears,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Play what is not done yet, write its files, and compute the columns of all.

    Returns:
        What bench.json holds.

    Raises:
        MissingInputError: no folder of the benchmark's.
        RequestError: an option is wrong, or `out` belongs to another protocol or model.
        ServerError: the server cannot be reached, or broke a conversation; what was finished stays.
    """
    if not 0 <= options.lead_in_s <= MAX_LEAD_IN_S:
        raise RequestError(f"--lead-in-s must be 0 to {MAX_LEAD_IN_S:g}, found {options.lead_in_s}")
    items, left_out = read_items(folder)
    changes = {"text_prompt": options.text_prompt, "voice_prompt": options.voice_prompt}
    url = wire.chat_url(url, **{k: v for k, v in changes.items() if v is not None})
    player = _Player(url, options, wire.parse_chat_request(wire.query_pairs(url)))
    player.look()
    protocol = player.protocol() | ears.protocol()
    fingerprint = sha256_bytes(canonical_json(protocol).encode())
    outcomes: list[tuple[BenchItem, Outcome]] = []
    with RunLock(out):
        _claim(out, protocol)
        for item in items:
            outcome = finished(out, item, fingerprint)
            try:
                if outcome is None:
                    outcome = _play(player, ears, item, out, fingerprint)
                    report(f"{item.name}: {outcome.frame_ms:.0f} ms a frame")
                else:
                    report(f"{item.name}: done before")
            except RecordError as error:
                left_out.append((item.name, str(error)))
                report(f"{item.name}: left out: {error}")
                continue
            outcomes.append((item, outcome))
        if not outcomes:
            raise MissingInputError(
                f"{folder} must hold samples that can be played, found none: "
                + "; ".join(f"{name}: {why}" for name, why in left_out[:5])
            )
        if len(models := {outcome.model for _, outcome in outcomes}) > 1:
            raise RequestError(
                f"{out} must hold one model's answers, found {len(models)} models: the server has "
                "changed meanwhile. Give another --out."
            )
        result = _result(outcomes, left_out, protocol, fingerprint, wire.base_url(url))
        write_json(out / "bench.json", result)
        write_atomic(out / "bench.md", markdown_of(result).encode())
    return result


class _Player:
    """A server, and how it is talked to."""

    def __init__(self, url: str, options: BenchOptions, request: wire.ChatRequest):
        self._url, self._options, self._request = url, options, request
        self._model: str | None = None
        self._tokens: list[int] = []
        self.lead_in_frames = frames_covering_seconds(options.lead_in_s)

    def look(self) -> None:
        """Ask the server what it serves."""
        info, tokenizer = asyncio.run(describe(self._url, PlaySettings(token=self._options.token)))
        digest = info.get("model_digest")
        self._model = digest if isinstance(digest, str) else None
        self._tokens = wire.prompt_tokens(processor_of(tokenizer), self._request.text_prompt)

    def protocol(self) -> dict[str, Any]:
        request = self._request
        return {
            "benchmark": "Full-Duplex-Bench 1.0",
            "model": self._model,
            "text_prompt": request.text_prompt,
            "voice_prompt": request.voice_prompt,
            "greeting": request.greeting,
            "seed": request.seed or 0,
            "sampling": request.sampling.model_dump(),
            "lead_in_s": round(self.lead_in_frames * FRAME_S, 6),
            "pace": REAL_TIME if self._options.real_time else LOCK_STEP,
            "wire": "24 kHz int16 PCM, format=pcm; agent frame i beside user frame i",
        }

    def talk(self, user: np.ndarray) -> Conversation:
        return asyncio.run(
            converse_when_free(
                self._url,
                user,
                text_prompt=self._request.text_prompt,
                seed=self._request.seed or 0,
                sampling=self._request.sampling,
                lockstep=not self._options.real_time,
                token=self._options.token,
            )
        )

    def proof(self, conversation: Conversation) -> PromptProof:
        digest = wire.prompt_digest(self._tokens)
        return prove_prompt(conversation.prompt, digest, len(self._tokens))


def _play(player: _Player, ears: Ears, item: BenchItem, out: Path, fingerprint: str) -> Outcome:
    digest = sha256_file(item.audio)
    user = read_audio(item)
    lead_in = np.zeros(player.lead_in_frames * FRAME_SAMPLES, dtype=np.float32)
    try:
        conversation = player.talk(np.concatenate([lead_in, user]))
    except ServerError as error:
        raise type(error)(f"{item.name}: {error}") from None
    agent = conversation.agent[len(lead_in) :][: len(user)]
    speech = ears.speech(agent)
    opening, words = ears.words(
        agent, conversation.text, speech,
        lead_in_s=player.lead_in_frames * FRAME_S, cut_s=item.user_end_s,
    )  # fmt: skip
    proven, note = player.proof(conversation)
    model = (conversation.prompt or {}).get("model_digest")
    outcome = Outcome(
        protocol=fingerprint,
        model=model if isinstance(model, str) else None,
        input=digest,
        duration_s=len(agent) / (FRAME_SAMPLES / FRAME_S),
        words=words,
        speech=speech,
        user_speech=ears.speech(user),
        opening=opening,
        prompt_proven=proven,
        prompt_note=note,
        frame_ms=round(1000 * float(np.median(conversation.wall.frame_s)), 1),
        files={},
    )
    return write_outcome(out, item, agent, outcome)


def _claim(out: Path, protocol: dict[str, Any]) -> None:
    """
    Raises:
        RequestError: `out` belongs to another protocol, or is no folder of this command's.
    """
    path = out / "protocol.json"
    if not path.exists():
        if any(entry.name != ".lock" for entry in out.iterdir()):
            raise RequestError(f"{out} must be new, empty or of this command, found other files.")
        write_json(path, protocol)
        return
    try:
        known = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RequestError(f"{path} must hold a protocol: {error}. Give another --out.") from None
    differing = [
        f"{key} {known.get(key)!r:.60} there, {protocol.get(key)!r:.60} now"
        for key in sorted({*known, *protocol})
        if known.get(key) != protocol.get(key)
    ]
    if differing:
        raise RequestError(
            f"{out} belongs to another protocol: {'; '.join(differing)}. Give another --out."
        )


def _result(
    outcomes: list[tuple[BenchItem, Outcome]],
    left_out: list[tuple[str, str]],
    protocol: dict[str, Any],
    fingerprint: str,
    server: str,
) -> dict[str, Any]:
    samples = [(item, outcome, sample_of(item, outcome)) for item, outcome in outcomes]
    rows: list[dict[str, Any]] = []
    for dataset in dict.fromkeys(item.dataset for item, _ in outcomes):
        of_dataset = [sample for item, _, sample in samples if item.dataset == dataset]
        rows += [
            {"dataset": dataset, **row, "elsewhere": elsewhere(dataset, row["key"]),
             "protocol": fingerprint}
            for row in summarize(of_dataset)
        ]  # fmt: skip
    return {
        "server": server,
        "protocol": protocol,
        "fingerprint": fingerprint,
        "rows": rows,
        "elsewhere": OTHERS,
        "samples": [
            {
                "name": item.name,
                "published": published(sample),
                "corrected": corrected(sample),
                "opening": outcome.opening,
                "missing": list(item.missing),
                "prompt_proven": outcome.prompt_proven,
                "prompt_note": outcome.prompt_note,
                "frame_ms": outcome.frame_ms,
            }
            for item, outcome, sample in samples
        ],
        "left_out": [list(entry) for entry in left_out],
    }


def _recogniser(options: BenchOptions) -> tuple[Any, str]:
    if options.recogniser is None:
        return None, options.language
    made = make_recogniser(options.recogniser, options.recogniser_model, options.language)
    return made, options.language
