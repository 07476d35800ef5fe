"""The one configuration schema: a section for each stage, and all defaults.

A YAML file holds only what differs from these defaults; `duplex/configfile.py` reads it.
Only sections *without* `runtime` enter keys and manifests, and secrets live in `runtime`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from duplex.config_data import DialoguesSection, PersonasSection, SpeechSection, VoicesSection
from duplex.config_train import Device, TrainSection
from duplex.sections import Probability, Runtime, Section, StageSection

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]

ProfileName = Literal["workbench", "personaplex", "moshi", "coffee-compat"]

# A profile sets a group of defaults; a key that the YAML names wins over it.
# personaplex: the paper's weights; moshi: moshi-finetune's;
# coffee-compat: the predecessor to the letter, its defects included, so that its
# files and numbers can be reproduced.
PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    "workbench": {},
    "personaplex": {
        "tensors": {"alignment": "word", "voice_prompt_s": 6},
        "train": {"loss": {"semantic_weight": 1, "acoustic_weight": 0.02,
                           "text_padding_weight": 0.3, "normalize": "all"}},
    },
    "moshi": {
        "tensors": {"alignment": "word", "prompt": False},
        "train": {"loss": {"semantic_weight": 100, "acoustic_weight": 1,
                           "text_padding_weight": 0.5}},
    },
    "coffee-compat": {
        "tensors": {"alignment": "onset", "onset_fraction": 0.3, "overflow": "drop",
                    "padding": "zero", "layout": "coffee", "encoding": "turn",
                    "split": "conversation", "valid_fraction": 0.1},
        "train": {"learning_rate": 2e-6, "batch_size": 1, "epochs": 2, "warmup_steps": 0,
                  "weight_decay": 0.01, "clip_norm": 1,
                  "lora": {"rank": 16, "alpha": 32, "dropout": 0.1},
                  "loss": {"semantic_weight": 100, "acoustic_weight": 1,
                           "text_padding_weight": 1, "normalize": "none", "prompt": True}},
    },
}  # fmt: skip


class ModelSection(Section):
    """The base model. `pocket` is a small one of our own, in data/pocket.

    `base` is `pocket`, a folder with `config.json`, or a Hugging Face repository `owner/name`.
    """

    base: str = "pocket"
    revision: str | None = Field(default=None, description="a commit of that repository")


class TensorsRuntime(Runtime):
    device: Device = "auto"
    cache: bool = Field(default=True, description="keep codes by content, for another alignment")


class TensorsSection(StageSection):
    alignment: Literal["onset", "word", "uniform"] = Field(
        default="onset",
        description="text close behind a turn's start, at each word, or spread over the turn",
    )
    onset_fraction: float = Field(
        default=0.3, gt=0, le=1, description="onset: share of a turn's frames that its text fills"
    )
    overflow: Literal["continue", "drop"] = Field(
        default="continue", description="onset: what becomes of tokens past the window"
    )
    padding: Literal["pad", "zero"] = Field(
        default="pad", description="zero: -1 in silent dialogue frames, as the predecessor had"
    )
    prompt: bool = Field(default=True, description="the system prompt stands in front")
    layout: Literal["personaplex", "coffee"] = Field(
        default="personaplex", description="of the prompt; coffee: the predecessor's"
    )
    voice_prompt_s: float = Field(
        default=0, ge=0, le=30, description="longest voice sample in the prompt; 0: none"
    )
    greeting: bool = Field(
        default=False, description="the user's first turn is part of the prompt, without loss"
    )
    encoding: Literal["conversation", "turn"] = Field(
        default="conversation", description="turn: each by itself, constant silence between"
    )
    batch: int = Field(
        default=1,
        ge=1,
        le=64,
        description="a persona's conversations in one encoding; more is for a GPU",
    )
    split: Literal["persona", "conversation"] = Field(
        default="persona", description="what is held out whole"
    )
    valid_fraction: Probability = Field(
        default=0.1, description="share of personas, or conversations, held out"
    )
    max_frames: int = Field(default=3000, ge=50, le=3000, description="of one clip: 3000 are 240 s")
    long: Literal["reject", "cut"] = Field(
        default="reject", description="cut: longer conversations become several clips"
    )
    runtime: TensorsRuntime = TensorsRuntime()

    @model_validator(mode="after")
    def _consistent(self) -> TensorsSection:
        if self.overflow == "drop" and self.alignment != "onset":
            raise ValueError(f"overflow: drop needs alignment: onset, found {self.alignment}")
        if (self.voice_prompt_s or self.greeting) and not self.prompt:
            raise ValueError("voice_prompt_s and greeting are parts of a prompt: set prompt: true")
        if self.layout == "coffee" and (self.voice_prompt_s or self.greeting):
            raise ValueError("layout: coffee has neither voice_prompt_s nor greeting")
        return self


class MergeSection(StageSection):
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the merged weights"
    )


class SamplingSection(Section):
    """Defaults of a conversation; its URL may name others."""

    text_temperature: float = Field(default=0.7, ge=0, le=5)
    audio_temperature: float = Field(default=0.8, ge=0, le=5)
    text_topk: int = Field(default=25, ge=1)
    audio_topk: int = Field(default=250, ge=1)


class ServeRuntime(Runtime):
    host: str = "127.0.0.1"
    port: int = Field(default=8998, ge=0, le=65535, description="0: any free port")
    slots: int = Field(default=4, ge=1, le=256, description="conversations at a time")
    device: Device = "auto"
    token: str | None = Field(default=None, repr=False, description="write ${DUPLEX_TOKEN}")
    start_timeout_s: float = Field(default=600, gt=0)


class ServeSection(StageSection):
    sampling: SamplingSection = SamplingSection()
    runtime: ServeRuntime = ServeRuntime()


class EvaluateRuntime(Runtime):
    device: Device = "auto"
    slots: int = Field(
        default=16, ge=1, le=256, description="conversations at a time in one process, at most"
    )
    start_timeout_s: float = Field(default=600, gt=0)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


VadName = Literal["level", "silero"]
ItemFiles = Annotated[tuple[str, ...], BeforeValidator(_as_list)]


class EvaluateSection(StageSection):
    items: ItemFiles = Field(
        default=("data/prompts/seeds.yaml",), min_length=1, description="files, or one"
    )
    seconds: float = Field(
        default=120,
        gt=1,
        le=240,
        description="longest conversation; turns that do not fit are left out",
    )
    answer_s: float = Field(default=2.4, ge=0, le=30, description="pause left after each user turn")
    seed: int = Field(default=0, description="of the first conversation of each item")
    seeds: int = Field(
        default=1, ge=1, le=100, description="conversations of each item: seed, seed + 1, …"
    )
    prompts: Literal["given", "weak"] = Field(
        default="given", description="weak: an item's weak_prompt where it has one"
    )
    vad: VadName = Field(default="level", description="silero: for real voices and noise")
    recogniser: str = Field(
        default="",
        pattern=r"^(|pocketsphinx|faster-whisper(:.+)?)$",
        description="pocketsphinx or faster-whisper:MODEL holds the audio against the text",
    )
    dnsmos: bool = Field(
        default=False, description="rate the agent's sound by DNSMOS: pip install speechmos"
    )
    sockets: bool = Field(
        default=False,
        description="hold every conversation over a WebSocket, not the first alone",
    )
    clips: int = Field(
        default=16,
        ge=0,
        le=1000,
        description="held-out clips scored teacher-forced, and as many of base_clips; 0: none",
    )
    swaps: int = Field(
        default=2, ge=0, le=20, description="other prompts that each is scored under"
    )
    base_clips: str | None = Field(
        default=None, description="folder of .pt tensors that have nothing to do with the personas"
    )
    sampling: SamplingSection = SamplingSection()
    runtime: EvaluateRuntime = EvaluateRuntime()


class RunnerRuntime(Section):
    address: str | None = Field(
        default=None, description="of a Ray cluster; None: RAY_ADDRESS, the one here, or a new one"
    )
    workers: int | None = Field(
        default=None, ge=1, le=10_000, description="of a stage; None: as many as the cluster holds"
    )
    in_flight: int = Field(
        default=2, ge=1, le=64, description="records sent to a worker and not yet come back, each"
    )
    gpu_share: float = Field(default=1, gt=0, le=1, description="of a GPU, for a worker with one")
    max_deaths: int = Field(
        default=3, ge=1, le=100, description="workers that one record, made alone, may take with it"
    )
    start_timeout_s: float = Field(
        default=600, gt=0, description="longest wait for the first worker, its setup included"
    )
    storage: str | None = Field(
        default=None, description="s3://bucket/prefix, say, where nodes share no file system"
    )


class RunnerSection(Section):
    """Where the records of a stage are made, with `--runner ray`. It enters no key."""

    runtime: RunnerRuntime = RunnerRuntime()


class Config(Section):
    name: Name = Field(description="of the run folder, runs/NAME")
    seed: int = Field(default=42, ge=0, description="every record's own seed is made from it")
    profile: ProfileName = Field(default="workbench", description="a group of defaults")
    model: ModelSection = ModelSection()
    personas: PersonasSection = PersonasSection()
    dialogues: DialoguesSection = DialoguesSection()
    voices: VoicesSection = VoicesSection()
    speech: SpeechSection = SpeechSection()
    tensors: TensorsSection = TensorsSection()
    train: TrainSection = TrainSection()
    merge: MergeSection = MergeSection()
    serve: ServeSection = ServeSection()
    evaluate: EvaluateSection = EvaluateSection()
    runner: RunnerSection = RunnerSection()

    def section(self, stage: str) -> StageSection:
        return getattr(self, stage)

    def keyed(self, stage: str) -> dict[str, Any]:
        """The part of a stage's section that enters keys: everything but `runtime`."""
        return self.section(stage).model_dump(mode="json", exclude={"runtime"})
