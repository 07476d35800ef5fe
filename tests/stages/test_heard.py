"""The agent's speech against its text: real speech and a real recogniser, and a planted one."""

import numpy as np
import pytest

from duplex.frames import FRAME_SAMPLES, SAMPLE_RATE
from duplex.metrics import speech_activity, word_error_rate
from duplex.mixing import normalize_loudness
from duplex.records import Word
from duplex.words import words_of
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.recogniser import RECOGNISER_RATE, PocketSphinx
from pipeline.evaluation.heard import MAX_FRAMES, Heard, believed, hear, parts, resampled

REPLIES = (
    "Good morning, I would like a large coffee, please.",
    "No, thank you very much. Have a good day.",
    "My name is Winston and I have five dollars.",
)
OTHER = (
    "The volcano erupted twice during the last century.",
    "Goalkeepers practise penalties every Wednesday.",
    "Rabbits dig deep burrows under old trees.",
)
GAP = np.zeros(2 * SAMPLE_RATE, dtype=np.float32)


def timed(*texts: str) -> list[tuple[int, str]]:
    return [(0, word) for text in texts for word in text.split()]


@pytest.fixture(scope="module")
def agent():
    """(float32 [S] at 24 kHz, bool [T], onset of each reply in s): three replies, 2 s apart."""
    pieces, onsets, length = [GAP], [], len(GAP)
    with EspeakEngine() as engine:
        for text in REPLIES:
            spoken = engine.synthesize(text, {"voice": "en-us", "variant": "f2"}).samples
            onsets.append(length / SAMPLE_RATE)
            pieces += [normalize_loudness(spoken, -24.0), GAP]
            length += len(spoken) + len(GAP)
    samples = np.concatenate(pieces)
    return samples, speech_activity(samples), onsets


@pytest.fixture(scope="module")
def pocketsphinx():
    return PocketSphinx()


# -- real speech


@pytest.fixture(scope="module")
def heard(agent, pocketsphinx):
    samples, active, _ = agent
    return hear(timed(*REPLIES), samples, active, pocketsphinx)


def against(heard, *texts):
    """The error of what was heard against another text: what is heard hangs on no text."""
    said = words_of(" ".join(texts))
    return word_error_rate(said, words_of(" ".join(word.text for word in heard.words)))


def test_speech_that_says_its_text_has_a_low_error_and_other_text_a_high_one(agent, heard):
    """Measured: .19 against its own text, 1.30 against another, .53 with the other behind it."""
    assert heard.error_rate == against(heard, *REPLIES) < 0.45
    assert against(heard, *OTHER) > 0.85
    assert against(heard, *REPLIES, *OTHER) > heard.error_rate + 0.2
    assert heard.refused == 0
    starts = [word.start_s for word in heard.words]
    assert starts == sorted(starts)
    for onset_s in agent[2]:  # times are the conversation's
        assert min(abs(start - onset_s) for start in starts) < 0.3


@pytest.mark.slow
def test_fifty_calls_on_one_clip_give_the_same_words(pocketsphinx):
    with EspeakEngine() as engine:
        clip = resampled(engine.synthesize("Thank you.", {"voice": "en-us"}).samples)
    first = pocketsphinx.transcribe(clip, "en")
    assert first
    for call in range(49):
        if call % 10 == 0:  # what is heard in between is not carried over
            pocketsphinx.transcribe(clip[: len(clip) // 2], "en")
        assert pocketsphinx.transcribe(clip, "en") == first, call


def test_a_stretch_is_heard_alike_whatever_came_before_it(agent, heard, pocketsphinx):
    samples, active, onsets = agent
    cut = round((onsets[-1] - 1) * SAMPLE_RATE / FRAME_SAMPLES)
    last = hear([], samples[cut * FRAME_SAMPLES :], active[cut:], pocketsphinx)
    later = [word.text for word in heard.words if word.start_s > onsets[-1] - 1]
    assert later and [word.text for word in last.words] == later
    assert last.error_rate is None, "there is no text"


def test_without_speech_all_of_the_text_is_in_error(pocketsphinx):
    silent = hear(timed("Hello there."), GAP, speech_activity(GAP), pocketsphinx)
    assert silent == Heard((), 0, 1.0)


# -- what is recognised together


def frames(count: int, *spoken: tuple[int, int]) -> np.ndarray:
    active = np.zeros(count, dtype=bool)
    for start, end in spoken:
        active[start:end] = True
    return active


@pytest.mark.parametrize(
    ("active", "found"),
    [
        (frames(40, (10, 20)), [(8, 22)]),
        (frames(40, (10, 20), (26, 30)), [(8, 32)]),
        (frames(40, (10, 20), (27, 30)), [(8, 22), (25, 32)]),
        (frames(40, (1, 39)), [(0, 40)]),
        (frames(40), []),
        (frames(1000, (100, 100 + MAX_FRAMES)), [(98, 102 + MAX_FRAMES)]),
        (frames(1000, (100, 101 + MAX_FRAMES)), [(98, 276), (276, 453)]),
    ],
)
def test_stretches_are_cut_in_silence_and_long_ones_evenly(active, found):
    assert parts(active) == found


# -- guards, on a recogniser that says what it is told


class Planted:
    def __init__(self, *said: str):
        self.said = list(said)
        self.seconds: list[float] = []

    def transcribe(self, samples: np.ndarray, language: str) -> tuple[Word, ...]:
        self.seconds.append(len(samples) / RECOGNISER_RATE)
        words = self.said.pop(0).split()
        return tuple(Word(text=w, start_s=0.1 * i, end_s=0.1 * i) for i, w in enumerate(words))

    def revision(self) -> str:
        return "planted"


def test_each_stretch_is_recognised_by_itself_at_16_khz():
    active = frames(100, (10, 20), (50, 75))
    recogniser = Planted("one two", "three")
    samples = np.zeros(100 * FRAME_SAMPLES, dtype=np.float32)
    found = hear(timed("One, two: four!"), samples, active, recogniser)
    assert recogniser.seconds == pytest.approx([14 * 0.08, 29 * 0.08])
    assert [(word.text, word.start_s) for word in found.words] == [
        ("one", 0.64),
        ("two", 0.74),
        ("three", 3.84),
    ]
    assert found.error_rate == pytest.approx(1 / 3)


def test_what_the_guards_leave_out_is_counted_by_stretch():
    active = frames(100, (10, 20), (50, 75))
    samples = np.zeros(100 * FRAME_SAMPLES, dtype=np.float32)
    found = hear(timed("well"), samples, active, Planted("well " + "no " * 8, "спасибо"))
    assert [word.text for word in found.words] == ["well", "no"]
    assert found.refused == 2
    assert hear(timed("well"), samples, active, Planted("well", "")).refused == 0


@pytest.mark.parametrize(
    ("said", "seconds", "language", "kept"),
    [
        ("a good day to you", 2.0, "en", 5),
        ("well thank thank thank thank thank thank", 5.0, "en", 2),
        ("no no no", 2.0, "en", 3),
        ("thank you for watching " * 8, 10.0, "en", 0),  # compresses like a loop
        ("спасибо за просмотр", 2.0, "en", 0),
        ("спасибо за просмотр", 2.0, "ru", 3),
        ("one two three four five six seven eight nine ten eleven twelve", 0.4, "en", 10),
        ("one two three four five six seven eight nine ten eleven twelve", 0.8, "en", 12),
        ("", 2.0, "en", 0),
    ],
)
def test_words_that_nobody_said_are_not_believed(said, seconds, language, kept):
    words = [Word(text=word, start_s=0.0, end_s=0.0) for word in said.split()]
    assert len(believed(words, seconds, language)) == kept


def test_activity_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"must have the frames of the audio, 2, found \(3,\)"):
        samples = np.zeros(2 * FRAME_SAMPLES, dtype=np.float32)
        hear([], samples, np.zeros(3, dtype=bool), Planted())
