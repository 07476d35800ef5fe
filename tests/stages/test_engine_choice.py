"""The engine of a language that no setting names: which it is, who records it, whose key has it."""

import pytest

from duplex.characters import VoiceTraits
from duplex.config import Config
from duplex.errors import DataFileError
from duplex.records import Turn, Voice
from pipeline.engines import engines
from pipeline.engines.engines import engine_module, language_map, unnamed_engines, voice_engine
from pipeline.speech import SpeechStage
from pipeline.voices import VoicesStage
from tests.factories import persona
from tests.stages.spoken_helpers import complete, context_of, conversation, folders

pytest.importorskip("espeakng_loader")

ANN = persona("angry-ann")
UWE = persona("friendly-uwe", language="de", voice=VoiceTraits(gender="male"))
TALKS = [
    conversation("angry-ann", 0),
    conversation("friendly-uwe", 0, (Turn(role="user", text="Ja?"), Turn(role="agent", text="Ja"))),
]
CLONED = {"engine": "csm", "recordings": "tests", "user_voices": 1}


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    """What is cloned is not the question here."""
    monkeypatch.setattr("pipeline.voices.source_digest", lambda section: "recordings")
    monkeypatch.setattr("pipeline.voices.source_files", lambda section: {"a.wav": "0" * 64})


@pytest.fixture
def at_hand(monkeypatch):
    """Chatterbox is installed on this machine, or not; a test may change its revision."""
    chatterbox = engine_module("chatterbox")

    def set_up(here, revision="chatterbox 1"):
        monkeypatch.setattr(chatterbox, "missing", lambda section: None if here else "uv")
        monkeypatch.setattr(chatterbox, "revision", lambda section: revision)
        monkeypatch.setattr(engine_module("pocket-tts"), "missing", lambda section: "weights")

    set_up(True)
    return set_up


@pytest.fixture
def people(monkeypatch):
    """The personas whose files the config names."""

    def set_up(*personas):
        monkeypatch.setattr(engines, "load_personas", lambda folder, only: list(personas))

    set_up(ANN, UWE)
    return set_up


def config(**sections):
    base = {"voices": CLONED, "speech": {"engine": "csm"}}
    return Config.model_validate({"name": "x", **base, **sections})


def voice_tasks(root, *personas, **sections):
    inputs = folders(root, personas or (ANN, UWE), [])
    context = context_of(
        inputs, root, **({"voices": CLONED, "speech": {"engine": "csm"}} | sections)
    )
    return {task.id: task for task in VoicesStage().tasks(context)}


def test_a_voice_is_made_by_the_engine_that_speaks_its_language(tmp_path, at_hand):
    tasks = voice_tasks(tmp_path)
    assert {name: task.payload.engine for name, task in tasks.items()} == {
        "agent-angry-ann": "csm", "user-00": "csm",
        "agent-friendly-uwe": "chatterbox", "user-de-00": "chatterbox",
    }  # fmt: skip
    at_hand(False)
    tasks = voice_tasks(tmp_path / "b")
    plan = tasks["agent-friendly-uwe"].payload
    assert (plan.engine, plan.params["voice"], plan.wants) == ("espeak", "de", ())
    assert {want.language for want in tasks["agent-angry-ann"].payload.wants} == {"en"}


def test_what_the_config_says_for_a_language_wins(at_hand):
    said = config(speech={"engine": "csm", "engines": {"de": "pocket-tts"}})
    assert voice_engine("de", said) == "pocket-tts"
    assert voice_engine("de", config()) == "chatterbox"
    assert voice_engine("en", config()) == "csm"


def test_the_key_of_a_voice_has_the_engine_that_nobody_named(tmp_path, at_hand):
    before = voice_tasks(tmp_path)
    at_hand(True, "chatterbox 2")
    after = voice_tasks(tmp_path / "b")
    changed = {name for name in before if before[name].sources != after[name].sources}
    assert changed == {"agent-friendly-uwe", "user-de-00"}


@pytest.mark.parametrize("stage", [VoicesStage(), SpeechStage()])
def test_the_key_of_a_folder_has_the_engines_that_nobody_named(at_hand, people, stage):
    def key(**sections):
        inputs = dict.fromkeys(stage.reads, "")
        return stage.folder_key(config(**sections), inputs)

    first = key()
    at_hand(True, "chatterbox 2")
    second = key()
    at_hand(False)
    assert len({first, second, key()}) == 3
    people(ANN)  # nobody speaks German any more
    english = key()
    at_hand(True)
    assert key() == english


def spoken_by(root, revision_of):
    """Records of a run with an English and a German agent, and their speech tasks' keys."""

    def voice(role, language, engine, persona_id=None):
        identity = f"{role}-{persona_id or language}"
        return Voice(
            id=identity, engine=engine, role=role, persona_id=persona_id, params={},
            language=language, licence="l",
        )  # fmt: skip

    voices = [
        voice("agent", "en", "csm", "angry-ann"), voice("user", "en", "csm"),
        voice("agent", "de", "chatterbox", "friendly-uwe"), voice("user", "de", "chatterbox"),
    ]  # fmt: skip
    inputs = {"dialogues": complete(root, 2, "dialogues", TALKS),
              "voices": complete(root, 3, "voices", voices)}  # fmt: skip
    context = context_of(inputs, root, voices=CLONED, speech={"engine": "csm"})
    revision_of()
    stage = SpeechStage()
    return {t.id: stage.record_key(context.config, t) for t in stage.tasks(context)}


def test_speech_by_an_unnamed_engine_has_its_revision_and_other_speech_has_not(tmp_path, at_hand):
    before = spoken_by(tmp_path / "a", lambda: at_hand(True, "chatterbox 1"))
    after = spoken_by(tmp_path / "b", lambda: at_hand(True, "chatterbox 2"))
    assert {name for name in before if before[name] != after[name]} == {TALKS[1].id}


def test_a_config_whose_engine_speaks_all_reads_no_persona_for_its_keys(monkeypatch):
    monkeypatch.setattr(engines, "load_personas", lambda folder, only: 1 / 0)
    assert unnamed_engines(Config(name="x")) == {}


def test_personas_that_cannot_be_read_count_as_speaking_everything(monkeypatch, at_hand):
    def broken(folder, only):
        raise DataFileError("no")

    monkeypatch.setattr(engines, "load_personas", broken)
    assert set(unnamed_engines(config())) == set(language_map()) - {"en"}


def test_the_shipped_personas_add_nothing_to_an_english_run(at_hand):
    assert unnamed_engines(config()) == {}
