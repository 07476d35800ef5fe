"""Stage 3: a voice for each persona, for good, and some for the person on the other side.

Three sources, one a config: espeak's own voices, shaped by a persona's traits
(`pipeline/engines/espeak_voices.py`); voices that an engine has by name; recorded speakers, cut
to a sample that an engine clones (`pipeline/engines/voice_recordings.py`). Nobody shares a
voice, and each is proven: it says a sentence, which is kept to be listened to.

Cost: 20 ms a voice with espeak. Recordings take 3 s a minute to be judged, all of them as soon
as one voice is to be made, since who gets which depends on who is fit.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duplex.base import Language, Record, canonical_json
from duplex.characters import Persona, VoiceTraits
from duplex.config import Config
from duplex.errors import RecordError, RequestError
from duplex.records import Dialogue, Voice
from duplex.stage import BlobSink, MapStage, StageContext, Task
from duplex.store import StageFolder
from pipeline.engines.draws import Draw
from pipeline.engines.engines import engine_module, unnamed_engines, voice_engine
from pipeline.engines.espeak_voices import Params, persona_params, user_params
from pipeline.engines.speaking import SpeechEngine, SpeechRequest
from pipeline.engines.voice_choice import Want, match_names
from pipeline.engines.voice_sets import (
    Casting,
    cast,
    clips_of,
    source_digest,
    source_files,
)
from pipeline.pages.voices_page import Rejected, render

LONGEST_ID = 96  # of a record
PROOF_DBFS = -24.0
PROOF_TEXTS = {
    "en": "Hello. This is how I sound.",
    "hi": "नमस्ते।",
    "es": "Hola, buenos días.",
    "fr": "Bonjour à tous.",
    "de": "Guten Morgen zusammen.",
    "it": "Buongiorno a tutti.",
    "pt": "Bom dia a todos.",
    "ja": "こんにちは。",
    "ko": "안녕하세요.",
    "zh": "你好。",
    "ms": "Selamat pagi.",
    "ta": "வணக்கம்.",
    "te": "నమస్కారం.",
    "mr": "नमस्कार.",
    "kn": "ನಮಸ್ಕಾರ.",
    "ml": "നമസ്കാരം.",
    "bn": "নমস্কার.",
}


@dataclass(frozen=True)
class VoicePlan:
    """What a voice will be. `wants` are all voices that are chosen together with it."""

    want: Want
    engine: str
    params: Params
    wants: tuple[Want, ...] = field(default=(), repr=False)


class VoicesStage(MapStage):
    name = "voices"
    number = 3
    version = 2
    reads = ("personas", "dialogues")
    set_only = frozenset({"user_voices"})

    def __init__(self) -> None:
        self._engines: dict[str, SpeechEngine] = {}
        self._context: StageContext | None = None
        self._casting: Casting | None = None

    def engine(self, config: Config) -> str:
        return engine_module(config.voices.engine).revision(config.speech)

    def files(self, config: Config) -> dict[str, str]:
        """The recordings that are cloned: who replaces one, or takes a consent back, is heard.

        Raises:
            DataFileError: they are not there.
        """
        return source_files(config.voices)

    def beyond(self, config: Config) -> dict[str, Any]:
        unnamed = unnamed_engines(config)
        # Of `files` a folder's key has the digests alone; which path has which says who speaks.
        recordings = source_files(config.voices)
        return ({"engines": unnamed} if unnamed else {}) | (
            {"recordings": recordings} if recordings else {}
        )

    def tasks(self, context: StageContext) -> list[Task]:
        section = context.config.voices
        wants = wanted_voices(context)
        if section.names is not None:
            return named_tasks(wants, context.config)
        if section.recordings is None and section.dataset is None:
            return espeak_tasks(wants)
        if not engine_module(section.engine).CAPABILITIES.cloning:
            raise RequestError(
                f"recordings need an engine that clones voices, {section.engine} does not. Set "
                "voices.engine: chatterbox, csm or pocket-tts"
            )
        return cloned_tasks(wants, context.config)

    def setup(self, context: StageContext) -> None:
        self._context = context

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        plan: VoicePlan = task.payload
        want = plan.want
        voice = Voice(
            id=task.id,
            engine=plan.engine,
            role=want.role,
            persona_id=want.persona_id,
            params=plan.params,
            language=want.language,
            licence=engine_module(plan.engine).CAPABILITIES.licence,
        )
        with tempfile.TemporaryDirectory() as scratch:
            sample = None
            if plan.wants:
                voice, content = self._cloned(voice, plan)
                voice = voice.model_copy(update={"sample": blobs.put(content, ".wav")})
                sample = Path(scratch) / "sample.wav"
                sample.write_bytes(content)
            proof = self._proof(voice, seed, sample)
        return [voice.model_copy(update={"proof": blobs.put(proof, ".wav")})]

    def close(self) -> None:
        engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.close()

    def notes(self, folder: StageFolder) -> dict[str, Any]:
        if self._casting is None:
            return {}
        return {"refused_recordings": [list(pair) for pair in self._casting.refused]}

    def page(self, folder: StageFolder, context: StageContext) -> str | None:
        refused: Iterable[Rejected] = self._casting.refused if self._casting else ()
        return render(folder, context, tuple(refused))

    def _cloned(self, voice: Voice, plan: VoicePlan) -> tuple[Voice, bytes]:
        """The voice with what is known of its speaker, and its sample's WAV."""
        from pipeline.engines.encoding import mono_wav_bytes
        from pipeline.engines.voice_recordings import transcript_of

        assert self._context is not None, "setup comes first"
        section = self._context.config.voices
        if self._casting is None:
            self._casting = self._cast(plan.wants)
        sample = self._casting.samples[plan.want.id]
        source = (
            f"{sample.clip.source}, {sample.start_s:g}-{sample.end_s:g} s, "
            f"{sample.snr_db:.0f} dB above the noise, up to {sample.bandwidth_hz / 1000:.1f} kHz"
        )
        update = {
            "licence": sample.clip.licence,
            "consent": sample.clip.consent,
            "source": source,
            "transcript": transcript_of(sample, section),
        }
        return voice.model_copy(update=update), mono_wav_bytes(sample.samples)

    def _cast(self, wants: tuple[Want, ...]) -> Casting:
        from pipeline.engines.vad import VoiceActivity

        assert self._context is not None
        section = self._context.config.voices
        casting = cast(
            wants,
            clips_of(section),
            VoiceActivity(),
            guess_gender=section.guess_gender,
            thorough=section.dataset is None,
        )
        if casting.refused:
            source, reason = casting.refused[0]
            self._context.report(
                f"voices: {len(casting.refused)} recordings were refused, first {source}: {reason}"
            )
        return casting

    def _proof(self, voice: Voice, seed: int, sample: Path | None) -> bytes:
        """A sentence in this voice.

        Raises:
            RequestError: the engine has no such voice; names the persona.
        """
        from duplex.mixing import normalize_loudness
        from pipeline.engines.encoding import mono_wav_bytes

        assert self._context is not None, "setup comes first"
        text = PROOF_TEXTS.get(voice.language, PROOF_TEXTS["en"])
        request = SpeechRequest(
            text=text, voice=voice, seed=seed, language=voice.language, sample=sample
        )
        try:
            samples = self._engine(voice.engine).synthesize(request).samples
        except RequestError as error:
            hint = (
                "accent must be a voice of espeak-ng, such as en-us, en-gb or en-gb-scotland."
                if voice.engine == "espeak"
                else "The engine must have it: see voices.names."
            )
            raise RequestError(
                f"{voice.id}: {error}. Look at `voice` of persona {voice.persona_id}; {hint}"
            ) from error
        try:
            return mono_wav_bytes(normalize_loudness(samples, PROOF_DBFS))
        except ValueError as error:
            raise RecordError(f"{voice.id}: {error}") from error

    def _engine(self, name: str) -> SpeechEngine:
        assert self._context is not None
        if name not in self._engines:
            self._engines[name] = engine_module(name).make(self._context.config.speech)
        return self._engines[name]


# -- what is wanted


def wanted_voices(context: StageContext) -> list[Want]:
    """A voice for each persona by id, also an imported one; then the user's, a language each."""
    known = {p.id: (p.voice, p.language) for p in context.records("personas", Persona)}
    for dialogue in context.records("dialogues", Dialogue):
        if dialogue.persona_id not in known:  # imported: somebody else's persona
            known[dialogue.persona_id] = default_traits(dialogue.persona_id), "en"
    wants = [
        Want(agent_voice_id(persona_id), "agent", language, persona_id, traits)
        for persona_id, (traits, language) in sorted(known.items())
    ]
    for language in sorted({language for _, language in known.values()} or {"en"}):
        for index in range(context.config.voices.user_voices):
            wants.append(Want(user_voice_id(index, language), "user", language))
    return wants


def agent_voice_id(persona_id: str) -> str:
    voice_id = f"agent-{persona_id}"
    if len(voice_id) <= LONGEST_ID:
        return voice_id
    short = hashlib.sha256(persona_id.encode()).hexdigest()[:12]
    return f"{voice_id[: LONGEST_ID - 13]}-{short}"


def user_voice_id(index: int, language: Language = "en") -> str:
    return f"user-{index:02d}" if language == "en" else f"user-{language}-{index:02d}"


def default_traits(persona_id: str) -> VoiceTraits:
    """Traits of a persona of which only dialogues are known."""
    gender = ("female", "male")[Draw(f"gender of {persona_id}").between(0, 1)]
    return VoiceTraits.model_validate({"gender": gender})


# -- tasks


def espeak_tasks(wants: Iterable[Want]) -> list[Task]:
    """A task for each want; no two personas get equal parameters."""
    wants = list(wants)
    agents = [(w.persona_id, w.traits, w.language) for w in wants if w.persona_id and w.traits]
    chosen = persona_params(agents)
    tasks: list[Task] = []
    for want in wants:
        if not want.persona_id or not want.traits:
            index = int(want.id.rpartition("-")[2])
            plan = VoicePlan(want, "espeak", user_params(index, want.language))
            tasks.append(Task(want.id, (), plan))
            continue
        params, attempt = chosen[want.persona_id]
        material: dict[str, object] = {
            "persona": want.persona_id,
            "voice": want.traits.model_dump(mode="json"),
        }
        if want.language != "en":
            material["language"] = want.language
        # Only a voice that had to give way depends on more than its own persona.
        if attempt:
            material["attempt"] = attempt
        plan = VoicePlan(want, "espeak", params)
        tasks.append(Task(want.id, (_digest(material),), plan))
    return tasks


def named_tasks(wants: Iterable[Want], config: Config) -> list[Task]:
    """Voices of an engine by name. A language that it does not speak is another engine's, which
    must be espeak: names mean nothing elsewhere.

    Raises:
        RequestError: too few names, or no engine for a language.
    """
    section, wants = config.voices, list(wants)
    assert section.names is not None
    own = engine_module(section.engine).CAPABILITIES
    spoken = [want for want in wants if own.speaks(want.language)]
    names = match_names(spoken, section.names)
    tasks = [
        Task(want.id, (names[want.id],), VoicePlan(want, section.engine, {"voice": names[want.id]}))
        for want in spoken
    ]
    return tasks + _espeak_instead([want for want in wants if want not in spoken], config)


def cloned_tasks(wants: Iterable[Want], config: Config) -> list[Task]:
    """Voices from recordings, each of the engine that speaks its language; espeak's own voices
    where that is espeak, which clones none.

    Raises:
        RequestError: no engine for a language.
    """
    section, wants = config.voices, list(wants)
    engines = {want.id: voice_engine(want.language, config) for want in wants}
    cloned = [want for want in wants if engine_module(engines[want.id]).CAPABILITIES.cloning]
    # Who gets which speaker hangs on everybody who wants one.
    together = _digest({"source": source_digest(section), "wants": [str(w) for w in cloned]})
    tasks = []
    for want in cloned:
        name, sources = engines[want.id], (together,)
        if name != section.engine:
            sources = (together, engine_module(name).revision(config.speech))
        tasks.append(Task(want.id, sources, VoicePlan(want, name, {}, tuple(cloned))))
    return tasks + _espeak_instead([want for want in wants if want not in cloned], config)


def _espeak_instead(wants: list[Want], config: Config) -> list[Task]:
    """espeak's voices for those whose language `voices.engine` does not speak.

    Raises:
        RequestError: their engine is another one, in which they have no voice.
    """
    for want in wants:
        if (name := voice_engine(want.language, config)) != "espeak":
            raise RequestError(
                f"{want.id} speaks {want.language}, {config.voices.engine} does not, and {name} "
                f"has no voice for it. Set speech.engines: {{{want.language}: espeak}}, or clone "
                "voices from recordings (voices.recordings)"
            )
    revision = engine_module("espeak").revision(config.speech)
    return [replace(task, sources=(*task.sources, revision)) for task in espeak_tasks(wants)]


def _digest(material: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical_json(material).encode()).hexdigest()


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("voices")
