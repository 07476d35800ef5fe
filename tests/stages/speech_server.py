"""A server with /v1/audio/speech that speaks by espeak-ng, and misbehaves where a test asks."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import soundfile
import soxr

from duplex.frames import SAMPLE_RATE
from pipeline.engines.espeak import EspeakEngine

VOICES = {"alloy": {"voice": "en-us", "variant": "f2"}, "onyx": {"voice": "en-us", "variant": "m3"}}


@dataclass
class Reply:
    body: bytes = b""
    content_type: str = "audio/wav"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    declared: int | None = None  # Content-Length, where it shall lie
    trickle_s: float = 0.0  # between the parts of the body


Answer = Callable[[np.ndarray, dict[str, Any]], Reply]


def encoded(samples: np.ndarray, rate: int = SAMPLE_RATE, **form: Any) -> bytes:
    """float32 [S] or [S, C] at 24 kHz as a file, WAV unless `format` says otherwise."""
    target = io.BytesIO()
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, SAMPLE_RATE, rate)
    soundfile.write(target, samples, rate, **({"format": "WAV", "subtype": "PCM_16"} | form))
    return target.getvalue()


def wav(samples: np.ndarray, body: dict[str, Any]) -> Reply:
    return Reply(encoded(samples))


class SpeechServer:
    """`answers` come one after the other, the last one again and again.

    `most_at_once`: requests that it had in hand at the same time, at most.
    """

    def __init__(self, *answers: Answer):
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""
        self.most_at_once = self._at_once = 0
        waiting = list(answers or (wav,))
        lock = threading.Lock()
        engine = EspeakEngine()
        self._engine = engine
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with lock:
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append(body)
                    outer.keys.append(self.headers["Authorization"])
                    answer = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                    voice = VOICES[body["voice"]] | {"rate_wpm": round(175 * body.get("speed", 1))}
                    samples = engine.synthesize(body["input"], voice).samples
                if self.path != "/v1/audio/speech":
                    reply = Reply(b"no such page", "text/plain", 404)
                else:
                    reply = answer(samples, body)
                with lock:  # from here on the client may have what it needs
                    outer._at_once -= 1
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                length = len(reply.body) if reply.declared is None else reply.declared
                self.send_header("Content-Length", str(length))
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    for start in range(0, len(reply.body), 8192):
                        self.wfile.write(reply.body[start : start + 8192])
                        time.sleep(reply.trickle_s)
                except OSError:
                    pass  # the client had enough

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._engine.close()

    def start(self) -> SpeechServer:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self


@contextmanager
def serving(*answers: Answer) -> Iterator[SpeechServer]:
    server = SpeechServer(*answers).start()
    try:
        yield server
    finally:
        server.close()
