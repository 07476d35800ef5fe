"""Spoken conversations for the tensors stage: noise in the turns' places, words in even steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from duplex.config import Config
from duplex.records import Speech, SpokenTurn, Word, record_line
from duplex.sinks import FolderBlobs
from duplex.stage import StageContext
from duplex.store import StageFolder
from pipeline.speech import wav_bytes

FRAME = 1920
# Role, first and end frame, words.
TURNS = (
    ("user", 3, 25, "what can I get you"),
    ("agent", 28, 60, "a large oat latte please and be quick"),
    ("user", 62, 80, "seven dollars"),
    ("agent", 84, 110, "here you are thank you"),
)


def make_speech(
    folder: StageFolder,
    name: str,
    *,
    persona: str = "maria",
    voice: str | None = None,
    turns: tuple[tuple[str, int, int, str], ...] = TURNS,
    num_frames: int = 116,
    seed: int = 0,
    **changes: Any,
) -> Speech:
    rng = np.random.default_rng(seed)
    audio = 0.01 * rng.standard_normal((2, num_frames * FRAME))
    for role, start, end, _ in turns:
        row = audio[0 if role == "agent" else 1]
        row[start * FRAME : end * FRAME] += 0.1 * rng.standard_normal((end - start) * FRAME)
    fields: dict[str, Any] = {
        "id": name,
        "dialogue_id": name,
        "persona_id": persona,
        "scenario_id": "none",
        "system_prompt": f"You are {persona}.",
        "first_speaker": turns[0][0],
        "audio": FolderBlobs(folder).put(wav_bytes(audio.astype(np.float32)), ".wav"),
        "num_samples": audio.shape[1],
        "turns": tuple(
            _turn(role, start, end, text, voice or f"agent-{persona}", name)
            for role, start, end, text in turns
        ),
    }
    return Speech.model_validate(fields | changes)


def _turn(role: str, start: int, end: int, text: str, voice: str, name: str) -> SpokenTurn:
    # The conversation's name makes its text its own: splits tie equal texts together.
    words = [*text.split(), name.replace("-", "")]
    step = (end - start) / len(words)
    return SpokenTurn(
        role=role,
        text=" ".join(words),
        voice_id=voice if role == "agent" else "user-0",
        start_s=round(start * 0.08, 6),
        end_s=round(end * 0.08, 6),
        words=tuple(
            Word(
                text=word,
                start_s=round((start + i * step) * 0.08, 6),
                end_s=round((start + (i + 1) * step) * 0.08, 6),
            )
            for i, word in enumerate(words)
        ),
    )


def speech_stage(root: Path, count: int = 4, **options: Any) -> StageFolder:
    """A finished speech stage: `count` conversations of two personas."""
    folder = StageFolder(root / "04-speech-test", "speech", "k")
    folder.path.mkdir(parents=True, exist_ok=True)
    speeches = [
        make_speech(folder, f"c{i}", persona=f"p{i % 2}", seed=i, **options) for i in range(count)
    ]
    finish(folder, speeches)
    return folder


def finish(folder: StageFolder, speeches: list[Speech]) -> None:
    counts = {"records": len(speeches)}
    lines = [record_line(speech) for speech in speeches]
    folder.complete(lines, files=[], counts=counts, provenance={})


def tensors_context(root: Path, checkpoint: Path, speech: StageFolder, **section: Any):
    """The stage's context and its folder; `section` is that of the config."""
    runtime = {"device": "cpu", "workers": 1} | section.pop("runtime", {})
    config = Config.model_validate(
        {
            "name": "t",
            "model": {"base": str(checkpoint)},
            "tensors": {"valid_fraction": 0.5, "runtime": runtime} | section,
        }
    )
    key = f"{abs(hash(str(sorted(section.items())))):x}"[:16]
    folder = StageFolder(root / f"05-tensors-{key[:8]}", "tensors", key)
    return StageContext(config, root, {"speech": speech}), folder
