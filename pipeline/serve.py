"""Stage 8: serve the merged model, and prove that each persona's prompt reaches it.

In a run the server is started, probed and stopped; its proofs are the stage's records.
A prompt that is not proven fails the stage: everything after it would measure a model that
was never told who it is. Where a training tensor has the same prompt, all 17 rows that the
model was fed are compared with it too. `duplex serve` stays up instead.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from duplex.base import Record
from duplex.characters import Persona
from duplex.errors import ServerError
from duplex.records import Proof, TensorClip, VoiceSample
from duplex.stage import StageContext, WholeStage
from duplex.streams import TEXT_ROW, apply_delays

if TYPE_CHECKING:
    import numpy as np

    from duplex.sinks import FileWriter
    from duplex.store import StageFolder
    from pipeline.engines.checkpoint import Checkpoint
    from pipeline.serving.probe import ProbeResult


class ServeStage(WholeStage):
    name = "serve"
    number = 8
    reads = ("personas", "tensors", "merge")

    def run(self, context: StageContext, writer: FileWriter) -> list[Record]:
        """One `Proof` for the first prompt of each persona, by the persona's id.

        Raises:
            ServerError: the server did not start, or a prompt is not proven.
        """
        from pipeline.engines.checkpoint import Checkpoint
        from pipeline.serving.launch import running_server
        from pipeline.serving.probe import probe_sync
        from pipeline.serving.voices import files_of_run
        from pipeline.serving.wire import chat_url, prompt_audio

        section = context.config.serve
        folder = context.inputs["merge"].artifact("weights").parent
        tokenizer = Checkpoint.open(folder).files()["tokenizer"].read_bytes()
        sampling = section.sampling.model_dump()
        personas = list(context.records("personas", Persona))
        proofs: list[Record] = []
        voices = files_of_run(context.inputs["tensors"])
        trained = trained_prompts(context.inputs["tensors"], personas, Checkpoint.open(folder))
        # A model that was trained without prompts is served and proven without one.
        has_prompt = context.config.tensors.prompt
        prompts = {p.id: p.prompts[0] for p in personas} if has_prompt else {"no-prompt": ""}
        on_cpu = runs_on_cpu(section.runtime.device)
        with running_server(
            folder,
            device=section.runtime.device,
            timeout_s=section.runtime.start_timeout_s,
            voices=voices,
            bare=not has_prompt,
        ) as url:
            for name, text in prompts.items():
                address = chat_url(url, text_prompt=text, **prompt_audio(name, voices), **sampling)
                result = probe_sync(address, tokenizer=tokenizer)
                proofs.append(proof_of(name, result, trained.get(name), on_cpu=on_cpu))
                context.report(f"{name}: {result.reason}")
        return proofs


@dataclass(frozen=True)
class TrainedPrompt:
    """The prompt of a training tensor: digest of what the model reads of it, and its clip.

    has_audio: a voice or a greeting is in it, whose codes may differ from a server's in near
        ties when one of them runs on a GPU.
    """

    frames_digest: str
    clip_id: str
    has_audio: bool


def trained_prompts(
    tensors: StageFolder, personas: list[Persona], checkpoint: Checkpoint
) -> dict[str, TrainedPrompt]:
    """For each persona a tensor with its first prompt, its own voice sample and the greeting
    that the server has, by its id; personas without one are left out."""
    from pipeline.serving.wire import prompt_digest, prompt_tokens

    tokenizer = checkpoint.load_tokenizer()
    wanted = {p.id: prompt_tokens(tokenizer, p.prompts[0]) for p in personas}
    records = list(tensors.records())
    greeter = next((r.speech_id for r in records if _is_greeting(r)), None)
    found: dict[str, TrainedPrompt] = {}
    for clip in records:
        if not isinstance(clip, TensorClip) or clip.layout != "personaplex":
            continue
        spans = {span.label: span for span in clip.prompt}
        tokens = wanted.get(clip.persona_id)
        own_voice = clip.voice_sample is None or clip.voice_sample.endswith(".0")
        own_greeting = clip.speech_id == greeter if greeter else "greeting" not in spans
        if clip.persona_id in found or tokens is None or "text" not in spans:
            continue
        if not (own_voice and own_greeting):
            continue
        codes = _read_codes(tensors, clip)
        if codes[TEXT_ROW, spans["text"].start : spans["text"].end].tolist() != tokens:
            continue
        end = max(span.end for span in clip.prompt)
        card, text_card = checkpoint.config["card"], checkpoint.config["text_card"]
        digest = prompt_digest(apply_delays(codes[:, :end], card, text_card))
        has_audio = bool({"voice", "greeting"} & set(spans))
        found[clip.persona_id] = TrainedPrompt(digest, clip.id, has_audio)
    return found


def _is_greeting(record: Record) -> TypeGuard[VoiceSample]:
    return isinstance(record, VoiceSample) and record.kind == "greeting"


def runs_on_cpu(device: str) -> bool:
    """Whether tensors and server of this machine run on a CPU, where codes repeat."""
    import torch

    return device == "cpu" or not torch.cuda.is_available()


def _read_codes(tensors: StageFolder, clip: TensorClip) -> np.ndarray:
    import torch

    content = tensors.read_blob(clip.tensor, ".pt")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True).numpy()


def proof_of(
    persona_id: str,
    result: ProbeResult,
    trained: TrainedPrompt | None = None,
    *,
    on_cpu: bool = True,
) -> Proof:
    """The record of a probe that proved its prompt.

    Raises:
        ServerError: it did not, or the model was fed other frames than in training.
    """
    if not result.proven or not result.expected_digest or not result.served_digest:
        raise ServerError(
            f"the prompt of {persona_id} must reach the model, nothing proves that it does: "
            f"{result.reason}"
        )
    equal = None
    if trained is not None and result.frames_digest is not None:
        equal = trained.frames_digest == result.frames_digest
        if not equal and (on_cpu or not trained.has_audio):
            raise ServerError(
                f"the prompt of {persona_id} must be fed as in training, and its frames differ "
                f"from those of {trained.clip_id}: another codec, or tensors of another version. "
                "Make the tensors again."
            )
    return Proof(
        id=persona_id,
        prompt=result.prompt,
        expected_digest=result.expected_digest,
        served_digest=result.served_digest,
        num_tokens=result.count or 0,
        frames_equal=equal,
        proven=True,
    )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("serve")
