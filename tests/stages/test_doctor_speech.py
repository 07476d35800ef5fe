"""The doctor's look at what will speak and who listens: what is missing, and how to get it."""

import subprocess
import sys

import pytest

from duplex.config import Config
from duplex.datafiles import CHECKOUT
from pipeline import doctor
from pipeline.engines import espeak, listening
from pipeline.engines.engines import engine_module
from tests.stages.test_engine_choice import people  # noqa: F401

NAMED = {"engine": "moshi-tts", "names": {"female": ["a"], "male": ["b"]}}


def config(voices=None, **speech):
    return Config.model_validate({"name": "x", "voices": voices or {}, "speech": speech})


def engines_of(config):
    return {check["found"].split()[0]: check for check in doctor._engines(config)}


@pytest.fixture
def online(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_only_the_engines_that_speak_are_looked_at(monkeypatch):
    monkeypatch.setattr(espeak, "MODULE", "espeakng_loader_that_is_not_there")
    (check,) = doctor._engines(config())
    assert check["state"] == "fail"
    assert "espeak needs the package espeakng-loader" in check["found"]
    assert "pip install -e '.[espeak]'" in check["found"]
    server = {"engine": "openai-speech", "names": {"female": ["a"]}}
    assert set(engines_of(config(server, model="m", runtime={"base_url": "http://x/v1"}))) == {
        "openai-speech"
    }


def test_weights_are_told_with_size_and_licence(online, empty_cache, monkeypatch):
    check = engines_of(config(NAMED))["moshi-tts"]
    assert check["state"] == "warn"  # it will fetch them
    for part in ("kyutai/tts-1.6b-en_fr", "about 4 GB", "CC-BY-4.0", "hf download"):
        assert part in check["found"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert engines_of(config(NAMED))["moshi-tts"]["state"] == "fail"


def test_the_engine_of_a_language_needs_its_script_runner(monkeypatch, people):  # noqa: F811
    monkeypatch.setattr("pipeline.engines.chatterbox.uv", lambda: None)
    said = engines_of(config(NAMED, engines={"de": "chatterbox"}))["chatterbox"]
    assert said["state"] == "fail" and "pip install uv" in said["found"]
    assert "watermark" in said["found"]
    monkeypatch.setattr(engine_module("pocket-tts"), "missing", lambda section: "weights")
    assert "chatterbox" not in engines_of(config(NAMED, engine="moshi-tts"))
    monkeypatch.setattr("pipeline.engines.chatterbox.uv", lambda: "/bin/uv")
    found = engines_of(config(NAMED, engine="moshi-tts"))  # nobody named it: Uwe speaks German
    assert found["chatterbox"]["state"] == "ok" and "at hand" in found["chatterbox"]["found"]


def test_the_recogniser_is_looked_at_where_somebody_is_to_listen(online, empty_cache, monkeypatch):
    assert doctor._recogniser(config()) == []  # nobody listens to espeak
    (check,) = doctor._recogniser(config(checks={"share": 0.1, "recogniser": "pocketsphinx"}))
    assert check["state"] == "ok" and "English only" in check["found"]
    whisper = {"recogniser": "faster-whisper"}
    (check,) = doctor._recogniser(config(NAMED, checks=whisper))
    assert check["state"] == "warn" and "weights small" in check["found"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (check,) = doctor._recogniser(config(NAMED, checks=whisper))
    assert check["state"] == "fail"
    (empty_cache / "models--Systran--faster-whisper-small" / "snapshots").mkdir(parents=True)
    (check,) = doctor._recogniser(config(NAMED, checks=whisper))
    assert check["state"] == "ok"


def test_a_missing_recogniser_says_how_to_get_one(monkeypatch):
    find = listening.importlib.util.find_spec
    gone = ("faster_whisper", "pocketsphinx")
    monkeypatch.setattr(
        listening.importlib.util, "find_spec", lambda name: None if name in gone else find(name)
    )
    (check,) = doctor._recogniser(config(NAMED))
    assert check["state"] == "warn" and "pip install -e '.[asr]'" in check["found"]
    for name in ("faster-whisper", "pocketsphinx"):
        (check,) = doctor._recogniser(config(NAMED, checks={"recogniser": name}))
        assert check["state"] == "fail" and f"{name} needs the package" in check["found"]


def test_the_look_at_engines_imports_nothing_heavy():
    code = (
        "import sys; from duplex.config import Config; from pipeline import doctor;"
        "c = Config.model_validate({'name': 'x', 'voices': {'engine': 'csm', 'recordings': 'r'}});"
        "assert doctor._engines(c) and doctor._recogniser(c);"
        "print({'torch', 'moshi', 'transformers', 'faster_whisper', 'pocketsphinx'}"
        "& set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr
