"""What the neural speech engines share."""

import subprocess
import sys

import numpy as np
import pytest

from duplex.config_data import SpeechSection
from duplex.errors import MissingInputError, RecordError, RequestError
from pipeline.engines import neural
from pipeline.engines.speaker import Speaker
from tests.stages.tiny_tts import request

NAMES = ("moshi_tts", "csm", "pocket_tts", "dia")


def test_keys_and_plans_import_nothing_heavy():
    code = (
        "import sys; from importlib import import_module as load;"
        "from duplex.config_data import SpeechSection; section = SpeechSection();"
        f"modules = [load('pipeline.engines.' + name) for name in {NAMES}];"
        "[(m.revision(section), m.missing(section), m.make(section).close) for m in modules];"
        "print([n for n in ('torch', 'moshi', 'transformers', 'pocket_tts') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_what_the_speaker_returns_says_whose_voice_it_is():
    with Speaker(SpeechSection.model_validate({"checks": {"share": 0}})) as speaker:
        assert speaker.speak(request("espeak", "hello")).speaker == "agent-espeak"


def test_loud_speech_is_cut_off_flat_for_the_checks_to_see():
    time_s = np.arange(44_100) / 44_100
    loud = neural.finished(2 * np.sin(2 * np.pi * 100 * time_s), 44_100, "dia")
    assert np.abs(loud).max() == 1 and (np.abs(loud) == 1).mean() > 0.5
    quiet = neural.finished(0.25 * np.sin(2 * np.pi * 100 * time_s), 44_100, "dia")
    assert np.abs(quiet).max() == pytest.approx(0.25, abs=0.01), "not scaled"


@pytest.mark.parametrize("samples", [np.zeros(0), np.array([0.0, np.nan]), np.zeros((2, 9))])
def test_what_is_no_sound_is_refused(samples):
    with pytest.raises(RecordError, match="must give"):
        neural.finished(samples, 24_000, "csm")


def test_a_source_is_a_path_that_exists_or_a_hub_name(tmp_path):
    def weights(source):
        return neural.Weights("csm", source, None, "none", "small")

    weights("owner/name").check()
    weights(str(tmp_path)).check()
    for source in ("../owner/name", "owner", "https://x.org/a", "/nowhere", "a/b/c"):
        with pytest.raises(MissingInputError, match="must be a folder that exists or a hub name"):
            weights(source).check()


def test_a_folders_identity_follows_its_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "weights").write_bytes(b"x" * 300_000)
    first = neural.folder_identity(tmp_path)
    assert first == neural.folder_identity(tmp_path)
    (tmp_path / "a" / "weights").write_bytes(b"x" * 299_999 + b"y")
    second = neural.folder_identity(tmp_path)
    within = b"x" * 150_000 + b"z" + b"x" * 149_998 + b"y"
    (tmp_path / "a" / "weights").write_bytes(within)
    assert neural.folder_identity(tmp_path) not in (first, second)
    (tmp_path / "a" / "weights").rename(tmp_path / "weights")
    assert len({first, second, neural.folder_identity(tmp_path)}) == 3


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert neural.pick_device("auto") == neural.pick_device("cpu") == "cpu"
    with pytest.raises(RequestError, match="device: cuda needs a GPU"):
        neural.pick_device("cuda")
