"""Voices: one a persona, apart from the users', by espeak or by name."""

import itertools
import subprocess
import sys
import wave

import pytest

from duplex.characters import VoiceTraits
from duplex.config import Config
from duplex.datafiles import CHECKOUT, load_personas
from duplex.errors import RequestError
from duplex.records import Turn, Voice
from duplex.stage import StageContext
from pipeline.engines.espeak_voices import (
    PERSONA_VARIANTS,
    PITCH_SPREAD,
    RATE_SPREAD,
    USER_VARIANTS,
    user_params,
)
from pipeline.engines.voice_choice import Want, match_names
from pipeline.speech import SpeechStage
from pipeline.voices import VoicesStage, agent_voice_id, espeak_tasks
from tests.factories import persona
from tests.stages.spoken_helpers import context_of, conversation, folders, made_voices

pytest.importorskip("espeakng_loader")

SHIPPED = CHECKOUT / "data" / "personas"


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


# -- voices by name


NAMES = {"female": ["alba", "cosette", "eponine"], "male": ["jean", "marius"], "fr-male": ["luc"]}


def wants(*personas, users=0, language="en"):
    agents = [
        Want(agent_voice_id(name), "agent", language, name, VoiceTraits(gender=gender))
        for name, gender in personas
    ]
    return agents + [Want(f"user-{index:02d}", "user", language) for index in range(users)]


def test_names_follow_gender_and_nobody_shares_one():
    chosen = match_names(wants(("a", "female"), ("b", "female"), ("c", "male"), users=2), NAMES)
    assert {chosen["agent-a"], chosen["agent-b"]} < set(NAMES["female"])
    assert chosen["agent-c"] in NAMES["male"]
    assert len(set(chosen.values())) == 5
    alone = match_names(wants(("a", "female")), NAMES)
    assert alone["agent-a"] == chosen["agent-a"]


def test_a_language_takes_its_own_list():
    everybody = wants(("c", "male")) + wants(("d", "male"), language="fr")
    chosen = match_names(everybody, NAMES)
    assert chosen["agent-d"] == "luc" and chosen["agent-c"] in NAMES["male"]


@pytest.mark.parametrize(
    ("these", "names", "message"),
    [
        (wants(("c", "male"), ("d", "male"), ("e", "male")), NAMES, r"1 male of a persona \(en\)"),
        (wants(("c", "male"), users=5), NAMES, r"6 voices are needed, 5 found.*1 of the user's"),
        (wants(), {"female": ["a", "b"], "male": ["b"]}, "found twice: b"),
    ],
)
def test_too_few_names_or_one_twice_is_an_error(these, names, message):
    with pytest.raises(RequestError, match=message):
        match_names(these, names)


def test_named_voices_are_the_engines_by_name_and_foreign_languages_espeaks(tmp_path):
    german = persona("friendly-uwe", language="de", voice=VoiceTraits(gender="male"))
    inputs = folders(tmp_path, [persona("angry-ann"), german], [])
    section = {"engine": "moshi-tts", "names": NAMES, "user_voices": 2}
    context = context_of(inputs, tmp_path, voices=section, speech={"engines": {"de": "espeak"}})
    plans = {task.id: task.payload for task in VoicesStage().tasks(context)}
    assert plans["agent-angry-ann"].engine == "moshi-tts"
    assert plans["agent-angry-ann"].params["voice"] in NAMES["female"]
    uwe = plans["agent-friendly-uwe"]
    assert (uwe.engine, uwe.params["voice"], uwe.want.language) == ("espeak", "de", "de")
    assert {name for name in plans if name.startswith("user")} == {
        "user-00", "user-01", "user-de-00", "user-de-01",
    }  # fmt: skip


def test_a_personas_language_is_its_voices_and_its_user_speaks_it_too(tmp_path):
    german = persona("friendly-uwe", language="de", voice=VoiceTraits(gender="male"))
    words = (Turn(role="user", text="Guten Morgen."), Turn(role="agent", text="Einen Kaffee."))
    talk = conversation("friendly-uwe", 0, words)
    inputs, made = made_voices(tmp_path, [persona("angry-ann"), german], [talk])
    voices = {voice.id: voice for voice in made.records()}
    assert voices["agent-friendly-uwe"].language == "de"
    assert voices["agent-friendly-uwe"].params["voice"] == "de"
    context = context_of({"dialogues": inputs["dialogues"], "voices": made}, tmp_path)
    (task,) = SpeechStage().tasks(context)
    assert task.payload.user.language == "de"


def test_each_voice_says_a_sentence_and_the_page_plays_it(tmp_path):
    # The personas say the same in all dialogues, so none of them can be held out.
    _, folder = made_voices(tmp_path, voices={"user_voices": 2})
    page = (folder.path / "index.html").read_text()
    for voice in folder.records():
        with wave.open(str(folder.blob_path(voice.proof, ".wav"))) as file:
            assert file.getframerate() == 24_000 and file.getnframes() > 12_000
        assert f"blobs/{voice.proof}.wav" in page
    assert page.count('class="tag valid"') == 2  # the legend's and a user's
    assert "http" not in page
