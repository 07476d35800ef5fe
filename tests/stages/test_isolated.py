"""Engines in scripts: a second real script, its deaths and lies; chatterbox's as far as it runs."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest

from duplex.config_data import SpeechSection
from duplex.datafiles import CHECKOUT
from duplex.errors import MissingInputError, RecordError, RequestError, TransientError
from duplex.frames import SAMPLE_RATE
from duplex.records import Voice
from pipeline.engines import chatterbox, espeak
from pipeline.engines.espeak import EspeakEngine
from pipeline.engines.isolated import IsolatedEngine, clean_environment, uv
from pipeline.engines.speaking import Capabilities, SpeechRequest
from tests.stages.test_espeak import gone

pytest.importorskip("espeakng_loader")

SCRIPT = Path(__file__).with_name("planted_engine.py")
FAKE = Path(__file__).with_name("fake_chatterbox")
TEXT = "Good morning, a large latte please."
VOICE = Voice(id="v", engine="chatterbox", role="agent", params={}, licence="test")


def planted(mode="", **changes):
    return IsolatedEngine(
        [sys.executable, str(SCRIPT)],
        Capabilities(frozenset({"en"}), "test"),
        engine="planted",
        version="1.0",
        environment={"MODE": mode, "ESPEAK_WORKER": str(espeak.WORKER)},
        **({"start_s": 20.0, "reply_s": 20.0} | changes),
    )


def request(text=TEXT, **changes):
    return SpeechRequest(text, VOICE, seed=3, **changes)


@pytest.fixture
def engine():
    engine = planted()
    yield engine
    engine.close()


def test_a_script_speaks_and_is_started_once(engine):
    first = engine.synthesize(request())
    pid = engine.pid
    again = engine.synthesize(request())
    assert engine.pid == pid
    assert np.array_equal(first.samples, again.samples) and first.words is None
    with EspeakEngine() as direct:
        reference = direct.synthesize(TEXT, {"voice": "en-us", "variant": "f2"}).samples
    common = min(len(reference), len(first.samples))
    assert first.samples.dtype == np.float32
    assert np.corrcoef(first.samples[:common], reference[:common])[0, 1] > 0.99


@pytest.mark.skipif(uv() is None, reason="needs uv, which starts the scripts")
def test_a_script_speaks_when_uv_starts_it_and_ends_with_it(engine):
    starter = uv()
    assert starter is not None
    isolated = IsolatedEngine(
        [starter, "run", "--no-project", "--script", str(SCRIPT)],
        engine.capabilities,
        engine="planted",
        version="1.0",
        start_s=60.0,
        environment={
            "ESPEAK_WORKER": str(espeak.WORKER), "WORKER_PYTHON": sys.executable,
            "UV_OFFLINE": "1", "UV_PYTHON": sys.executable,
        },
    )  # fmt: skip
    spoken = isolated.synthesize(request()).samples
    assert np.array_equal(spoken, engine.synthesize(request()).samples)
    assert isolated.pid is not None
    script = [child.pid for child in psutil.Process(isolated.pid).children(recursive=True)]
    assert script, "uv starts it as a child"
    isolated.close()
    assert all(gone(pid) for pid in script)


def test_parameters_reach_the_script(engine):
    plain = engine.synthesize(request()).samples
    quick = engine.synthesize(request(adjusted={"rate_wpm": 300})).samples
    assert len(quick) < 0.75 * len(plain)


DEATHS = {
    "crash": "'!crash', tried twice: the script of planted must answer, but it ended; its "
    "last lines: CUDA error: out of memory",
    "half": "'!half', tried twice: the script of planted must answer, but it ended",
    "garbage": "lines of its protocol, found 'Loading model: 100%'",
    "endless line": "lines of its protocol, found 'xxxx",
    "huge": "lines of its protocol",
    "other id": "must answer request 2, it answered 9",
}


@pytest.mark.parametrize("kind", DEATHS)
def test_a_script_that_breaks_is_ended_and_started_again(engine, kind):
    """A text that kills it twice is refused for good; a script that talks nonsense is not."""
    error = RecordError if kind in ("crash", "half") else TransientError
    reference = engine.synthesize(request()).samples
    pid = engine.pid
    with pytest.raises(error, match=re.escape(DEATHS[kind])):
        engine.synthesize(request(f"!{kind}"))
    assert engine.pid is None and gone(pid)
    assert np.array_equal(engine.synthesize(request()).samples, reference)


def test_a_script_that_dies_once_is_started_again_and_speaks(engine):
    reference = engine.synthesize(request()).samples
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    assert np.array_equal(engine.synthesize(request()).samples, reference)
    assert engine.pid != pid and gone(pid)


def test_a_script_that_hangs_is_killed_with_its_children():
    engine = planted(reply_s=1.0)
    with pytest.raises(RecordError, match=r"'!hang', tried twice: .* within 1 s") as caught:
        engine.synthesize(request("!hang"))
    found = re.search(r"child (\d+)", str(caught.value))
    assert found and gone(int(found[1]))
    assert engine.pid is None


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("text", RecordError),
        ("failed", RecordError),
        ("request", RequestError),
        ("missing", MissingInputError),
        ("unheard-of", TransientError),
    ],
)
def test_an_error_reply_keeps_the_script_and_has_its_kind(engine, kind, error):
    engine.synthesize(request())
    pid = engine.pid
    with pytest.raises(error, match="as it was asked to"):
        engine.synthesize(request(f"!error {kind}"))
    assert engine.pid == pid
    assert len(engine.synthesize(request()).samples) > SAMPLE_RATE


def test_silence_in_place_of_speech_is_refused(engine):
    with pytest.raises(RecordError, match="must give sound, and gave none"):
        engine.synthesize(request("!nothing"))


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("dies", MissingInputError, "No solution found when resolving.*Try it by hand"),
        ("never ready", MissingInputError, "ready within 1 s"),
        ("missing", MissingInputError, "needs the weights of planted"),
        ("another version", RequestError, "must be duplex-speech-1 planted 1.0"),
    ],
)
def test_a_script_that_does_not_start_says_why(mode, error, said):
    engine = planted(mode, start_s=1.0 if mode == "never ready" else 20.0)
    with pytest.raises(error, match=said):
        engine.synthesize(request())
    assert engine.pid is None


def test_a_starter_that_is_not_there_says_so():
    engine = IsolatedEngine(
        ["/nowhere/uv", "run"], chatterbox.CAPABILITIES, engine="planted", version="1"
    )
    with pytest.raises(MissingInputError, match="must be started by /nowhere/uv"):
        engine.synthesize(request())


def test_no_secret_is_inherited(engine, monkeypatch):
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "UV_INDEX"):
        monkeypatch.setenv(name, "a secret")
    with pytest.raises(RecordError) as caught:
        engine.synthesize(request("!environment"))
    names = str(caught.value).rpartition(": ")[2].split(",")
    assert "PATH" in names
    assert not {"OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"} & set(names)
    proxies = {"https_proxy": "http://me:secret@proxy", "http_proxy": "http://proxy:3128"}
    assert clean_environment(proxies) == {"http_proxy": "http://proxy:3128"}


def test_closing_ends_the_script_and_its_children(engine):
    engine.synthesize(request())
    family = [engine.pid, *(child.pid for child in psutil.Process(engine.pid).children())]
    assert len(family) == 2
    engine.close()
    assert all(gone(pid) for pid in family)


def test_a_killed_parent_leaves_no_script_behind():
    code = (
        "import time; from tests.stages.test_isolated import planted, request; e = planted();"
        "e.synthesize(request()); print(e.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


# -- chatterbox's script: its package and weights do not fit here


def header_of(script):
    """The PEP 723 block, read as the standard says."""
    block = re.search(
        r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$",
        script.read_text(),
    )
    assert block and block["type"] == "script"
    lines = block["content"].splitlines()
    return tomllib.loads("\n".join(line[2:] for line in lines))


def test_the_script_pins_what_the_key_says():
    header = header_of(chatterbox.SCRIPT)
    assert header["dependencies"] == [f"chatterbox-tts=={chatterbox.VERSION}"]
    assert header["requires-python"].startswith(">=3.10")
    compile(chatterbox.SCRIPT.read_text(), str(chatterbox.SCRIPT), "exec")


@pytest.fixture
def fake(tmp_path):
    """chatterbox's script with a package of its interface and a cached snapshot, under PYTHONPATH.

    Only the packages differ from a real start: `python script` in place of `uv run --script`.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--ResembleAI--chatterbox"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    snapshot = hub / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "ve.pt").write_bytes(b"")
    metadata = tmp_path / "site" / f"chatterbox_tts-{chatterbox.VERSION}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: chatterbox-tts\nVersion: {chatterbox.VERSION}\n"
    )
    paths = [str(FAKE), str(tmp_path / "site")]
    engine = IsolatedEngine(
        [sys.executable, str(chatterbox.SCRIPT)],
        chatterbox.CAPABILITIES,
        engine="chatterbox",
        version=chatterbox.VERSION,
        start_s=120.0,
        reply_s=60.0,
        environment={
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
    )
    yield engine
    engine.close()


def pitch_of(samples):
    spectrum = np.abs(np.fft.rfft(samples))
    return float(np.argmax(spectrum) * SAMPLE_RATE / len(samples))


def test_chatterbox_speaks_in_the_voice_of_each_request(fake, tmp_path):
    """Its `generate` keeps the last voice: a request without a sample must not get it."""
    sample = tmp_path / "voice.wav"
    sample.write_bytes(b"x" * 100)
    plain = fake.synthesize(request())
    cloned = fake.synthesize(request(sample=sample))
    after = fake.synthesize(request())
    assert pitch_of(plain.samples) == pytest.approx(100, abs=2)
    assert pitch_of(cloned.samples) == pytest.approx(300, abs=2)
    assert np.array_equal(plain.samples, after.samples), "the seed decides, not what came before"
    louder = fake.synthesize(request(adjusted={"exaggeration": 1.0, "cfg_weight": 0.4}))
    assert np.abs(louder.samples).max() == pytest.approx(0.2, abs=0.02)
    other = SpeechRequest(TEXT, VOICE, seed=4)
    assert not np.array_equal(fake.synthesize(other).samples, plain.samples)


def test_chatterbox_refuses_what_it_cannot(fake, tmp_path):
    with pytest.raises(RequestError, match="does not speak ta"):
        fake.synthesize(request(language="ta"))
    with pytest.raises(RequestError, match="no such parameter: pitch"):
        fake.synthesize(request(adjusted={"pitch": 3}))
    with pytest.raises(RecordError, match=r"must be spoken in 39\.5 s"):
        fake.synthesize(request("long " * 150))
    with pytest.raises(RecordError, match="No such file"):
        fake.synthesize(request(sample=tmp_path / "gone.wav"))
    assert len(fake.synthesize(request(language="de")).samples)


def test_chatterbox_without_its_package_says_what_is_missing():
    assert not _installed("chatterbox-tts"), "then this test has to hide it"
    engine = IsolatedEngine(
        [sys.executable, str(chatterbox.SCRIPT)],
        chatterbox.CAPABILITIES,
        engine="chatterbox",
        version=chatterbox.VERSION,
        start_s=120.0,
    )
    with pytest.raises(MissingInputError, match=r"needs the package chatterbox-tts==0\.1\.7"):
        engine.synthesize(request())


@pytest.mark.slow  # without its package: above
def test_chatterbox_without_its_weights_says_what_is_missing(fake, tmp_path):
    fake._environment["HF_HUB_CACHE"] = str(tmp_path / "empty")
    with pytest.raises(MissingInputError, match="needs the weights ResembleAI/chatterbox"):
        fake.synthesize(request())


def test_chatterbox_is_started_by_uv_with_its_pinned_weights():
    section = SpeechSection.model_validate(
        {"engine": "chatterbox", "models": {"chatterbox": {"revision": "abc123"}}}
    )
    command = chatterbox.make(section)._command
    assert command[1:3] == ["run", "--no-project"]
    assert command[-2:] == ["--revision", "abc123"]
    assert chatterbox.revision(section) == "chatterbox 0.1.7 weights abc123"
    started = time.monotonic()
    assert json.dumps(chatterbox.revision(section)) and time.monotonic() - started < 1


def _installed(package):
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_the_revision_of_another_engines_weights_is_not_chatterboxs():
    other = SpeechSection.model_validate({"engine": "csm", "revision": "abc123"})
    assert chatterbox.revision(other) == chatterbox.revision(SpeechSection())
    own = SpeechSection.model_validate({"engine": "chatterbox", "revision": "abc123"})
    assert "abc123" in chatterbox.revision(own)
    named = {"engine": "csm", "models": {"chatterbox": {"revision": "def456"}}}
    assert "def456" in chatterbox.revision(SpeechSection.model_validate(named))
