"""Whole, batched, windowed and streaming encodings agree; so do voices and their files.

A code may fall the other way where two are all but equally near and sums are rounded in another
order. In noise that is fewer than one in a thousand; in digital silence a codec of random weights
has many such ties (benchmarks/tensors.py counts them), so there the latents are compared, which
are what codes are made of.
"""

import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from moshi.utils.compile import no_compile

from duplex.config import Config
from duplex.errors import RecordError, RequestError
from duplex.streams import KYUTAI_TOKENS
from pipeline import doctor
from pipeline.engines import codec
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.encoding import mono_wav_bytes, quantize
from pipeline.engines.voicesample import loudness_lufs, read_voice, voice_sample
from pipeline.serving.voices import VoiceList, files_in

FRAME = 1920
NEARLY_ALL = 0.999

LM = SimpleNamespace(dim=16, card=64, text_card=400)  # what a packaged voice is held to


@pytest.fixture(scope="module")
def mimi(tiny_checkpoint):
    return Checkpoint.open(tiny_checkpoint).load_mimi()


def noise(num_frames, channels=2, seed=0, level=0.1):
    rng = np.random.default_rng(seed)
    return (level * rng.standard_normal((channels, num_frames * FRAME))).astype(np.float32)


def agreement(one, other):
    assert one.shape == other.shape
    return float((one == other).mean())


def reader(audio):
    return lambda start, stop: audio[:, start:stop]


def by_the_library(mimi, audio):
    with torch.no_grad(), no_compile():
        return mimi.encode(torch.from_numpy(audio)[:, None])[:, :8].numpy()


def test_the_codes_are_the_librarys(mimi):
    audio = noise(400)
    for chunk_frames in (40, 125, 1000):
        codes = codec.encode_long(mimi, reader(audio), audio.shape[1], chunk_frames=chunk_frames)
        assert agreement(codes, by_the_library(mimi, audio)) > NEARLY_ALL


def test_convolutions_that_look_back_on_too_little_would_be_noticed(mimi, monkeypatch):
    audio = noise(400)
    monkeypatch.setattr(codec, "CONV_FRAMES", 1)
    codes = codec.encode_long(mimi, reader(audio), audio.shape[1], chunk_frames=40)
    assert agreement(codes, by_the_library(mimi, audio)) < NEARLY_ALL


def test_windows_give_the_codes_of_the_whole(mimi):
    audio = noise(400)
    whole = codec.encode(mimi, audio)
    windows = codec.encode_long(mimi, reader(audio), audio.shape[1], window_frames=90)
    assert agreement(whole, windows) > NEARLY_ALL


def test_less_sound_before_a_window_would_be_noticed(mimi, monkeypatch):
    audio = noise(400)
    whole = codec.encode(mimi, audio)
    monkeypatch.setattr(codec, "lookback_frames", lambda _: 10)
    windows = codec.encode_long(mimi, reader(audio), audio.shape[1], window_frames=90)
    assert agreement(whole[:, :, 90:], windows[:, :, 90:]) < NEARLY_ALL
    assert np.array_equal(whole[:, :, :90], windows[:, :, :90])


def test_the_lookback_covers_every_layer_of_the_codecs_transformer(mimi):
    encoder = mimi.encoder_transformer.transformer.layers
    positions = sum(layer.self_attn.context for layer in encoder)
    # Two positions of the transformer to a frame.
    assert codec.lookback_frames(mimi) >= positions / 2


def test_a_recording_of_any_length_is_padded_to_whole_frames(mimi):
    audio = noise(10)[:, : 10 * FRAME - 700]
    codes = codec.encode_long(mimi, reader(audio), audio.shape[1], window_frames=4)
    assert codes.shape == (2, 8, 10)
    assert agreement(codes, codec.encode(mimi, audio)) > NEARLY_ALL


def test_a_batch_gives_the_codes_of_each_by_itself(mimi):
    recordings = [noise(length, seed=length) for length in (60, 35, 48)]
    recordings[1] = recordings[1][:, :-500]
    for one, batched in zip(recordings, codec.encode_batch(mimi, recordings), strict=True):
        assert agreement(codec.encode(mimi, one), batched) > NEARLY_ALL


def test_the_whole_is_what_a_server_hears_frame_by_frame(mimi):
    audio = noise(150, channels=1)
    streamed = []
    with torch.no_grad(), no_compile(), mimi.streaming(1):
        for start in range(0, audio.shape[1], FRAME):
            streamed.append(mimi.encode(torch.from_numpy(audio[None, :, start : start + FRAME])))
    streamed = torch.cat(streamed, dim=2)[:, :8].numpy()
    assert agreement(streamed, codec.encode(mimi, audio)) > NEARLY_ALL


def test_with_digital_silence_the_latents_are_the_servers(mimi):
    audio = noise(200, channels=1)
    for start in (0, 60, 130):
        audio[:, start * FRAME : (start + 30) * FRAME] = 0
    streamed = []
    with torch.no_grad(), no_compile(), mimi.streaming(1):
        for start in range(0, audio.shape[1], FRAME):
            frame = torch.from_numpy(audio[None, :, start : start + FRAME])
            streamed.append(mimi.encode_to_latent(frame, quantize=False))
    expected = torch.cat(streamed, dim=2)
    found = codec.latents(mimi, reader(audio), audio.shape[1])
    scale = expected.abs().mean()
    assert (found - expected).abs().max() < 1e-3 * scale
    late = codec.latents(mimi, reader(np.roll(audio, FRAME, axis=1)), audio.shape[1])
    assert (late - expected).abs().max() > 0.1 * scale, "a shift by a frame would be noticed"


def test_steady_tokens_are_those_that_silence_ends_in(mimi):
    tokens = codec.measure_tokens(mimi)
    silence = codec.encode(mimi, np.zeros((1, 400 * FRAME), dtype=np.float32))[0, :, -25:]
    assert (silence == np.asarray(tokens.silence)[:, None]).mean() > 0.5
    assert tokens.silence != tokens.sine
    assert tokens != KYUTAI_TOKENS


# -- voices


def speech_like(seconds, level=0.05, seed=1):
    time_s = np.arange(int(seconds * 24_000)) / 24_000
    rng = np.random.default_rng(seed)
    carrier = np.sin(2 * np.pi * 180 * time_s) + 0.3 * rng.standard_normal(len(time_s))
    return (level * carrier * (1 + np.sin(2 * np.pi * 4 * time_s))).astype(np.float32)


@pytest.mark.parametrize("level", [0.001, 0.05, 0.3])
def test_a_voice_sample_is_at_minus_24_lufs_in_whole_frames(level):
    sample = voice_sample(speech_like(5, level), 3.0)
    assert loudness_lufs(sample) == pytest.approx(-24, abs=0.1)
    assert len(sample) == 3 * 24_000 // FRAME * FRAME
    assert np.abs(sample).max() <= 1


def test_a_sample_that_was_made_here_is_not_made_again():
    sample = quantize(voice_sample(speech_like(4), 3.0))
    assert np.array_equal(voice_sample(sample, 30), sample)
    peaky = speech_like(4) * 0.02
    peaky[1000::6000] = 0.9  # the peak limits the gain: softer than -24
    limited = quantize(voice_sample(peaky, 3.0))
    assert np.array_equal(voice_sample(limited, 30), limited)


def test_what_a_voice_file_holds_is_what_was_encoded():
    sample = quantize(speech_like(1.6))
    samples, rate = soundfile.read(io.BytesIO(mono_wav_bytes(sample)), dtype="float32")
    assert rate == 24_000 and np.array_equal(samples, sample)


@pytest.mark.parametrize(
    ("samples", "said"),
    [(speech_like(0.5), "at least 0.8 s"), (np.zeros(48_000, dtype=np.float32), "silence")],
)
def test_what_is_no_voice_is_refused(samples, said):
    with pytest.raises(RecordError, match=said):
        voice_sample(samples, 10)


def write_voice(path, samples=None, rate=24_000, channels=1):
    samples = speech_like(2) if samples is None else samples
    soundfile.write(path, np.repeat(samples[:, None], channels, axis=1), rate)
    return path


def test_other_rates_are_resampled_and_stereo_is_refused(tmp_path):
    samples = read_voice(write_voice(tmp_path / "v.wav", rate=48_000))
    assert abs(len(samples) - 24_000) < 10
    with pytest.raises(RecordError, match="mono"):
        read_voice(write_voice(tmp_path / "s.wav", channels=2))


def test_personaplexs_packaged_voices_are_named(tmp_path):
    voice = {"embeddings": torch.zeros(50, 1, 1, 64), "cache": torch.zeros(1, 17, 4)}
    for name, said in (("NATF2", "packaged voice NATF2: input"), ("mine", "packaged voice: input")):
        torch.save(voice, tmp_path / f"{name}.pt")
        with pytest.raises(RecordError, match=said):
            read_voice(tmp_path / f"{name}.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "x.pt")
    with pytest.raises(RecordError, match=r"must be a mono WAV; .* found a dict of 1"):
        read_voice(tmp_path / "x.pt")


def test_a_packaged_voice_of_another_model_stops_the_server_by_name(tmp_path, mimi):
    torch.save({"embeddings": torch.zeros(9, 1, 1, 8), "cache": torch.zeros(1, 17, 4)},
               tmp_path / "VARM3.pt")  # fmt: skip
    with pytest.raises(RequestError, match=r"VARM3\.pt.*width 16"):
        VoiceList.load(files_in(tmp_path), mimi, LM)


def test_a_voice_that_would_run_code_does_not(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save(Evil(), tmp_path / "NATF0.pt")
    with pytest.raises(RecordError, match="may run code"):
        read_voice(tmp_path / "NATF0.pt")
    assert not (tmp_path / "pwned").exists()


def test_voices_are_names_on_a_list(tmp_path, mimi):
    write_voice(tmp_path / "maria.wav")
    voices = VoiceList.load(files_in(tmp_path), mimi, LM)
    sample = quantize(voice_sample(read_voice(tmp_path / "maria.wav"), 30))
    assert voices.names == ["maria"]
    assert voices.voice("maria").shape == (8, len(sample) // FRAME)
    assert voices.greeting("maria").shape == (8, math.ceil(48_000 / FRAME))
    assert voices.voice("") is None
    for name in ("george", "../maria", "maria.wav"):
        with pytest.raises(RequestError, match=r"voice that this server has .maria."):
            voices.voice(name)
    (tmp_path / "a b.wav").write_bytes(b"")
    with pytest.raises(RequestError, match="name must be"):
        files_in(tmp_path)
    with pytest.raises(RequestError, match="must be a folder"):
        files_in(tmp_path / "none")


def test_a_short_greeting_is_no_voice_and_still_a_greeting(tmp_path, mimi):
    write_voice(tmp_path / "hi.wav", speech_like(0.5))
    voices = VoiceList.load(files_in(tmp_path), mimi, LM)
    assert voices.greeting("hi").shape == (8, math.ceil(12_000 / FRAME))
    with pytest.raises(RequestError, match=r"voice_prompt hi: .* at least 0.8 s"):
        voices.voice("hi")


def test_a_voice_file_that_is_none_stops_the_server_with_its_name(tmp_path, mimi):
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(40))
    with pytest.raises(RequestError, match=r"voice broken: broken\.wav: must be a recording"):
        VoiceList.load(files_in(tmp_path), mimi, LM)


def test_the_number_of_threads_changes_no_prompt(mimi):
    """Near ties fall by how sums are rounded, and so by the number of threads: the codec has one,
    whatever its process has. (With the pocket codec two gave another silence token.)"""
    before, seen = torch.get_num_threads(), []
    hook = mimi.encoder.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        measured = codec.measure_tokens(mimi)
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert codec.measure_tokens(mimi) == measured
    finally:
        hook.remove()
        torch.set_num_threads(before)
    assert set(seen) == {1}


# -- the doctor's look at Kyutai's codec


def kyutai_folder(folder):
    """A checkpoint folder whose codec has the name of Kyutai's."""
    folder.mkdir()
    (folder / codec.KYUTAI_CODEC).write_bytes(b"")
    return Config.model_validate({"name": "c", "model": {"base": str(folder)}})


def test_the_doctor_says_that_the_codec_is_not_here(tmp_path):
    (tmp_path / "m").mkdir()
    config = Config.model_validate({"name": "c", "model": {"base": str(tmp_path / "m")}})
    (check,) = doctor._codec(config)
    assert check["state"] == "ok" and "not checked" in check["found"]
    assert doctor._codec(Config(name="c")) == []
    hub = Config.model_validate({"name": "c", "model": {"base": "kyutai/moshiko-pytorch-bf16"}})
    assert "not checked" in doctor._codec(hub)[0]["found"]


def test_the_doctor_compares_with_the_published_constants(tmp_path, mimi, monkeypatch):
    from moshi.models import loaders

    config = kyutai_folder(tmp_path / "m")
    assert doctor._codec(config)[0]["state"] == "fail"  # it does not load
    monkeypatch.setattr(loaders, "get_mimi", lambda *_, **__: mimi)
    (check,) = doctor._codec(config)
    assert check["state"] == "fail" and str(list(KYUTAI_TOKENS.sine)) in check["found"]
    monkeypatch.setattr(codec, "measure_tokens", lambda _: KYUTAI_TOKENS)
    assert doctor._codec(config)[0]["state"] == "ok"


def test_codes_are_decoded_as_the_library_does(mimi):
    codes = codec.encode(mimi, noise(12, channels=1))[0]
    with torch.no_grad(), no_compile():
        expected = mimi.decode(torch.from_numpy(codes)[None])[0, 0].numpy()
    sound = codec.decode(mimi, codes)
    assert sound.dtype == np.float32 and sound.shape == (12 * FRAME,)
    assert np.allclose(sound, expected, atol=1e-5)
    assert not np.allclose(sound, codec.decode(mimi, codes[:, ::-1]), atol=1e-3)
