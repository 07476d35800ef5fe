"""Stage 9: what tuning changed. Base and merged model play the same conversations.

Each item's prompt and the user's audio go to both servers with the same seed, in lock-step, so
that a conversation comes back bit for bit on the same machine. The prompt that each model was
fed is compared with our own tokenization. `report.json`, the recordings and the scores hold no
wall-clock time; that is in `timings.json` and on the page.

Cost: four items of 24 s, pocket model, two cores, both servers at once: 54 s, of which 12 s are
starting the servers; 17 ms a frame. The page is 0.3 MB a conversation.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from duplex.base import Record, canonical_json
from duplex.characters import Persona
from duplex.config import Config, EvaluateSection
from duplex.datafiles import find_path
from duplex.errors import RequestError, ServerError
from duplex.files import read_lines, sha256_bytes, write_atomic
from duplex.records import Score
from duplex.sinks import FileWriter
from duplex.stage import StageContext, WholeStage
from pipeline.engines import espeak
from pipeline.engines.checkpoint import model_identity
from pipeline.evaluation.items import LEAD_IN_S, LOUDNESS_DBFS, load_items, speak_item
from pipeline.serving.voices import files_of_run

if TYPE_CHECKING:
    from pipeline.evaluation.items import SpokenItem
    from pipeline.evaluation.play import Played, PlaySettings

USER_VOICE: dict[str, str | int | float] = {"voice": "en-us"}


class EvaluateStage(WholeStage):
    name = "evaluate"
    number = 9
    version = 3  # 2: each slot draws by its own generator; 3: verdicts
    reads = ("personas", "tensors", "train", "merge")

    def engine(self, config: Config) -> str:
        return f"{espeak.revision()}, {model_identity(config.model)}"

    def files(self, config: Config) -> dict[str, str]:
        """The items by the digest of their content: a comment in the YAML changes nothing.

        Raises:
            DataFileError: the file breaks its schema, or is not there.
        """
        items = load_items(find_path(config.evaluate.items))
        content = canonical_json([item.model_dump(mode="json") for item in items])
        return {config.evaluate.items: sha256_bytes(content.encode())}

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        from pipeline.evaluation.origins import origins_of
        from pipeline.evaluation.report import page_files, recordings
        from training.servable import servable_checkpoint

        config, section = context.config, context.config.evaluate
        base = servable_checkpoint(config.model, context.runs_root, context.report)
        checkpoints = {
            "base": base.folder,
            "merged": context.inputs["merge"].artifact("weights").parent,
        }
        spoken = speak_items(section)
        voices = files_of_run(context.inputs["tensors"])
        prompt_audio = voices_of_items(spoken, context.records("personas", Persona), voices)
        tokenizer = base.files()["tokenizer"].read_bytes()
        settings = play_settings(section, tokenizer, prompt_audio)
        settings = replace(settings, bare=not config.tensors.prompt)
        played, started_s = _play_checkpoints(checkpoints, spoken, settings, context, voices)
        require_proofs(played)
        about = {
            "name": config.name,
            "base": config.model.base,
            "base_revision": config.model.revision,
            "items": section.items,
        }
        training = list(read_lines(context.inputs["train"].artifact("metrics")))
        fixed, loose = page_files(
            played, started_s, about=about, protocol=_protocol(section, settings),
            training=training,
            origins=origins_of(context.inputs["tensors"].path.parent, context.inputs["tensors"]),
        )  # fmt: skip
        audio = recordings(played)
        records: list[Record] = [
            _add(writer, name, content) for name, content in {**fixed, **audio}.items()
        ]
        for name, content in loose.items():
            # Not among the records: their lines are in the digest, and these bytes differ.
            _add(writer, name, content, deterministic=False)
        return [*records, *_scores(played, audio, bare=settings.bare)]


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
            for item in load_items(find_path(section.items))
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


def play_settings(
    section: EvaluateSection,
    tokenizer: bytes | None,
    prompt_audio: Mapping[str, dict[str, str]] | None = None,
) -> PlaySettings:
    from pipeline.evaluation.play import PlaySettings

    return PlaySettings(
        seed=section.seed,
        sampling=section.sampling,
        tokenizer=tokenizer,
        prompt_audio=prompt_audio or {},
        ready_timeout_s=section.runtime.start_timeout_s,
    )


def _play_checkpoints(
    checkpoints: Mapping[str, Path],
    spoken: Sequence[SpokenItem],
    settings: PlaySettings,
    context: StageContext,
    voices: dict[str, Path],
) -> tuple[list[Played], dict[str, float]]:
    """Conversations of both models, and how long each server took to start.

    On a CPU both servers are up at once, each with half of the cores; on a GPU one after the
    other, since two 7B models need not fit.
    """
    from pipeline.evaluation.play import describe, evaluate_urls
    from pipeline.serving.launch import running_server

    runtime = context.config.evaluate.runtime
    started_s: dict[str, float] = {}

    def start(servers: ExitStack, label: str) -> str:
        started = time.monotonic()
        url = servers.enter_context(
            running_server(
                checkpoints[label],
                device=runtime.device,
                timeout_s=runtime.start_timeout_s,
                voices=voices,
                bare=not context.config.tensors.prompt,
            )
        )
        started_s[label] = time.monotonic() - started
        return url

    played: list[Played] = []
    waiting = list(checkpoints)
    with _half_of_the_cores():
        while waiting:
            with ExitStack() as servers:
                urls = {label: start(servers, label) for label in waiting[:1]}
                info, _ = asyncio.run(describe(urls[waiting[0]], settings))
                if info.get("device") == "cpu":
                    urls |= {label: start(servers, label) for label in waiting[1:]}
                played += evaluate_urls(urls, spoken, settings, context.report, at_once=True)
                waiting = waiting[len(urls) :]
    return played, started_s


@contextmanager
def _half_of_the_cores() -> Iterator[None]:
    """Threads of the servers' OpenMP, unless the user has set them.

    Its threads spin while they wait: two items of 12 s took 26 s with one thread a server on two
    cores, and were not done after 140 s with two. One server after the other took 33 s.
    """
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        del os.environ[name]


def _protocol(section: EvaluateSection, settings: PlaySettings) -> dict[str, Any]:
    """What a number of the report hangs on, besides the models."""
    return {
        "seed": settings.seed,
        "sampling": settings.sampling.model_dump(),
        "pace": "lock-step: a user frame goes out when the agent's frame before it has come",
        "seconds": section.seconds,
        "lead_in_s": LEAD_IN_S,
        "answer_pause_s": section.answer_s,
        "user_voice": f"{espeak.revision()}, {USER_VOICE['voice']}, {LOUDNESS_DBFS:g} dBFS RMS",
        "codec": "24 kHz int16 PCM on the wire, format=pcm; the model's own codec behind it",
        "bare": settings.bare,
        "prompt_audio": dict(settings.prompt_audio),
        "prompt_proof": "against our own tokenization"
        if settings.tokenizer
        else "against the tokenizer that the server gave out",
    }


def _scores(played: Sequence[Played], audio: Mapping[str, bytes], *, bare: bool) -> list[Score]:
    from pipeline.evaluation.report import wav_name

    return [
        Score(
            id=f"{measured.spoken.item.id}.{label}",
            item_id=measured.spoken.item.id,
            model=label,
            prompt="" if bare else measured.spoken.item.text_prompt,
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


# -- servers that are up already


def evaluate_to_folder(
    targets: Sequence[str], *, against: str | None, items: str, out: Path
) -> Path:
    """Evaluate running servers; write report.json, report.html and the recordings to `out`.

    Args:
        targets: URLs of servers; `against`, if given, is the one that they are compared with.

    Returns:
        The path of report.html.

    Raises:
        RequestError: no URL where one must be.
        DataFileError: the items.
        ServerError: a server cannot be reached, or broke a conversation.
    """
    from pipeline.evaluation.play import evaluate_urls
    from pipeline.evaluation.report import page_files, recordings

    urls = name_urls([*([against] if against else []), *targets])
    section = EvaluateSection(items=items)
    spoken = speak_items(section)
    settings = play_settings(section, tokenizer=None)
    # Progress to stderr: stdout may have to be JSON.
    played = evaluate_urls(urls, spoken, settings, lambda line: print(line, file=sys.stderr))
    about = {"name": " and ".join(urls), "items": items}
    fixed, loose = page_files(
        played, {}, about=about, protocol=_protocol(section, settings), training=[]
    )
    for name, content in {**fixed, **loose, **recordings(played)}.items():
        write_atomic(out / name, content)
    return out / "report.html"


def name_urls(urls: Sequence[str]) -> dict[str, str]:
    """A short name for each server: its host and port, as a file name may hold them.

    Raises:
        RequestError: not the URL of a server.
    """
    named: dict[str, str] = {}
    for url in urls:
        netloc = urlsplit(url).netloc
        if not netloc:
            raise RequestError(
                f"a server to evaluate must be given as http://host:port or ws://…, found {url}"
            )
        name = re.sub(r"[^a-z0-9.-]+", "-", netloc.rpartition("@")[2].lower()).strip("-.")
        count = sum(other == name or other.startswith(f"{name}-again") for other in named)
        named[f"{name}-again{count}" if count else name] = url
    return named


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("evaluate")
