"""The serve stage's proof: what the server fed against what a training tensor holds."""

import io

import numpy as np
import pytest
import torch

from duplex.config import SamplingSection
from duplex.errors import ServerError
from duplex.records import TensorClip, VoiceSample
from duplex.streams import apply_delays
from pipeline.engines.checkpoint import Checkpoint
from pipeline.runners.local import execute
from pipeline.serve import TrainedPrompt, proof_of, trained_prompts
from pipeline.serving.probe import ProbeResult
from pipeline.serving.voices import VoiceList, files_of_run
from pipeline.serving.wire import prompt_audio, prompt_digest
from pipeline.tensors import TensorsStage
from tests.factories import persona
from tests.stages.tensor_factories import speech_stage, tensors_context

SAMPLING = SamplingSection()
PROMPT = "You are a customer. You want a large latte."
PEOPLE = [persona(f"p{i}", name=f"P{i}", prompts=(PROMPT,)) for i in (0, 1)]


def made_tensors(root, checkpoint, **section):
    """A tensors stage whose conversations have the personas' prompt."""
    speech = speech_stage(root / "s", system_prompt=PROMPT)
    context, folder = tensors_context(root, checkpoint, speech, **section)
    execute(TensorsStage(), context, folder)
    return folder


@pytest.mark.parametrize(
    "section",
    [{}, {"voice_prompt_s": 1.2}, {"greeting": True}, {"voice_prompt_s": 1.2, "greeting": True}],
    ids=["text", "voice", "greeting", "both"],
)
def test_the_server_feeds_the_frames_of_a_training_tensor(
    tmp_path, tiny_checkpoint, tiny_speaker, section
):
    folder = made_tensors(tmp_path, tiny_checkpoint, **section)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    trained = trained_prompts(folder, PEOPLE, checkpoint)
    assert trained
    files = files_of_run(folder)
    tiny_speaker.voices = VoiceList.load(files, checkpoint.load_mimi(), tiny_speaker.lm)
    for name, expected in trained.items():
        audio = prompt_audio(name, files)
        fed = tiny_speaker.begin(
            PROMPT, SAMPLING, 1,
            voice=audio.get("voice_prompt", ""), greeting=audio.get("greeting", ""),
        )  # fmt: skip
        assert fed.frames_digest == expected.frames_digest
        assert expected.has_audio == bool(section)
    other = tiny_speaker.begin("You are somebody else.", SAMPLING, 1)
    assert other.frames_digest not in {one.frames_digest for one in trained.values()}


def test_the_digest_is_of_what_the_model_reads(tmp_path, tiny_checkpoint):
    folder = made_tensors(tmp_path, tiny_checkpoint)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    trained = trained_prompts(folder, PEOPLE, checkpoint)["p0"]
    clip = next(
        r for r in folder.records() if isinstance(r, TensorClip) and r.id == trained.clip_id
    )
    content = folder.read_blob(clip.tensor, ".pt")
    codes = torch.load(io.BytesIO(content), weights_only=True).numpy()
    end = max(span.end for span in clip.prompt)
    card, text_card = checkpoint.config["card"], checkpoint.config["text_card"]
    read = apply_delays(codes[:, :end], card, text_card)
    assert trained.frames_digest == prompt_digest(read)
    assert np.array_equal(read[1, 1:], codes[1, :end])


def probed(frames_digest, proven=True):
    return ProbeResult(
        url="ws://x", server="s", prompt="You are p0.", proven=proven, reason="because",
        expected_digest="0" * 64, served_digest="0" * 64, count=3, frames_digest=frames_digest,
    )  # fmt: skip


def test_other_frames_than_in_training_fail_the_stage():
    text, voice = TrainedPrompt("a" * 64, "c0", False), TrainedPrompt("a" * 64, "c0", True)
    assert proof_of("p0", probed("a" * 64), text).frames_equal is True
    assert proof_of("p0", probed("a" * 64), None).frames_equal is None
    for trained, on_cpu in ((text, True), (text, False), (voice, True)):
        with pytest.raises(ServerError, match="fed as in training"):
            proof_of("p0", probed("b" * 64), trained, on_cpu=on_cpu)
    # On a GPU the codes of a recording may fall otherwise where two are all but equally near.
    assert proof_of("p0", probed("b" * 64), voice, on_cpu=False).frames_equal is False
    with pytest.raises(ServerError, match="nothing proves"):
        proof_of("p0", probed("a" * 64, proven=False), text)


def test_a_persona_called_otherwise_has_no_tensor_to_compare_with(tmp_path, tiny_checkpoint):
    folder = made_tensors(tmp_path, tiny_checkpoint)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    stranger = persona("p9", name="P9", prompts=(PROMPT,))
    assert trained_prompts(folder, [stranger], checkpoint) == {}
    said = persona("p0", name="P0", prompts=("You are another. You want a large latte.",))
    assert trained_prompts(folder, [said], checkpoint) == {}
    assert not any(isinstance(record, VoiceSample) for record in folder.records())
