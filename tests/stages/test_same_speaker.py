"""Whether an utterance sounds like its voice: a tiny WavLM through the path of the real weights."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr

from duplex.config import Config
from duplex.config_data import SpeechSection
from duplex.datafiles import CHECKOUT
from duplex.errors import CorruptFileError, MissingInputError, RecordError
from duplex.frames import SAMPLE_RATE
from duplex.records import Voice
from duplex.store import StageFolder
from pipeline import doctor
from pipeline.engines import speaker
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.same_speaker import SameSpeaker, speech_of
from pipeline.engines.speaker import Speaker, speaker_revision
from pipeline.engines.speaking import Capabilities, SpeechRequest, Utterance
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage, heard_of, quality_of, sound_of
from tests.stages.spoken_helpers import context_of, conversation, made_voices

pytest.importorskip("espeakng_loader")
pytest.importorskip("transformers")

TEXT = "I would like a large coffee with milk, please. How much is it?"
OTHER = "The train to the airport leaves from the other side of the river."
CLONING = Capabilities(frozenset({"en"}), "test", cloning=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random WavLM with the classes and files of microsoft/wavlm-base-plus-sv."""
    import torch
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    folder = tmp_path_factory.mktemp("wavlm")
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        num_buckets=16, max_bucket_distance=40, tdnn_dim=[16, 16, 16, 16, 32],
        xvector_output_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def say():
    """Text and variant -> float32 [S] at 24 kHz."""
    with EspeakEngine() as engine:
        yield (
            lambda text=TEXT, variant="f2": (
                engine.synthesize(text, {"voice": "en-us", "variant": variant}).samples
            )
        )


@pytest.fixture
def recording(tmp_path):
    def write(samples, name="sample.wav"):
        soundfile.write(tmp_path / name, samples, SAMPLE_RATE, subtype="FLOAT")
        return tmp_path / name

    return write


# -- the model


def test_equal_sound_is_one_and_other_sound_is_less(weights, say, recording):
    check = SameSpeaker(str(weights), "cpu")
    reference = recording(say())
    assert check.similarity(say(), reference) == pytest.approx(1.0, abs=1e-9)
    noise = np.random.default_rng(0).normal(0, 0.2, 3 * SAMPLE_RATE).astype(np.float32)
    noise *= np.sin(np.arange(len(noise)) / 3000) ** 2
    assert check.similarity(noise, reference) < 0.9999


def test_it_is_the_models_own_embedding_at_16_khz(weights, say):
    import torch
    from transformers import WavLMForXVector

    model = WavLMForXVector.from_pretrained(weights).eval()
    sound = torch.from_numpy(soxr.resample(say(), SAMPLE_RATE, 16_000, quality="HQ"))
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model(sound[None]).embeddings[0], dim=-1)
    found = SameSpeaker(str(weights), "cpu").embedding(say())
    assert found == pytest.approx(wanted.double().numpy(), abs=1e-5)


def test_again_and_alone_and_with_other_random_numbers_it_is_the_same(weights, say, recording):
    import torch

    reference = recording(say())
    first = SameSpeaker(str(weights), "cpu").similarity(say(OTHER), reference)
    check = SameSpeaker(str(weights), "cpu")
    check.similarity(say(variant="m3"), reference)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert check.similarity(say(OTHER), reference) == first
    assert torch.equal(torch.get_rng_state(), before)  # other engines draw from these
    check.close()
    assert check.similarity(say(OTHER), reference) == first


def test_too_little_speech_on_either_side_is_not_judged(weights, say, recording):
    short = np.pad(say("Yes, please."), (0, 3 * SAMPLE_RATE))
    check = SameSpeaker(str(weights), "cpu")
    assert check.similarity(short, recording(say())) is None
    assert check.similarity(say(), recording(short, "short.wav")) is None
    padded = np.pad(say(), SAMPLE_RATE)
    assert len(speech_of(padded)) < len(say()) + 0.1 * SAMPLE_RATE
    assert len(speech_of(np.tile(say(), 9))) == 20 * SAMPLE_RATE


# -- what may be wrong with it


def test_offline_it_says_what_to_do(monkeypatch, say, recording):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check = SameSpeaker("microsoft/wavlm-that-is-not-here@abc")
    with pytest.raises(MissingInputError) as caught:
        check.similarity(say(), recording(say()))
    for part in ("microsoft/wavlm-that-is-not-here", "HF_HUB_OFFLINE", "same_speaker", "400 MB"):
        assert part in str(caught.value)


def test_a_path_that_is_not_there_and_a_missing_package_are_told(monkeypatch, weights, say):
    with pytest.raises(MissingInputError, match=r"speech\.checks\.same_speaker must be a folder"):
        SameSpeaker("no/such/folder").embedding(say())
    missing = "pipeline.engines.neural.missing_package"
    monkeypatch.setattr(missing, lambda module, extra: "the package transformers: pip install x")
    with pytest.raises(MissingInputError, match="the package transformers: pip install"):
        SameSpeaker(str(weights)).embedding(say())


@pytest.fixture
def damaged(weights, tmp_path):
    from safetensors.torch import load_file, save_file

    def change(edit):
        folder = tmp_path / "damaged"
        shutil.copytree(weights, folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return change


def test_weights_that_are_missing_are_not_made_up(damaged, say):
    folder = damaged(lambda tensors: tensors.pop("projector.weight"))
    with pytest.raises(CorruptFileError, match=r"weights are missing.*projector\.weight"):
        SameSpeaker(str(folder), "cpu").embedding(say())


def test_those_that_no_embedding_needs_may_be_missing(damaged, weights, say):
    unused = ("classifier.weight", "classifier.bias", "objective.weight")
    folder = damaged(lambda tensors: [tensors.pop(name) for name in unused])
    found = SameSpeaker(str(folder), "cpu").embedding(say())
    assert (found == SameSpeaker(str(weights), "cpu").embedding(say())).all()


def test_a_pickle_is_not_read(weights, tmp_path, say):
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "pickle"
    shutil.copytree(weights, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match="safetensors"):
        SameSpeaker(str(folder), "cpu").embedding(say())


def test_a_model_for_another_rate_and_weights_without_a_voice_are_refused(damaged, say):
    def silent(tensors):
        for name in ("feature_extractor.weight", "feature_extractor.bias"):
            tensors[name].zero_()

    folder = damaged(silent)
    with pytest.raises(CorruptFileError, match="must give an embedding"):
        SameSpeaker(str(folder), "cpu").embedding(say())
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": 8000}))
    with pytest.raises(CorruptFileError, match="must take 16000 Hz, found 8000"):
        SameSpeaker(str(folder), "cpu").embedding(say())


# -- the speaker


class Cloner:
    """Says what the test gives, try by try."""

    capabilities = CLONING

    def __init__(self, tries):
        self._tries, self.count = tries, 0

    def synthesize(self, request):
        self.count += 1
        return Utterance(self._tries[self.count - 1], None)

    def close(self):
        pass


@pytest.fixture
def speak(monkeypatch, weights):
    def run(tries, request, report=print, name="csm", **checks):
        section = SpeechSection.model_validate(
            {"checks": {"same_speaker": str(weights), "recogniser": "none"} | checks}
        )
        monkeypatch.setattr(speaker, "engine_of", lambda request, section: name)
        talker = Speaker(section, report)
        talker._engines[name] = Cloner(tries)
        try:
            return talker.speak(request)
        finally:
            talker.close()

    return run


def request(**references):
    voice = Voice(id="v", engine="csm", role="agent", params={}, licence="test")
    return SpeechRequest(TEXT, voice, seed=7, **references)


@pytest.mark.parametrize("reference", ["sample", "proof"])
def test_another_speaker_is_refused_and_spoken_again(speak, say, recording, reference):
    path = recording(say())
    tries = [say(variant="m3"), say(variant="Annie"), say()]
    spoken = speak(tries, request(**{reference: path}), min_similarity=1 - 1e-9)
    assert spoken.checks.retries == 2
    assert spoken.checks.similarity == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(RecordError, match=r"must sound like voice v, similarity at least 1"):
        speak(tries[:2], request(**{reference: path}), min_similarity=1 - 1e-9, retries=1)


def test_the_limit_is_on_the_cosine_of_the_embeddings(monkeypatch, speak, say, recording):
    """The embedding is planted: what the real weights make of two voices is not known here."""
    sample = say(variant="m3")
    path = recording(sample)

    def planted(self, samples):
        own = len(samples) == len(speech_of(sample))
        return np.array([1.0, 0.0]) if own else np.array([self.cosine, 0.5])

    monkeypatch.setattr(SameSpeaker, "embedding", planted)
    for cosine, passes in ((0.87, True), (0.85, False)):
        monkeypatch.setattr(SameSpeaker, "cosine", cosine, raising=False)
        if passes:
            assert speak([say()], request(sample=path)).checks.similarity == cosine
            continue
        with pytest.raises(RecordError, match=r"similarity at least 0\.86, found 0\.85"):
            speak([say()], request(sample=path), retries=0)


def test_the_sample_counts_more_than_the_proof_and_a_short_answer_passes(speak, say, recording):
    references = {
        "sample": recording(say(), "a.wav"),
        "proof": recording(say(OTHER, "m3"), "b.wav"),
    }
    checks = speak([say()], request(**references), min_similarity=1 - 1e-9).checks
    assert checks.similarity == pytest.approx(1.0, abs=1e-9)
    yes = replace(request(**references), text="Yes, please.")
    assert speak([say("Yes, please.", "m3")], yes, min_similarity=1).checks.similarity is None


def test_without_anything_to_compare_with_it_is_said_once(speak, say, recording):
    said = []
    assert speak([say()], request(), said.append).checks.similarity is None
    assert "nothing of voice v to be compared with" in "".join(said)
    said.clear()
    cloned = request(sample=recording(say()))
    speak([say()], cloned, said.append, same_speaker=None)
    assert "is not checked: see speech.checks.same_speaker" in "".join(said)


def test_conversations_say_how_far_their_voices_strayed(say):
    from pipeline.engines.speaking import Checks

    spoken = [("", Utterance(say(), (), checks=Checks(similarity=s))) for s in (0.9, 0.87, None)]
    assert quality_of(spoken).worst_similarity == 0.87
    assert quality_of(spoken[2:]).worst_similarity is None


def test_the_stage_compares_with_the_voices_proof(weights, tmp_path):
    talks = [conversation("angry-ann", 0)]
    inputs, voices = made_voices(tmp_path, dialogues=talks)
    checks = {"same_speaker": str(weights), "min_similarity": -1}
    context = context_of(inputs | {"voices": voices}, tmp_path, speech={"checks": checks})
    folder = StageFolder.of(tmp_path, 4, "speech", "2" * 64)
    execute(SpeechStage(), context, folder)
    (speech,) = folder.records()
    assert -1 <= speech.quality.worst_similarity <= 1


# -- keys, doctor


def test_a_proof_counts_where_speech_is_compared_with_it():
    voice = Voice(id="v", engine="csm", role="user", params={}, licence="l", proof="0" * 64)
    other = voice.model_copy(update={"proof": "1" * 64})
    assert sound_of(voice) == sound_of(other) and heard_of(voice) != heard_of(other)
    cloned, again = (one.model_copy(update={"sample": "2" * 64}) for one in (voice, other))
    assert heard_of(cloned) == heard_of(again)


def test_keys_have_model_and_limit(weights, damaged):
    def of(**checks):
        return speaker_revision(Config.model_validate({"name": "x", "speech": {"checks": checks}}))

    other = damaged(lambda tensors: tensors["projector.bias"].add_(1))
    plain, first = of(), of(same_speaker=str(weights))
    assert "compared by" not in plain and "compared by folder:" in first
    names = ("microsoft/a", "microsoft/a@abc", str(other))
    assert len({plain, first, *(of(same_speaker=name) for name in names)}) == 5


def test_the_doctor_looks_for_it(weights):
    def look(**checks):
        config = Config.model_validate({"name": "x", "speech": {"checks": checks}})
        return doctor._same_speaker(config)

    assert look() == []
    assert look(same_speaker=str(weights))[0]["state"] == "ok"
    (check,) = look(same_speaker="microsoft/wavlm-that-is-not-here")
    assert check["state"] in ("warn", "fail") and "hf download" in check["found"]


def test_nothing_of_it_is_imported_where_it_is_not_asked_for():
    code = (
        "import sys; from duplex.config_data import SpeechSection as S;"
        "from pipeline.engines.speaker import Speaker; from duplex.records import Voice;"
        "from pipeline.engines.speaking import SpeechRequest as R;"
        "v = Voice(id='v', engine='espeak', role='user', params={'voice': 'en-us'}, licence='l');"
        "t = Speaker(S()); t.speak(R('Good morning to you.', v, 1)); t.close();"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()", result.stderr
