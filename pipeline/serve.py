"""Stage 8: serve the merged model, and prove that each persona's prompt reaches it.

In a run the server is started, probed and stopped; its proofs are the stage's records.
A prompt that is not proven fails the stage: everything after it would measure a model that
was never told who it is. `duplex serve` stays up instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from duplex.errors import ServerError
from duplex.records import Persona, Proof, Record
from duplex.stage import StageContext, WholeStage

if TYPE_CHECKING:
    from duplex.store import FileWriter
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
                proofs.append(proof_of(persona.id, result))
                context.report(f"{persona.id}: {result.reason}")
        return proofs


def proof_of(persona_id: str, result: ProbeResult) -> Proof:
    """The record of a probe that proved its prompt.

    Raises:
        ServerError: it did not.
    """
    if not result.proven or not result.expected_digest or not result.served_digest:
        raise ServerError(
            f"the prompt of {persona_id} must reach the model, nothing proves that it does: "
            f"{result.reason}"
        )
    return Proof(
        id=persona_id,
        prompt=result.prompt,
        expected_digest=result.expected_digest,
        served_digest=result.served_digest,
        num_tokens=result.count or 0,
        proven=True,
    )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("serve")
