"""The tensors stage: what each setting puts into a `.pt`, and that bytes repeat."""

import io
import json

import numpy as np
import pytest
import torch

from duplex.errors import RequestError, StageFailedError
from duplex.records import TensorClip, VoiceSample, parse_record
from duplex.sinks import FolderBlobs
from duplex.streams import AGENT_ROWS, TEXT_EPAD, TEXT_PAD, TEXT_ROW, USER_ROWS
from pipeline.engines import encoding
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import encode, measure_tokens
from pipeline.runners.local import execute
from pipeline.speech import wav_bytes
from pipeline.tensors import TensorsStage
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.tensor_factories import (
    FRAME,
    TURNS,
    finish,
    make_speech,
    speech_stage,
    tensors_context,
)  # fmt: skip


def run(root, checkpoint, speech, **section):
    """Clips by id, samples by id, codes by clip id, and the manifest."""
    context, folder = tensors_context(root, checkpoint, speech, **section)
    manifest = execute(TensorsStage(), context, folder)
    records = [
        parse_record(json.loads(line)) for entry in folder.ledger().values() for line in entry.lines
    ]
    clips = {r.id: r for r in records if isinstance(r, TensorClip)}
    samples = {r.id: r for r in records if isinstance(r, VoiceSample)}
    codes = {
        name: torch.load(
            io.BytesIO(folder.read_blob(clip.tensor, ".pt")), weights_only=True
        ).numpy()
        for name, clip in clips.items()
    }
    return clips, samples, codes, manifest


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    return speech_stage(tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="module")
def codec(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint).load_mimi()


def prompt_end(clip):
    return max((span.end for span in clip.prompt), default=0)


def test_a_tensor_is_prompt_then_the_whole_conversation(tmp_path, tiny_checkpoint, speech, codec):
    clips, samples, codes, _ = run(tmp_path, tiny_checkpoint, speech)
    assert set(clips) == {"c0", "c1", "c2", "c3"} and not samples
    clip, tensor = clips["c0"], codes["c0"]
    audio = encoding.read_stereo(speech.blob_path(next(speech.records()).audio, ".wav"))
    whole = encode(codec, audio)
    start = prompt_end(clip)
    assert tensor.shape == (17, clip.num_frames) and clip.num_frames == start + 116
    assert np.array_equal(tensor[AGENT_ROWS, start:], whole[0])
    assert np.array_equal(tensor[USER_ROWS, start:], whole[1])
    assert clip.dropped_tokens == 0
    words = tensor[TEXT_ROW, start:]
    assert (words != TEXT_PAD).sum() == clip.text_tokens
    assert [span.label for span in clip.turns] == [role for role, *_ in TURNS]


def test_personas_are_held_out_whole(tmp_path, tiny_checkpoint, speech):
    clips, *_ = run(tmp_path, tiny_checkpoint, speech)
    sides = {(clip.persona_id, clip.split) for clip in clips.values()}
    assert len(sides) == 2 and {split for _, split in sides} == {"train", "valid"}
    by_conversation, *_ = run(tmp_path, tiny_checkpoint, speech, split="conversation")
    assert sorted(c.split for c in by_conversation.values()) == ["train"] * 2 + ["valid"] * 2


def test_one_text_in_two_conversations_is_never_split(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    twins = [
        make_speech(folder, f"c{i}", persona=f"p{i}", seed=i, turns=TURNS[:2], num_frames=64)
        for i in range(4)
    ]
    said = twins[0].turns
    twins[1] = twins[1].model_copy(update={"turns": tuple(
        turn.model_copy(update={"voice_id": own.voice_id})
        for turn, own in zip(said, twins[1].turns, strict=True))})  # fmt: skip
    finish(folder, twins)
    for seed_fraction in (0.25, 0.5, 0.75):
        clips, *_ = run(tmp_path, tiny_checkpoint, folder, valid_fraction=seed_fraction)
        assert clips["c0"].split == clips["c1"].split
        assert clips["c0"].text_digest == clips["c1"].text_digest


def test_word_alignment_puts_words_at_their_times(tmp_path, tiny_checkpoint, speech):
    clips, _, codes, _ = run(tmp_path, tiny_checkpoint, speech, alignment="word")
    row = codes["c0"][TEXT_ROW, prompt_end(clips["c0"]) :]
    assert (row == TEXT_EPAD).any()
    first = np.flatnonzero((row != TEXT_PAD) & (row != TEXT_EPAD))[0]
    assert first == TURNS[1][1]


def test_coffee_layout_is_the_predecessors(tmp_path, tiny_checkpoint, speech, codec):
    clips, _, codes, _ = run(
        tmp_path, tiny_checkpoint, speech, layout="coffee", padding="zero", overflow="drop",
        encoding="turn",
    )  # fmt: skip
    clip, tensor = clips["c0"], codes["c0"]
    tokenizer = Checkpoint.open(tiny_checkpoint).load_tokenizer()
    ids = tokenizer.encode("<system> You are p0. </system>")
    # 6 + max(25, tokens) + 6 frames, frame 0 among them.
    text_frames = max(25, len(ids))
    assert [(s.label, s.end - s.start) for s in clip.prompt] == [
        ("silence", 6), ("text", text_frames), ("silence", 6),
    ]  # fmt: skip
    assert tensor[TEXT_ROW, 6 : 6 + len(ids)].tolist() == ids
    start = prompt_end(clip)
    row = tensor[TEXT_ROW, start:]
    for role, first, end, _ in TURNS:
        if role == "agent":
            window = max(1, int((end - first) * 0.3))
            assert (row[first : first + window] >= 0).all()
            assert (row[first + window : end] == -1).all()
    assert clip.dropped_tokens > 0
    assert (row >= 0).sum() == clip.text_tokens - clip.dropped_tokens
    # Each turn by itself, the other side constant silence.
    silence = np.asarray(measure_tokens(codec).silence)[:, None]
    agent = tensor[AGENT_ROWS, start:]
    assert (agent[:, : TURNS[1][1]] == silence).all() and (agent[:, TURNS[3][2] :] == silence).all()
    audio = encoding.read_stereo(speech.blob_path(next(speech.records()).audio, ".wav"))
    _, first, end, _ = TURNS[1]
    alone = encode(codec, audio[:1, first * FRAME : end * FRAME])[0]
    assert np.array_equal(agent[:, first:end], alone)


def test_a_voice_sample_comes_from_another_conversation(tmp_path, tiny_checkpoint, speech):
    clips, samples, *_ = run(tmp_path, tiny_checkpoint, speech, voice_prompt_s=1.2)
    assert {sample.kind for sample in samples.values()} == {"voice"}
    for clip in clips.values():
        sample = samples[clip.voice_sample]
        assert sample.speech_id != clip.speech_id and sample.voice_id in clip.voices
        assert clips[sample.speech_id].split == clip.split
        (span,) = (span for span in clip.prompt if span.label == "voice")
        assert span.end - span.start == sample.num_frames - 1  # frame 0 is never seen
        assert sample.num_frames == 15


def test_a_greeting_is_prompt_and_not_dialogue(tmp_path, tiny_checkpoint, speech, codec):
    clips, samples, codes, _ = run(tmp_path, tiny_checkpoint, speech, greeting=True)
    clip, tensor = clips["c0"], codes["c0"]
    span = clip.prompt[-1]
    _, first, end, _ = TURNS[0]
    assert span.label == "greeting" and span.end - span.start == end - first
    assert clip.num_frames == span.end + 116 - end
    audio = encoding.read_stereo(speech.blob_path(next(speech.records()).audio, ".wav"))
    alone = encode(codec, audio[1:, first * FRAME : end * FRAME])[0]
    assert np.array_equal(tensor[USER_ROWS, span.start : span.end], alone)
    assert [turn.label for turn in clip.turns] == ["agent", "user", "agent"]
    assert samples["greeting"].num_frames == end - first


def test_what_the_agent_says_first_is_no_greeting(tmp_path, tiny_checkpoint):
    """As a transcript of one side gives it: the user opened, but nobody wrote down how."""
    folder = speech_stage(tmp_path / "s", count=1)
    turns = (TURNS[1], TURNS[2], TURNS[3])
    finish(folder, [make_speech(folder, "c0", turns=turns, first_speaker="user")])
    plain, *_ = run(tmp_path, tiny_checkpoint, folder)
    clips, samples, *_ = run(tmp_path, tiny_checkpoint, folder, greeting=True)
    assert not samples and clips["c0"].text_tokens == plain["c0"].text_tokens
    assert [span.label for span in clips["c0"].prompt] == ["silence", "text", "silence"]


def test_turn_by_turn_after_a_greeting_stands_where_it_should(tmp_path, tiny_checkpoint, speech):
    _, _, whole, _ = run(tmp_path, tiny_checkpoint, speech, encoding="turn")
    clips, _, codes, _ = run(tmp_path, tiny_checkpoint, speech, encoding="turn", greeting=True)
    dialogue = codes["c0"][1:, prompt_end(clips["c0"]) :]
    assert np.array_equal(dialogue, whole["c0"][1:, -dialogue.shape[1] :])


def test_a_clip_fits_the_models_own_context(tmp_path, tiny_checkpoint, speech):
    short = write_tiny_checkpoint(tmp_path / "short", context=100)
    with pytest.raises(StageFailedError, match="at most 100 frames"):
        run(tmp_path, short, speech)
    clips, *_ = run(tmp_path, short, speech, long="cut")
    assert clips and all(clip.num_frames <= 100 for clip in clips.values())


def test_a_recording_called_as_the_greeting_is_refused(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    finish(folder, [make_speech(folder, "greeting")])
    with pytest.raises(RequestError, match="must not be that of a voice sample or the greeting"):
        run(tmp_path, tiny_checkpoint, folder, greeting=True)


def test_one_conversation_more_renames_no_voice_sample_unnoticed(tmp_path, tiny_checkpoint):
    """What a record holds is in its key: an adopted clip equals one that is made anew."""
    folder = speech_stage(tmp_path / "s", count=1)
    speeches = [make_speech(folder, f"c{i}", persona="p", seed=i) for i in range(6)]
    made = []
    for count in (4, 5, 6):
        finish(folder, speeches[:count])
        context, _ = tensors_context(
            tmp_path, tiny_checkpoint, folder, voice_prompt_s=1.2, split="conversation"
        )
        stage = TensorsStage()
        for task in stage.tasks(context):
            if hasattr(task.payload, "sample"):
                made.append((stage.record_key(context.config, task), task.payload.sample.id))
    assert len(dict(made)) == len(set(made))


def test_a_greeting_that_is_talked_over_is_refused(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    turns = (TURNS[0], ("agent", 20, 60, "a latte"), *TURNS[2:])
    finish(folder, [make_speech(folder, "c0", turns=turns)])
    with pytest.raises(StageFailedError, match="must be heard out"):
        run(tmp_path, tiny_checkpoint, folder, greeting=True)


def test_too_long_a_conversation_is_refused_with_its_count_or_cut(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=2)
    whole, _, reference, _ = run(tmp_path, tiny_checkpoint, folder)
    prompt_frames = prompt_end(whole["c0"])
    limit = prompt_frames + 90
    message = (
        f"at most {limit} frames .*, found {prompt_frames + 116} .{prompt_frames} of them prompt"
    )
    with pytest.raises(StageFailedError, match=message):
        run(tmp_path, tiny_checkpoint, folder, max_frames=limit)
    clips, _, codes, _ = run(tmp_path, tiny_checkpoint, folder, max_frames=limit, long="cut")
    assert set(clips) == {"c0.w00", "c0.w01", "c1.w00", "c1.w01"}
    first, second = codes["c0.w00"], codes["c0.w01"]
    assert np.array_equal(first[:, :prompt_frames], second[:, :prompt_frames])
    # The pieces hold the very codes of the whole, and all of its text.
    audio = reference["c0"][1:, prompt_frames:]
    assert np.array_equal(first[1:, prompt_frames:], audio[:, : first.shape[1] - prompt_frames])
    tail = second[1:, prompt_frames:]
    assert np.array_equal(tail, audio[:, -tail.shape[1] :])
    assert sum(clips[name].text_tokens for name in ("c0.w00", "c0.w01")) == whole["c0"].text_tokens
    assert clips["c0.w00"].split == clips["c0.w01"].split


def test_a_prompt_beyond_the_clip_is_an_error_with_the_count(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    finish(folder, [make_speech(folder, "c0", system_prompt="coffee and tea " * 40)])
    for long in ("reject", "cut"):
        with pytest.raises(StageFailedError, match=r"found \d+ \(\d+ of them prompt\)"):
            run(tmp_path, tiny_checkpoint, folder, max_frames=60, long=long)


def test_an_empty_stream_is_refused_with_its_side(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    audio = np.zeros((2, 116 * FRAME), dtype=np.float32)
    audio[1] = 0.1
    silent = FolderBlobs(folder).put(wav_bytes(audio), ".wav")
    finish(folder, [make_speech(folder, "c0", audio=silent)])
    with pytest.raises(StageFailedError, match="agent's channel must hold its turns"):
        run(tmp_path, tiny_checkpoint, folder)
    finish(folder, [make_speech(folder, "c0", turns=(TURNS[0], TURNS[2]))])
    for section in ({}, {"voice_prompt_s": 1.2}, {"greeting": True}):
        with pytest.raises(StageFailedError, match="agent must have a turn"):
            run(tmp_path, tiny_checkpoint, folder, **section)


def test_a_user_who_only_greets_is_no_empty_stream(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    audio = np.zeros((2, 116 * FRAME), dtype=np.float32)
    _, start, end, _ = TURNS[0]
    audio[1, start * FRAME : end * FRAME] = 0.1
    audio[0, 28 * FRAME : 60 * FRAME] = 0.1
    blob = FolderBlobs(folder).put(wav_bytes(audio), ".wav")
    finish(folder, [make_speech(folder, "c0", turns=TURNS[:2], audio=blob)])
    clips, *_ = run(tmp_path, tiny_checkpoint, folder, greeting=True)
    assert [turn.label for turn in clips["c0"].turns] == ["agent"]


def test_text_without_a_frame_is_an_error_unless_it_may_go(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    turns = (TURNS[0], ("agent", 28, 40, "a large oat latte please and be quick " * 3))
    finish(folder, [make_speech(folder, "c0", turns=turns, num_frames=42)])
    with pytest.raises(
        StageFailedError, match=r"c0: every text token must have a frame, found \d+"
    ):
        run(tmp_path, tiny_checkpoint, folder)
    clips, *_ = run(tmp_path, tiny_checkpoint, folder, overflow="drop")
    assert clips["c0"].dropped_tokens > 0


def test_bytes_are_the_same_with_workers_and_with_the_cache(tmp_path, tiny_checkpoint, speech):
    digests = {}
    for name, runtime in {
        "alone": {"cache": False},
        "workers": {"cache": False, "workers": 2},
        "filling": {"cache": True},
        "cached": {"cache": True},
    }.items():
        root = tmp_path / ("cache" if runtime.get("cache") else name)
        context, folder = tensors_context(root, tiny_checkpoint, speech, runtime=runtime)
        if name == "cached":  # the same root, so the same cache; another folder
            folder.path = root / "05-tensors-again"
        digests[name] = execute(TensorsStage(), context, folder)["digest"]
    assert len(set(digests.values())) == 1, digests


def silent_between(folder, name, seed):
    """A conversation with digital silence between its turns, where near ties are many."""
    rng = np.random.default_rng(seed)
    audio = np.zeros((2, 116 * FRAME), dtype=np.float32)
    for role, start, end, _ in TURNS:
        span = slice(start * FRAME, end * FRAME)
        audio[0 if role == "agent" else 1, span] = 0.1 * rng.standard_normal((end - start) * FRAME)
    blob = FolderBlobs(folder).put(wav_bytes(audio), ".wav")
    return make_speech(folder, name, persona="p", seed=seed, audio=blob)


def test_batches_are_part_of_keys_and_their_bytes_repeat(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    speeches = [silent_between(folder, f"c{i}", i) for i in range(4)]
    finish(folder, speeches)
    digests, keys = [], []
    for batch in (1, 2, 2):
        root = tmp_path / f"r{len(digests)}"
        context, out = tensors_context(
            root, tiny_checkpoint, folder, batch=batch, runtime={"cache": False}
        )
        stage = TensorsStage()
        keys.append(
            {task.id: stage.record_key(context.config, task) for task in stage.tasks(context)}
        )
        digests.append(execute(stage, context, out)["digest"])
    assert digests[1] == digests[2] and keys[1] == keys[2]
    assert not set(keys[0].values()) & set(keys[1].values())
    # One conversation more makes other batches, and so other keys where a batch is another.
    finish(folder, [*speeches, silent_between(folder, "c00", 9)])
    context, _ = tensors_context(tmp_path / "more", tiny_checkpoint, folder, batch=2)
    stage = TensorsStage()
    more = {task.id: stage.record_key(context.config, task) for task in stage.tasks(context)}
    assert not set(more.values()) & set(keys[1].values())


def test_a_bad_conversation_spoils_no_other_of_its_batch(tmp_path, tiny_checkpoint):
    folder = speech_stage(tmp_path / "s", count=1)
    speeches = [make_speech(folder, f"c{i}", persona="p", seed=i) for i in range(3)]
    finish(folder, speeches)
    (folder.path / "blobs" / f"{speeches[1].audio}.wav").write_bytes(b"RIFF rubbish")
    context, out = tensors_context(tmp_path, tiny_checkpoint, folder, batch=3)
    with pytest.raises(StageFailedError, match="1 of 3"):
        execute(TensorsStage(), context, out)
    assert set(out.ledger()) == {"c0", "c2"} and set(out.rejected()) == {"c1"}


def test_another_alignment_encodes_nothing_again(tmp_path, tiny_checkpoint, speech, monkeypatch):
    first = run(tmp_path, tiny_checkpoint, speech, runtime={"cache": True})[2]

    def never(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(encoding, "encode_long", never)
    again = run(tmp_path, tiny_checkpoint, speech, alignment="uniform", runtime={"cache": True})[2]
    assert all(np.array_equal(first[name][1:], again[name][1:]) for name in first)
    for path in (tmp_path / ".cache").rglob("*.codes"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(AssertionError, match="encoded again"):  # damage is noticed
        run(tmp_path, tiny_checkpoint, speech, alignment="word", runtime={"cache": True})


def test_a_batch_is_made_from_the_full_list(tmp_path, tiny_checkpoint, speech, monkeypatch):
    """What is already done changes no batch, so a resumed run encodes the same bytes."""
    seen = []
    inner = encoding.encode_batch
    monkeypatch.setattr(
        encoding,
        "encode_batch",
        lambda mimi, audio: (seen.append(len(audio)), inner(mimi, audio))[1],
    )
    context, folder = tensors_context(tmp_path, tiny_checkpoint, speech, batch=2)
    stage = TensorsStage()
    tasks = {task.id: task for task in stage.tasks(context)}
    whole = {name: [s.id for s in task.payload.batch] for name, task in tasks.items()}
    assert whole == {"c0": ["c0", "c2"], "c2": ["c0", "c2"], "c1": ["c1", "c3"], "c3": ["c1", "c3"]}
    execute(stage, context, folder)
    assert seen == [2, 2]
