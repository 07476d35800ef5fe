"""Voices and speech: one voice a persona, apart from the users', and a WAV of both channels."""

import io
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from duplex.characters import VoiceTraits
from duplex.config import Config
from duplex.datafiles import CHECKOUT, load_personas
from duplex.errors import MissingInputError, RecordError, RequestError
from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.records import Speech, Turn, Voice, record_line
from duplex.stage import BlobSink, StageContext, record_seed
from duplex.store import StageFolder
from pipeline.engines.espeak_voices import (
    PERSONA_VARIANTS,
    PITCH_SPREAD,
    RATE_SPREAD,
    USER_VARIANTS,
    user_params,
)
from pipeline.engines.voice_choice import Want
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage, choose_user_voice, sound_of
from pipeline.voices import VoicesStage, agent_voice_id, espeak_tasks
from tests.factories import dialogue, persona

pytest.importorskip("espeakng_loader")

SHIPPED = CHECKOUT / "data" / "personas"
PERSONAS = [
    persona("angry-ann"),
    persona("friendly-bob", voice=VoiceTraits(gender="male", accent="en-gb")),
]
TURNS = (
    Turn(role="user", text="Good morning. What can I get you?"),
    Turn(role="agent", text="A large latte, please."),
    Turn(role="user", text="That is four dollars."),
    Turn(role="agent", text="Here you <are>."),
)


def conversation(persona_id, index, turns=TURNS):
    return dialogue(f"{persona_id}.rush-hour.{index:02d}", persona_id=persona_id, turns=turns)


DIALOGUES = [
    conversation(persona_id, index)
    for persona_id in ("angry-ann", "friendly-bob", "imported-cleo")
    for index in range(3)
]


def complete(root, number, stage, records):
    folder = StageFolder.of(root, number, stage, "0" * 64)
    folder.complete((record_line(r) for r in records), files=[], counts={}, provenance={})
    return folder


def folders(root, personas=PERSONAS, dialogues=DIALOGUES):
    return {
        "personas": complete(root, 1, "personas", personas),
        "dialogues": complete(root, 2, "dialogues", dialogues),
    }


def context_of(inputs, root, **sections):
    config = Config.model_validate({"name": "toy", **sections})
    return StageContext(config, root, inputs)


def made_voices(root, personas=PERSONAS, dialogues=DIALOGUES, **sections):
    inputs = folders(root, personas, dialogues)
    folder = StageFolder.of(root, 3, "voices", "1" * 64)
    execute(VoicesStage(), context_of(inputs, root, **sections), folder)
    return inputs, folder


def made_speech(root, dialogues=DIALOGUES):
    inputs, voices = made_voices(root, dialogues=dialogues)
    folder = StageFolder.of(root, 4, "speech", "2" * 64)
    context = context_of({"dialogues": inputs["dialogues"], "voices": voices}, root)
    execute(SpeechStage(), context, folder)
    return context, folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    return made_speech(tmp_path_factory.mktemp("runs"))


def wav(folder, speech):
    import soundfile

    return soundfile.SoundFile(io.BytesIO(folder.read_blob(speech.audio, ".wav")))


# -- voices


def agent_tasks(traits):
    """Tasks of personas, given as (id, traits)."""
    wants = [Want(agent_voice_id(name), "agent", "en", name, voice) for name, voice in traits]
    return espeak_tasks(wants)


def test_each_persona_has_one_voice_also_an_imported_one(tmp_path):
    _, folder = made_voices(tmp_path, voices={"user_voices": 3})
    voices = list(folder.records())
    assert [voice.id for voice in voices] == [
        "agent-angry-ann", "agent-friendly-bob", "agent-imported-cleo",
        "user-00", "user-01", "user-02",
    ]  # fmt: skip
    known = ["angry-ann", "friendly-bob", "imported-cleo"]
    assert [voice.persona_id for voice in voices[:3]] == known
    assert {voice.role for voice in voices[3:]} == {"user"}
    assert_all_differ([voice.params for voice in voices])


def assert_all_differ(params):
    assert len({tuple(sorted(p.items())) for p in params}) == len(params)


def test_shipped_personas_have_voices_of_their_own_that_espeak_can_speak(tmp_path):
    personas = load_personas(SHIPPED)
    _, folder = made_voices(tmp_path, personas, [], voices={"user_voices": 64})
    voices = list(folder.records())
    assert len(voices) == len(personas) + 64
    assert_all_differ([voice.params for voice in voices])
    agents = [voice.params for voice in voices if voice.role == "agent"]
    for one, other in itertools.combinations(agents, 2):
        alike = one["voice"] == other["voice"] and one["variant"] == other["variant"]
        assert not alike or abs(one["pitch"] - other["pitch"]) >= 4, "two personas sound the same"
    # None of the shipped ones had to give way: each follows from its own id and traits.
    for one in personas:
        assert agent_tasks([(one.id, one.voice)])[0].payload.params in [v.params for v in voices]


def test_voices_follow_their_traits():
    young = VoiceTraits(gender="female", age="young", accent="en-gb", pitch=62, rate_wpm=195)
    params = agent_tasks([("p", young)])[0].payload.params
    assert params["voice"] == "en-gb"
    assert params["variant"] in PERSONA_VARIANTS["female", "young"]
    assert abs(params["pitch"] - 62) <= PITCH_SPREAD
    assert abs(params["rate_wpm"] - 195) <= RATE_SPREAD
    for pitch in (0, 99):
        low = agent_tasks([("p", VoiceTraits(gender="male", pitch=pitch))])[0].payload.params
        assert 0 <= low["pitch"] <= 99


def test_many_personas_of_equal_traits_never_share_a_voice():
    traits = VoiceTraits(gender="male")
    tasks = agent_tasks([(f"persona-{index}", traits) for index in range(1500)])
    assert_all_differ([task.payload.params for task in tasks])
    assert len({task.sources for task in tasks}) == 1500
    alone = sum(
        agent_tasks([(f"persona-{index}", traits)])[0] == task for index, task in enumerate(tasks)
    )
    assert 1200 < alone < 1500  # some collided, the others don't depend on who else is there


def test_a_voice_depends_on_id_and_voice_traits_only(tmp_path):
    def tasks(name, *personas):
        inputs = folders(tmp_path / name, personas, [])
        context = context_of(inputs, tmp_path)
        return {task.id: task for task in VoicesStage().tasks(context)}

    ann = persona("angry-ann")
    before = tasks("before", ann)
    edited = tasks("edited", persona("angry-ann", name="Anna", traits=("loud",)))
    joined = tasks("joined", persona("aaa"), ann, persona("zzz"))
    lower = tasks("lower", persona("angry-ann", voice=VoiceTraits(gender="female", pitch=20)))
    assert edited == before
    assert {key: joined[key] for key in before} == before
    assert lower["agent-angry-ann"].sources != before["agent-angry-ann"].sources


def test_user_voices_lie_apart_and_more_of_them_keep_the_first():
    assert not set(USER_VARIANTS) & {v for variants in PERSONA_VARIANTS.values() for v in variants}
    assert_all_differ([user_params(index) for index in range(64)])
    assert len({user_params(index)["variant"] for index in range(6)}) == 6
    stage, keys = VoicesStage(), []
    for count in (2, 5):
        config = Config.model_validate({"name": "toy", "voices": {"user_voices": count}})
        tasks = [
            task
            for task in stage.tasks(StageContext(config, CHECKOUT, _Nothing()))
            if task.id.startswith("user-")
        ]
        keys.append({task.id: stage.record_key(config, task) for task in tasks})
    assert len(keys[1]) == 5
    assert {key: keys[1][key] for key in keys[0]} == keys[0]


class _Nothing(dict):
    """Inputs without a record."""

    def __missing__(self, key):
        return self

    def records(self):
        return iter(())


def test_an_accent_that_espeak_lacks_names_the_persona(tmp_path):
    wrong = persona("angry-ann", voice=VoiceTraits(gender="female", accent="en-mars"))
    with pytest.raises(RequestError, match=r"agent-angry-ann.*no voice en-mars.*accent must be"):
        made_voices(tmp_path, [wrong], [])


def test_long_persona_ids_give_valid_and_different_voice_ids():
    ids = [agent_voice_id("p" * 95 + letter) for letter in "ab"]
    assert len(set(ids)) == 2
    for voice_id in ids:
        Voice(id=voice_id, engine="e", role="agent", params={}, licence="l")


# -- speech


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
        before = choose_user_voice(f"d-{index}", voices[:4], 42)
        after = choose_user_voice(f"d-{index}", voices[::-1], 42)
        assert after in (before, voices[4])
        moved += after != before
    assert 50 < moved < 110  # a fifth is 80
    assert len({choose_user_voice(f"d-{i}", voices, 42).id for i in range(100)}) == 5


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


# -- imports


def test_keys_need_no_engine_and_no_audio_library():
    code = (
        "import sys; from duplex.config import Config; from pipeline.voices import VoicesStage; "
        "from pipeline.speech import SpeechStage; c = Config(name='a'); "
        "print(VoicesStage().folder_key(c, {'personas': '', 'dialogues': ''}), "
        "SpeechStage().engine(c)); "
        "print(*{'torch', 'soundfile', 'soxr', 'espeakng_loader', 'jinja2'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    key, heavy = result.stdout.splitlines()
    assert "espeakng-loader 0." in key
    assert heavy == ""
