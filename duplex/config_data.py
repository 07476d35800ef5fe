"""The sections of the data stages: personas, dialogues, voices, speech."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from duplex.base import Language, Text
from duplex.sections import Probability, Runtime, Section, StageSection

EngineName = Literal[
    "espeak", "openai-speech", "chatterbox", "moshi-tts", "csm", "pocket-tts", "dia"
]

Addresses = Annotated[tuple[str, ...], Field(min_length=1)]


class PersonasSection(StageSection):
    domain: str = Field(default="data/domains/coffee-shop.yaml", description="the place, the roles")
    folder: str = "data/personas"
    scenarios: str = "data/scenarios"
    only: tuple[str, ...] | None = Field(default=None, description="persona ids; None: all")
    only_scenarios: tuple[str, ...] | None = Field(
        default=None, description="scenario ids; None: all"
    )


class DialoguesRuntime(Runtime):
    api_key: str | None = Field(default=None, repr=False, description="write ${OPENAI_API_KEY}")
    base_url: str | Addresses | None = Field(
        default=None, description="where the model is served; several share the requests"
    )
    timeout_s: float = Field(default=120, gt=0, description="longest silence of the endpoint")
    deadline_s: float = Field(default=600, gt=0, description="longest reply, however it trickles")
    concurrency: int = Field(default=8, ge=1, le=256, description="requests in flight at most")
    budget_usd: float | None = Field(default=None, ge=0, description="hard stop; needs the prices")
    budget_tokens: int | None = Field(default=None, ge=0, description="hard stop, in and out")
    price_in: float | None = Field(default=None, ge=0, description="dollars per million tokens")
    price_out: float | None = Field(default=None, ge=0, description="dollars per million tokens")
    critic_price_in: float | None = Field(
        default=None, ge=0, description="of another checks.critic"
    )
    critic_price_out: float | None = Field(
        default=None, ge=0, description="of another checks.critic"
    )
    max_retries: int = Field(
        default=8, ge=0, le=100, description="of one request that was turned away or cut off"
    )
    max_wait_s: float = Field(default=120, gt=0, description="longest pause before a retry")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the endpoint; empty where it is OpenAI's own."""
        if self.base_url is None or isinstance(self.base_url, str):
            return (self.base_url,) if self.base_url else ()
        return self.base_url


class DialogueChecks(Section):
    """What a dialogue must show before it is kept."""

    min_facts: int = Field(default=2, ge=0, description="facts that the agent tells")
    min_patterns: int = Field(default=1, ge=0, description="speech patterns that the agent uses")
    near_duplicate: float = Field(
        default=0.7, gt=0, le=1, description="Jaccard similarity of three-word shingles"
    )
    critic: str | None = Field(default=None, description="a model at the endpoint that judges too")


class DialoguesSection(StageSection):
    writer: Literal["scripted", "openai", "annotate"] = Field(
        default="scripted",
        description="openai: a model at any compatible endpoint; annotate: prompts for dialogues "
        "that exist",
    )
    source: str | None = Field(default=None, description="annotate: the dialogues that exist")
    per_persona: int = Field(default=4, ge=1, le=1000, description="dialogues")
    min_turns: int = Field(default=15, ge=2)
    max_turns: int = Field(default=25, ge=2)
    llm: str | None = Field(default=None, description="model name at the endpoint")
    temperature: float = Field(default=0.8, ge=0, le=2)
    max_tokens: int = Field(default=4096, ge=64, description="of one reply")
    max_candidates: int = Field(
        default=4, ge=1, le=16, description="replies to one request before it is rejected"
    )
    checks: DialogueChecks = DialogueChecks()
    runtime: DialoguesRuntime = DialoguesRuntime()

    @model_validator(mode="after")
    def _consistent(self) -> DialoguesSection:
        if self.min_turns > self.max_turns:
            raise ValueError(
                f"min_turns must not exceed max_turns, found {self.min_turns} > {self.max_turns}"
            )
        if self.writer != "scripted" and not self.llm:
            raise ValueError(f"writer: {self.writer} needs llm, the model's name at the endpoint")
        if (self.writer == "annotate") != (self.source is not None):
            raise ValueError("writer: annotate and source belong together")
        runtime = self.runtime
        if runtime.budget_usd is not None and (
            runtime.price_in is None or runtime.price_out is None
        ):
            raise ValueError("budget_usd needs price_in and price_out, dollars per million tokens")
        critic = self.checks.critic
        if (
            runtime.budget_usd is not None
            and critic not in (None, self.llm)
            and (runtime.critic_price_in is None or runtime.critic_price_out is None)
        ):
            raise ValueError(
                "budget_usd with another model as checks.critic needs critic_price_in and "
                "critic_price_out, dollars per million tokens"
            )
        return self


class VoiceDataset(Section):
    """Recordings of many speakers in a `datasets` set: a hub name, or a folder of its files."""

    name: str = Field(min_length=1)
    config: str | None = Field(
        default=None, description="the set's own configuration, where it has several"
    )
    split: str = "train"
    revision: str | None = Field(default=None, description="a commit: without it, what is newest")
    audio: str = Field(default="audio", description="column")
    speaker: str = Field(default="speaker_id", description="column")
    transcript: str | None = Field(default=None, description="column")
    gender: str | None = Field(default=None, description="column of female, male, F, M")
    age: str | None = Field(default=None, description="column of young, adult, old or years")
    max_rows: int = Field(default=2000, ge=1, le=100_000, description="looked at, at most")


VoiceNames = dict[
    Annotated[str, StringConstraints(pattern=r"^([a-z]{2,3}-)?(female|male)$")],
    Annotated[tuple[Text, ...], Field(min_length=1)],
]


class VoicesSection(StageSection):
    """Voices are made by the engine (espeak), named (`names`), or cloned from recordings
    (`recordings`, `dataset`)."""

    engine: EngineName = "espeak"
    user_voices: int = Field(
        default=4, ge=1, le=64, description="voices that share the user's side, a language each"
    )
    names: VoiceNames | None = Field(
        default=None, description="the engine's own voices: {female: […], fr-male: […]}"
    )
    recordings: str | None = Field(
        default=None, description="folder: a file, or a folder of files, for each speaker"
    )
    dataset: VoiceDataset | None = Field(default=None, description="a name is enough")
    licence: Text | None = Field(default=None, description="of the recordings")
    consent: Text | None = Field(default=None, description="on what consent they are used")
    language: Language = Field(default="en", description="of recordings that do not say it")
    guess_gender: bool = Field(
        default=False, description="by pitch, where a recording does not say it"
    )
    recogniser: Literal["auto", "faster-whisper", "pocketsphinx", "none"] = Field(
        default="auto", description="for recordings without a transcript"
    )

    @field_validator("dataset", mode="before")
    @classmethod
    def _name_is_enough(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> VoicesSection:
        sources = [n for n in ("names", "recordings", "dataset") if getattr(self, n) is not None]
        if len(sources) > 1:
            raise ValueError(f"voices come from one source, found {' and '.join(sources)}")
        if self.engine == "espeak" and sources:
            raise ValueError(
                f"espeak has voices of its own and clones none: {sources[0]} needs another engine"
            )
        if self.engine != "espeak" and not sources:
            raise ValueError(
                f"engine: {self.engine} needs its voices: names, recordings or dataset"
            )
        return self


class TimelineSection(Section):
    """What lies between and under the turns. Levels are RMS in dB of full scale."""

    room_tone_dbfs: float | None = Field(
        default=None, ge=-90, le=-30, description="under the user's channel; None: digital silence"
    )
    leakage_db: float | None = Field(
        default=None, ge=-80, le=-10, description="of the agent, heard in the user's channel"
    )
    noise_dbfs: float | None = Field(
        default=None, ge=-90, le=-20, description="louder noise of the place, user's channel"
    )
    yield_ms: tuple[int, int] = Field(
        default=(160, 480), description="how long somebody goes on who is cut short"
    )

    @field_validator("yield_ms")
    @classmethod
    def _a_range(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] <= value[1] <= 5000:
            raise ValueError(f"must be a range within 0 and 5000 ms, found {value[0]}-{value[1]}")
        return value


class UtteranceChecks(Section):
    """What an utterance must show before it is used."""

    max_wer: float = Field(default=0.5, ge=0, description="against what it should say")
    share: Probability | None = Field(
        default=None, description="of utterances transcribed; None: by engine"
    )
    recogniser: Literal["auto", "faster-whisper", "pocketsphinx", "none"] = Field(
        default="auto", description="what transcribes; auto: whichever is at hand"
    )
    recogniser_model: str | None = Field(
        default=None, description="faster-whisper: a size, a hub name or a folder; None: small"
    )
    same_speaker: str | None = Field(
        default=None, description="a WavLM that compares voices: owner/name[@revision], or a folder"
    )
    min_similarity: float = Field(
        default=0.86, ge=-1, le=1, description="to the voice's sample, or its proof; cosine"
    )
    retries: int = Field(default=3, ge=0, le=20, description="with another seed each")


class SpeechModel(Section):
    """Where a neural engine's weights are from."""

    weights: str | None = Field(
        default=None, description="hub name owner/name, or a folder; None: the engine's own"
    )
    revision: str | None = Field(default=None, description="the hub's commit or tag")
    voices: str | None = Field(
        default=None, description="moshi-tts: hub name or folder of the voices' embeddings"
    )


class SpeechRuntime(Runtime):
    base_url: str | None = Field(default=None, description="server of openai-speech, ends in /v1")
    api_key: str | None = Field(default=None, repr=False, description="write ${OPENAI_API_KEY}")
    timeout_s: float = Field(default=120, gt=0, description="longest silence of an engine")
    deadline_s: float = Field(default=600, gt=0, description="longest reply, however it trickles")
    start_s: float = Field(
        default=1800, gt=0, description="start of an isolated engine: it may install itself first"
    )
    concurrency: int = Field(default=4, ge=1, le=256, description="requests in flight at most")
    retries: int = Field(default=4, ge=0, le=20, description="of a busy server, with back-off")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="of the neural engines"
    )


class SpeechSection(StageSection):
    engine: EngineName = "espeak"
    model: str | None = Field(default=None, description="openai-speech: the model's name there")
    revision: str | None = Field(default=None, description="of an engine's weights: a hub commit")
    instructions: bool = Field(
        default=False, description="openai-speech: tell the emotion in words; not all servers can"
    )
    engines: dict[Language, EngineName] = Field(
        default={}, description="for some languages another engine"
    )
    agent_voice: Literal["persona", "conversation"] = Field(
        default="persona",
        description="conversation: any persona's of the same side of the split, drawn for each "
        "dialogue, as the predecessor had it",
    )
    loudness_dbfs: float = Field(default=-24, ge=-60, le=0, description="RMS of each utterance")
    lead_in_s: float = Field(default=0.32, ge=0, le=30, description="before the first turn")
    tail_s: float = Field(default=0.48, ge=0, le=30, description="after the last turn")
    timeline: TimelineSection = TimelineSection()
    checks: UtteranceChecks = UtteranceChecks()
    models: dict[EngineName, SpeechModel] = Field(
        default={}, description="weights of neural engines that are not their own"
    )
    runtime: SpeechRuntime = SpeechRuntime()
