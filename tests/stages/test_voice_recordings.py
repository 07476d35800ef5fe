"""Recordings of speakers: what is taken of them, what is refused and why, who gets whom."""

import json

import numpy as np
import pytest
import soundfile
import soxr

from duplex.characters import VoiceTraits
from duplex.config import Config
from duplex.config_data import VoicesSection
from duplex.errors import DataFileError, RecordError, RequestError
from duplex.frames import FRAME_SAMPLES
from duplex.records import Voice
from duplex.store import StageFolder
from pipeline.engines import engines
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.vad import VoiceActivity
from pipeline.engines.voice_recordings import clips_of_folder, take_sample, transcript_of
from pipeline.engines.voice_sound import LONGEST_READ_S, best_stretch, read_mono
from pipeline.engines.voicesample import loudness_lufs
from pipeline.runners.local import execute
from pipeline.speech import SpeechStage
from pipeline.voices import VoicesStage
from tests.factories import persona, write_yaml
from tests.stages.spoken_helpers import context_of, conversation, folders

pytest.importorskip("espeakng_loader")

TEXT = (
    "Good morning, I would like a large coffee with a little milk, please. "
    "And if you still have one of those muffins, I will take it."
)
SPEAKERS = {
    "anna": ("f2", "female"),
    "beth": ("f5", "female"),
    "carl": ("m3", "male"),
    "dave": ("m7", "male"),
    "ella": ("Annie", "female"),
}
RIGHTS = {"licence": "CC0-1.0", "consent": "signed, 2024"}
RATE = 24_000


@pytest.fixture(scope="module")
def speech():
    """Each speaker's sentence, with half a second of faint noise on each side."""
    noise = np.random.default_rng(0)
    with EspeakEngine() as engine:
        found = {}
        for name, (variant, _) in SPEAKERS.items():
            samples = engine.synthesize(TEXT, {"voice": "en-us", "variant": variant}).samples
            samples = np.pad(0.5 * samples / np.abs(samples).max(), RATE // 2)
            found[name] = (samples + noise.normal(0, 3e-4, len(samples))).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def vad():
    return VoiceActivity()


@pytest.fixture
def folder(speech, tmp_path):
    """Five speakers: one with two files, the first too short; one at 44.1 kHz in stereo."""
    root = tmp_path / "recordings"
    (root / "beth").mkdir(parents=True)
    for name, samples in speech.items():
        soundfile.write(root / f"{name}.wav", samples, RATE)
    (root / "beth.wav").rename(root / "beth" / "second.wav")
    soundfile.write(root / "beth" / "first.wav", speech["beth"][: 2 * RATE], RATE)
    wide = soxr.resample(np.stack([speech["carl"]] * 2, axis=1), RATE, 44_100)
    soundfile.write(root / "carl.flac", wide, 44_100)
    (root / "carl.wav").unlink()
    facts = {n: {"gender": gender, "transcript": TEXT} for n, (_, gender) in SPEAKERS.items()}
    facts["beth"]["transcript"] = {"second.wav": TEXT}
    write_yaml(root / "voices.yaml", {**RIGHTS, "speakers": facts})
    return root


def sample_of(path, vad, **changes):
    section = VoicesSection.model_validate({**RIGHTS, **changes})
    (clip,) = clips_of_folder(path, section)
    return take_sample(clip, vad, guess_gender=section.guess_gender)


def recording(root, samples, rate=RATE, name="someone.wav", **options):
    root.mkdir(exist_ok=True)
    soundfile.write(root / name, samples, rate, **options)
    return root


def test_the_stretch_is_whole_frames_at_the_loudness_of_prompts(speech, vad, tmp_path):
    sample = sample_of(recording(tmp_path / "r", speech["anna"]), vad)
    assert len(sample.samples) % FRAME_SAMPLES == 0
    assert 4 <= len(sample.samples) / RATE <= 15
    assert loudness_lufs(sample.samples) == pytest.approx(-24, abs=0.1)
    assert 0.3 < sample.start_s < 0.6 and sample.whole
    assert sample.snr_db > 30 and sample.bandwidth_hz > 6000


def test_of_a_long_recording_the_stretch_with_most_speech_is_taken(speech, vad, tmp_path):
    pause = np.zeros(3 * RATE, dtype=np.float32)
    long = np.concatenate([speech["anna"][: 3 * RATE], pause, speech["anna"], pause])
    sample = sample_of(recording(tmp_path / "r", long), vad)
    assert 6 < sample.start_s < 7 and not sample.whole


def defect(name, speech):
    clean = speech["anna"]
    rng = np.random.default_rng(1)
    return {
        "noisy": clean + rng.normal(0, 0.05, len(clean)),
        "clipped": np.clip(clean * 20, -1, 1),
        "telephone": soxr.resample(soxr.resample(clean, RATE, 8000), 8000, RATE),
        "short": clean[: 3 * RATE],
        "silence": np.zeros(8 * RATE),
        "NaN": np.full(RATE * 5, np.nan),
    }[name].astype(np.float32)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("noisy", "above the noise, found"),
        ("clipped", "it is clipped"),
        ("telephone", "a telephone's sound"),
        ("short", "4 s of speech"),
        ("silence", "4 s of speech"),
        ("NaN", "finite samples"),
    ],
)
def test_what_is_wrong_with_a_recording_is_said(speech, vad, tmp_path, name, reason):
    root = recording(tmp_path / "r", defect(name, speech), subtype="FLOAT")
    with pytest.raises(RecordError, match=reason):
        sample_of(root, vad)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"RIFF" + b"\xff" * 400,
        b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + b"\0" * 8 + b"\2\0\x10\0data\xff\xff\xff\x7f",
        b"\x89PNG" + bytes(range(256)) * 8,
    ],
)
def test_rubbish_is_refused_with_a_reason(vad, tmp_path, content):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "x.wav").write_bytes(content)
    with pytest.raises(RecordError):
        sample_of(tmp_path / "r", vad)
    with pytest.raises(RecordError):
        read_mono(content)


def test_no_more_of_a_file_is_read_than_the_limit(tmp_path):
    recording(tmp_path / "r", np.zeros(8000 * 600, dtype=np.float32), 8000)
    samples, rate = read_mono(tmp_path / "r" / "someone.wav")
    assert len(samples) / rate == LONGEST_READ_S


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0.0, 5.0)], (0.0, 5.0)),
        ([(0.0, 5.0), (5.2, 9.0)], (0.0, 9.0)),
        ([(0.0, 5.0), (7.0, 13.0)], (7.0, 13.0)),  # the pause is too long to go across
        ([(0.0, 9.0), (9.5, 18.0)], (0.0, 9.0)),  # together they are too long
        ([(0.0, 4.0), (4.5, 8.5), (20.0, 28.0)], (20.0, 28.0)),  # no pause beats one
    ],
)
def test_the_best_stretch(spans, expected):
    assert best_stretch(spans) == expected


def test_links_hidden_files_and_other_things_are_no_recordings(folder, tmp_path):
    (folder / "link.wav").symlink_to(folder / "anna.wav")
    (folder / "linked").symlink_to(folder / "beth")
    (folder / ".hidden.wav").write_bytes(b"x")
    (folder / "notes.txt").write_text("x")
    speakers = {clip.speaker for clip in clips_of_folder(folder, VoicesSection())}
    assert speakers == set(SPEAKERS)


@pytest.mark.parametrize("missing", ["licence", "consent"])
def test_without_licence_and_consent_nothing_is_cloned(folder, missing):
    write_yaml(folder / "voices.yaml", {name: RIGHTS[name] for name in RIGHTS if name != missing})
    with pytest.raises(RequestError, match=f"must have {missing}"):
        clips_of_folder(folder, VoicesSection())
    clips = clips_of_folder(folder, VoicesSection.model_validate({missing: "by config"}))
    assert getattr(clips[0], missing) == "by config"


def test_a_speaker_without_a_recording_is_named(folder):
    write_yaml(folder / "voices.yaml", {**RIGHTS, "speakers": {"zoe": {"gender": "female"}}})
    with pytest.raises(DataFileError, match="found none of zoe"):
        clips_of_folder(folder, VoicesSection())


def test_gender_is_guessed_only_where_that_is_allowed(speech, vad, tmp_path):
    for name, (_, gender) in SPEAKERS.items():
        root = recording(tmp_path / name, speech[name])
        assert sample_of(root, vad).clip.gender is None
        assert sample_of(root, vad, guess_gender=True).clip.gender in (gender, None)
    guessed = sample_of(tmp_path / "carl", vad, guess_gender=True).clip.gender
    assert guessed == "male"


@pytest.mark.slow  # three recognitions
def test_a_given_transcript_is_kept_only_where_all_of_it_is_in_the_stretch(speech, vad, tmp_path):
    root = recording(tmp_path / "r", speech["anna"])
    write_yaml(root / "voices.yaml", {"speakers": {"someone": {"transcript": TEXT}}})
    section = VoicesSection(recogniser="none")
    assert transcript_of(sample_of(root, vad), section) == TEXT
    pause = np.zeros(3 * RATE, dtype=np.float32)
    recording(root, np.concatenate([speech["anna"], pause, speech["anna"]]))
    assert transcript_of(sample_of(root, vad), section) is None
    heard = transcript_of(sample_of(root, vad), VoicesSection(recogniser="pocketsphinx"))
    assert heard and heard != TEXT


# -- through the stage


PERSONAS = [
    persona("angry-ann", voice=VoiceTraits(gender="female")),
    persona("friendly-bob", voice=VoiceTraits(gender="male")),
]
DIALOGUES = [
    conversation(name, index) for name in ("angry-ann", "friendly-bob") for index in (0, 1)
]


@pytest.fixture
def parrot(monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "chatterbox", "tests.stages.parrot_engine")


def cloned(root, folder, **section):
    section = {"engine": "chatterbox", "recordings": str(folder), "user_voices": 2} | section
    inputs = folders(root, PERSONAS, DIALOGUES)
    context = context_of(inputs, root, voices=section, tensors={"valid_fraction": 0.5})
    stage_folder = StageFolder.of(root, 3, "voices", "3" * 64)
    execute(VoicesStage(), context, stage_folder)
    return context, stage_folder


def test_personas_and_users_get_speakers_of_their_own_and_speak(parrot, folder, tmp_path):
    context, made = cloned(tmp_path / "runs", folder)
    voices: list[Voice] = list(made.records())
    assert [voice.id for voice in voices] == [
        "agent-angry-ann", "agent-friendly-bob", "user-00", "user-01",
    ]  # fmt: skip
    speakers = [voice.source.split(".")[0].split("/")[0] for voice in voices]
    assert len(set(speakers)) == 4
    assert [SPEAKERS[name][1] for name in speakers[:2]] == ["female", "male"]
    for voice in voices:
        assert (voice.licence, voice.consent) == ("CC0-1.0", "signed, 2024")
        assert voice.transcript == TEXT
        assert made.blob_path(voice.sample, ".wav").exists()
        assert made.blob_path(voice.proof, ".wav").exists()
    page = (made.path / "index.html").read_text()
    assert page.count("<audio") == 8 and "signed, 2024" in page
    assert "first.wav" in page and "4 s of speech" in page  # what was refused, and why

    inputs = {"dialogues": context.inputs["dialogues"], "voices": made}
    speech_folder = StageFolder.of(tmp_path / "runs", 4, "speech", "4" * 64)
    speech_context = context_of(
        inputs, tmp_path, voices=context.config.voices.model_dump(),
        speech={"engine": "chatterbox"}, tensors={"valid_fraction": 0.5},
    )  # fmt: skip
    execute(SpeechStage(), speech_context, speech_folder)
    assert len(list(speech_folder.records())) == len(DIALOGUES)


def test_too_few_speakers_is_an_error_that_says_which(parrot, folder, tmp_path):
    with pytest.raises(RequestError, match=r"missing: 3 of the user's side \(en\).*first.wav"):
        cloned(tmp_path / "runs", folder, user_voices=6)


def test_an_engine_that_cannot_clone_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(engines.ENGINES, "dia", "pipeline.engines.espeak_speech")
    with pytest.raises(RequestError, match="need an engine that clones"):
        cloned(tmp_path / "runs", folder, engine="dia")


def test_another_recording_is_another_key(parrot, folder, tmp_path):
    inputs = folders(tmp_path / "runs", PERSONAS, DIALOGUES)
    section = {"engine": "chatterbox", "recordings": str(folder), "user_voices": 1}
    context = context_of(inputs, tmp_path, voices=section)

    def sources():
        return {task.id: task.sources for task in VoicesStage().tasks(context)}

    before = sources()
    assert before == sources()
    (folder / "dave.wav").unlink()
    assert all(before[name] != found for name, found in sources().items())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"recordings": "x"}, "espeak has voices of its own"),
        ({"engine": "csm"}, "needs its voices"),
        ({"engine": "csm", "recordings": "x", "dataset": "a/b"}, "one source"),
        ({"engine": "csm", "names": {"women": ["a"]}}, "female|male"),
    ],
)
def test_a_config_with_no_or_two_sources_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Config.model_validate({"name": "toy", "voices": section})


# -- data sets


@pytest.fixture
def dataset(speech, tmp_path):
    """A `datasets` folder as the hub serves them: parquet with sound as bytes, and a card."""
    import io

    import pyarrow
    import pyarrow.parquet
    from datasets import Audio, Features, Value

    def wav(samples):
        target = io.BytesIO()
        soundfile.write(target, samples, RATE, format="WAV")
        return {"bytes": target.getvalue(), "path": None}

    rows = [{"audio": wav(speech["anna"][: 2 * RATE]), "who": "anna", "text": "x", "sex": "F"}]
    rows += [
        {"audio": wav(speech[name]), "who": name, "text": TEXT, "sex": gender[0].upper()}
        for name, (_, gender) in SPEAKERS.items()
    ]
    text = {name: Value("string") for name in ("who", "text", "sex")}
    schema = Features({"audio": Audio(), **text}).arrow_schema
    root = tmp_path / "set"
    root.mkdir()
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    pyarrow.parquet.write_table(table, root / "train-00000-of-00001.parquet")
    (root / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A set\n")
    return root


def of_set(path, **changes):
    columns = {"name": str(path), "speaker": "who", "transcript": "text", "gender": "sex"}
    return {"recordings": None, "dataset": columns | changes, "consent": "its card says so"}


def test_speakers_of_a_data_set_become_voices_with_its_cards_licence(parrot, dataset, tmp_path):
    _, made = cloned(tmp_path / "runs", None, **of_set(dataset))
    voices = list(made.records())
    assert {voice.licence for voice in voices} == {"cc-by-4.0"}
    assert {voice.consent for voice in voices} == {"its card says so"}
    speakers = [voice.source.split("speaker ")[1].split(",")[0] for voice in voices]
    assert len(set(speakers)) == 4
    assert [SPEAKERS[name][1] for name in speakers[:2]] == ["female", "male"]
    # The fifth speaker was not needed, and so not looked at.
    assert "ella" not in json.dumps([voice.source for voice in voices])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speaker": "speaker"}, "must have the column speaker, found"),
        ({"split": "nowhere"}, "with the split nowhere"),
        ({"name": "/nowhere/at/all"}, "must have licence, found none"),
    ],
)
def test_a_wrong_set_is_explained(parrot, dataset, tmp_path, changes, message):
    with pytest.raises(RequestError, match=message):
        cloned(tmp_path / "runs", None, **of_set(dataset, **changes))


def test_a_set_without_licence_is_refused(parrot, dataset, tmp_path):
    (dataset / "README.md").unlink()
    with pytest.raises(RequestError, match="must have licence"):
        cloned(tmp_path / "runs", None, **of_set(dataset))
