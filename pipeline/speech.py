"""Stage 4: dialogues are spoken. One stereo WAV each: left the agent, right the user.

The agent has its persona's voice in all of its dialogues. The user's voice is the one that
scores highest by a hash of dialogue and voice, among the voices of the dialogue's language and
of its side of the split: no voice that is heard in training is heard in validation. A fifth
voice takes over a fifth of the dialogues and leaves the others as they are.

A turn that cannot be spoken rejects its dialogue; nothing is replaced by silence. What an engine
spoke, espeak apart, is kept in `runs/.cache/speech`: see pipeline/engines/utterance_store.py.
Cost: 0.22 s of CPU time for a dialogue of 35 s with espeak and a room (200 dialogues of
configs/pocket-full.yaml, 117 minutes: 45 s), 217 MB of memory, a WAV of 5.8 MB a minute. One
dialogue's utterances are in memory at a time.
"""

from __future__ import annotations

import io
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from duplex.base import Record, Role
from duplex.clips import text_digest
from duplex.config import Config
from duplex.errors import MissingInputError, RecordError
from duplex.records import Dialogue, Speech, SpeechQuality, Turn, Voice
from duplex.splits import Split, dialogue_sides, voice_sides
from duplex.stage import BlobSink, MapStage, StageContext, Task, record_seed
from duplex.store import StageFolder
from pipeline.engines.engines import configured_engines, engine_module, unnamed_engines
from pipeline.engines.speaker import (
    Speaker,
    chosen_engine,
    engines_revision,
    speaker_revision,
)
from pipeline.engines.speaking import SpeechRequest, Utterance
from pipeline.engines.utterance_store import FOLDER as UTTERANCES
from pipeline.engines.utterance_store import UtteranceStore
from pipeline.pages.speech_page import render

if TYPE_CHECKING:
    import numpy as np

    from duplex.mixing import VoicedTurn

CONTEXT_UTTERANCES = 4  # that an engine is given which speaks better for it


@dataclass(frozen=True)
class Script:
    """A dialogue and who speaks it. `agent` is None where the persona has no voice."""

    dialogue: Dialogue
    agent: Voice | None
    user: Voice
    side: Split


class SpeechStage(MapStage):
    name = "speech"
    number = 4
    version = 2
    reads = ("dialogues", "voices")
    set_only = frozenset({"agent_voice"})  # whose voice it is stands among a record's sources

    def __init__(self) -> None:
        self._speaker: Speaker | None = None
        self._context: StageContext | None = None

    def engine(self, config: Config) -> str:
        return speaker_revision(config)

    def beyond(self, config: Config) -> dict[str, Any]:
        tensors = config.tensors
        unnamed = unnamed_engines(config)
        return {"split": tensors.split, "valid_fraction": tensors.valid_fraction} | (
            {"engines": unnamed} if unnamed else {}
        )

    def takes_workers(self, config: Config) -> bool:
        """Where it was asked for: espeak alone is quicker than a start."""
        return config.speech.runtime.workers is not None and configured_engines(config) == {
            "espeak"
        }

    def threads(self, config: Config) -> int:
        """As many as a server takes requests. espeak may speak some languages beside it, in its
        own process; neural engines share torch's generators, so that their order would count."""
        if not engine_module(config.voices.engine).CAPABILITIES.parallel:
            return 1
        others = set(config.speech.engines.values()) - {"espeak"}
        if not all(engine_module(name).CAPABILITIES.parallel for name in others):
            return 1
        return config.speech.runtime.concurrency

    def tasks(self, context: StageContext) -> list[Task]:
        dialogues: list[Dialogue] = list(context.records("dialogues", Dialogue))
        voices: list[Voice] = list(context.records("voices", Voice))
        agents = {voice.persona_id: voice for voice in voices if voice.role == "agent"}
        pools = user_pools(voices, context.config)
        named = {persona: voice.id for persona, voice in agents.items() if persona}
        section, seed = context.config.tensors, context.config.seed
        sides = dialogue_sides(dialogues, named, section.split, section.valid_fraction, seed)
        # An utterance that is compared with the voice's proof depends on that.
        proven = context.config.speech.checks.same_speaker is not None
        digest = heard_of if proven else sound_of
        tasks = []
        for dialogue in dialogues:
            agent = agents.get(dialogue.persona_id)
            if agent and context.config.speech.agent_voice == "conversation":
                agent = choose_voice(dialogue.id, fellows(agent, agents, dialogues, sides), seed)
            side = sides.get(dialogue.id, "train")
            language = agent.language if agent else "en"
            pool = pools.get((language, side)) or pools.get(("en", side), [])
            if not pool:
                raise MissingInputError(
                    f"the speech stage needs at least one voice with role user for {language}, "
                    f"found none in {context.inputs['voices'].path}. Raise voices.user_voices."
                )
            user = choose_voice(dialogue.id, pool, seed)
            sources = (dialogue.digest, digest(agent) if agent else "none", digest(user))
            if agent:
                sources += unnamed_revision((agent, user), context.config)
            tasks.append(Task(dialogue.id, sources, Script(dialogue, agent, user, side)))
        return tasks

    def setup(self, context: StageContext) -> None:
        self._context = context
        store = UtteranceStore(context.runs_root / UTTERANCES)
        self._speaker = Speaker(context.config.speech, context.report, store)

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        from duplex.mixing import mix_turns

        assert self._context is not None, "setup comes first"
        script: Script = task.payload
        dialogue, section = script.dialogue, self._context.config.speech
        reading = _Reading(self, script, seed)
        turns = [reading.turn(index, turn) for index, turn in enumerate(dialogue.turns)]
        try:
            timeline = mix_turns(
                turns,
                gap_after_user=dialogue.gap_after_user,
                gap_other=dialogue.gap_other,
                rng=random.Random(seed),
                loudness_dbfs=section.loudness_dbfs,
                lead_in_s=section.lead_in_s,
                tail_s=section.tail_s,
                section=section.timeline,
            )
        except ValueError as error:
            raise RecordError(str(error)) from error
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
                text_digest=text_digest(dialogue.turns),
                quality=quality_of(reading.spoken),
            )
        ]

    def speak(self, request: SpeechRequest) -> Utterance:
        """A request with its voice's recording, spoken."""
        assert self._speaker is not None and self._context is not None, "setup comes first"
        folder, voice = self._context.inputs["voices"], request.voice
        if voice.sample:
            request = replace(request, sample=folder.blob_path(voice.sample, ".wav"))
        if voice.proof:
            request = replace(request, proof=folder.blob_path(voice.proof, ".wav"))
        return self._speaker.speak(request)

    def close(self) -> None:
        if self._speaker is not None:
            self._speaker.close()
            self._speaker = None

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        sides = {task.id: task.payload.side for task in self.tasks(context)}
        names = {voice.id: voice for voice in context.records("voices", Voice)}
        return render(folder, context.config, sides, names)


class _Reading:
    """One dialogue, read aloud turn by turn."""

    def __init__(self, stage: SpeechStage, script: Script, seed: int):
        dialogue = script.dialogue
        if script.agent is None:
            raise RecordError(
                f"persona {dialogue.persona_id} must have a voice, found none: "
                "see rejected.jsonl of the voices stage"
            )
        self._stage, self._seed = stage, seed
        self._voices: dict[Role, Voice] = {"agent": script.agent, "user": script.user}
        self._language = script.agent.language
        self.spoken: list[tuple[str, Utterance]] = []

    def turn(self, index: int, turn: Turn) -> VoicedTurn:
        """
        Raises:
            RecordError: no speech of it; names the turn.
        """
        from duplex.mixing import VoicedBackchannel, VoicedTurn

        utterance = self._utterance(turn.role, turn.text, f"turn {index}", turn)
        other: Role = "user" if turn.role == "agent" else "agent"
        within = []
        for number, said in enumerate(turn.backchannels):
            heard = self._utterance(other, said.text, f"turn {index} backchannel {number}")
            within.append(
                VoicedBackchannel(
                    text=said.text,
                    voice_id=self._voices[other].id,
                    after_word=said.after_word,
                    samples=heard.samples,
                    words=heard.words or (),
                )
            )
        return VoicedTurn(
            role=turn.role,
            text=turn.text,
            voice_id=self._voices[turn.role].id,
            samples=utterance.samples,
            words=utterance.words or (),
            gap_frames=turn.gap_frames,
            emotion=turn.emotion,
            cut_after_words=turn.cut_after_words,
            backchannels=tuple(within),
        )

    def _utterance(self, role: Role, text: str, place: str, turn: Turn | None = None) -> Utterance:
        request = SpeechRequest(
            text=text,
            voice=self._voices[role],
            seed=record_seed(self._seed, "utterance", place),
            language=self._language,
            context=tuple(self.spoken[-CONTEXT_UTTERANCES:]),
        )
        if turn and turn.emotion:
            intensity = 1.0 if turn.intensity is None else turn.intensity
            request = replace(request, emotion=turn.emotion, intensity=intensity)
        try:
            utterance = self._stage.speak(request)
        except RecordError as error:
            raise RecordError(f"{place} ({role}): {error}") from error
        self.spoken.append((text, utterance))
        return utterance


def unnamed_revision(voices: tuple[Voice, Voice], config: Config) -> tuple[str, ...]:
    """Of the engines that speak for an agent and its user and that the config does not name."""
    language, section = voices[0].language, config.speech
    names = {chosen_engine(voice, language, section) for voice in voices}
    names -= configured_engines(config)
    return (engines_revision(names, section),) if names else ()


def user_pools(voices: Sequence[Voice], config: Config) -> dict[tuple[str, Split], list[Voice]]:
    """The user's voices by language and side of the split. A language's lone voice is heard on
    both sides."""
    by_language: defaultdict[str, list[Voice]] = defaultdict(list)
    for voice in voices:
        if voice.role == "user":
            by_language[voice.language].append(voice)
    pools: defaultdict[tuple[str, Split], list[Voice]] = defaultdict(list)
    both: tuple[Split, Split] = ("train", "valid")
    for language, members in by_language.items():
        fraction = config.tensors.valid_fraction
        sides = voice_sides((voice.id for voice in members), fraction, config.seed)
        for voice in members:
            alone = len(set(sides.values())) == 1
            for side in both if alone else (sides[voice.id],):
                pools[language, side].append(voice)
    return pools


def sound_of(voice: Voice) -> str:
    """Digest of what a voice sounds like: an engine that never says the same twice proves it
    with another sentence, and that must not speak everything again."""
    return voice.model_copy(update={"proof": None}).digest


def heard_of(voice: Voice) -> str:
    """`sound_of`, and the proof of a voice that has no sample to be compared with."""
    return sound_of(voice) if voice.sample else voice.digest


def quality_of(spoken: Sequence[tuple[str, Utterance]]) -> SpeechQuality:
    """What the checks measured on the utterances of a conversation."""
    checks = [utterance.checks for _, utterance in spoken if utterance.checks]
    rates = [check.wer for check in checks if check.wer is not None]
    found = [check.similarity for check in checks if check.similarity is not None]
    return SpeechQuality(
        utterances=len(spoken),
        transcribed=len(rates),
        worst_wer=round(max(rates), 4) if rates else None,
        mean_wer=round(sum(rates) / len(rates), 4) if rates else None,
        worst_similarity=round(min(found), 4) if found else None,
        retries=sum(check.retries for check in checks),
        timed_by=dict(sorted(Counter(said.words_by for _, said in spoken).items())),
    )


def fellows(
    agent: Voice,
    agents: Mapping[str | None, Voice],
    dialogues: Sequence[Dialogue],
    sides: Mapping[str, Split],
) -> list[Voice]:
    """The agents' voices of `agent`'s language whose personas are on its side of the split; of
    all, where the split is not by persona."""
    of_persona: dict[str, set[Split]] = defaultdict(set)
    for dialogue in dialogues:
        of_persona[dialogue.persona_id].add(sides.get(dialogue.id, "train"))
    own = of_persona[agent.persona_id or ""]
    return [
        voice
        for persona, voice in agents.items()
        if voice.language == agent.language and of_persona[persona or ""] & own
    ]


def choose_voice(dialogue_id: str, voices: Sequence[Voice], run_seed: int) -> Voice:
    """One of `voices` for a dialogue, whatever their order."""

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


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("speech")
