"""moshi-tts on a tiny random `TTSModel`: everything but what it says."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from duplex.config_data import SpeechSection
from duplex.errors import CorruptFileError, MissingInputError, RecordError, RequestError
from duplex.frames import FRAME_SAMPLES
from pipeline.engines import moshi_tts, neural
from tests.stages.tiny_tts import (
    DELAY_STEPS,
    MOSHI_VOICE,
    request,
    voice,
    write_moshi_tts,
    write_moshi_voices,
)

TEXT = "I would like a large latte: (hot) and don’t wait : please"
OTHER = "people/bob.wav"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("moshi-tts")
    voices = write_moshi_voices(root / "voices", MOSHI_VOICE, OTHER)
    return write_moshi_tts(root / "weights"), voices


def section_of(weights, voices, **runtime):
    models = {"moshi-tts": {"weights": str(weights), "voices": str(voices)}}
    return SpeechSection.model_validate({"models": models, "runtime": {"device": "cpu", **runtime}})


@pytest.fixture(scope="module")
def engine(folders):
    engine = moshi_tts.make(section_of(*folders))
    yield engine
    engine.close()


def asked(text="hello there", name=MOSHI_VOICE, seed=7, **params):
    return request("moshi-tts", text, voice=voice("moshi-tts", voice=name, **params), seed=seed)


def spied(engine, monkeypatch):
    """Results of the model's `generate`, as they are made."""
    results = []
    model = engine._loaded()
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: results.append(generate(*a, **k)) or results[-1]
    )
    return results


def test_each_word_of_the_text_is_timed_in_order_and_within_the_audio(engine):
    utterance = engine.synthesize(asked(TEXT))
    words = utterance.words
    assert [word.text for word in words] == TEXT.split()
    assert utterance.samples.dtype == np.float32 and np.abs(utterance.samples).max() <= 1
    length = len(utterance.samples) / 24_000
    times = [time for word in words for time in (word.start_s, word.end_s)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= length
    spoken = [word for word in words if word.text != ":"]
    assert all(word.end_s > word.start_s for word in spoken)
    (colon,) = [word for word in words if word.text == ":"]
    assert colon.start_s == colon.end_s


def test_word_times_are_the_steps_at_which_the_model_was_fed_the_words(engine, monkeypatch):
    results = spied(engine, monkeypatch)
    utterance = engine.synthesize(asked("hello there you"))
    (result,) = results
    steps = [step for _, step in result.all_transcripts[0]]
    assert [word.start_s for word in utterance.words] == pytest.approx(
        [(step - 2) / 12.5 for step in steps]
    )
    # Frame k is step k: its text is what step k gave, undelayed.
    texts = [int(frame[0, 0, 0]) for frame in result.frames]
    assert texts == [out for _, out in result.logged_text_tokens[0][: len(texts)]]


def test_the_models_delay_and_the_steps_after_the_end_are_cut_off(engine, monkeypatch):
    results = spied(engine, monkeypatch)
    utterance = engine.synthesize(asked("hello there you"))
    (result,) = results
    audio = torch.cat(result.frames, dim=-1)[0, 1:]
    assert (audio[:, :DELAY_STEPS] < 0).all(), "before the delay there is no audio"
    assert (audio[:, DELAY_STEPS:] >= 0).all()
    kept = min(audio.shape[1] - DELAY_STEPS, result.end_steps[0] + 4) - 2
    assert len(utterance.samples) == kept * FRAME_SAMPLES


def test_a_word_ends_where_its_sound_does():
    samples = np.zeros(24_000, dtype=np.float32)
    samples[:6_000] = samples[12_000:18_000] = 0.5
    first, second = moshi_tts.timed([("a", 1), ("b", 1)], [2, 8], samples)
    assert (first.start_s, first.end_s) == pytest.approx((0.0, 0.25))
    assert (second.start_s, second.end_s) == pytest.approx((0.48, 0.75))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(engine):
    spoken = [engine.synthesize(asked(seed=seed)).samples.tobytes() for seed in (1, 2, 1)]
    assert spoken[0] == spoken[2] != spoken[1]


def test_a_request_leaves_no_trace_in_the_next_one(engine):
    plain = engine.synthesize(asked()).samples.tobytes()
    changed = engine.synthesize(
        asked("wait", temperature=1.5, n_q=4, padding_bonus=1.0, cfg_coef=3.0)
    )
    assert changed.samples.tobytes() != plain
    assert engine.synthesize(asked()).samples.tobytes() == plain


def test_the_programs_own_random_numbers_and_gradients_are_left_alone(folders):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    engine = moshi_tts.make(section_of(*folders))
    engine.synthesize(asked("hello"))
    assert torch.equal(torch.rand(4), expected)
    assert torch.is_grad_enabled()
    model = engine._loaded()
    assert not model.lm.is_streaming and not model.mimi.is_streaming


@pytest.mark.parametrize(
    "change", [{"name": OTHER}, {"cfg_coef": 3.0}, {"n_q": 4}, {"padding_between": 4}]
)
def test_voice_and_settings_reach_the_model(engine, change):
    assert (
        engine.synthesize(asked(**change)).samples.tobytes()
        != engine.synthesize(asked()).samples.tobytes()
    )


def test_speech_that_does_not_end_is_refused(engine, monkeypatch):
    monkeypatch.setattr(neural, "longest_s", lambda text: 0.8)
    with pytest.raises(RecordError, match=r"must end its speech within 0\.8 s"):
        engine.synthesize(asked())


def test_a_text_without_words_is_refused(engine):
    with pytest.raises(RecordError, match="must have a word"):
        engine.synthesize(asked("... (!)"))


@pytest.mark.parametrize(
    "name", ["../outside.wav", "/etc/x.wav", "people/../../outside.wav", "hf://a/b/c.wav", "", 3]
)
def test_a_voice_is_a_name_and_no_path(engine, name):
    with pytest.raises(RequestError, match="must name one of kyutai/tts-voices"):
        engine.synthesize(asked(name=name))


def test_a_link_out_of_the_voices_folder_is_not_followed(folders, tmp_path):
    weights, voices = folders
    (tmp_path / "evil.wav.tiny@1.safetensors").symlink_to(
        voices / f"{MOSHI_VOICE}.tiny@1.safetensors"
    )
    engine = moshi_tts.make(section_of(weights, tmp_path))
    with pytest.raises(MissingInputError, match=r"voice evil\.wav must be in"):
        engine.synthesize(asked(name="evil.wav"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"cfg_coef": 9.0}, "must have cfg_coef in 1 to 4"),
        ({"cfg_coef": 1.5}, "cfg_coef must be one of 1, 2, 3"),
        ({"n_q": 16}, "n_q must be at most 8"),
        ({"pitch": 4}, "found pitch"),
        ({"temperature": "hot"}, "must have temperature in 0 to 2"),
    ],
)
def test_a_wrong_parameter_is_named(engine, params, message):
    with pytest.raises(RequestError, match=message):
        engine.synthesize(asked(**params))


def test_a_voice_made_for_other_weights_is_refused(folders, tmp_path):
    engine = moshi_tts.make(section_of(folders[0], write_moshi_voices(tmp_path, width=5)))
    with pytest.raises(CorruptFileError, match=r"of shape \[1, 8, T\].*found \[1, 5, 6\]"):
        engine.synthesize(asked())


def test_weights_that_cannot_be_had_are_told_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engine = moshi_tts.make(SpeechSection())
    with pytest.raises(MissingInputError) as caught:
        engine.synthesize(asked())
    for part in ("kyutai/tts-1.6b-en_fr", "about 4 GB", "CC-BY-4.0", "HF_TOKEN", "HF_HUB_OFFLINE"):
        assert part in str(caught.value)
    assert "kyutai/tts-1.6b-en_fr" in (moshi_tts.missing(SpeechSection()) or "")


def test_damaged_weights_are_told_as_such(folders, tmp_path):
    weights = write_moshi_tts(tmp_path / "weights")
    (weights / "tts.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(CorruptFileError, match="must hold the weights of moshi-tts"):
        moshi_tts.make(section_of(weights, folders[1])).synthesize(asked())
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps({**config, "moshi_name": "../tts.pt"}))
    (weights / "tts.pt").write_bytes(b"")
    with pytest.raises(CorruptFileError, match="must be safetensors"):
        moshi_tts.make(section_of(weights, folders[1])).synthesize(asked())


def test_the_revision_follows_weights_and_voices_and_not_the_device(folders, tmp_path):
    here = moshi_tts.revision(section_of(*folders))
    assert here == moshi_tts.revision(section_of(*folders, device="cuda"))
    assert here != moshi_tts.revision(section_of(folders[0], write_moshi_voices(tmp_path)))
    pinned = {"models": {"moshi-tts": {"revision": "abc"}}}
    assert "@abc" in moshi_tts.revision(SpeechSection.model_validate(pinned))
    section = SpeechSection(engine="moshi-tts", revision="def")
    assert "@def" in moshi_tts.revision(section)
    assert "@def" not in moshi_tts.revision(SpeechSection(revision="def"))


@pytest.mark.slow  # another engine's: test_csm.py
def test_close_frees_the_model_and_the_engine_can_be_used_again(folders):
    engine = moshi_tts.make(section_of(*folders))
    first = engine.synthesize(asked("hello")).samples.tobytes()
    held = [weakref.ref(engine._loaded().lm), weakref.ref(engine._loaded().mimi)]
    engine.close()
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert engine.synthesize(asked("hello")).samples.tobytes() == first
    engine.close()
