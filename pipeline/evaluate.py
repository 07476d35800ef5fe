"""Stage 9: what tuning changed. Base and merged model play the same conversations.

Each item's prompt and the user's audio go to both models with the same seed, in lock-step, so
that a conversation comes back bit for bit on the same machine; of each model one is held over a
WebSocket too. The prompt that each model was fed is compared with our own tokenization.
Both are asked without talking too: how likely they find held-out clips and base clips.
`report.json`, the tables, the recordings and the scores hold no wall-clock time; that is in
`timings.json` and on the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duplex.base import Record, canonical_json
from duplex.characters import Persona
from duplex.config import Config, EvaluateSection
from duplex.datafiles import find_path
from duplex.errors import ServerError
from duplex.files import read_lines, sha256_bytes
from duplex.records import Score, TensorClip
from duplex.sinks import FileWriter
from duplex.stage import StageContext, WholeStage
from duplex.store import StageFolder
from pipeline.engines import espeak
from pipeline.engines.checkpoint import model_identity
from pipeline.evaluation.items import (
    LEAD_IN_S,
    LOUDNESS_DBFS,
    load_all_items,
    load_items,
    speak_item,
)
from pipeline.evaluation.likelihood import (
    base_clip_digests,
    protocol_of_clips,
    teacher_force,
)
from pipeline.serving.voices import files_of_run

if TYPE_CHECKING:
    from pipeline.evaluation.items import SpokenItem
    from pipeline.evaluation.play import Played, PlaySettings

USER_VOICE: dict[str, str | int | float] = {"voice": "en-us"}


class EvaluateStage(WholeStage):
    name = "evaluate"
    number = 9
    # 2: each slot draws by its own generator; 3: verdicts; 4: in batches, more measures;
    # 5: clips scored teacher-forced, which enter the verdicts; 6: each item draws by its own seed
    # 7: a prompt is swapped with other personas' alone
    version = 7
    reads = ("personas", "tensors", "train", "merge")

    def engine(self, config: Config) -> str:
        return f"{espeak.revision()}, {model_identity(config.model)}"

    def files(self, config: Config) -> dict[str, str]:
        """The items by the digest of their content: a comment in the YAML changes nothing, and a
        situation is a label. Base clips by their bytes.

        Raises:
            DataFileError: the file breaks its schema, or is not there.
            MissingInputError: `evaluate.base_clips` is no folder with clips.
        """
        found = {}
        for name in config.evaluate.items:
            items = load_items(find_path(name))
            content = canonical_json(
                [item.model_dump(mode="json", exclude={"situation"}) for item in items]
            )
            found[name] = sha256_bytes(content.encode())
        load_all_items(config.evaluate.items)
        section = config.evaluate
        if section.base_clips and section.clips:
            found |= {
                f"{section.base_clips}/{name}": digest
                for name, digest in base_clip_digests(section.base_clips).items()
            }
        return found

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        from pipeline.evaluation.checkpoints import Machine, play_checkpoints
        from pipeline.evaluation.found import recordings
        from pipeline.evaluation.origins import origins_of
        from pipeline.evaluation.report import page_files
        from pipeline.evaluation.wandb_tables import log_evaluation
        from training.servable import servable_checkpoint

        config, section = context.config, context.config.evaluate
        base = servable_checkpoint(config.model, context.runs_root, context.report)
        checkpoints = {
            "base": base.folder,
            "merged": context.inputs["merge"].artifact("weights").parent,
        }
        spoken = speak_items(section)
        tokenizer = base.files()["tokenizer"].read_bytes()
        settings, voices = settings_of_run(
            config, spoken, context.records("personas", Persona), context.inputs["tensors"],
            tokenizer,
        )  # fmt: skip
        runtime = section.runtime
        machine = Machine(runtime.device, runtime.slots, runtime.start_timeout_s, voices)
        played, started_s = play_checkpoints(
            checkpoints, spoken, settings, machine, context.report,
            tokenizer=tokenizer, sockets=section.sockets,
        )  # fmt: skip
        require_proofs(played)
        about = {
            "name": config.name,
            "base": config.model.base,
            "base_revision": config.model.revision,
            "items": ", ".join(section.items),
        }
        clips = list(context.records("tensors", TensorClip))
        likelihood = []
        if section.clips and (section.base_clips or any(clip.split == "valid" for clip in clips)):
            likelihood = teacher_force(
                checkpoints, context.inputs["tensors"], section, config.seed, context.report
            )
        training = list(read_lines(context.inputs["train"].artifact("metrics")))
        fixed, loose = page_files(
            played, started_s, about=about,
            protocol=protocol_of(section, settings)
            | {"teacher_forced": protocol_of_clips(section)},
            training=training, likelihood=likelihood,
            trained=frozenset(clip.persona_id for clip in clips if clip.split == "train"),
            origins=origins_of(context.inputs["tensors"].path.parent, context.inputs["tensors"]),
        )  # fmt: skip
        audio = recordings(played)
        records: list[Record] = [
            _add(writer, name, content) for name, content in {**fixed, **audio}.items()
        ]
        for name, content in loose.items():
            # Not among the records: their lines are in the digest, and these bytes differ.
            _add(writer, name, content, deterministic=False)
        data = json.loads(fixed["report.json"])
        log_evaluation(data, writer.folder.path, writer.work, config, context.report)
        return [*records, *_scores(played, audio)]


def require_proofs(played: Sequence[Played]) -> None:
    """
    Raises:
        ServerError: a model was not fed the prompt that it is scored on.
    """
    for model in played:
        for measured in model.conversations:
            if not measured.proof.proven:
                raise ServerError(
                    f"{model.label} must be fed the prompt of {measured.spoken.item.id} before it "
                    f"is scored on it; this is not proven: {measured.proof.note}"
                )


def speak_items(section: EvaluateSection) -> list[SpokenItem]:
    """The user's side of all items of the section; raises as `load_items`, `speak_item`."""
    with espeak.EspeakEngine() as engine:
        return [
            speak_item(item, engine, USER_VOICE, seconds=section.seconds, answer_s=section.answer_s)
            for item in load_all_items(section.items)
        ]


def voices_of_items(
    spoken: Sequence[SpokenItem], personas: Iterable[Persona], voices: Mapping[str, Path]
) -> dict[str, dict[str, str]]:
    """Where training prompted with voices, each item gets that of a persona of its type."""
    from pipeline.serving.wire import prompt_audio

    of_type: dict[str, str] = {}
    for persona in personas:
        if persona.id in voices:
            of_type.setdefault(persona.type, persona.id)
    any_voice = next(iter(of_type.values()), "")
    return {
        one.item.id: prompt_audio(of_type.get(one.item.persona_type, any_voice), voices)
        for one in spoken
    }


def settings_of_run(
    config: Config,
    spoken: Sequence[SpokenItem],
    personas: Iterable[Persona],
    tensors: StageFolder,
    tokenizer: bytes,
) -> tuple[PlaySettings, dict[str, Path]]:
    """How the models of a run are talked to, and the recordings that they are prompted with: as
    its tensors were made."""
    voices = files_of_run(tensors)
    audio = voices_of_items(spoken, personas, voices)
    settings = play_settings(config.evaluate, tokenizer, audio)
    return replace(settings, bare=not config.tensors.prompt), voices


def play_settings(
    section: EvaluateSection,
    tokenizer: bytes | None,
    prompt_audio: Mapping[str, dict[str, str]] | None = None,
) -> PlaySettings:
    from pipeline.evaluation.listening import Listener
    from pipeline.evaluation.play import PlaySettings

    return PlaySettings(
        seeds=tuple(range(section.seed, section.seed + section.seeds)),
        weak=section.prompts == "weak",
        listener=Listener(section.vad, section.recogniser, dnsmos=section.dnsmos),
        sampling=section.sampling,
        tokenizer=tokenizer,
        prompt_audio=prompt_audio or {},
        ready_timeout_s=section.runtime.start_timeout_s,
    )


def protocol_of(section: EvaluateSection, settings: PlaySettings) -> dict[str, Any]:
    """What a number of the report hangs on, besides the models."""
    return {
        "seeds": list(settings.seeds),
        "draws": "each item by a seed of its own, made of the seed and its id",
        "prompts": "weak where there is one" if settings.weak else "given",
        "sampling": settings.sampling.model_dump(),
        "pace": "lock-step: a user frame goes in when the agent's frame before it has come out"
        if settings.lockstep
        else "real time: a user frame every 80 ms",
        "seconds": section.seconds,
        "lead_in_s": LEAD_IN_S,
        "answer_pause_s": section.answer_s,
        "user_voice": f"{espeak.revision()}, {USER_VOICE['voice']}, {LOUDNESS_DBFS:g} dBFS RMS",
        **settings.listener.protocol(),
        "codec": "24 kHz int16 PCM on the wire, format=pcm; the model's own codec behind it",
        "bare": settings.bare,
        "prompt_audio": dict(settings.prompt_audio),
        "prompt_proof": "against our own tokenization"
        if settings.tokenizer
        else "against the tokenizer that the server gave out",
    }


def _scores(played: Sequence[Played], audio: Mapping[str, bytes]) -> list[Score]:
    from pipeline.evaluation.found import wav_name

    return [
        Score(
            id=f"{measured.name}.{label}",
            item_id=measured.spoken.item.id,
            model=label,
            prompt=measured.prompt,
            prompt_proven=measured.proof.proven,
            transcript=measured.conversation.transcript,
            metrics=measured.metrics(),
            audio=sha256_bytes(audio[wav_name(measured)]),
        )
        for label, model in zip(("base", "merged"), played, strict=True)
        for measured in model.conversations
    ]


def _add(writer: FileWriter, name: str, content: bytes, deterministic: bool = True) -> Record:
    source = writer.work / "unfinished"
    source.write_bytes(content)
    return writer.add(Path(name).name, source, name, deterministic=deterministic)


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("evaluate")
