"""dia on a tiny random model and codec that transformers saved and the engine's code loads."""

import gc
import weakref

import numpy as np
import pytest
import soxr
import torch

from duplex.config_data import SpeechSection
from duplex.errors import CorruptFileError, MissingInputError, RecordError, RequestError
from pipeline.engines import dia, neural
from tests.stages.tiny_tts import request, voice, write_dia, write_sample

FRAMES = 40  # after which the library itself ends the random model, as it never does
TRANSCRIPT = "what the sample says"
RATE = 44_100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dia(tmp_path_factory.mktemp("dia"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample") / "ann.wav")


def engine_of(folder):
    models = {"dia": {"weights": str(folder)}}
    return dia.make(SpeechSection.model_validate({"models": models, "runtime": {"device": "cpu"}}))


@pytest.fixture(scope="module")
def loaded(folder):
    engine = engine_of(folder)
    engine._load()
    yield engine
    engine.close()


def ended(engine, monkeypatch, frames=FRAMES):
    """The engine whose model ends after so many frames. Returns the calls that it got and what
    it gave."""
    calls, generate = [], engine._model.generate

    def ending(**inputs):
        given = generate(**{**inputs, "max_new_tokens": frames + 16})
        calls.append((inputs, given))
        return given

    monkeypatch.setattr(engine._model, "generate", ending)
    return calls


def asked(sample, text="hello there", transcript=TRANSCRIPT, seed=7, **params):
    who = voice("dia", transcript, **params)
    return request("dia", text, voice=who, sample=sample, seed=seed)


def test_a_text_is_spoken_at_24_khz(loaded, sample, monkeypatch):
    ended(loaded, monkeypatch)
    utterance = loaded.synthesize(asked(sample))
    assert abs(len(utterance.samples) - FRAMES * 512 * 24_000 / RATE) <= 2
    assert utterance.samples.dtype == np.float32 and 0 < np.abs(utterance.samples).max() <= 1
    assert utterance.words is None


def test_the_samples_part_is_cut_off_and_the_delays_undone(loaded, sample, monkeypatch):
    calls = ended(loaded, monkeypatch)
    utterance = loaded.synthesize(asked(sample))
    ((inputs, sequences),) = calls
    start = inputs["decoder_input_ids"].shape[1] - 15
    assert start == 1 + -(-RATE // 512), "a second of sample, and the first token"
    codes = torch.stack(
        [
            sequences[0, start + delay : start + delay + FRAMES, channel]
            for channel, delay in enumerate(loaded._model.config.delay_pattern)
        ]
    )
    with torch.no_grad():
        sound = loaded._processor.audio_tokenizer.decode(audio_codes=codes[None]).audio_values
    expected = soxr.resample(sound.squeeze().numpy(), RATE, 24_000, quality="HQ")
    np.testing.assert_array_equal(utterance.samples, np.clip(expected, -1, 1))


def test_the_prompt_is_the_voices_sample_with_its_words_then_the_text(loaded, sample, monkeypatch):
    calls = ended(loaded, monkeypatch)
    loaded.synthesize(asked(sample, "hello [S2] (laughs) there"))
    inputs, _ = calls[0]
    text = bytes(loaded._processor.tokenizer.encode("x")).decode()
    assert text == "x", "bytes are tokens"
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == 1, "[S1]"
    assert bytes(ids[1:]).decode() == " what the sample says hello laughs there"
    codec = loaded._processor.audio_tokenizer
    heard = neural.read_sample(sample, RATE, 15, "dia")
    padded = np.pad(heard, (0, -len(heard) % 512))
    with torch.no_grad():
        codes = codec.encode(torch.from_numpy(padded)[None, None]).audio_codes[0]
    assert torch.equal(inputs["decoder_input_ids"][0, 1 : codes.shape[1] + 1, 0], codes[0])


@pytest.mark.parametrize(
    "changes", [{"text": "hello you"}, {"transcript": "other words"}, {"guidance": 1.5},
                {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.2}]
)  # fmt: skip
def test_text_and_settings_reach_the_model(loaded, sample, monkeypatch, changes):
    ended(loaded, monkeypatch)
    plain = loaded.synthesize(asked(sample)).samples
    assert not np.array_equal(loaded.synthesize(asked(sample, **changes)).samples, plain)


def test_another_sample_gives_other_speech(loaded, sample, tmp_path, monkeypatch):
    ended(loaded, monkeypatch)
    other = write_sample(tmp_path / "bob.wav", seed=4)
    plain, cloned = (loaded.synthesize(asked(path)).samples for path in (sample, other))
    assert not np.array_equal(plain, cloned)


def test_speech_that_does_not_end_is_refused(loaded, sample, monkeypatch):
    monkeypatch.setattr(neural, "longest_s", lambda text: 0.5)
    with pytest.raises(RecordError, match=r"dia must end its speech within 0\.5 s"):
        loaded.synthesize(asked(sample))


def test_speech_may_be_as_long_as_its_bound_less_a_frame(loaded, sample, monkeypatch):
    monkeypatch.setattr(neural, "longest_s", lambda text: (FRAMES + 1.5) * 512 / RATE)
    ended(loaded, monkeypatch)
    assert len(loaded.synthesize(asked(sample)).samples)


def test_speech_that_ends_at_once_is_refused(loaded, sample, monkeypatch):
    ended(loaded, monkeypatch, frames=0)
    with pytest.raises(RecordError, match="must give samples"):
        loaded.synthesize(asked(sample))


def test_what_the_model_has_no_room_for_is_refused(loaded, sample, tmp_path):
    with pytest.raises(RecordError, match="has room for 256 bytes of text and 700 frames"):
        loaded.synthesize(asked(sample, "long " * 60))
    long = write_sample(tmp_path / "long.wav", seconds=8)
    with pytest.raises(RecordError, match="shorten the text, or the sample"):
        loaded.synthesize(asked(long))
    with pytest.raises(RequestError, match=r"must be 0\.5 to 15 s"):
        loaded.synthesize(asked(write_sample(tmp_path / "longer.wav", seconds=16)))


def test_the_same_seed_gives_the_same_bytes(loaded, sample, monkeypatch):
    ended(loaded, monkeypatch)
    spoken = [loaded.synthesize(asked(sample, seed=s)).samples.tobytes() for s in (1, 2, 1)]
    assert spoken[0] == spoken[2] != spoken[1]


def test_the_programs_own_random_numbers_are_left_alone(folder, sample, monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine = engine_of(folder)
    engine._load()
    ended(engine, monkeypatch)
    engine.synthesize(asked(sample))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": None}, "dia must have a recording of the voice"),
        ({"transcript": None}, "agent-dia must have a transcript of its sample"),
        ({"pitch": 3}, "found pitch"),
        ({"guidance": 0}, "must have guidance in 1 to 10"),
    ],
)
def test_what_a_voice_lacks_is_named(loaded, sample, changes, message):
    with pytest.raises(RequestError, match=message):
        loaded.synthesize(asked(**{"sample": sample, **changes}))


def test_weights_that_cannot_be_had_are_told_with_the_way_to_get_them(monkeypatch, sample):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInputError) as caught:
        dia.make(SpeechSection()).synthesize(asked(sample))
    for part in ("nari-labs/Dia-1.6B-0626", "Apache-2.0", "HF_TOKEN", "about 7 GB"):
        assert part in str(caught.value)


def test_damaged_weights_and_pickles_are_refused(tmp_path, sample):
    weights = write_dia(tmp_path) / "codec" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CorruptFileError, match="must hold the weights of dia"):
        engine_of(tmp_path).synthesize(asked(sample))
    weights.unlink()
    torch.save({}, weights.with_name("pytorch_model.bin"))
    with pytest.raises(MissingInputError, match="must hold all files of dia"):
        engine_of(tmp_path).synthesize(asked(sample))


@pytest.mark.slow  # another engine's: test_csm.py
def test_close_frees_the_models_and_the_engine_can_be_used_again(folder, sample, monkeypatch):
    engine = engine_of(folder)
    engine._load()
    with monkeypatch.context() as patch:
        ended(engine, patch)
        engine.synthesize(asked(sample))
    held = [weakref.ref(engine._model), weakref.ref(engine._processor.audio_tokenizer)]
    engine.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    engine._load()
    engine.close()
