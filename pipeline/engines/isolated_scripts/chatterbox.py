# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = ["chatterbox-tts==0.1.7"]
# ///
"""Chatterbox in an environment of its own: requests on stdin, speech on stdout.

Started by `pipeline/engines/isolated.py`, which describes the protocol; it imports nothing of
ours. It speaks 23 languages in the voice of a recording, or in its own. Every utterance carries
the inaudible watermark of its makers (Perth), which is not taken out here.

    uv run --script chatterbox.py [--revision COMMIT] [--device cpu|cuda|mps]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

# Python puts a script's folder first, where this file would pass for the package of its name.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

PROTOCOL = "duplex-speech-1"
WEIGHTS = "ResembleAI/chatterbox"
T3 = "t3_mtl23ls_v2.safetensors"
FILES = [
    "ve.pt", T3, "s3gen.pt", "grapheme_mtl_merged_expanded_v1.json", "conds.pt",
    "Cangjie5_TC.json",
]  # fmt: skip
LONGEST_S = 39.5  # it stops after 1 000 tokens, 25 a second, wherever it is in the text
DEFAULTS = {"exaggeration": 0.5, "cfg_weight": 0.5, "temperature": 0.8}
KNOWN_VOICES = 64


class Fault(Exception):
    """kind: missing, request, text or failed."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Engine:
    def __init__(self, revision: str | None, device: str | None):
        try:
            import torch
            from chatterbox.mtl_tts import (  # pyright: ignore[reportMissingImports]
                ChatterboxMultilingualTTS,
            )
        except ImportError as error:
            raise Fault("missing", f"the package chatterbox-tts==0.1.7: {error}") from error
        self.torch = torch
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = download(revision)
        self.model: Any = ChatterboxMultilingualTTS.from_local(folder, device)
        # `generate` leaves the last voice behind: a request without one would get it.
        self.own_voice = self.model.conds
        self.voices: dict[str, Any] = {}
        self.hello = {
            "protocol": PROTOCOL,
            "engine": "chatterbox",
            "version": importlib.metadata.version("chatterbox-tts"),
            "weights": Path(folder).name,
            "rate": int(self.model.sr),
            "languages": sorted(ChatterboxMultilingualTTS.get_supported_languages()),
            "cloning": True,
            "watermark": True,
        }

    def speak(self, request: dict[str, Any]) -> bytes:
        settings = DEFAULTS | request["params"]
        if unknown := sorted(set(settings) - set(DEFAULTS)):
            raise Fault("request", f"no such parameter: {', '.join(unknown)}")
        if request["language"] not in self.hello["languages"]:
            raise Fault("request", f"it does not speak {request['language']}")
        self.use_voice(request.get("sample"), settings["exaggeration"])
        random.seed(request["seed"])
        self.torch.manual_seed(request["seed"])
        try:
            import numpy

            numpy.random.seed(request["seed"] % 2**32)
        except ImportError:
            pass
        spoken = self.model.generate(request["text"], request["language"], **settings)
        samples = spoken.detach().to("cpu").reshape(-1)
        if len(samples) >= LONGEST_S * self.hello["rate"]:
            raise Fault("text", f"it must be spoken in {LONGEST_S:g} s, shorten it")
        return (samples.clamp(-1, 1) * 32767).to(self.torch.int16).numpy().tobytes()

    def use_voice(self, path: str | None, exaggeration: float) -> None:
        if path is None:
            if self.own_voice is None:
                raise Fault("request", "a voice must have a recording: there is no built-in one")
            self.model.conds = self.own_voice
            return
        if path not in self.voices:
            self.model.prepare_conditionals(path, exaggeration=exaggeration)
            if len(self.voices) >= KNOWN_VOICES:
                self.voices.pop(next(iter(self.voices)))
            self.voices[path] = self.model.conds
        self.model.conds = self.voices[path]


def download(revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(WEIGHTS, revision=revision, allow_patterns=FILES)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Fault("missing", f"the weights {WEIGHTS}: {first}") from error


def reply(target: Any, header: dict[str, Any], samples: bytes = b"") -> None:
    target.write(json.dumps(header | {"bytes": len(samples)}).encode() + b"\n" + samples)
    target.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--revision")
    parser.add_argument("--device")
    arguments = parser.parse_args()
    # Replies get a descriptor of their own: whatever the libraries print cannot spoil them.
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        engine = Engine(arguments.revision, arguments.device)
    except Exception as error:  # noqa: BLE001 - its message is the reply
        traceback.print_exc()
        kind = error.kind if isinstance(error, Fault) else "failed"
        reply(target, {"error": kind, "message": f"{error}"})
        return
    reply(target, engine.hello)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            reply(target, {"id": request["id"]}, engine.speak(request))
        except Exception as error:  # noqa: BLE001 - its message is the reply
            traceback.print_exc()
            kind = error.kind if isinstance(error, Fault) else "failed"
            reply(target, {"id": request["id"], "error": kind, "message": f"{error}"})


if __name__ == "__main__":
    main()
