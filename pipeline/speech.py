"""Stage 4: dialogues are spoken. One stereo WAV each: left the agent, right the user.

The agent has its persona's voice in all of its dialogues. The user's voice is the one that
scores highest by a hash of dialogue and voice: a fifth voice takes over a fifth of the
dialogues and leaves the others as they are.

A turn that cannot be spoken rejects its dialogue; nothing is replaced by silence.
Cost: 0.19 s of CPU time for a dialogue of 73 s (80 scripted dialogues, 98 minutes: 15 s on one
EPYC core), a WAV of 5.8 MB a minute.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import Record
from duplex.config import Config, SpeechSection
from duplex.errors import MissingInputError, RecordError
from duplex.records import Dialogue, Speech, Voice
from duplex.stage import BlobSink, MapStage, StageContext, Task, record_seed
from duplex.store import StageFolder
from pipeline.engines import espeak

if TYPE_CHECKING:
    import numpy as np

TEMPLATES = Path(__file__).with_name("templates")
LISTEN_PER_PERSONA = 2
PIXELS_PER_SECOND = 6


@dataclass(frozen=True)
class Script:
    """A dialogue and who speaks it. `agent` is None where the persona has no voice."""

    dialogue: Dialogue
    agent: Voice | None
    user: Voice


class SpeechStage(MapStage):
    name = "speech"
    number = 4
    reads = ("dialogues", "voices")

    def __init__(self) -> None:
        self._engine: espeak.EspeakEngine | None = None
        self._section = SpeechSection()

    def engine(self, config: Config) -> str:
        return espeak.revision()

    def takes_workers(self, config: Config) -> bool:
        return config.speech.runtime.workers is not None  # espeak alone is quicker than a start

    def tasks(self, context: StageContext) -> list[Task]:
        voices: list[Voice] = list(context.records("voices", Voice))
        agents = {voice.persona_id: voice for voice in voices if voice.role == "agent"}
        users = [voice for voice in voices if voice.role == "user"]
        if not users:
            raise MissingInputError(
                "the speech stage needs at least one voice with role user, found none in "
                f"{context.inputs['voices'].path}. Raise voices.user_voices."
            )
        tasks = []
        for dialogue in context.records("dialogues", Dialogue):
            agent = agents.get(dialogue.persona_id)
            user = choose_user_voice(dialogue.id, users, context.config.seed)
            sources = (dialogue.digest, agent.digest if agent else "none", user.digest)
            tasks.append(Task(dialogue.id, sources, Script(dialogue, agent, user)))
        return tasks

    def setup(self, context: StageContext) -> None:
        self._engine = espeak.EspeakEngine()
        self._section = context.config.speech

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        from duplex.mixing import VoicedTurn, mix_turns

        assert self._engine is not None, "setup comes first"
        script: Script = task.payload
        dialogue = script.dialogue
        if script.agent is None:
            raise RecordError(
                f"persona {dialogue.persona_id} must have a voice, found none: "
                "see rejected.jsonl of the voices stage"
            )
        turns = []
        for index, turn in enumerate(dialogue.turns):
            voice = script.agent if turn.role == "agent" else script.user
            try:
                utterance = self._engine.synthesize(turn.text, voice.params)
            except RecordError as error:
                raise RecordError(f"turn {index} ({turn.role}): {error}") from error
            turns.append(
                VoicedTurn(
                    role=turn.role,
                    text=turn.text,
                    voice_id=voice.id,
                    samples=utterance.samples,
                    words=utterance.words,
                    gap_frames=turn.gap_frames,
                )
            )
        timeline = mix_turns(
            turns,
            gap_after_user=dialogue.gap_after_user,
            gap_other=dialogue.gap_other,
            rng=random.Random(seed),
            loudness_dbfs=self._section.loudness_dbfs,
            lead_in_s=self._section.lead_in_s,
            tail_s=self._section.tail_s,
        )
        return [
            Speech(
                id=task.id,
                dialogue_id=dialogue.id,
                persona_id=dialogue.persona_id,
                scenario_id=dialogue.scenario_id,
                system_prompt=dialogue.system_prompt,
                first_speaker=dialogue.first_speaker,
                audio=blobs.put(wav_bytes(timeline.audio), ".wav"),
                num_samples=timeline.audio.shape[1],
                turns=timeline.turns,
            )
        ]

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        rows = page_rows(finished_speech(folder))
        return environment.get_template("speech.html.j2").render(
            config=context.config.name,
            rows=rows,
            total_s=sum(row["duration_s"] for row in rows),
            personas=len({row["speech"].persona_id for row in rows}),
        )


def choose_user_voice(dialogue_id: str, voices: list[Voice], run_seed: int) -> Voice:
    """The user's voice of a dialogue, whatever the order of `voices`."""

    def score(voice: Voice) -> tuple[int, str]:
        return record_seed(run_seed, "speech", f"{dialogue_id}\x00{voice.id}"), voice.id

    return max(voices, key=score)


def wav_bytes(audio: np.ndarray) -> bytes:
    """float32 [2, S] in [-1, 1] -> 16-bit stereo WAV at 24 kHz, the same bytes every time."""
    import numpy as np
    import soundfile

    from duplex.frames import SAMPLE_RATE

    # Rounded here, so that the library's own conversion and clipping have no say.
    pcm = np.round(audio.T * 32767).astype(np.int16)
    target = io.BytesIO()
    soundfile.write(target, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return target.getvalue()


# -- the page


def finished_speech(folder: StageFolder) -> list[Speech]:
    """The folder's records by id, also while its manifest is still to come."""
    import json

    from duplex.records import parse_record

    lines = (line for entry in folder.ledger().values() for line in entry.lines)
    records = (
        folder.records() if folder.manifest() else (parse_record(json.loads(x)) for x in lines)
    )
    return sorted((r for r in records if isinstance(r, Speech)), key=lambda r: r.id)


def page_rows(speeches: list[Speech]) -> list[dict[str, Any]]:
    """One row a dialogue: its record, figures, and rectangles of its timeline."""
    from duplex.frames import SAMPLE_RATE

    heard: dict[str, int] = {}
    rows = []
    for speech in speeches:
        heard[speech.persona_id] = heard.get(speech.persona_id, 0) + 1
        gaps = [b.start_s - a.end_s for a, b in zip(speech.turns, speech.turns[1:], strict=False)]
        rows.append(
            {
                "speech": speech,
                "listen": heard[speech.persona_id] <= LISTEN_PER_PERSONA,
                "duration_s": speech.num_samples / SAMPLE_RATE,
                "words": sum(len(turn.words) for turn in speech.turns),
                "voices": sorted({turn.voice_id for turn in speech.turns}),
                "gap_mean_s": sum(gaps) / len(gaps) if gaps else None,
                "gap_least_s": min(gaps, default=None),
                "gap_most_s": max(gaps, default=None),
                "width": round(speech.num_samples / SAMPLE_RATE * PIXELS_PER_SECOND, 1),
                "bars": [
                    {
                        "role": turn.role,
                        "x": round(turn.start_s * PIXELS_PER_SECOND, 1),
                        "width": round((turn.end_s - turn.start_s) * PIXELS_PER_SECOND, 1),
                        "title": f"{turn.start_s:.2f} s {turn.role}: {turn.text}",
                    }
                    for turn in speech.turns
                ],
            }
        )
    return rows


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("speech")
