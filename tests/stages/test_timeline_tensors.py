"""From an interrupted dialogue with backchannels to its tensor: what the model learns to say."""

import numpy as np
import pytest

from duplex.clips import text_digest
from duplex.config import Config
from duplex.frames import frame_at, frames_covering_seconds
from duplex.records import Backchannel, Speech, Turn
from duplex.splits import dialogue_sides
from duplex.store import StageFolder
from duplex.streams import TEXT_EPAD, TEXT_PAD, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.clipplan import choose_excerpts, split_of
from pipeline.inspecting.folders import split_findings
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage
from tests.stages.spoken_helpers import context_of, conversation, made_voices
from tests.stages.tensor_factories import make_speech
from tests.stages.test_tensors import prompt_end, run

pytest.importorskip("espeakng_loader")

ORDER = "I would like a large oat milk latte with two shots of espresso and a blueberry muffin"
TURNS = (
    Turn(
        role="user",
        text="Good morning and welcome to the shop, what can I get you today my friend",
        backchannels=(Backchannel(text="Hello.", after_word=4),),
    ),
    Turn(role="agent", text=ORDER, emotion="angry", intensity=1.5, cut_after_words=6),
    Turn(role="user", text="Sorry, we have no oat milk."),
    Turn(
        role="agent",
        text="Then I want a black coffee, please, and quick",
        backchannels=(Backchannel(text="Sure.", after_word=5),),
    ),
    Turn(role="user", text="Here you go."),
)
ROOM = {"room_tone_dbfs": -62, "leakage_db": -40}


def spoken_folder(root, dialogues, **config):
    inputs, voices = made_voices(root, dialogues=dialogues, **config)
    context = context_of({"dialogues": inputs["dialogues"], "voices": voices}, root, **config)
    folder = StageFolder.of(root, 4, "speech", "2" * 64)
    execute(SpeechStage(), context, folder)
    return context, folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    dialogues = [conversation(name, 0, TURNS) for name in ("angry-ann", "friendly-bob")]
    _, folder = spoken_folder(root, dialogues, speech={"timeline": ROOM})
    return folder


def test_the_speech_record_holds_what_was_spoken(spoken):
    for speech in spoken.records():
        kinds = [(turn.kind, turn.role, turn.cut) for turn in speech.turns]
        assert kinds == [
            ("turn", "user", False),
            ("backchannel", "agent", False),
            ("turn", "agent", True),
            ("turn", "user", False),
            ("turn", "agent", False),
            ("backchannel", "user", False),
            ("turn", "user", False),
        ]
        cut = speech.turns[2]
        assert cut.emotion == "angry"
        assert ORDER.startswith(cut.text) and 6 <= len(cut.text.split()) < 12
        assert speech.text_digest == text_digest(TURNS)
        assert speech.quality.utterances == 7


def decoded(tokenizer, row):
    return tokenizer.decode([int(t) for t in row if t not in (TEXT_PAD, TEXT_EPAD)])


@pytest.mark.parametrize("alignment", ["word", "onset"])
def test_cut_words_are_absent_and_a_backchannel_stands_at_its_time(
    tmp_path, tiny_checkpoint, spoken, alignment
):
    clips, _, codes, _ = run(tmp_path, tiny_checkpoint, spoken, alignment=alignment)
    tokenizer = Checkpoint.open(tiny_checkpoint).load_tokenizer()
    for speech in spoken.records():
        clip = clips[speech.id]
        row = codes[speech.id][TEXT_ROW, prompt_end(clip) :]
        said = decoded(tokenizer, row)
        heard, cut = speech.turns[1], speech.turns[2]
        assert said == f"{heard.text} {cut.text} {TURNS[3].text}"
        assert "muffin" not in said and "Sure" not in said
        start, end = frame_at(heard.start_s), frames_covering_seconds(heard.end_s)
        tokens = np.flatnonzero((row != TEXT_PAD) & (row != TEXT_EPAD))
        first = tokenizer.encode(heard.text)
        assert tokens[0] == start + (frame_at(heard.words[0].start_s) - start) * (
            alignment == "word"
        )
        assert row[tokens[: len(first)]].tolist() == first
        user = speech.turns[0]
        assert user.start_s < heard.start_s < heard.end_s
        assert tokens[0] < end < frames_covering_seconds(user.end_s)
        assert clip.dropped_tokens == 0


def test_turn_by_turn_encoding_takes_them_too(tmp_path, tiny_checkpoint, spoken):
    clips, *_ = run(tmp_path, tiny_checkpoint, spoken, encoding="turn")
    assert len(clips) == 2


def test_a_backchannel_is_neither_the_greeting_nor_the_voice_sample(
    tmp_path, tiny_checkpoint, spoken
):
    clips, samples, codes, _ = run(
        tmp_path, tiny_checkpoint, spoken, greeting=True, voice_prompt_s=5, valid_fraction=0
    )
    tokenizer = Checkpoint.open(tiny_checkpoint).load_tokenizer()
    by_id = {speech.id: speech for speech in spoken.records()}
    greeting = samples.pop("greeting")
    opening = by_id[greeting.speech_id].turns[0]
    assert greeting.num_frames == frames_covering_seconds(opening.end_s) - frame_at(opening.start_s)
    for sample in samples.values():
        turns = by_id[sample.speech_id].turns
        own = [t for t in turns if t.role == "agent" and t.kind == "turn"]
        longest = max(turn.end_s - turn.start_s for turn in own)
        assert sample.num_frames == int(longest * 12.5 + 1e-6)
    for name, speech in by_id.items():
        row = codes[name][TEXT_ROW, prompt_end(clips[name]) :]
        # What was said within the greeting is part of no prompt and of no dialogue.
        assert decoded(tokenizer, row) == f"{speech.turns[2].text} {TURNS[3].text}"


# -- voices of training and of validation


def many(count):
    """Dialogues of four personas, some of which say the same."""
    names = ("angry-ann", "friendly-bob", "imported-cleo", "imported-dan")
    return [
        conversation(
            names[index % 4],
            index,
            (
                Turn(role="user", text=f"Hello number {min(index, count - 3)}."),
                Turn(role="agent", text="A large latte with oat milk please.", cut_after_words=3),
                Turn(role="user", text="Fine."),
            ),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("by", ["persona", "conversation"])
def test_no_user_voice_is_heard_on_both_sides_of_the_split(tmp_path, tiny_checkpoint, by):
    dialogues = many(16)
    tensors = {"split": by, "valid_fraction": 0.25}
    context, folder = spoken_folder(tmp_path, dialogues, tensors=tensors)
    speeches: list[Speech] = list(folder.records())
    split = split_of(speeches, context.config.tensors, context.config.seed)
    agents = {dialogue.persona_id: f"agent-{dialogue.persona_id}" for dialogue in dialogues}
    assert split == dialogue_sides(dialogues, agents, by, 0.25, context.config.seed)
    heard = {"train": set(), "valid": set()}
    for speech in speeches:
        heard[split[speech.id]] |= {t.voice_id for t in speech.turns if t.role == "user"}
    assert heard["train"] and heard["valid"]
    assert not heard["train"] & heard["valid"]
    clips, *_ = run(tmp_path, tiny_checkpoint, folder, **tensors)
    codes = {f.code for f in split_findings(list(clips.values()), {s.id: s for s in speeches})}
    assert "shared-user-voice" not in codes


def test_another_split_is_another_folder_and_speaks_only_what_changes_its_voice(tmp_path):
    dialogues = many(12)
    inputs, voices = made_voices(tmp_path, dialogues=dialogues)
    inputs = {"dialogues": inputs["dialogues"], "voices": voices}
    stage, keys, folder_keys = SpeechStage(), [], set()
    for fraction in (0.25, 0.5):
        context = context_of(inputs, tmp_path, tensors={"valid_fraction": fraction})
        digests = dict.fromkeys(stage.reads, "0")
        folder_keys.add(stage.folder_key(context.config, digests))
        tasks = stage.tasks(context)
        keys.append({t.id: (stage.record_key(context.config, t), t.payload.user.id) for t in tasks})
    assert len(folder_keys) == 2
    same = [name for name in keys[0] if keys[0][name] == keys[1][name]]
    moved = [name for name in keys[0] if keys[0][name][1] != keys[1][name][1]]
    assert same and moved and len(same) + len(moved) == len(dialogues)


def test_a_lone_user_voice_is_heard_on_both_sides(tmp_path):
    _, folder = spoken_folder(
        tmp_path, many(4), voices={"user_voices": 1}, tensors={"valid_fraction": 0.5}
    )
    voices = {t.voice_id for s in folder.records() for t in s.turns if t.role == "user"}
    assert voices == {"user-00"}


def test_conversations_that_were_written_alike_count_as_one_whatever_was_cut(tmp_path):
    """Cut at another word, they are no longer spoken alike."""
    folder = StageFolder(tmp_path / "04-speech-test", "speech", "k")
    section = Config.model_validate({"name": "t", "tensors": {"split": "conversation"}}).tensors
    section = section.model_copy(update={"valid_fraction": 0.5})
    speeches = [
        make_speech(folder, f"c{number}", num_frames=111, text_digest=f"{number // 4:064x}")
        for number in range(24)
    ]
    split = split_of(speeches, section, 42)
    for first in range(0, 24, 4):
        assert len({split[f"c{first + offset}"] for offset in range(4)}) == 1
    assert set(split.values()) == {"train", "valid"}


def test_a_long_backchannel_is_no_voice_sample(tmp_path):
    folder = StageFolder(tmp_path / "04-speech-test", "speech", "k")
    speech = make_speech(folder, "c0")
    turns = list(speech.turns)
    assert turns[1].end_s - turns[1].start_s > turns[3].end_s - turns[3].start_s
    turns[1] = turns[1].model_copy(update={"kind": "backchannel"})
    changed = speech.model_copy(update={"turns": tuple(turns)})
    for one, expected in ((speech, 1), (changed, 3)):
        excerpt = choose_excerpts([one], {"c0": "train"}, 42)["c0"]
        assert excerpt and excerpt.turn == expected
