"""espeak-ng in its worker: repeatable speech, true word times, a worker that comes and goes."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duplex.datafiles import CHECKOUT
from duplex.errors import MissingInputError, RecordError, RequestError, TransientError
from duplex.frames import SAMPLE_RATE
from pipeline.engines import espeak
from pipeline.engines.espeak import TRAILING_S, EspeakEngine

espeakng_loader = pytest.importorskip("espeakng_loader")

VOICE = {"voice": "en-us", "variant": "f2", "pitch": 55, "range": 45, "rate_wpm": 180}
OTHER_VOICE = {"voice": "en-gb-scotland", "variant": "m3", "pitch": 20, "rate_wpm": 240}
TEXT = "Good morning, I would like a large latte, please. How much is one of the muffins?"
PLAIN = [
    TEXT,
    "Hi.",
    "Well, here I am.",
    "I am sure it has to be one of the many in the house of the rising sun.",
    "That is $3.50, or twenty-five percent off: 1,200.50 at 12:30!",
    "Wait... what? No — yes. “Really?” he said, 'sure'.",
    "First line\nsecond line\tand a café.",
]


@pytest.fixture(scope="module")
def engine():
    with EspeakEngine() as engine:
        yield engine


def gone(pid, within_s=5.0):
    """Whether a process ends; one that nobody has waited for yet has ended too."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("variant", ["", "f2", "f3", "edward"])
def test_speech_is_bit_exact_whatever_was_spoken_before(variant):
    """f2 and f3 hold noise that espeak seeds with the time in seconds; edward is a Klatt voice."""
    voice = VOICE | {"variant": variant}
    with EspeakEngine() as fresh:
        reference = fresh.synthesize(TEXT, voice)
    time.sleep(1.05)
    with EspeakEngine() as used:
        for text in ("What?!", "Something else, in another voice.", TEXT):
            used.synthesize(text, OTHER_VOICE)
        used.synthesize("Noise.", voice)
        again = used.synthesize(TEXT, voice)
    assert np.array_equal(again.samples, reference.samples)
    assert again.words == reference.words
    assert reference.samples.dtype == np.float32


def test_the_voice_and_each_parameter_are_heard(engine):
    spoken = [engine.synthesize(TEXT, VOICE).samples.tobytes()]
    for change in (
        {"voice": "en-gb"},
        {"variant": "m3"},
        {"pitch": 20},
        {"range": 90},
        {"rate_wpm": 140},
    ):
        spoken.append(engine.synthesize(TEXT, VOICE | change).samples.tobytes())
    assert len(set(spoken)) == len(spoken)


@pytest.mark.parametrize("text", PLAIN)
def test_every_script_word_has_its_time(engine, text):
    utterance = engine.synthesize(text, VOICE)
    expected = [word.strip(".,?!:;—“”'") for word in text.split()]
    assert [word.text for word in utterance.words] == [word for word in expected if word]
    assert_words_ordered(utterance)
    end_s = len(utterance.samples) / SAMPLE_RATE
    assert end_s - utterance.words[-1].end_s == pytest.approx(TRAILING_S, abs=1e-3)


def assert_words_ordered(utterance):
    times = [time_s for word in utterance.words for time_s in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= len(utterance.samples) / SAMPLE_RATE


@pytest.mark.parametrize("variant", ["", "f2", "m3", "edward"])
def test_pauses_between_words_are_silent_and_words_are_not(engine, variant):
    utterance = engine.synthesize(TEXT, VOICE | {"variant": variant})
    peak = np.abs(utterance.samples).max()
    words = utterance.words
    pauses = 0
    for word, following in itertools.pairwise(words):
        assert loudest(utterance, word.start_s, word.end_s) > 0.05 * peak
        if following.start_s - word.end_s > 0.1:
            pauses += 1
            # f2 carries an echo, which is heard for some time after the word.
            assert loudest(utterance, word.end_s + 0.06, following.start_s - 0.01) < 0.03 * peak
    assert pauses == 3  # after "morning,", "latte," and "please."
    assert [w.text for w, n in itertools.pairwise(words) if n.start_s > w.end_s] == [
        "morning",
        "latte",
        "please",
    ]


def loudest(utterance, start_s, end_s):
    first, end = (round(time_s * SAMPLE_RATE) for time_s in (start_s, end_s))
    return np.abs(utterance.samples[first:end]).max()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.lists(st.text("abdeinorst", min_size=1, max_size=9), min_size=1, max_size=12))
def test_no_plain_word_is_lost(engine, text):
    utterance = engine.synthesize(" ".join(text) + ".", VOICE)
    assert [word.text for word in utterance.words] == text
    assert_words_ordered(utterance)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(max_size=40))
def test_any_text_is_spoken_or_refused(engine, text):
    try:
        utterance = engine.synthesize(text, VOICE)
    except RecordError:
        return
    assert utterance.words
    assert_words_ordered(utterance)
    assert np.abs(utterance.samples).max() > 0


def test_characters_without_utf8_and_nul_cut_nothing(engine):
    utterance = engine.synthesize("one\x00two\ud800three four", VOICE)
    assert [word.text for word in utterance.words] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("text", ["", "...", " — ", "?!", "a" * 20_000])
def test_a_text_without_speech_is_refused(engine, text):
    with pytest.raises(RecordError, match=r"word to say|at most"):
        engine.synthesize(text, VOICE)


def test_silence_from_the_library_is_refused():
    header = {"rate": 22050, "words": [[0, 0]], "phonemes": []}
    with pytest.raises(RecordError, match="must give speech"):
        espeak._utterance("hello", np.zeros(4000, dtype=np.float32), header)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"voice": "en-nowhere"}, "no voice en-nowhere"),
        ({"variant": "f99"}, "no variant f99"),
        ({"variant": "../f2"}, "no variant ../f2"),
        ({"pitch": 100}, "pitch must lie in"),
        ({"rate_wpm": 10}, "rate_wpm must lie in"),
        ({"speed": 3}, "may have others of"),
    ],
)
def test_a_voice_that_espeak_lacks_is_a_wrong_request(engine, change, said):
    with pytest.raises(RequestError, match=said):
        engine.synthesize(TEXT, VOICE | change)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(espeak, "MODULE", "espeakng_loader_that_is_not_there")
    with pytest.raises(MissingInputError, match=r"pip install -e '\.\[espeak\]'"):
        EspeakEngine()


def test_the_data_may_lie_deeper_than_espeak_can_spell(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    package = Path(espeakng_loader.__file__).parent
    shutil.copytree(package, deep / package.name, symlinks=True)
    with EspeakEngine() as engine:
        reference = engine.synthesize(TEXT, VOICE)
    monkeypatch.setenv("PYTHONPATH", str(deep))
    with EspeakEngine() as engine:
        spoken = engine.synthesize(TEXT, VOICE)
        assert engine.worker_pid is not None
        assert psutil.Process(engine.worker_pid).cwd() == str(deep / package.name)
    assert np.array_equal(spoken.samples, reference.samples)


def test_closing_ends_the_worker_and_a_closed_engine_starts_another():
    engine = EspeakEngine()
    engine.synthesize("One.", VOICE)
    pid = engine.worker_pid
    assert pid is not None and not gone(pid, within_s=0.1)
    worker = engine._worker
    engine.close()
    assert gone(pid)
    assert worker is not None and worker.returncode == 0, "it ends by itself, it is not killed"
    engine.synthesize("Two.", VOICE)
    assert engine.worker_pid != pid
    engine.close()


def test_the_worker_ends_when_its_parent_is_killed():
    code = (
        "import time; from pipeline.engines.espeak import EspeakEngine; e = EspeakEngine(); "
        "e.synthesize('One.', {'voice': 'en-us'}); print(e.worker_pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    assert not gone(pid, within_s=0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def test_a_killed_worker_is_transient_and_replaced(engine):
    reference = engine.synthesize(TEXT, VOICE)
    os.kill(engine.worker_pid, signal.SIGKILL)
    with pytest.raises(TransientError, match="ended in between"):
        engine.synthesize(TEXT, VOICE)
    assert np.array_equal(engine.synthesize(TEXT, VOICE).samples, reference.samples)


def test_a_hanging_worker_is_transient_ended_and_replaced():
    with EspeakEngine(timeout_s=2) as engine:
        engine.synthesize("One.", VOICE)
        pid = engine.worker_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TransientError, match="within 2 s"):
            engine.synthesize(TEXT, VOICE)
        assert gone(pid)
        assert len(engine.synthesize(TEXT, VOICE).words) == len(TEXT.split())
