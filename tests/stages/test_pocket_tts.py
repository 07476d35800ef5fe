"""pocket-tts on a tiny random model that the package's own `load_model` loads."""

import gc
import os
import weakref

import numpy as np
import pytest
import torch
import yaml

from duplex.config_data import SpeechSection
from duplex.errors import CorruptFileError, MissingInputError, RecordError, RequestError
from pipeline.engines import pocket_tts
from tests.stages.tiny_tts import request, voice, write_pocket_tts, write_sample

TEXT = "Hello there. It is me, and I would like a large latte with oat milk!"


@pytest.fixture(scope="module")
def description(tmp_path_factory):
    return write_pocket_tts(tmp_path_factory.mktemp("pocket-tts"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample") / "ann.wav")


def section_of(path):
    return SpeechSection.model_validate({"models": {"pocket-tts": {"weights": str(path)}}})


@pytest.fixture(scope="module")
def engine(description):
    engine = pocket_tts.make(section_of(description))
    yield engine
    engine.close()


def asked(sample, text=TEXT, seed=7, language="en", **params):
    who = voice("pocket-tts", **params)
    return request("pocket-tts", text, voice=who, sample=sample, seed=seed, language=language)


def test_a_text_is_spoken_by_the_voice_of_a_sample(engine, sample):
    utterance = engine.synthesize(asked(sample))
    assert utterance.samples.ndim == 1 and utterance.samples.dtype == np.float32
    assert 0 < np.abs(utterance.samples).max() <= 1 and utterance.words is None
    assert len(utterance.samples) % 1920 == 0


@pytest.mark.parametrize("language", ["en", "fr", "de", "pt", "it", "es"])
def test_the_package_has_weights_of_each_language(language):
    places = pocket_tts._places(pocket_tts.CONFIGS[language])
    assert [repository for repository, _, _ in places] == [
        "kyutai/pocket-tts", "kyutai/pocket-tts-without-voice-cloning",
    ]  # fmt: skip
    assert all(file.endswith("model.safetensors") and commit for _, file, commit in places)


def test_another_sample_and_another_temperature_give_other_speech(engine, sample, tmp_path):
    other = write_sample(tmp_path / "bob.wav", seed=4)
    spoken = {
        engine.synthesize(request).samples.tobytes()
        for request in (asked(sample), asked(other), asked(sample, temperature=1.0))
    }
    assert len(spoken) == 3


def test_the_bytes_hang_on_the_seed_alone_not_on_what_was_spoken_before(
    engine, sample, tmp_path, description
):
    first = engine.synthesize(asked(sample, seed=1)).samples.tobytes()
    for number in range(pocket_tts.STATES + 1):  # the voice's state is forgotten
        engine.synthesize(asked(write_sample(tmp_path / "x.wav", seed=number + 2), "other"))
    assert engine.synthesize(asked(sample, seed=2)).samples.tobytes() != first
    assert engine.synthesize(asked(sample, seed=1)).samples.tobytes() == first
    fresh = pocket_tts.make(section_of(description))
    assert fresh.synthesize(asked(sample, seed=1)).samples.tobytes() == first


def test_the_process_is_left_as_it_was(description, sample, monkeypatch):
    monkeypatch.delenv(pocket_tts.WITHOUT_END, raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        pocket_tts.make(section_of(description)).synthesize(asked(sample))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.rand(4), expected)
    assert pocket_tts.WITHOUT_END not in os.environ


def test_each_frame_is_decoded_by_itself(engine, sample, monkeypatch):
    model = engine._loaded("en")
    sizes, decode = [], model.mimi.decode_from_latent
    monkeypatch.setattr(
        model.mimi,
        "decode_from_latent",
        lambda latent, state: sizes.append(latent.shape[1]) or decode(latent, state),
    )
    engine.synthesize(asked(sample))
    assert set(sizes) == {1} and len(sizes) > 6


def test_speech_that_does_not_end_is_refused(tmp_path, sample):
    engine = pocket_tts.make(section_of(write_pocket_tts(tmp_path, end_bias=-1e4)))
    with pytest.raises(RecordError, match="pocket-tts must end its speech within"):
        engine.synthesize(asked(sample, "Hello"))


def test_weights_without_cloning_are_not_used_to_clone(description, sample):
    engine = pocket_tts.make(section_of(description))
    engine._loaded("en").has_voice_cloning = False  # as the package does when the hub refuses
    with pytest.raises(MissingInputError, match=r"Accept the terms at .*kyutai/pocket-tts"):
        engine.synthesize(asked(sample))


@pytest.mark.parametrize("name", ["https://example.org/x.safetensors", "../x.wav", "nobody", 3])
def test_a_voice_by_name_is_one_of_the_packages_list(engine, name):
    with pytest.raises(RequestError, match=r"one of the names .*alba"):
        engine.synthesize(asked(None, voice=name))


def test_a_voice_of_the_package_is_not_given_to_other_weights(engine):
    with pytest.raises(RequestError, match="alba is made for the package's own weights"):
        engine.synthesize(asked(None, voice="alba"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "ja"}, "speaks en, fr, de, pt, it, es, asked for ja"),
        ({"pitch": 3}, "found pitch"),
        ({"decode_steps": 0}, "must have decode_steps in 1"),
    ],
)
def test_a_wrong_request_is_named(engine, sample, changes, message):
    with pytest.raises(RequestError, match=message):
        engine.synthesize(asked(sample, **changes))


def test_a_voice_without_sample_or_name_is_refused(engine, tmp_path):
    with pytest.raises(RequestError, match="must have a recording of the voice"):
        engine.synthesize(asked(None))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF")
    with pytest.raises(RequestError, match="must be a WAV file"):
        engine.synthesize(asked(broken))


def test_weights_that_cannot_be_had_are_told_with_the_way_to_get_them(monkeypatch, sample):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "kyutai/pocket-tts" in (pocket_tts.missing(SpeechSection()) or "")
    with pytest.raises(MissingInputError) as caught:
        pocket_tts.make(SpeechSection()).synthesize(asked(sample))
    for part in ("kyutai/pocket-tts", "HF_TOKEN", "HF_HUB_OFFLINE"):
        assert part in str(caught.value)


def test_damaged_weights_are_told_as_such_and_are_another_revision(tmp_path, sample):
    path = write_pocket_tts(tmp_path)
    before = pocket_tts.revision(section_of(path))
    weights = tmp_path / "model.safetensors"
    assert yaml.safe_load(path.read_text())["weights_path"] == str(weights)
    weights.write_bytes(weights.read_bytes()[:-8])
    assert pocket_tts.revision(section_of(path)) != before
    with pytest.raises(CorruptFileError, match="must hold the weights of pocket-tts"):
        pocket_tts.make(section_of(path)).synthesize(asked(sample))


@pytest.mark.slow  # another engine's: test_csm.py
def test_close_frees_the_model_and_the_engine_can_be_used_again(description, sample):
    engine = pocket_tts.make(section_of(description))
    first = engine.synthesize(asked(sample)).samples.tobytes()
    held = weakref.ref(engine._loaded("en"))
    engine.close()
    gc.collect()
    assert held() is None
    assert engine.synthesize(asked(sample)).samples.tobytes() == first
    engine.close()
