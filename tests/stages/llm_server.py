"""A chat endpoint that misbehaves by a seeded plan, and keeps books on what it did.

It speaks `/v1/chat/completions`, streamed or not, from a thread of its own. Its dialogues come
from the scripted writer, by the persona and the scenario that the request describes, so they pass
ordinary checks; its bill is by its price list, on its own count of tokens.

What it does with a request is drawn from the plan's seed and how often that request has come, so
each one gets through in the end: after `patience` misdeeds in a row it behaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

from aiohttp import web

from duplex.base import canonical_json
from duplex.datafiles import CHECKOUT, load_personas, load_scenarios
from pipeline.engines.scripted import ScriptedWriter

PRICE_IN, PRICE_OUT = 0.5, 2.0  # dollars per million tokens
KEY = "sk-tiger-lily-must-not-be-seen-0123456789"

# Before a reply: nothing is billed. `stall`, `cut` and `reset`: billed in full all the same.
TURNED_AWAY = ("429-seconds", "429-date", "429-ms", "429-bare", "500", "503")
BROKEN_OFF = ("reset", "stall", "cut")
# Whole replies, billed, some of them of no use.
WHOLE = ("broken", "fenced", "roles", "refusal", "refusal-field", "filter", "length", "slow",
         "no-usage", "twin", "one-piece")  # fmt: skip
ALL = (*TURNED_AWAY, *BROKEN_OFF, *WHOLE)


@dataclass
class Books:
    """What the server saw and did. `answers`: id -> cost in dollars and tokens, usage told."""

    requests: Counter[str] = field(default_factory=Counter)
    completed: Counter[str] = field(default_factory=Counter)
    answers: dict[str, tuple[float, int, bool]] = field(default_factory=dict)
    deeds: Counter[str] = field(default_factory=Counter)
    billed_usd: float = 0.0
    billed_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    keys: set[str] = field(default_factory=set)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)  # when requests came, monotonic


class MisbehavingServer:
    """`with MisbehavingServer(share=.3) as server: … server.base_url`.

    share: of first sends that meet a deed of `deeds`. refuses: parameters answered with 400.
    says: what a reply holds, by the request's body, where it shall be no dialogue.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        share: float = 0.0,
        deeds: tuple[str, ...] = ALL,
        patience: int = 3,
        think_s: float = 0.0,
        stall_s: float = 3.0,
        refuses: tuple[str, ...] = (),
        script: list[str] | None = None,
        says: Callable[[dict[str, Any]], str] | None = None,
    ):
        self._seed, self._share, self._deeds, self._patience = seed, share, deeds, patience
        self._think_s, self._stall_s, self._refuses = think_s, stall_s, refuses
        self._says = says
        self._script = script or []  # deeds of the first requests, in order
        self.books = Books()
        self._writer = ScriptedWriter()
        _ = self._writer.grammar  # read now: later it would look like a silence
        self._personas = {
            prompt: persona
            for persona in load_personas(CHECKOUT / "data/personas")
            for prompt in persona.prompts
        }
        self._scenarios = {s.setting: s for s in load_scenarios(CHECKOUT / "data/scenarios")}
        self._last_content = ""
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> MisbehavingServer:
        self._thread.start()
        assert self._ready.wait(10), "the server must start"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            app = web.Application(client_max_size=1 << 24)
            app.router.add_post("/v1/chat/completions", self._answer)
            runner = web.AppRunner(
                app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
            )
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
            self._ready.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    # -- one request

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        books = self.books
        body = await request.json()
        books.keys.add(request.headers.get("Authorization", ""))
        for name in self._refuses:
            given = body.get("response_format", {}).get("type") if "json" in name else None
            if name in body or given == name:
                said = {"error": {"message": f"Unsupported parameter: {name} is not known here"}}
                books.deeds[f"refused {name}"] += 1
                return web.json_response(said, status=400)
        asked = {k: v for k, v in body.items() if not k.startswith(("stream", "response_"))}
        name = hashlib.sha256(canonical_json(asked).encode()).hexdigest()
        books.requests[name] += 1
        books.bodies.append(body)
        books.accepted.append(time.monotonic())
        books.in_flight += 1
        books.most_in_flight = max(books.most_in_flight, books.in_flight)
        left = [False]

        def leave() -> None:  # before the last byte, or the next request would overtake it
            if not left[0]:
                left[0] = True
                books.in_flight -= 1

        try:
            deed = self._deed(name)
            books.deeds[deed] += 1
            await asyncio.sleep(self._think_s)
            return await self._act(deed, name, body, request, leave)
        finally:
            leave()

    def _deed(self, name: str) -> str:
        if self._script:
            return self._script.pop(0)
        number = self.books.requests[name]
        draw = random.Random(f"{self._seed}/{name}/{number}")
        if number > self._patience or draw.random() >= self._share:
            return "good"
        return draw.choice(self._deeds)

    async def _act(
        self, deed: str, name: str, body: dict[str, Any], request: web.Request, leave: Any
    ) -> web.StreamResponse:
        if deed in TURNED_AWAY or deed.startswith("status-"):
            leave()
            return _turn_away(deed)
        if deed == "reset":
            self._bill(body, "x" * 200)
            leave()
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        content, finish, refusal = self._content(deed, name, body)
        usage = self._bill(body, content)
        answer_id = f"chatcmpl-{len(self.books.answers)}"
        cost = (usage["in"] * PRICE_IN + usage["out"] * PRICE_OUT) / 1e6
        told = deed != "no-usage"
        self.books.answers[answer_id] = (cost, usage["in"] + usage["out"], told)
        counts = {"prompt_tokens": usage["in"], "completion_tokens": usage["out"]}
        counts["total_tokens"] = usage["in"] + usage["out"]
        head = {"id": answer_id, "created": 0, "model": body["model"]}
        if deed == "one-piece" or not body.get("stream"):
            message = {"role": "assistant", "content": content, "refusal": refusal or None}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            self.books.completed[name] += 1
            leave()
            whole = head | {"object": "chat.completion", "choices": [choice], "usage": counts}
            return web.json_response(whole)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(delta: dict[str, Any], ended: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": ended}
            chunk = head | {"object": "chat.completion.chunk", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())

        await send({"role": "assistant", "content": ""})
        while deed == "pings":  # signs of life, and no reply
            with contextlib.suppress(ConnectionError):
                await response.write(b": still there\n\n")
            await asyncio.sleep(0.02)
        pieces = 12 if deed == "slow" else 3
        step = max(1, len(content) // pieces)
        for start in range(0, len(content), step):
            if start and deed == "stall":
                await asyncio.sleep(self._stall_s)
            if start and deed == "cut":
                leave()
                assert request.transport is not None
                request.transport.abort()
                return response
            if deed == "slow":
                await asyncio.sleep(0.02)
            await send({"content": content[start : start + step]})
        if refusal:
            await send({"refusal": refusal})
        self.books.completed[name] += 1
        leave()
        await send({}, finish)
        if told and body.get("stream_options", {}).get("include_usage"):
            last = head | {"object": "chat.completion.chunk", "choices": [], "usage": counts}
            await response.write(f"data: {json.dumps(last)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    def _bill(self, body: dict[str, Any], content: str) -> dict[str, int]:
        """About four bytes a token, the template apart; never more than was allowed."""
        said = sum(len(message["content"].encode()) for message in body["messages"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        usage = {"in": said // 4 + 40, "out": min(len(content) // 4 + 20, limit)}
        self.books.billed_usd += (usage["in"] * PRICE_IN + usage["out"] * PRICE_OUT) / 1e6
        self.books.billed_tokens += usage["in"] + usage["out"]
        return usage

    # -- what it says

    def _content(self, deed: str, name: str, body: dict[str, Any]) -> tuple[str, str, str]:
        """The reply's text, its finish_reason, its refusal."""
        if deed == "refusal":
            return "I'm sorry, I can't help with that.", "stop", ""
        if deed == "refusal-field":
            return "", "stop", "I cannot write that."
        if deed == "filter":
            return "", "content_filter", ""
        if deed == "twin" and self._last_content and "prompts" not in _wanted(body):
            return self._last_content, "stop", ""
        content = self._says(body) if self._says else self._words(name, body)
        if deed == "roles":
            return content.replace('"agent"', '"narrator"'), "stop", ""
        if deed == "broken":
            return content[: len(content) // 2] + ' "role" }', "stop", ""
        if deed == "length":
            return content[: len(content) // 2], "length", ""
        if deed == "fenced":
            return f"Here you are:\n\n{content[:-2]},]}}\n\nEnjoy!", "stop", ""
        self._last_content = content
        return content, "stop", ""

    def _words(self, name: str, body: dict[str, Any]) -> str:
        asked = body["messages"][1]["content"]
        persona = next(p for prompt, p in self._personas.items() if prompt in asked)
        scenario = next(s for setting, s in self._scenarios.items() if setting in asked)
        between = re.search(r"between (\d+) and (\d+) turns", asked)
        assert between is not None
        low, high = int(between[1]), int(between[2])
        seed = int(name[:8], 16)
        written = self._writer.write(persona, scenario, seed=seed, min_turns=low, max_turns=high)
        draw = random.Random(seed)
        turns = [
            {
                "role": turn.role,
                "text": turn.text,
                "emotion": draw.choice(["angry", "neutral", "happy"]),
                "intensity": round(draw.uniform(0.4, 2.4), 2),
                "pause": draw.choice(["quick", "normal", "long", "overlap"]),
                "cut_after_words": draw.choice([None, None, None, 3, 90]),
                "backchannels": [{"text": "mm-hm", "after_word": draw.randint(1, 40)}],
            }
            for turn in written.turns
        ]
        return json.dumps({"turns": turns}, ensure_ascii=False)


def _wanted(body: dict[str, Any]) -> str:
    return body.get("response_format", {}).get("json_schema", {}).get("name", "")


def _turn_away(deed: str) -> web.Response:
    status = int(re.search(r"\d+", deed)[0])  # type: ignore[index]
    headers = {
        "429-seconds": {"Retry-After": "0.05"},
        "429-date": {"Retry-After": formatdate(time.time() + 0.05, usegmt=True)},
        "429-ms": {"retry-after-ms": "30"},
        "503": {"Retry-After": "0"},
    }.get(deed, {})
    said = {"error": {"message": f"not now; your key is {KEY}", "type": "server_error"}}
    return web.json_response(said, status=status, headers=headers)
