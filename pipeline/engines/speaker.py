"""What the speech stage speaks through: the right engine, its emotion, checks, another try.

`Speaker.speak` gives an utterance whose words are timed and that passed the checks, or raises:
there is never silence in place of speech. One that fails is spoken again with another seed, as
often as `speech.checks.retries` says, by engines that have seeds.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from duplex.config import Config
from duplex.config_data import SpeechSection
from duplex.errors import RecordError, RequestError
from duplex.files import sha256_file
from duplex.records import Voice
from pipeline.engines.emotions import EMOTIONS, with_emotion
from pipeline.engines.engines import (
    ENGINES,
    LANGUAGES,
    configured_engines,
    engine_for,
    engine_module,
)
from pipeline.engines.listening import Heard, Listener, recogniser_revision
from pipeline.engines.same_speaker import SameSpeaker, same_speaker_revision
from pipeline.engines.script_words import words_by_ear, words_by_letters
from pipeline.engines.speaking import Checks, SpeechEngine, SpeechRequest, Utterance
from pipeline.engines.utterance_check import (
    fault_of_words,
    faults_of_sound,
    pace_of,
    transcript_error,
)
from pipeline.engines.utterance_store import UNSTORED, UtteranceStore, key_of


class Speaker:
    """Engines are started at their first utterance, one of each. Safe for threads.

    Args:
        section: `config.speech`.
        report: gets what a person should know, once.
        store: where what was spoken is kept; None: it is not.
    """

    def __init__(
        self,
        section: SpeechSection,
        report: Callable[[str], None] = print,
        store: UtteranceStore | None = None,
    ):
        self._section = section
        self._report = report
        self._store = store
        self._revisions: dict[str, str] = {}
        self._engines: dict[str, SpeechEngine] = {}
        self._locks: dict[str, threading.Lock] = {name: threading.Lock() for name in ENGINES}
        self._starting = threading.Lock()
        self._listener = Listener(section.checks)
        self._listening = threading.Lock()
        name = section.checks.same_speaker
        self._comparison = SameSpeaker(name, section.runtime.device) if name else None
        self._comparing = threading.Lock()
        self._told: set[str] = set()

    def __enter__(self) -> Speaker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def speak(self, request: SpeechRequest) -> Utterance:
        """
        Raises:
            RequestError, MissingInputError, TransientError: as `SpeechEngine.synthesize`.
            RecordError: no try gave speech that passes; names all reasons.
        """
        name = engine_of(request, self._section)
        engine = self._engine(name)
        settings = settings_of(name, request)
        prepared = replace(request, adjusted=settings)
        tries = 1 + self._section.checks.retries * engine.capabilities.seeded
        reasons: list[str] = []
        for number in range(tries):
            try:
                utterance = self._spoken(name, engine, _again(prepared, number), number)
                return self._checked(name, engine, utterance, prepared, number)
            except RecordError as error:
                reasons.append(str(error))
        # Who asks for it once more (--retry-rejected) shall hear other speech of a server.
        for number in range(tries):
            key = self._key(name, engine, _again(prepared, number), number)
            if self._store is not None and key is not None:
                self._store.forget(key)
        if tries == 1:
            raise RecordError(reasons[0])
        # Equal reasons once, in order.
        listing = "; ".join(dict.fromkeys(reasons))
        raise RecordError(
            f"{name} must speak {_short(request.text)} well in one of {tries} tries: {listing}"
        )

    def close(self) -> None:
        with self._starting:
            engines, self._engines = self._engines, {}
        for engine in engines.values():
            engine.close()
        with self._listening:
            self._listener.close()
        with self._comparing:
            if self._comparison is not None:
                self._comparison.close()

    def _engine(self, name: str) -> SpeechEngine:
        with self._starting:
            if name not in self._engines:
                self._engines[name] = engine_module(name).make(self._section)
            return self._engines[name]

    def _spoken(
        self, name: str, engine: SpeechEngine, request: SpeechRequest, number: int
    ) -> Utterance:
        """As the engine spoke it, now or in an earlier run."""
        key = self._key(name, engine, request, number)
        if self._store is None or key is None:
            return self._synthesize(name, engine, request)
        if (known := self._store.read(key)) is not None:
            return known
        utterance = self._synthesize(name, engine, request)
        self._store.write(key, utterance)
        return utterance

    def _key(
        self, name: str, engine: SpeechEngine, request: SpeechRequest, number: int
    ) -> str | None:
        """Its name in the store; None where it is not kept."""
        if self._store is None or name in UNSTORED:
            return None
        with self._starting:
            if name not in self._revisions:
                revision = engine_module(name).revision(self._section)
                told = ", instructed" if self._section.instructions else ""
                self._revisions[name] = f"{name}={revision}{told}"
        hears = engine.capabilities.context
        return key_of(self._revisions[name], request, number, hears_context=hears)

    def _synthesize(self, name: str, engine: SpeechEngine, request: SpeechRequest) -> Utterance:
        if engine.capabilities.parallel:
            return engine.synthesize(request)
        with self._locks[name]:
            return engine.synthesize(request)

    def _checked(
        self, name: str, engine: SpeechEngine, spoken: Utterance, request: SpeechRequest, retry: int
    ) -> Utterance:
        """The utterance with its words timed.

        Raises:
            RecordError: it has faults.
        """
        text, language = request.text, request.language
        faults = list(
            faults_of_sound(spoken.samples, text, language, pace_of(dict(request.settings)))
        )
        share = self._section.checks.share
        share = engine.capabilities.checked if share is None else share
        chosen = in_sample(text, request.voice.id, share)
        heard: Heard | None = None
        error: float | None = None
        if not faults and (chosen or spoken.words is None):
            heard = self._hear(name, spoken, request, needed=chosen)
        if heard is not None and chosen:
            transcript = [word.text for word in heard.words]
            error = transcript_error(text, transcript, heard.known)
            fault = fault_of_words(error, self._section.checks.max_wer, transcript)
            faults += [fault] if fault else []
        similarity = None if faults else self._compare(name, spoken, request)
        least = self._section.checks.min_similarity
        if similarity is not None and similarity < least:
            faults.append(
                f"it must sound like voice {request.voice.id}, similarity at least {least:g}, "
                f"found {similarity:.2f}"
            )
        if faults:
            raise RecordError(f"{name} spoke {_short(text)} and {'; '.join(faults)}")
        words, words_by = spoken.words, spoken.words_by
        if words is None:
            words = words_by_ear(text, spoken.samples, heard.words) if heard else None
            words_by = "recogniser" if words is not None else "letters"
            words = words_by_letters(text, spoken.samples) if words is None else words
        if not words:
            raise RecordError(f"a text must have a word to say, found {_short(text)}")
        checks = Checks(error, similarity, retry)
        return Utterance(spoken.samples, words, words_by, checks, request.voice.id)

    def _hear(
        self, name: str, spoken: Utterance, request: SpeechRequest, needed: bool
    ) -> Heard | None:
        with self._listening:
            if self._listener.hears(request.language):
                return self._listener.hear(spoken.samples, request.language, request.text)
        if needed:
            self._tell(
                f"{name}: what it says in {request.language} is not checked, since no recogniser "
                "for it is at hand: pip install 'duplex-workbench[asr]' and set "
                "speech.checks.recogniser: faster-whisper, which fetches its model"
            )
        return None

    def _compare(self, name: str, spoken: Utterance, request: SpeechRequest) -> float | None:
        """How much it sounds like its voice; None where nobody can say."""
        voice, reference = request.voice, request.sample or request.proof
        if self._comparison is None:
            if request.sample is not None and name != "espeak":
                self._tell(
                    f"{name}: whether a cloned voice sounds like its sample is not checked: see "
                    "speech.checks.same_speaker"
                )
            return None
        if reference is None or (name == "espeak" and voice.engine != "espeak"):
            self._tell(f"{name}: it has nothing of voice {voice.id} to be compared with")
            return None
        with self._comparing:
            return self._comparison.similarity(spoken.samples, reference)

    def _tell(self, message: str) -> None:
        """Report something, once."""
        with self._starting:
            new = message not in self._told
            self._told.add(message)
        if new:
            self._report(message)


def in_sample(text: str, voice_id: str, share: float) -> bool:
    """Whether an utterance is among those that are transcribed: by the hash of what it is."""
    digest = hashlib.sha256(f"{voice_id}\x00{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _again(request: SpeechRequest, number: int) -> SpeechRequest:
    """The request of a further try: with another seed, the same one each time."""
    if number == 0:
        return request
    digest = hashlib.sha256(f"{request.seed}\x00try {number}".encode()).digest()
    return replace(request, seed=int.from_bytes(digest[:4], "big"))


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "…")


def chosen_engine(voice: Voice, language: str, section: SpeechSection) -> str:
    """`speech.engines` for the language; the voice's own where that speaks it; else as
    `engine_for`, which may raise a RequestError."""
    if language in section.engines:
        return section.engines[language]
    if voice.engine in ENGINES and engine_module(voice.engine).CAPABILITIES.speaks(language):
        return voice.engine
    return engine_for(language, section)


def engine_of(request: SpeechRequest, section: SpeechSection) -> str:
    """The engine of a request, as `chosen_engine`.

    Raises:
        RequestError: none speaks it, or the voice cannot be had in the one that does.
    """
    voice, language = request.voice, request.language
    name = chosen_engine(voice, language, section)
    capabilities = engine_module(name).CAPABILITIES
    if not capabilities.speaks(language):
        raise RequestError(f"{name} must speak {language}, and does not: see speech.engines")
    if name not in (voice.engine, "espeak") and not (capabilities.cloning and request.sample):
        raise RequestError(
            f"voice {voice.id} of {voice.engine} must have a recording that {name} can clone to "
            f"speak {language}, found none. Give the voice a sample, or name for {language} an "
            "engine that has the voice, in speech.engines"
        )
    return name


def settings_of(name: str, request: SpeechRequest) -> dict[str, str | int | float]:
    """The voice's parameters for this engine, with the emotion; another engine's mean nothing."""
    own = request.voice.params if request.voice.engine == name else {}
    return dict(with_emotion(name, own, request.emotion, request.intensity))


def speaker_revision(config: Config) -> str:
    """Everything but the requests that decides what is spoken: engines, recogniser, data."""
    maps = "".join(sha256_file(path) for path in (LANGUAGES, EMOTIONS))
    spoken = engines_revision(configured_engines(config), config.speech)
    return f"{spoken}, maps={hashlib.sha256(maps.encode()).hexdigest()[:12]}"


def engines_revision(names: Iterable[str], section: SpeechSection) -> str:
    """Of these engines, and of who listens where one of them is listened to."""
    names = sorted(names)
    parts = [f"{name}={engine_module(name).revision(section)}" for name in names]
    if somebody_listens(names, section):
        parts.append(f"heard by {recogniser_revision(section.checks)}")
    if compared := same_speaker_revision(section.checks):
        parts.append(compared)
    return ", ".join(parts)


def somebody_listens(names: Iterable[str], section: SpeechSection) -> bool:
    """Whether a recogniser hears some of what these engines say: to check it or to time it."""
    found = [engine_module(name).CAPABILITIES for name in names]
    share = section.checks.share
    checked = share > 0 if share is not None else any(one.checked for one in found)
    return checked or any(not one.word_times for one in found)
