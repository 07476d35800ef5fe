"""csm on a tiny random model that transformers saved and the engine's own code loads."""

import gc
import weakref

import numpy as np
import pytest
import torch

from duplex.config_data import SpeechSection
from duplex.errors import CorruptFileError, MissingInputError, RecordError, RequestError
from pipeline.engines import csm, neural
from pipeline.engines.speaking import Utterance
from tests.stages.tiny_tts import CSM_CODEBOOK, request, voice, write_csm, write_sample

FRAMES = 6  # after which the random model is made to end, as it never does by itself
TRANSCRIPT = "what the sample says"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_csm(tmp_path_factory.mktemp("csm"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample") / "ann.wav")


def engine_of(folder):
    models = {"csm": {"weights": str(folder)}}
    return csm.make(SpeechSection.model_validate({"models": models, "runtime": {"device": "cpu"}}))


@pytest.fixture(scope="module")
def loaded(folder):
    engine = engine_of(folder)
    engine._load()
    yield engine
    engine.close()


def ended(engine, monkeypatch, change=lambda codes: codes):
    """The engine whose model ends after FRAMES frames; `change` has a last word on the codes.
    Returns the calls that its model got."""
    calls, generate = [], engine._model.generate

    def ending(**inputs):
        calls.append(inputs)
        codes = generate(**{**inputs, "max_new_tokens": FRAMES + 2}).clone()
        codes[:, :FRAMES, 0].clamp_(min=1)  # no end by chance
        codes[:, FRAMES:] = 0
        return change(codes)

    monkeypatch.setattr(engine._model, "generate", ending)
    return calls


@pytest.fixture
def engine(loaded, monkeypatch):
    ended(loaded, monkeypatch)
    return loaded


def asked(sample, text="hello there", role="agent", **changes):
    who = voice("csm", TRANSCRIPT, **changes.pop("params", {}))
    who = who.model_copy(update={"role": role})
    return request("csm", text, **{"voice": who, "sample": sample, **changes})


def said(text, speaker, seed=2, seconds=0.4):
    samples = np.random.default_rng(seed).standard_normal(round(seconds * 24_000)) * 0.1
    return text, Utterance(samples.astype(np.float32), None, speaker=speaker)


def test_a_text_is_spoken_up_to_the_frame_of_zeros(engine, sample):
    utterance = engine.synthesize(asked(sample))
    assert utterance.samples.shape == (FRAMES * 1920,)
    assert utterance.samples.dtype == np.float32 and 0 < np.abs(utterance.samples).max() <= 1
    assert utterance.words is None


def test_a_frame_that_is_zero_but_for_its_last_codebook_ends_too(loaded, sample, monkeypatch):
    def stray(codes):
        codes[:, 4, :-1], codes[:, 4, -1] = 0, 9
        return codes

    ended(loaded, monkeypatch, stray)
    assert loaded.synthesize(asked(sample)).samples.shape == (4 * 1920,)


@pytest.mark.parametrize("code", [CSM_CODEBOOK, CSM_CODEBOOK + 2])
def test_a_code_beyond_the_codebook_is_clipped_to_its_last(loaded, sample, monkeypatch, code):
    def put(value):
        def change(codes):
            codes[:, 2] = value
            return codes

        return change

    with monkeypatch.context() as patch:
        ended(loaded, patch, put(code))
        beyond = loaded.synthesize(asked(sample)).samples
    with monkeypatch.context() as patch:
        ended(loaded, patch, put(CSM_CODEBOOK - 1))
        assert np.array_equal(loaded.synthesize(asked(sample)).samples, beyond)


def test_speech_that_does_not_end_is_refused(loaded, sample, monkeypatch):
    monkeypatch.setattr(neural, "longest_s", lambda text: 0.4)
    with pytest.raises(RecordError, match=r"csm must end its speech within 0\.4 s"):
        loaded.synthesize(asked(sample))


def test_speech_that_ends_at_once_is_refused(loaded, sample, monkeypatch):
    ended(loaded, monkeypatch, torch.zeros_like)
    with pytest.raises(RecordError, match="must give samples"):
        loaded.synthesize(asked(sample))


def test_the_models_inputs_are_sample_context_and_text_by_speaker(loaded, sample, monkeypatch):
    calls = ended(loaded, monkeypatch)
    context = (said("first", "user-00"), said("own words", "agent-csm"), said("who", None))
    loaded.synthesize(asked(sample, "my <|AUDIO|> turn", context=context))
    (call,) = calls
    audio = "<|AUDIO|>"
    text = loaded._processor.tokenizer.decode(call["input_ids"][0])
    assert text.replace(audio * 13, "A").replace(audio * 5, "B") == (
        "<|begin_of_text|>[0]what the sample says<|end_of_text|>A<|audio_eos|>"
        "<|begin_of_text|>[1]first<|end_of_text|>B<|audio_eos|>"
        "<|begin_of_text|>[0]own words<|end_of_text|>B<|audio_eos|>"
        "<|begin_of_text|>[0]my turn<|end_of_text|>"
    )
    assert call["input_values_cutoffs"].tolist() == [[24_000, 33_600, 43_200]]
    assert call["use_cache"] and call["top_k"] == call["depth_decoder_top_k"] == 50
    assert call["temperature"] == call["depth_decoder_temperature"] == 0.9


def test_the_user_is_the_other_speaker(loaded, sample, monkeypatch):
    calls = ended(loaded, monkeypatch)
    loaded.synthesize(asked(sample, role="user", context=(said("first", "agent-x"),)))
    text = loaded._processor.tokenizer.decode(calls[0]["input_ids"][0])
    assert [text[i + 1] for i, letter in enumerate(text) if letter == "["] == ["1", "0", "1"]


def test_another_context_and_another_sample_give_other_speech(engine, sample, tmp_path):
    spoken = {
        engine.synthesize(asked(path, context=context)).samples.tobytes()
        for path, context in [
            (sample, ()),
            (sample, (said("before", "user-00"),)),
            (sample, (said("before", "user-00", seed=3),)),
            (write_sample(tmp_path / "bob.wav", seed=4), ()),
        ]
    }
    assert len(spoken) == 4


def test_only_the_last_of_a_long_conversation_is_heard(sample):
    context = tuple(said(f"turn {n}", "user-00", seconds=6) for n in range(9))
    kept = csm.context_of(asked(sample, context=context))
    assert [text for _, text, _ in kept] == ["turn 5", "turn 6", "turn 7", "turn 8"]
    context = tuple(said(f"turn {n}", "user-00", seconds=11) for n in range(9))
    assert len(csm.context_of(asked(sample, context=context))) == 2


def test_context_gives_way_where_the_model_has_no_room(loaded, sample, monkeypatch):
    calls = ended(loaded, monkeypatch)
    context = (said("old", "user-00", seconds=12), said("new", "user-00", seconds=12))
    loaded.synthesize(asked(sample, context=context))
    text = loaded._processor.tokenizer.decode(calls[0]["input_ids"][0])
    assert "[1]new" in text and "[1]old" not in text
    with pytest.raises(RecordError, match="has room for 400 tokens and frames"):
        loaded.synthesize(asked(sample, "long " * 200))


def test_the_kept_cache_gives_the_tokens_of_a_pass_over_everything(loaded, sample):
    engine, model = loaded, loaded._model
    inputs, _ = engine._inputs(
        (0, TRANSCRIPT, neural.read_sample(sample, 24_000, 30, "csm")), [], asked(sample)
    )
    with torch.no_grad():
        codes = engine._generate(inputs, 8, {"temperature": 0.0, "top_k": 50})
        prompt = model._merge_input_ids_with_input_values(
            inputs["input_ids"], inputs["input_values"], inputs["input_values_cutoffs"]
        )["inputs_embeds"]
        for frame in range(len(codes)):
            spoken = model.backbone_model.embed_tokens(codes[None, :frame])
            everything = torch.cat([prompt, spoken], dim=1)
            logits = model(inputs_embeds=everything, use_cache=False).logits[0, -1]
            assert logits.argmax() == codes[frame, 0], frame
    assert len({tuple(frame) for frame in codes.tolist()}) > 1


def test_all_32_codebooks_are_heard_and_spoken(tmp_path, sample, monkeypatch):
    engine = engine_of(write_csm(tmp_path, codebooks=32, codec_codebooks=34))
    engine._load()
    ended(engine, monkeypatch)
    codec = engine._model.codec_model
    heard, spoken = [], []
    encode, decode = codec.encode, codec.decode
    monkeypatch.setattr(codec, "encode", lambda x: heard.append(encode(x)) or heard[-1])
    monkeypatch.setattr(codec, "decode", lambda x: spoken.append(x) or decode(x))
    engine.synthesize(asked(sample))
    assert heard[0].audio_codes.shape[1] == spoken[0].shape[1] == 32
    assert len(spoken) == 1, "one pass"


def test_a_codec_with_too_few_codebooks_is_refused(tmp_path, sample):
    engine = engine_of(write_csm(tmp_path, codebooks=4, codec_codebooks=3))
    with pytest.raises(CorruptFileError, match="codec must have 4 codebooks, found 3"):
        engine.synthesize(asked(sample))


def test_weights_that_are_not_in_the_file_are_no_random_numbers(tmp_path, sample):
    from safetensors.torch import load_file, save_file

    path = write_csm(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"1 weights are missing.*lm_head"):
        engine_of(tmp_path).synthesize(asked(sample))


def test_the_same_seed_gives_the_same_bytes(engine, sample):
    spoken = [engine.synthesize(asked(sample, seed=seed)).samples.tobytes() for seed in (1, 2, 1)]
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
    ("change", "message"),
    [
        ({"sample": None}, "csm must have a recording of the voice"),
        ({"voice": voice("csm")}, "agent-csm must have a transcript of its sample"),
        ({"params": {"pitch": 3}}, "found pitch"),
        ({"params": {"top_k": 0}}, "must have top_k in 1"),
    ],
)
def test_what_a_voice_lacks_is_named(engine, sample, change, message):
    with pytest.raises(RequestError, match=message):
        engine.synthesize(asked(**{"sample": sample, **change}))


def test_weights_that_cannot_be_had_are_told_with_the_way_to_get_them(monkeypatch, sample):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingInputError) as caught:
        csm.make(SpeechSection()).synthesize(asked(sample))
    for part in ("sesame/csm-1b", "Apache-2.0, gated", "HF_TOKEN", "about 7 GB"):
        assert part in str(caught.value)


def test_close_frees_the_model_and_the_engine_can_be_used_again(folder, sample, monkeypatch):
    engine = engine_of(folder)
    engine._load()
    with monkeypatch.context() as patch:
        ended(engine, patch)
        engine.synthesize(asked(sample))
    held = weakref.ref(engine._model)
    engine.close()
    gc.collect()
    assert held() is None
    engine._load()
    engine.close()
