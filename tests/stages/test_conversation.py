"""What the model is fed in a conversation, read from its own cache, against training's input.

Letters: K = 17 rows, P prompt frames, T frames of a tensor.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile

from duplex.config import SamplingSection
from duplex.errors import RequestError, ServerError
from duplex.frames import FRAME_SAMPLES
from duplex.streams import AGENT_ROWS, TEXT_PAD, TEXT_ROW, USER_ROWS, apply_delays
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import encode
from pipeline.serving import wire
from pipeline.serving.model import ServedModel
from pipeline.serving.text import TextAssembler
from tests.stages.conftest import write_tiny_checkpoint

PROMPT = "You work for Sunrise Coffee & Co. Your name is “Maria” ☕"
GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)
SAMPLED = SamplingSection()


@pytest.fixture
def speaker(tiny_speaker):
    return tiny_speaker


@pytest.fixture(scope="module")
def trainer(tiny_checkpoint):
    """The same weights as training has them: not streaming."""
    return Checkpoint.open(tiny_checkpoint).load_lm()


def user_audio(num_frames, seed=0):
    """float32 [num_frames, 1920]: tones and noise."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(num_frames * FRAME_SAMPLES) / 24_000
    tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * time_s)
    return (tone + 0.05 * rng.standard_normal(len(time_s))).astype(np.float32).reshape(-1, 1920)


def say(speaker, frame, slot=0):
    """What the agent says while its user says `frame`: samples and token."""
    return speaker.step({slot: frame})[slot]


def read_by_training(lm, codes):
    """int64 [17, T]: what `LMModel.forward` gives its transformer, and its text logits."""
    seen = []
    inner = lm.forward_text

    def spy(sequence, *rest):
        seen.append(sequence)
        return inner(sequence, *rest)

    lm.forward_text = spy
    try:
        with torch.no_grad(), no_compile():
            output = lm(torch.from_numpy(codes)[None])
    finally:
        del lm.forward_text
    return seen[0][0].numpy(), output.text_logits[0, 0]


@pytest.mark.parametrize("text", ["", "Hello.", PROMPT])
def test_every_position_of_the_prompt_is_what_apply_delays_says(speaker, text):
    fed = speaker.begin(text, SAMPLED, seed=1)
    prompt = speaker.plan(text).prompt
    expected = apply_delays(prompt.training_codes(), speaker.lm.card, speaker.lm.text_card)
    assert fed.frames.shape == (17, prompt.num_frames)
    for position in range(prompt.num_frames):
        assert fed.frames[:, position].tolist() == expected[:, position].tolist(), position
    assert fed.tokens == prompt.tokens
    assert list(fed.tokens) == wire.prompt_tokens(speaker.tokenizer, text)
    assert (fed.count, fed.digest) == (len(prompt.tokens), wire.prompt_digest(prompt.tokens))


def test_the_prompt_is_what_training_reads_one_call_earlier(speaker, trainer):
    fed = speaker.begin(PROMPT, SAMPLED, seed=1)
    prompt = speaker.plan(PROMPT).prompt.codes
    training = np.concatenate([prompt[:, 1:], prompt[:, :40]], axis=1)  # any dialogue after it
    read, _ = read_by_training(trainer, training)
    assert np.array_equal(read[:, : prompt.shape[1]], fed.frames)
    # Training frame i is server call i + 1: what call s passes undelayed (row 9) is frame s.
    assert np.array_equal(prompt[USER_ROWS][0, 1:], fed.frames[USER_ROWS][0, 1:])


def test_a_whole_conversation_is_what_training_would_read_and_predict(
    speaker, trainer, tiny_checkpoint
):
    """Prompt, user and agent: the server's inputs, undelayed, are a training tensor whose
    forward pass reads the same inputs and predicts the same greedy text."""
    num_frames = 25
    fed = speaker.begin(PROMPT, GREEDY, seed=1)
    audio = user_audio(num_frames)
    inputs = [fed.frames]
    for frame in audio:
        say(speaker, frame)
        inputs.append(speaker.slots.last_input(0)[:, None])
    inputs = np.concatenate(inputs, axis=1)  # [17, P + 25], delayed
    delays = np.asarray(speaker.lm.delays)
    length = inputs.shape[1] - 1 - delays.max()
    codes = np.stack([inputs[k, 1 + d : 1 + d + length] for k, d in enumerate(delays)])
    read, logits = read_by_training(trainer, codes)
    assert np.array_equal(read, inputs[:, :length])
    prompt = speaker.plan(PROMPT).prompt
    free = slice(prompt.num_frames - 1, length)  # training frames after the prompt
    assert np.array_equal(logits.argmax(-1).numpy()[free], codes[TEXT_ROW, free])
    # The user's rows are the recording as the tensors stage encodes it, from its first frame.
    recorded = encode(Checkpoint.open(tiny_checkpoint).load_mimi(), audio.reshape(1, -1))[0]
    said = codes[USER_ROWS, prompt.num_frames - 1 :]
    assert np.array_equal(said, recorded[:, : said.shape[1]])


def test_the_first_user_call_still_reads_the_prompts_delayed_codebooks(speaker):
    prompt = speaker.plan(PROMPT).prompt
    speaker.begin(PROMPT, SAMPLED, seed=1)
    say(speaker, user_audio(1)[0])
    read = speaker.slots.last_input(0)  # position P
    last = prompt.codes[:, -1]
    assert read[AGENT_ROWS][1:].tolist() == last[AGENT_ROWS][1:].tolist()
    assert read[USER_ROWS][1:].tolist() == last[USER_ROWS][1:].tolist()


def converse(speaker, seed, sampling=SAMPLED, prompt=PROMPT, num_frames=20):
    speaker.begin(prompt, sampling, seed)
    said = [say(speaker, frame) for frame in user_audio(num_frames)]
    return np.concatenate([pcm for pcm, _ in said]), [token for _, token in said]


def test_a_seed_decides_a_conversation_whatever_came_before(speaker, tiny_checkpoint):
    pcm, tokens = converse(speaker, seed=5)
    converse(speaker, seed=9, prompt="Something else altogether.")
    again_pcm, again_tokens = converse(speaker, seed=5)
    fresh_pcm, fresh_tokens = converse(ServedModel.load(tiny_checkpoint, "cpu"), seed=5)
    assert np.array_equal(pcm, again_pcm) and tokens == again_tokens
    assert np.array_equal(pcm, fresh_pcm) and tokens == fresh_tokens


def test_another_seed_prompt_or_sampling_is_another_conversation(speaker):
    pcm, tokens = converse(speaker, seed=5)
    cooler = SamplingSection(text_temperature=0.1, audio_temperature=0.1)
    for other in (
        converse(speaker, seed=6),
        converse(speaker, seed=5, prompt="Hello."),
        converse(speaker, seed=5, sampling=cooler),
    ):
        assert tokens != other[1]
        assert np.abs(pcm - other[0]).max() > 1e-3


def test_temperature_zero_is_greedy(speaker):
    first, second = (converse(speaker, seed, GREEDY) for seed in (1, 2))
    assert np.array_equal(first[0], second[0]) and first[1] == second[1]


def test_a_prompt_beyond_the_context_is_refused_with_its_length(speaker):
    text = "coffee and tea " * 2000
    count = len(wire.prompt_tokens(speaker.tokenizer, text))
    assert count > speaker.lm.context
    with pytest.raises(RequestError, match=f"{speaker.lm.context} frames.*{count} tokens"):
        speaker.begin(text, SAMPLED, seed=1)


def test_a_conversation_longer_than_the_context_goes_on(tmp_path):
    speaker = ServedModel.load(write_tiny_checkpoint(tmp_path / "short", context=40), "cpu")
    pcm, _ = converse(speaker, seed=1, prompt="Hello.", num_frames=60)
    assert len(pcm) == 60 * FRAME_SAMPLES and np.isfinite(pcm).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dep_q": 16}, "dep_q 16"), ({"n_q": 8}, "n_q 8"), ({"delays": [0] * 17}, "delays")],
)
def test_a_foreign_layout_is_refused_before_its_weights_are_read(
    tiny_checkpoint, tmp_path, change, message
):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ServerError, match=message):
        ServedModel.load(folder, "cpu")


def test_a_gpu_that_is_not_there_is_said(tiny_checkpoint):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ServerError, match="--device cpu"):
        ServedModel.load(tiny_checkpoint, "cuda")


@pytest.mark.parametrize("text", ["my name is Maria", "two ☕ and 你好, “thanks”", "naïve 🎉🎉"])
def test_pieces_and_bytes_come_back_as_the_text(speaker, text):
    tokens = speaker.tokenizer.encode(text)
    assert any(speaker.tokenizer.is_byte(t) for t in tokens) != text.isascii()
    pieces = TextAssembler(speaker.tokenizer)
    parts = [pieces.append(token) for token in tokens]
    assert "".join(parts) == " " + text
    assert not any("�" in part for part in parts)


def test_a_character_cut_short_is_marked_and_ends_nothing(speaker):
    coffee = [t for t in speaker.tokenizer.encode("☕") if speaker.tokenizer.is_byte(t)]
    name = speaker.tokenizer.encode("Maria")
    pieces = TextAssembler(speaker.tokenizer)
    parts = [pieces.append(token) for token in [*coffee[:2], *name]]
    assert "".join(parts) == "� Maria"
    assert [pieces.append(token) for token in (-2, 1, 2, TEXT_PAD, 10**6)] == [""] * 5


def test_a_model_that_was_trained_without_prompts_is_fed_none(tiny_checkpoint, trainer):
    """Then the first frame of a tensor is the first of its dialogue, and server call 1."""
    bare = ServedModel.load(tiny_checkpoint, "cpu", bare=True)
    fed = bare.begin("", GREEDY, seed=1)
    assert fed.frames.shape == (17, 1) and fed.tokens == () and fed.count == 0
    audio = user_audio(12)
    inputs = [fed.frames]
    for frame in audio:
        say(bare, frame)
        inputs.append(bare.slots.last_input(0)[:, None])
    inputs = np.concatenate(inputs, axis=1)
    recorded = encode(Checkpoint.open(tiny_checkpoint).load_mimi(), audio.reshape(1, -1))[0]
    # The user's semantic row has no delay: position p holds dialogue frame p - 1.
    assert np.array_equal(inputs[USER_ROWS][0, 1:], recorded[0, : inputs.shape[1] - 1])
    for given in ({"prompt_text": "You are Ann."}, {"prompt_text": "", "voice": "ann"}):
        with pytest.raises(RequestError, match="takes none"):
            bare.plan(**given)
