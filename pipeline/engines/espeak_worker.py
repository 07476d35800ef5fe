"""The process in which espeak-ng lives: JSON requests on stdin, speech on stdout.

A process of its own, for three reasons: the library is GPLv3 and is only ever talked to over
a pipe; it keeps global state; and its output depends on what the process spoke before. So
the library is initialised once and never speaks here: each utterance is spoken by a fork of
this pristine process, its random numbers seeded. That makes an utterance bit-exact whatever
came first, and whenever the worker was started.

Reply: one JSON line, then `bytes` bytes of int16 mono at `rate` Hz.

    -> {"text": "Hi there.", "voice": "en-us", "variant": "f2", "pitch": 50, "range": 50,
        "rate_wpm": 175}
    <- {"bytes": 41510, "rate": 22050, "words": [[0, 0], [3, 5271]],
        "phonemes": [[264, false], …, [14118, true]]}
    <- with "names": true in the request also "names": ["h", …, "_"], one a phoneme
    <- {"bytes": 0, "error": "voice" | "crash" | "stopped", "message": "…"}

`words` are [offset in characters, sample], `phonemes` are [sample, is a pause]. The process
ends when its stdin does, so it never outlives whoever started it by more than an utterance.
It imports nothing of ours: it is started by its path and must not find our modules first.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

# Constants of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_PHONEME_EVENTS = 0x0001
INITIALIZE_DONT_EXIT = 0x8000
CHARS_UTF8 = 1
POS_CHARACTER = 1
PARAMETER_RATE, PARAMETER_VOLUME, PARAMETER_PITCH, PARAMETER_RANGE = 1, 2, 3, 4
EVENT_LIST_TERMINATED, EVENT_WORD, EVENT_PHONEME = 0, 1, 7

VOLUME = 60  # espeak's own 100 clips in some voices; loudness is set later, when mixing
DATA_FOLDER = "espeak-ng-data"
UTTERANCE_LIMIT_S = 25
SEED = 1


class Event(ctypes.Structure):
    """`espeak_EVENT`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("phoneme", ctypes.c_char * 8),
    ]


Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
)


class Espeak:
    """The library, initialised. `speak` may be called once in a process: fork first."""

    def __init__(self) -> None:
        import espeakng_loader

        # espeak keeps its data path in 160 bytes, and a long one fails. Seen from inside its
        # package the path is two characters, however deep the environment lies.
        os.chdir(Path(espeakng_loader.__file__).parent)
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate: int = self.library.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, b".", INITIALIZE_DONT_EXIT | INITIALIZE_PHONEME_EVENTS
        )
        if self.rate <= 0:
            raise OSError(f"espeak-ng found no data in {Path.cwd() / DATA_FOLDER}")
        # Initialising seeds espeak's generator with the time, and some voices (f2, f3) draw
        # from it: left so, another second gives other samples. The Klatt voices draw from C's.
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
        ctypes.CDLL(None).srand(SEED)
        self.variants = {path.name for path in Path(DATA_FOLDER, "voices", "!v").iterdir()}

    def speak(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Header and samples of one utterance."""
        voice, variant = request["voice"], request["variant"]
        # An unknown variant is ignored by espeak without a word, so it is looked up here.
        known = not variant or variant in self.variants
        name = f"{voice}+{variant}" if variant else voice
        if not known or self.library.espeak_SetVoiceByName(name.encode()) != 0:
            kind = "voice" if known else "variant"
            return {"error": "voice", "message": f"no {kind} {voice if known else variant}"}, b""
        for parameter, value in (
            (PARAMETER_RATE, request["rate_wpm"]),
            (PARAMETER_VOLUME, VOLUME),
            (PARAMETER_PITCH, request["pitch"]),
            (PARAMETER_RANGE, request["range"]),
        ):
            self.library.espeak_SetParameter(parameter, value, 0)
        chunks: list[bytes] = []
        words: list[tuple[int, int]] = []
        phonemes: list[tuple[int, bool]] = []
        names: list[str] = []

        def collect(samples: Any, count: int, events: Any) -> int:
            if samples and count > 0:
                chunks.append(ctypes.string_at(samples, count * 2))
            index = 0
            while events[index].type != EVENT_LIST_TERMINATED:
                event = events[index]
                if event.type == EVENT_WORD:
                    words.append((max(event.text_position - 1, 0), event.sample))
                elif event.type == EVENT_PHONEME:
                    phonemes.append((event.sample, event.phoneme.startswith(b"_")))
                    names.append(event.phoneme.decode(errors="replace"))
                index += 1
            return 0

        callback = Callback(collect)
        self.library.espeak_SetSynthCallback(callback)
        text = request["text"].encode()
        failed = self.library.espeak_Synth(
            text, ctypes.c_size_t(len(text) + 1), 0, POS_CHARACTER, 0, CHARS_UTF8, None, None
        )
        if failed:
            return {"error": "crash", "message": f"espeak_Synth returned {failed}"}, b""
        header: dict[str, Any] = {"rate": self.rate, "words": words, "phonemes": phonemes}
        if request.get("names"):
            header["names"] = names
        return header, b"".join(chunks)


def speak_in_fork(espeak: Espeak, request: dict[str, Any], replies: int) -> bytes:
    """The whole reply to `request`, spoken by a fork."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read_end)
            os.close(replies)  # held here, it would hide the end of a worker that is killed
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(UTTERANCE_LIMIT_S)  # the kernel's alarm also ends a loop in C
            write_all(write_end, pack(*espeak.speak(request)))
            code = 0
        except Exception:  # noqa: BLE001 - printed, and reported as a crash
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        reply = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return reply
    # A fault of the library comes back with the same text; a signal from outside does not.
    faults = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGBUS, -signal.SIGILL)
    kind = "crash" if status > 0 or status in faults else "stopped"
    return pack({"error": kind, "message": f"espeak-ng ended with status {status}"}, b"")


def pack(header: dict[str, Any], samples: bytes) -> bytes:
    return json.dumps(header | {"bytes": len(samples)}).encode() + b"\n" + samples


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def main() -> None:
    # Replies get a descriptor of their own: whatever prints in here cannot spoil them.
    replies = os.dup(1)
    os.dup2(2, 1)
    try:
        espeak = Espeak()
    except (ImportError, OSError) as error:
        write_all(replies, pack({"error": "load", "message": str(error)}, b""))
        return
    try:
        write_all(replies, pack({"rate": espeak.rate}, b""))
        for line in sys.stdin.buffer:
            write_all(replies, speak_in_fork(espeak, json.loads(line), replies))
    except BrokenPipeError:
        pass  # nobody listens any more


if __name__ == "__main__":
    main()
