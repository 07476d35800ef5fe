"""espeak-ng as a speech engine: text in, 24 kHz samples and word times out.

The library runs in `espeak_worker.py`, a process of its own; this module imports none of it.
Its WORD events give the sample at which a word starts, its phoneme events where it pauses:

- A script word (what stands between spaces) starts at its first event. espeak speaks some
  neighbours as one ("of the", "I am") and marks only the first: these share its time by
  their letters, so that no word of the script is lost.
- It ends where the next one starts, or at the pause before that; the last one ends with the
  last audible sample.

Cost: 390 seconds of speech a second of CPU time, 10 ms an utterance, fork and resampling
included (one EPYC core). Same text and parameters, same samples, bit for bit, whatever was
spoken before and by whichever worker.
Source: espeak-ng's `speak_lib.h`; its words on `espeak_EVENT`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duplex.errors import MissingInputError, RecordError, RequestError, TransientError
from duplex.frames import SAMPLE_RATE
from duplex.records import Word
from pipeline.engines.script_words import script_words

PACKAGE = "espeakng-loader"
MODULE = "espeakng_loader"
WORKER = Path(__file__).with_name("espeak_worker.py")
MAX_TEXT_CHARACTERS = 10_000  # a request has to fit into a pipe that nobody reads yet
TIMEOUT_S = 30.0
TRAILING_S = 0.04  # silence kept after the last audible sample
AUDIBLE_SHARE = 0.005  # of the peak: -46 dB
# espeak files these languages under other names.
VOICE_NAMES = {"en-gb": "gmw/en", "zh": "cmn"}
# parameter -> (default, least, most); pitch and range are espeak's own scale, 50 its middle.
PARAMETER_RANGES = {"pitch": (50, 0, 99), "range": (50, 0, 99), "rate_wpm": (175, 80, 450)}


@dataclass(frozen=True)
class Utterance:
    """samples: float32 [S] at 24 kHz. words: times from the start of the utterance."""

    samples: np.ndarray
    words: tuple[Word, ...]


@dataclass(frozen=True)
class Phone:
    """espeak's mnemonic of a sound, stress marks included ("'oU"), and when it starts; a pause
    starts with "_". It lasts until the next one."""

    name: str
    start_s: float


def revision() -> str:
    """Id and version of the engine, for keys; "missing" where it is not installed."""
    try:
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE} missing"


def require_package() -> None:
    """
    Raises:
        MissingInputError: espeak-ng is not installed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise MissingInputError(
            f"the espeak engine needs the package {PACKAGE}, found none in {sys.prefix}. "
            "Install it: pip install -e '.[espeak]'"
        )


class EspeakEngine:
    """Speaks one utterance at a time; starts its worker at the first one.

    The worker ends when this object is closed or this process ends, however it ends.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S):
        require_package()
        self.revision = revision()
        self._timeout_s = timeout_s
        self._worker: subprocess.Popen[bytes] | None = None
        self._unread = bytearray()

    def __enter__(self) -> EspeakEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pid(self) -> int | None:
        return self._worker.pid if self._worker else None

    def synthesize(self, text: str, params: Mapping[str, str | int | float]) -> Utterance:
        """
        Args:
            text: the script, any language that the voice speaks.
            params: `voice` (en-us, gmw/en, en-gb-scotland …), and if wished `variant` (f2,
                m3 …), `pitch` 0-99, `range` 0-99, `rate_wpm` 80-450.

        Raises:
            RequestError: a parameter that espeak does not have.
            RecordError: the text gives no speech.
            TransientError: the worker died or hung; the next call starts a new one.
        """
        return self._spoken(_request(text, params))[0]

    def synthesize_with_phones(
        self, text: str, params: Mapping[str, str | int | float]
    ) -> tuple[Utterance, tuple[Phone, ...]]:
        """As `synthesize`, and the phones in the order in which they sound."""
        utterance, header = self._spoken(_request(text, params) | {"names": True})
        rate: int = header["rate"]
        return utterance, tuple(
            Phone(name, sample / rate)
            for name, (sample, _) in zip(header["names"], header["phonemes"], strict=True)
        )

    def _spoken(self, request: dict[str, Any]) -> tuple[Utterance, dict[str, Any]]:
        text: str = request["text"]
        if not script_words(text):
            raise RecordError(f"a text must have a word to say, found {text!r}")
        header, samples = self._exchange(request)
        if "error" in header:
            raise _error_of(header, text)
        pcm = np.frombuffer(samples, dtype="<i2").astype(np.float32) / 32768
        return _utterance(text, pcm, header), header

    def close(self) -> None:
        """End the worker. The engine may be used again: it starts another."""
        worker, self._worker = self._worker, None
        self._unread.clear()
        if worker is None:
            return
        assert worker.stdin and worker.stdout
        worker.stdin.close()  # which is what ends it
        try:
            worker.wait(timeout=1)
        except subprocess.TimeoutExpired:
            _kill_group(worker)
        worker.stdout.close()

    # -- the worker

    def _exchange(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + self._timeout_s
        try:
            worker = self._running(deadline)
            assert worker.stdin
            worker.stdin.write(json.dumps(request, ensure_ascii=False).encode() + b"\n")
            return self._read_reply(worker, deadline)
        except (BrokenPipeError, EOFError) as error:
            self._discard()
            raise TransientError(
                "the espeak worker must answer, but it ended in between; run again"
            ) from error
        except TimeoutError as error:
            self._discard()
            raise TransientError(
                f"the espeak worker must answer within {self._timeout_s:g} s, and did not; "
                "it was ended, run again"
            ) from error
        except BaseException:
            self._discard()  # an interrupted exchange leaves half a reply in the pipe
            raise

    def _running(self, deadline: float) -> subprocess.Popen[bytes]:
        if self._worker is not None:
            return self._worker
        # -P: the worker's own folder stays off its path, where our module names would shadow
        # others. A session of its own: it can be ended together with its fork, and Ctrl-C
        # reaches it only as the end of its stdin.
        self._worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True,
        )  # fmt: skip
        hello, _ = self._read_reply(self._worker, deadline)
        if "error" in hello:
            raise MissingInputError(
                f"the espeak engine needs a working {PACKAGE}; loading it failed with: "
                f"{hello['message']}. Reinstall it: pip install -e '.[espeak]'"
            )
        return self._worker

    def _read_reply(
        self, worker: subprocess.Popen[bytes], deadline: float
    ) -> tuple[dict[str, Any], bytes]:
        while (end := self._unread.find(b"\n")) < 0:
            self._read_more(worker, deadline)
        header = json.loads(self._unread[:end])
        total = end + 1 + header["bytes"]
        while len(self._unread) < total:
            self._read_more(worker, deadline)
        samples = bytes(self._unread[end + 1 : total])
        del self._unread[:total]
        return header, samples

    def _read_more(self, worker: subprocess.Popen[bytes], deadline: float) -> None:
        assert worker.stdout
        remaining = max(0.0, deadline - time.monotonic())
        if not select.select([worker.stdout], [], [], remaining)[0]:
            raise TimeoutError
        content = os.read(worker.stdout.fileno(), 1 << 20)
        if not content:
            raise EOFError
        self._unread += content

    def _discard(self) -> None:
        worker, self._worker = self._worker, None
        self._unread.clear()
        if worker is not None:
            _kill_group(worker)
            for pipe in (worker.stdin, worker.stdout):
                assert pipe
                pipe.close()


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and the fork that may be speaking."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _request(text: str, params: Mapping[str, str | int | float]) -> dict[str, Any]:
    """The worker's request, checked.

    Raises:
        RequestError, RecordError: as `EspeakEngine.synthesize`.
    """
    unknown = sorted(set(params) - {"voice", "variant", *PARAMETER_RANGES})
    if unknown or "voice" not in params:
        known = ", ".join(["voice", "variant", *PARAMETER_RANGES])
        raise RequestError(
            f"an espeak voice must have voice, and may have others of {known}; "
            f"found {', '.join(sorted(params)) or 'nothing'}"
        )
    if len(text) > MAX_TEXT_CHARACTERS:
        raise RecordError(
            f"a turn must have at most {MAX_TEXT_CHARACTERS} characters, found {len(text)}"
        )
    voice = str(params["voice"])
    request: dict[str, Any] = {
        # A NUL would cut the text, half a surrogate has no UTF-8: spaces, so offsets stay.
        "text": "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text),
        "voice": VOICE_NAMES.get(voice.lower(), voice),
        "variant": str(params.get("variant", "")),
    }
    for name, (default, least, most) in PARAMETER_RANGES.items():
        value = params.get(name, default)
        if not isinstance(value, int | float) or not least <= value <= most:
            raise RequestError(
                f"an espeak voice's {name} must lie in [{least}, {most}], found {value!r}"
            )
        request[name] = round(value)
    return request


def _error_of(header: dict[str, Any], text: str) -> Exception:
    message = header["message"]
    if header["error"] == "voice":
        return RequestError(f"espeak must know the voice: it has {message}")
    if header["error"] == "crash":
        return RecordError(f"{message} at {_shortened(text)}; shorten or reword the turn")
    return TransientError(f"{message} at {_shortened(text)}; run again")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


# -- from events to words


def _utterance(text: str, pcm: np.ndarray, header: dict[str, Any]) -> Utterance:
    """Bring the silence at the end to `TRAILING_S`, resample, and time the words.

    pcm: float32 [S'] at the worker's rate.
    """
    import soxr

    rate: int = header["rate"]
    peak = float(np.abs(pcm).max()) if len(pcm) else 0.0
    if peak == 0.0 or not header["words"]:
        raise RecordError(
            f"espeak must give speech for {_shortened(text)}, and gave "
            f"{len(pcm) / rate:.2f} s without a word or a sound"
        )
    speech_end = int(np.flatnonzero(np.abs(pcm) > AUDIBLE_SHARE * peak)[-1]) + 1
    kept = np.zeros(speech_end + round(TRAILING_S * rate), dtype=np.float32)
    kept[: len(pcm)] = pcm[: len(kept)]
    samples = soxr.resample(kept, rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
    words = _timed_words(text, header["words"], header["phonemes"], speech_end)
    return Utterance(
        samples,
        tuple(
            Word(text=word, start_s=round(start / rate, 6), end_s=round(end / rate, 6))
            for word, start, end in words
        ),
    )


def _timed_words(
    text: str, events: list[list[int]], phonemes: list[list[int]], speech_end: int
) -> list[tuple[str, int, int]]:
    """(word, first sample, end sample) of each spoken script word, in order."""
    script = script_words(text)
    groups: list[tuple[int, list[str]]] = []  # (first sample, words spoken from there)
    reached = 0
    for offset, sample in events:
        # The event's word, or the next one where the event stands on a dash or a space.
        index = next((i for i, word in enumerate(script) if offset < word.end), len(script))
        if index >= len(script) or index < reached:
            continue  # a further event of a word that has begun: "$3.50" has five
        if groups:
            groups[-1][1].extend(word.text for word in script[reached:index])
            leading = []
        else:
            leading = [word.text for word in script[:index]]
        earliest = groups[-1][0] if groups else 0
        start = min(max(sample, earliest), speech_end)
        groups.append((start, [*leading, script[index].text]))
        reached = index + 1
    if not groups:  # events on punctuation only
        groups.append((min(events[0][1], speech_end), []))
    groups[-1][1].extend(word.text for word in script[reached:])
    timed = []
    for (start, words), following in zip(groups, [*groups[1:], None], strict=True):
        end = speech_end
        if following is not None:
            end = _end_of_speech(phonemes, start, following[0])
        letters = [len(word) for word in words]
        edges = [
            start + (end - start) * sum(letters[:i]) // sum(letters) for i in range(len(words) + 1)
        ]
        timed += zip(words, edges, edges[1:], strict=False)
    return timed


def _end_of_speech(phonemes: list[list[int]], start: int, following: int) -> int:
    """Where a word that starts at `start` ends: at the pause before `following`, if any."""
    end = following
    for sample, is_pause in reversed(phonemes):
        if sample >= following:
            continue
        if not is_pause or sample <= start:
            break
        end = sample
    return end
