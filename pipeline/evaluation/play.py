"""Plays the items to one server after another and measures each conversation.

Every model gets the same audio, prompt, seed and sampling. The first item is played twice:
only if its audio comes back bit for bit may a difference between two models be put down to
the models.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import sentencepiece

from duplex.config import SamplingSection
from duplex.errors import ServerError
from pipeline.evaluation.client import BUSY_TIMEOUT_S, Conversation, converse_when_free
from pipeline.evaluation.items import SpokenItem
from pipeline.evaluation.listening import Listener
from pipeline.evaluation.scoring import Measured, measure, prove_prompt
from pipeline.serving import wire


@dataclass(frozen=True)
class PlaySettings:
    """How a conversation is held.

    at_a_time: most conversations at once, as far as the server has slots. tokenizer: SentencePiece
    model; None takes the server's, and then a prompt's proof rests on the server's own tokenizer.
    prompt_audio: query keys by item id, for the voice and the greeting that the server is to prompt
    with. again: the first item is played twice, to see whether it repeats. bare: the models were
    trained without prompts, so none is sent. weak: items are prompted with their `weak_prompt`
    where they have one.
    """

    seeds: tuple[int, ...] = (0,)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    lockstep: bool = True
    at_a_time: int = 1
    tokenizer: bytes | None = None
    prompt_audio: Mapping[str, dict[str, str]] = field(default_factory=dict)
    listener: Listener = field(default_factory=Listener)
    again: bool = True
    bare: bool = False
    weak: bool = False
    token: str | None = None
    ready_timeout_s: float = 120
    frame_timeout_s: float = 30
    busy_timeout_s: float = BUSY_TIMEOUT_S

    def prompt_of(self, spoken: SpokenItem) -> str:
        item = spoken.item
        if self.bare:
            return ""
        return item.weak_prompt if self.weak and item.weak_prompt else item.text_prompt


class Taken(NamedTuple):
    """One conversation to hold: an item with a seed."""

    spoken: SpokenItem
    seed: int

    @property
    def draws(self) -> int:
        """The seed that the model is given. Of seed and item: with one for all items their draws
        would be the same ones, and items no longer independent of each other."""
        digest = hashlib.sha256(f"{self.seed}/{self.spoken.item.id}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1

    @property
    def name(self) -> str:
        return f"{self.spoken.item.id}.s{self.seed}"


@dataclass(frozen=True)
class Played:
    """All conversations with one model, by seed and item. repeats: whether one item, played
    again, came back bit for bit; None when that was not tried (real time). served: whether a
    server of the same checkpoint gave that one bit for bit; None when all are a server's."""

    label: str
    info: dict[str, Any]
    conversations: tuple[Measured, ...]
    repeats: bool | None
    wall_s: float
    served: bool | None = None

    @property
    def model_digest(self) -> str | None:
        """As the server said it in its conversations; None when it did not, or said several."""
        said = {(m.conversation.prompt or {}).get("model_digest") for m in self.conversations}
        only = said.pop() if len(said) == 1 else None
        return only if isinstance(only, str) else None


def evaluate_urls(
    urls: Mapping[str, str],
    items: Sequence[SpokenItem],
    settings: PlaySettings,
    report: Callable[[str], None] = print,
    *,
    at_once: bool = False,
) -> list[Played]:
    """Play `items` to each server: to all at once, or to one after the other.

    Args:
        urls: label -> address of a server, its page or its socket. At once, each needs a
            slot of its own.

    Raises:
        ServerError: a server cannot be reached, or a conversation broke; names its item.
    """

    async def play_all() -> list[Played]:
        plays = (play(label, url, items, settings, report) for label, url in urls.items())
        if at_once:
            return list(await asyncio.gather(*plays))
        return [await each for each in plays]

    return asyncio.run(play_all())


async def play(
    label: str,
    url: str,
    items: Sequence[SpokenItem],
    settings: PlaySettings,
    report: Callable[[str], None] = print,
) -> Played:
    """Play `items` to one server; raises as `evaluate_urls` does."""
    started = time.perf_counter()
    info, served_tokenizer = await describe(url, settings)
    tokenizer = settings.tokenizer or served_tokenizer
    given = info.get("slots", 1)
    slots = asyncio.Semaphore(
        max(1, min(given, settings.at_a_time)) if isinstance(given, int) else 1
    )

    async def hold(taken: Taken) -> Measured:
        async with slots:
            conversation = await _converse(url, taken, settings)
        # In a thread: a neighbour who speaks at real time must not wait for it.
        found = await asyncio.to_thread(
            measured_call, label, taken, conversation, tokenizer, settings
        )
        frame_ms = 1000 * float(np.median(conversation.wall.frame_s))
        proof = found.proof
        proven = "prompt proven" if proof.proven else f"PROMPT NOT PROVEN: {proof.note}"
        report(f"{label} {taken.name}: {frame_ms:.0f} ms a frame, {proven}")
        return found

    taken = [Taken(spoken, seed) for seed in settings.seeds for spoken in items]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(hold(one)) for one in taken]
    except ExceptionGroup as faults:
        raise faults.exceptions[0] from None
    measured = [task.result() for task in tasks]
    repeats = None
    if settings.lockstep and settings.again and measured:
        again = await _converse(url, taken[0], settings)
        repeats = same_answer(again, measured[0].conversation)
    wall_s = time.perf_counter() - started
    return Played(label, info, tuple(measured), repeats, wall_s)


def measured_call(
    label: str, taken: Taken, conversation: Conversation, tokenizer: bytes, settings: PlaySettings
) -> Measured:
    """A conversation with its prompt's proof and all that is measured of it."""
    prompt = settings.prompt_of(taken.spoken)
    tokens = wire.prompt_tokens(processor_of(tokenizer), prompt)
    proof = prove_prompt(conversation.prompt, wire.prompt_digest(tokens), len(tokens))
    return measure(taken.spoken, label, taken.seed, prompt, conversation, proof, settings.listener)


@lru_cache(maxsize=4)
def processor_of(tokenizer: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer)
    return processor


def same_answer(one: Conversation, other: Conversation) -> bool:
    return one.text == other.text and np.array_equal(one.agent, other.agent)


async def _converse(url: str, taken: Taken, settings: PlaySettings) -> Conversation:
    spoken = taken.spoken
    try:
        return await converse_when_free(
            wire.chat_url(url, **settings.prompt_audio.get(spoken.item.id, {})),
            spoken.samples,
            text_prompt=settings.prompt_of(spoken),
            seed=taken.draws,
            sampling=settings.sampling,
            lockstep=settings.lockstep,
            token=settings.token,
            ready_timeout_s=settings.ready_timeout_s,
            frame_timeout_s=settings.frame_timeout_s,
            busy_timeout_s=settings.busy_timeout_s,
        )
    except ServerError as error:
        raise ServerError(f"{spoken.item.id}: {error}") from None


async def describe(url: str, settings: PlaySettings) -> tuple[dict[str, Any], bytes]:
    """The server's own description, and its tokenizer where we have none.

    Raises:
        ServerError: it cannot be reached, or does not describe itself.
    """
    base = wire.base_url(url)
    token = settings.token or dict(wire.query_pairs(url)).get("token")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    timeout = aiohttp.ClientTimeout(total=settings.ready_timeout_s)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:

        async def get(path: str) -> bytes:
            address = base + path
            try:
                async with session.get(address) as response:
                    if response.status != 200:
                        raise ServerError(
                            f"{address}: must answer with 200, found {response.status}. "
                            "Is this a duplex server, and is the token right?"
                        )
                    return await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                raise ServerError(
                    f"{address}: must be reachable: {error or type(error).__name__}. "
                    "Is `duplex serve` running there?"
                ) from None

        try:
            info = dict(json.loads(await get("/api/info")))
        except (ValueError, TypeError) as error:
            raise ServerError(f"{base}/api/info: must be a JSON object: {error}") from None
        return info, b"" if settings.tokenizer else await get("/api/tokenizer")
