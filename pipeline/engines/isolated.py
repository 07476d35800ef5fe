"""Engines that do not fit this environment: each a PEP 723 script in a process of its own.

The parent starts the script once, `uv run --script`, and talks JSON lines over its pipes; `bytes`
at the end of a line's object says how many bytes of int16 little-endian mono follow the line.

    <- {"protocol": "duplex-speech-1", "engine": "chatterbox", "version": "0.1.7", "rate": 24000,
        "languages": ["de", …], "cloning": true, "watermark": true, "bytes": 0}
    -> {"id": 1, "text": "…", "language": "en", "sample": "/…/voice.wav" | null, "seed": 7,
        "params": {"exaggeration": 0.8}}
    <- {"id": 1, "bytes": 96000}, then the samples
    <- {"id": 1, "error": "missing" | "request" | "text" | "failed", "message": "…", "bytes": 0}

In place of the first line an error may come. What the script prints goes to stderr, whose last
lines are in the message when it dies. It gets no secrets: of the environment only what `KEPT`
names, and proxies without a password. It ends when its stdin does; one that does not is killed,
and its children with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from duplex.errors import DuplexError, MissingInputError, RecordError, RequestError, TransientError
from pipeline.engines.sound_reply import LONGEST_S, MAX_RATE, MIN_RATE, at_our_rate
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance

PROTOCOL = "duplex-speech-1"
SCRIPTS = Path(__file__).with_name("isolated_scripts")
KEPT = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "UV_CACHE_DIR", "UV_OFFLINE",
    "UV_PYTHON_INSTALL_DIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
    "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS",
)  # fmt: skip
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
LONGEST_LINE = 1 << 20
STDERR_LINES, STDERR_CHARACTERS = 6, 300
LONGEST_TEXT = 10_000
CLOSE_S = 5.0
ERRORS: dict[str, type[DuplexError]] = {
    "missing": MissingInputError,
    "request": RequestError,
    "text": RecordError,
    "failed": RecordError,
}


def uv() -> str | None:
    """Where `uv` is: on the path, or beside this Python."""
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a script may know of the environment: nothing that could be a secret."""
    kept = {name: environment[name] for name in KEPT if name in environment}
    proxies = {name: environment[name] for name in PROXIES if "@" not in environment.get(name, "@")}
    return kept | proxies


class _Ended(Exception):
    """The script died, or had to be killed, while it was to speak."""


class IsolatedEngine:
    """A `SpeechEngine` that lives in a script. Not for several threads at once.

    Args:
        command: what starts the script.
        engine, version: what its first line must say, so that keys tell the truth.
        start_s: time for the first line; a first start installs packages and fetches weights.
        reply_s: time for an utterance.
        environment: what the script gets beside the clean environment.
    """

    def __init__(
        self,
        command: Sequence[str],
        capabilities: Capabilities,
        *,
        engine: str,
        version: str,
        start_s: float = 1800.0,
        reply_s: float = 600.0,
        environment: Mapping[str, str] | None = None,
    ):
        self.capabilities = capabilities
        self._command = list(command)
        self._engine, self._version = engine, version
        self._start_s, self._reply_s = start_s, reply_s
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._rate = 0
        self._requests = 0
        self._unread = bytearray()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def synthesize(self, request: SpeechRequest) -> Utterance:
        if len(request.text) > LONGEST_TEXT:
            raise RecordError(
                f"a turn must have at most {LONGEST_TEXT} characters, found {len(request.text)}"
            )
        try:
            header, content = self._answer(request)
        except BaseException:
            self._kill()  # half a reply may be in the pipe
            raise
        if "error" in header:
            raise self._error(header)
        samples = np.frombuffer(content, dtype="<i2").astype(np.float32) / 32768
        if not len(samples):
            raise RecordError(f"{self._engine} must give sound, and gave none")
        return Utterance(at_our_rate(samples, self._rate), None)

    def close(self) -> None:
        """End the script. The engine may be used again: it starts another."""
        process = self._process
        if process is not None and process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()  # which is what ends it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=CLOSE_S)
        self._kill()

    # -- the process

    def _answer(self, request: SpeechRequest) -> tuple[dict[str, Any], bytes]:
        """The reply; of a second script where the first died of it, or went on for ever.

        Raises:
            RecordError: so did the second: it is the text, and another run would find the same.
        """
        try:
            return self._exchange(request)
        except _Ended:
            self._kill()
        try:
            return self._exchange(request)
        except _Ended as error:
            text = request.text if len(request.text) <= 60 else request.text[:57] + "…"
            raise RecordError(f"{text!r}, tried twice: {error}") from None

    def _exchange(self, request: SpeechRequest) -> tuple[dict[str, Any], bytes]:
        process = self._running()
        self._requests += 1
        line = {
            "id": self._requests,
            "text": request.text,
            "language": request.language,
            "sample": str(request.sample.resolve()) if request.sample else None,
            "seed": request.seed,
            "params": dict(request.settings),
        }
        deadline = time.monotonic() + self._reply_s
        try:
            assert process.stdin
            process.stdin.write(json.dumps(line).encode() + b"\n")
            header, content = self._read(process, deadline)
        except (BrokenPipeError, EOFError):
            raise _Ended(
                f"the script of {self._engine} must answer, but it ended{self._last_words()}"
            ) from None
        except TimeoutError:
            raise _Ended(
                f"the script of {self._engine} must answer within {self._reply_s:g} s, and did "
                f"not{self._last_words()}"
            ) from None
        if header.get("id") != self._requests:
            raise TransientError(
                f"the script of {self._engine} must answer request {self._requests}, it answered "
                f"{header.get('id')!r}; it was ended, run again"
            )
        return header, content

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        self._stderr.clear()
        self._folder = tempfile.TemporaryDirectory(prefix="duplex-engine-")
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, bufsize=0, start_new_session=True, cwd=self._folder.name,
                env=clean_environment(os.environ) | self._environment,
            )  # fmt: skip
        except OSError as error:
            raise MissingInputError(
                f"{self._engine} must be started by {self._command[0]}: {error}"
            ) from None
        self._process = process
        assert process.stderr
        threading.Thread(
            target=self._keep_stderr, args=(process.stderr, self._stderr), daemon=True
        ).start()
        try:
            hello, _ = self._read(process, time.monotonic() + self._start_s)
        except (EOFError, TimeoutError) as error:
            late = f"within {self._start_s:g} s" if isinstance(error, TimeoutError) else "to start"
            raise MissingInputError(
                f"the script of {self._engine} must be ready {late}, and was not"
                f"{self._last_words()}. Try it by hand: {' '.join(self._command)}"
            ) from None
        self._check_hello(hello)
        return process

    def _check_hello(self, hello: dict[str, Any]) -> None:
        if "error" in hello:
            raise MissingInputError(
                f"{self._engine} needs {hello.get('message', hello['error'])}{self._last_words()}"
            )
        found = tuple(hello.get(key) for key in ("protocol", "engine", "version"))
        wanted = (PROTOCOL, self._engine, self._version)
        if found != wanted:
            raise RequestError(f"the script must be {' '.join(wanted)}, it says {found}")
        rate = hello.get("rate")
        if not isinstance(rate, int) or not MIN_RATE <= rate <= MAX_RATE:
            raise RequestError(f"the script of {self._engine} must name its rate, found {rate!r}")
        self._rate = rate

    def _read(
        self, process: subprocess.Popen[bytes], deadline: float
    ) -> tuple[dict[str, Any], bytes]:
        while (end := self._unread.find(b"\n")) < 0:
            if len(self._unread) > LONGEST_LINE:
                raise self._garbage(self._unread)
            self._read_more(process, deadline)
        line = bytes(self._unread[:end])
        try:
            header = json.loads(line)
            size = header["bytes"]
        except (ValueError, TypeError, KeyError):
            raise self._garbage(line) from None
        largest = 2 * LONGEST_S * (self._rate or MAX_RATE)
        if not isinstance(size, int) or not 0 <= size <= largest or size % 2:
            raise self._garbage(line)
        total = end + 1 + size
        while len(self._unread) < total:
            self._read_more(process, deadline)
        content = bytes(self._unread[end + 1 : total])
        del self._unread[:total]
        return header, content

    def _read_more(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        assert process.stdout
        remaining = max(0.0, deadline - time.monotonic())
        if not select.select([process.stdout], [], [], remaining)[0]:
            raise TimeoutError
        content = os.read(process.stdout.fileno(), 1 << 20)
        if not content:
            raise EOFError
        self._unread += content

    def _garbage(self, line: bytes | bytearray) -> TransientError:
        shown = bytes(line[:80]).decode("utf-8", errors="replace")
        return TransientError(
            f"the script of {self._engine} must write lines of its protocol, found {shown!r}"
            f"{self._last_words()}; it was ended, run again"
        )

    def _error(self, header: dict[str, Any]) -> DuplexError:
        message = str(header.get("message", ""))[:STDERR_CHARACTERS]
        kind = ERRORS.get(str(header["error"]), TransientError)
        return kind(f"{self._engine} could not speak this: {message}")

    def _last_words(self) -> str:
        """The end of its stderr, for a message."""
        time.sleep(0.05)  # what it wrote at its death is still on the way
        lines = [line.strip()[:STDERR_CHARACTERS] for line in self._stderr if line.strip()]
        return f"; its last lines: {' | '.join(lines)}" if lines else ""

    @staticmethod
    def _keep_stderr(stream: IO[bytes], lines: deque[str]) -> None:
        with contextlib.suppress(ValueError, OSError):  # closed while it is read
            while line := stream.readline(4096):
                lines.append(line.decode("utf-8", errors="replace"))

    def _kill(self) -> None:
        process, self._process = self._process, None
        self._unread.clear()
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
