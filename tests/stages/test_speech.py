"""Speech: one voice a persona, a WAV of both channels, user voices that keep to their side."""

import io
import re

import numpy as np
import pytest

from duplex.errors import MissingInputError, RecordError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.records import Speech, Turn, Voice
from duplex.stage import BlobSink, StageContext, record_seed
from pipeline.speech import SpeechStage, choose_voice, sound_of
from tests.stages.spoken_helpers import (
    DIALOGUES,
    TURNS,
    complete,
    conversation,
    made_speech,
)

pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return made_speech(tmp_path_factory.mktemp("runs"))


def wav(folder, speech):
    import soundfile

    return soundfile.SoundFile(io.BytesIO(folder.read_blob(speech.audio, ".wav")))


def test_a_persona_keeps_its_voice_in_all_of_its_dialogues(spoken):
    _, folder = spoken
    heard = {}
    for speech in folder.records():
        for turn in speech.turns:
            if turn.role == "agent":
                heard.setdefault(speech.persona_id, set()).add(turn.voice_id)
    assert heard == {
        name: {f"agent-{name}"} for name in ("angry-ann", "friendly-bob", "imported-cleo")
    }


def test_the_wav_has_the_agent_left_and_the_user_right(spoken):
    _, folder = spoken
    records = list(folder.records())
    assert len(records) == len(DIALOGUES)
    for speech in records:
        with wav(folder, speech) as file:
            assert (file.samplerate, file.channels, file.subtype) == (24_000, 2, "PCM_16")
            audio = file.read(dtype="int16")  # [S, 2]
        assert len(audio) == speech.num_samples
        assert len(audio) % FRAME_SAMPLES == 0
        assert len(speech.turns) == len(TURNS)
        outside = np.ones(len(audio), dtype=bool)
        for turn in speech.turns:
            start, end = (round(t * SAMPLE_RATE) for t in (turn.start_s, turn.end_s))
            assert start % FRAME_SAMPLES == 0
            outside[start:end] = False
            speaking, silent = (0, 1) if turn.role == "agent" else (1, 0)
            assert not audio[start:end, silent].any()
            rms = np.sqrt(np.mean((audio[start:end, speaking] / 32768.0) ** 2))
            assert 20 * np.log10(rms) == pytest.approx(-24, abs=0.05)
            assert [w.text for w in turn.words] == [w.strip(".,?") for w in turn.text.split()]
            assert turn.start_s <= turn.words[0].start_s
            assert turn.words[-1].end_s <= turn.end_s
        assert not audio[outside].any()


def test_the_same_dialogues_give_the_same_bytes(spoken, tmp_path):
    _, folder = spoken
    _, again = made_speech(tmp_path, dialogues=DIALOGUES[::-1])
    assert again.digest == folder.digest
    assert [s.audio for s in again.records()] == [s.audio for s in folder.records()]


def test_a_dialogue_by_itself_is_spoken_the_same(spoken, tmp_path):
    _, folder = spoken
    alone = conversation("friendly-bob", 1)
    _, again = made_speech(tmp_path, dialogues=[alone])
    by_id = {s.id: s.digest for s in folder.records()}
    assert [s.digest for s in again.records()] == [by_id[alone.id]]


def test_another_user_voice_moves_only_the_dialogues_that_it_takes_over():
    voices = [
        Voice(id=f"user-{i:02d}", engine="e", role="user", params={"n": i}, licence="l")
        for i in range(5)
    ]
    moved = 0
    for index in range(400):
        before = choose_voice(f"d-{index}", voices[:4], 42)
        after = choose_voice(f"d-{index}", voices[::-1], 42)
        assert after in (before, voices[4])
        moved += after != before
    assert 50 < moved < 110  # a fifth is 80
    assert len({choose_voice(f"d-{i}", voices, 42).id for i in range(100)}) == 5


def test_a_voice_for_each_conversation_is_one_of_the_same_side(spoken):
    context, _ = spoken
    config = context.config.model_copy(
        update={"speech": context.config.speech.model_copy(update={"agent_voice": "conversation"})}
    )
    stage, drawn = SpeechStage(), StageContext(config, context.runs_root, context.inputs)
    tasks, before = stage.tasks(drawn), stage.tasks(context)
    side_of = {task.payload.agent.id: task.payload.side for task in before}
    for task in tasks:
        assert side_of[task.payload.agent.id] == task.payload.side
        assert task.payload.agent.language == task.payload.user.language
    moved = [a for a, b in zip(tasks, before, strict=True) if a.payload.agent != b.payload.agent]
    assert moved and len(moved) < len(tasks)
    # Whoever keeps the voice keeps the record: the setting is in no record's key.
    keys = [
        {task.id: stage.record_key(one, task) for task in some}
        for one, some in ((config, tasks), (context.config, before))
    ]
    changed = {name for name in keys[0] if keys[0][name] != keys[1][name]}
    assert changed == {task.id for task in moved}


def test_sources_are_the_dialogue_and_its_two_voices(spoken):
    context, _ = spoken
    voices = {voice.id: voice for voice in context.records("voices", Voice)}
    for task in SpeechStage().tasks(context):
        script = task.payload
        assert task.sources == (
            script.dialogue.digest, sound_of(script.agent), sound_of(script.user)
        )  # fmt: skip
        assert script.agent == voices[f"agent-{script.dialogue.persona_id}"]
        assert script.user.role == "user"


class Blobs(BlobSink):
    def __init__(self):
        self.put_count = 0

    def put(self, content, suffix):
        self.put_count += 1
        return "0" * 64


def attempt(context, dialogues, root):
    inputs = context.inputs | {"dialogues": complete(root, 2, "dialogues", dialogues)}
    context = StageContext(context.config, root, inputs)
    stage, blobs = SpeechStage(), Blobs()
    (task,) = stage.tasks(context)
    stage.setup(context)
    try:
        return stage.process(task, record_seed(42, "speech", task.id), blobs), blobs
    except RecordError:
        assert blobs.put_count == 0
        raise
    finally:
        stage.close()


def test_a_turn_that_cannot_be_spoken_rejects_its_dialogue(spoken, tmp_path):
    context, _ = spoken
    mute = conversation("angry-ann", 0, (*TURNS, Turn(role="user", text="...")))
    with pytest.raises(RecordError, match=r"turn 4 \(user\).*word to say"):
        attempt(context, [mute], tmp_path)


def test_a_persona_without_a_voice_rejects_its_dialogue(spoken, tmp_path):
    context, _ = spoken
    with pytest.raises(RecordError, match="persona nobody must have a voice"):
        attempt(context, [conversation("nobody", 0)], tmp_path)


def test_without_user_voices_the_request_is_wrong(spoken, tmp_path):
    context, _ = spoken
    inputs = context.inputs | {"voices": complete(tmp_path, 3, "voices", [])}
    with pytest.raises(MissingInputError, match="at least one voice with role user"):
        SpeechStage().tasks(StageContext(context.config, tmp_path, inputs))


def test_gap_frames_of_a_turn_are_kept(spoken, tmp_path):
    context, _ = spoken
    turns = (TURNS[0], Turn(role="agent", text="Wait.", gap_frames=-5))
    records, _ = attempt(context, [conversation("angry-ann", 0, turns)], tmp_path)
    (speech,) = records
    assert isinstance(speech, Speech)
    first, second = speech.turns
    frames = -(-round(first.end_s * SAMPLE_RATE) // FRAME_SAMPLES) - 5
    assert second.start_s == pytest.approx(frames * 0.08)


# -- the page


def test_the_page_has_a_row_a_dialogue_and_needs_nothing_from_outside(spoken):
    _, folder = spoken
    page = (folder.path / "index.html").read_text()
    assert page.count("<tr>") == len(DIALOGUES) + 1
    table = page[page.index("<table>") :]
    assert table.count("<svg") == len(DIALOGUES)
    assert table.count("<rect") == len(DIALOGUES) * len(TURNS)
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == 6  # two for each of three personas
    for source in sources:
        assert (folder.path / source).is_file()
    assert "http" not in page
    assert "@import" not in page
    assert "<are>" not in page and "&lt;are&gt;" in page


def test_the_page_can_be_made_again_from_a_finished_folder(spoken):
    context, folder = spoken
    assert SpeechStage().page(folder, context) == (folder.path / "index.html").read_text()


def test_the_page_says_who_timed_the_words(spoken):
    context, folder = spoken
    for speech in folder.records():
        assert speech.quality.timed_by == {"engine": len(TURNS)}
    shown = " ".join((SpeechStage().page(folder, context) or "").split())
    assert f"Words timed by the engine in {len(DIALOGUES) * len(TURNS)}." in shown
