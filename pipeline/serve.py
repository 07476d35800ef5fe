"""Stage 8: serve the merged model, and prove that each persona's prompt reaches it.

In a run the server is started, probed and stopped; its proofs are the stage's records.
A prompt that is not proven fails the stage: everything after it would measure a model that
was never told who it is. Where a training tensor has the same prompt, all 17 rows that the
model was fed are compared with it too. `duplex serve` stays up instead.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from duplex.errors import ServerError
from duplex.records import Persona, Proof, Record, TensorClip
from duplex.stage import StageContext, WholeStage
from duplex.streams import TEXT_ROW, apply_delays

if TYPE_CHECKING:
    import numpy as np

    from duplex.store import FileWriter, StageFolder
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
        with running_server(
            folder,
            device=section.runtime.device,
            timeout_s=section.runtime.start_timeout_s,
            voices=voices,
        ) as url:
            for persona in personas:
                audio = prompt_audio(persona.id, voices)
                address = chat_url(url, text_prompt=persona.prompts[0], **audio, **sampling)
                result = probe_sync(address, tokenizer=tokenizer)
                proofs.append(proof_of(persona.id, result, trained.get(persona.id)))
                context.report(f"{persona.id}: {result.reason}")
        return proofs


@dataclass(frozen=True)
class TrainedPrompt:
    """The prompt of a training tensor: digest of what the model reads of it, and its clip.

    has_voice: a recording is in it, whose codes may differ from a server's in near ties when
        one of them runs on a GPU.
    """

    frames_digest: str
    clip_id: str
    has_voice: bool


def trained_prompts(
    tensors: StageFolder, personas: list[Persona], checkpoint: Checkpoint
) -> dict[str, TrainedPrompt]:
    """For each persona a tensor with its first prompt and its own voice sample, by its id.

    Tensors with a greeting are left out: theirs is the conversation's own.
    """
    from pipeline.serving.wire import prompt_digest, prompt_tokens

    tokenizer = checkpoint.load_tokenizer()
    wanted = {p.id: prompt_tokens(tokenizer, p.prompts[0]) for p in personas}
    found: dict[str, TrainedPrompt] = {}
    for clip in tensors.records():
        if not isinstance(clip, TensorClip) or clip.layout != "personaplex":
            continue
        spans = {span.label: span for span in clip.prompt}
        tokens = wanted.get(clip.persona_id)
        first_choice = clip.voice_sample is None or clip.voice_sample.endswith(".0")
        if clip.persona_id in found or not first_choice or "greeting" in spans:
            continue
        if tokens is None or "text" not in spans:
            continue
        codes = _read_codes(tensors, clip)
        if codes[TEXT_ROW, spans["text"].start : spans["text"].end].tolist() != tokens:
            continue
        end = max(span.end for span in clip.prompt)
        card, text_card = checkpoint.config["card"], checkpoint.config["text_card"]
        digest = prompt_digest(apply_delays(codes[:, :end], card, text_card))
        found[clip.persona_id] = TrainedPrompt(digest, clip.id, clip.voice_sample is not None)
    return found


def _read_codes(tensors: StageFolder, clip: TensorClip) -> np.ndarray:
    import torch

    content = tensors.read_blob(clip.tensor, ".pt")
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True).numpy()


def proof_of(persona_id: str, result: ProbeResult, trained: TrainedPrompt | None = None) -> Proof:
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
        if not equal and not trained.has_voice:
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
