"""moshi's own programs against our files and our server; adapters and packaged voices served."""

import asyncio
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile

from duplex.config import SamplingSection
from duplex.errors import (
    EXIT_WORK_FAILED,
    CorruptFileError,
    MergeError,
    MissingInputError,
    RequestError,
    ServerError,
)
from duplex.streams import AGENT_ROWS, TEXT_PAD, USER_ROWS, apply_delays
from pipeline import serve_command
from pipeline.engines.checkpoint import Checkpoint
from pipeline.serve_command import ServeOptions
from pipeline.serving import stock
from pipeline.serving.model import ServedModel
from pipeline.serving.stock import (
    compare,
    load_by_moshi,
    moshi_adapter,
    serve_stock,
    stock_files,
)
from pipeline.serving.voice_embeddings import read_voice_embeddings
from pipeline.serving.voices import VoiceList
from tests.factories import slow
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.serving_helpers import PROMPT, in_loop, user_pcm
from tests.stages.training_factories import make_adapter
from training.merge import merge_checkpoint

GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)

# A sound card for `moshi.client`: reads a recording, keeps what is played.
SOUND_CARD = """
import os, threading, time
import numpy as np

class _Stream:
    def __init__(self, samplerate, channels, blocksize, callback):
        self.block, self.callback, self.on = (blocksize, channels), callback, True
    def __enter__(self):
        threading.Thread(target=self._run, daemon=True).start()
    def __exit__(self, *_):
        self.on = False

class InputStream(_Stream):
    def _run(self):
        audio = np.load(os.environ["CARD_IN"]).reshape(-1, self.block[0], 1)
        for frame in audio:
            self.callback(frame, len(frame), None, None)
            time.sleep(0.03)
        time.sleep(0.5)
        os._exit(0)

class OutputStream(_Stream):
    def _run(self):
        played = []
        while self.on:
            out = np.zeros(self.block, dtype=np.float32)
            self.callback(out, len(out), None, None)
            played.append(out[:, 0])
            kept = os.environ["CARD_OUT"]
            np.save(kept + ".npy", np.concatenate(played))
            os.replace(kept + ".npy", kept)  # the process ends at any moment
            time.sleep(0.03)
"""


def test_moshis_own_client_talks_to_our_server(tiny_speaker, tmp_path):
    (tmp_path / "sounddevice.py").write_text(textwrap.dedent(SOUND_CARD))
    np.save(tmp_path / "in.npy", user_pcm(50))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "CARD_IN": str(tmp_path / "in.npy"),
        "CARD_OUT": str(tmp_path / "out.npy"),
    }

    async def talk(url):
        command = [sys.executable, "-m", "moshi.client", "--host", "127.0.0.1"]
        command += ["--port", url.rpartition(":")[2]]
        client = await asyncio.create_subprocess_exec(
            *command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return (await asyncio.wait_for(client.communicate(), 60))[0].decode()

    said = in_loop(tiny_speaker, talk)
    assert "connected" in said and "Lost connection" not in said and "Traceback" not in said
    played = np.load(tmp_path / "out.npy")
    assert np.abs(played).max() > 0.01
    words = [line for line in said.splitlines() if line and not line.startswith(("[", "unknown"))]
    assert words, said


@pytest.mark.parametrize("adapted", [False, True], ids=["checkpoint", "adapter"])
def test_moshi_loads_the_same_files_and_gives_our_logits(tiny_checkpoint, tmp_path, adapted):
    base = Checkpoint.open(tiny_checkpoint)
    adapter = make_adapter(tmp_path / "a", tiny_checkpoint) if adapted else None
    files = stock_files(base, adapter, tmp_path)
    assert compare(files, base) < 1e-5
    if adapted:  # it is not the base that both of them gave
        (tmp_path / "plain").mkdir()
        plain = stock_files(base, None, tmp_path / "plain")
        codes = torch.randint(0, 60, (1, 17, 6))
        with torch.no_grad(), no_compile():
            one, other = load_by_moshi(files)(codes), load_by_moshi(plain)(codes)
        assert (one.text_logits - other.text_logits).abs().max() > 1e-3


@pytest.fixture
def no_cuda(monkeypatch):
    """As on a machine without it, where moshi's server cannot be started."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_engine_moshi_without_cuda_checks_the_files_and_says_what_it_cannot(
    tiny_checkpoint, no_cuda, capsys
):
    code = serve_stock(tiny_checkpoint, None, host="localhost", port=8998)
    shown = capsys.readouterr()
    assert code == EXIT_WORK_FAILED
    assert "ignores text_prompt" in shown.out and "strictly" in shown.out
    for flag in ("--moshi-weight", "--mimi-weight", "--tokenizer", "--config-path"):
        assert flag in shown.out
    assert "CUDA" in shown.err


def test_the_command_reaches_it_and_refuses_to_open_it_to_others(tiny_checkpoint, no_cuda, capsys):
    def serve(**options):
        given = ServeOptions(engine="moshi", port=0, **options)
        serve_command.serve(str(tiny_checkpoint), given, tiny_checkpoint.parent, [])

    with pytest.raises(RequestError, match="no token"):
        serve(host="0.0.0.0")
    with pytest.raises(SystemExit) as end:
        serve()
    assert end.value.code == EXIT_WORK_FAILED and "strictly" in capsys.readouterr().out
    with pytest.raises(RequestError, match="must be duplex or moshi"):
        serve_command.serve(
            str(tiny_checkpoint), ServeOptions(engine="other"), tiny_checkpoint.parent, []
        )


def test_the_flags_are_those_that_moshis_server_has(tiny_checkpoint, tmp_path):
    files = stock_files(Checkpoint.open(tiny_checkpoint), None, tmp_path)
    shown = subprocess.run(
        [sys.executable, "-m", "moshi.server", "--help"], capture_output=True, text=True, check=True
    ).stdout
    given = [*files.arguments("localhost", 1), "--lora-weight", "--ssl", "--static"]
    for flag in (one for one in given if one.startswith("--")):
        assert flag in shown, flag


def test_other_weights_are_not_called_equal(tiny_checkpoint, tmp_path, no_cuda, monkeypatch):
    other = Checkpoint.open(write_tiny_checkpoint(tmp_path / "other", lm_seed=8))
    files = stock_files(Checkpoint.open(tiny_checkpoint), None, tmp_path)
    assert compare(files, other) > 1e-2
    monkeypatch.setattr(stock, "compare", lambda *_: 0.5)
    with pytest.raises(ServerError, match=r"our logits.*0\.5"):
        serve_stock(tiny_checkpoint, None, host="localhost", port=8998)


# -- adapters


def talked(model, num_frames=12, slot=0, **audio):
    model.begin(PROMPT, GREEDY, 1, slot=slot, **audio)
    frames = user_pcm(num_frames).reshape(-1, 1920)
    found = [model.step({slot: frame})[slot] for frame in frames]
    return np.concatenate([pcm for pcm, _ in found]), [token for _, token in found]


def test_an_unmerged_adapter_says_what_the_merged_model_says(tiny_checkpoint, tmp_path):
    adapter = make_adapter(tmp_path / "a", tiny_checkpoint)
    merge_checkpoint(tiny_checkpoint, adapter, tmp_path / "merged")
    unmerged = ServedModel.load(tiny_checkpoint, "cpu", adapter=adapter, num_slots=2)
    merged = ServedModel.load(tmp_path / "merged", "cpu", num_slots=2)
    base = ServedModel.load(tiny_checkpoint, "cpu", num_slots=2)
    one, other, plain = (talked(model) for model in (unmerged, merged, base))
    assert one[1] == other[1]
    assert np.abs(one[0] - other[0]).max() < 1e-3
    assert one[1] != plain[1] or np.abs(one[0] - plain[0]).max() > 1e-2
    digests = {model.model_digest for model in (unmerged, merged, base)}
    assert len(digests) == 3


def test_an_adapter_of_another_base_is_refused(tiny_checkpoint, tmp_path):
    other = write_tiny_checkpoint(tmp_path / "other", dim=48)
    adapter = make_adapter(tmp_path / "a", other)
    with pytest.raises(MergeError):
        ServedModel.load(tiny_checkpoint, "cpu", adapter=adapter)
    moshi_adapter(adapter, Checkpoint.open(other), tmp_path / "moshi")  # and in moshi's form
    with pytest.raises(CorruptFileError, match="must fit the model"):
        ServedModel.load(tiny_checkpoint, "cpu", adapter=tmp_path / "moshi")
    with pytest.raises(MissingInputError, match=r"found no lora\.safetensors"):
        ServedModel.load(tiny_checkpoint, "cpu", adapter=tmp_path)


# -- packaged voices


def packaged(model, voice, path):
    """A voice as PersonaPlex saves it, of codes [8, V]: embeddings by position, end of the ring."""
    lm, num_frames = model.lm, voice.shape[1]
    codes = np.empty((17, num_frames), dtype=np.int64)
    codes[0], codes[AGENT_ROWS] = TEXT_PAD, voice
    codes[USER_ROWS] = np.asarray(model.codec_tokens.sine)[:, None]
    delayed = apply_delays(codes[:, 1:], lm.card, lm.text_card)  # positions 0 to V - 1
    with torch.no_grad():
        parts = [lm.text_emb(torch.from_numpy(delayed[:1]))[0]]
        parts += [
            table(torch.from_numpy(delayed[n + 1 : n + 2]))[0] for n, table in enumerate(lm.emb)
        ]
        embeddings = torch.stack(parts).sum(0)[:-1]  # [V - 1, C]
    ring = torch.full((1, 17, 4), -2, dtype=torch.long)
    ring[0, :, (num_frames - 1) % 4] = torch.from_numpy(delayed[:, -1])
    late = [row for row, delay in enumerate(lm.delays) if delay]
    ring[0, late, num_frames % 4] = torch.from_numpy(codes[late, -1])
    torch.save({"embeddings": embeddings[:, None, None], "cache": ring}, path)
    return path


@pytest.mark.parametrize("num_frames", [slow(2), 9, slow(40)])
def test_a_packaged_voice_is_what_its_codes_would_be(tiny_checkpoint, tmp_path, num_frames):
    """Embeddings replayed against the same sample as tokens: same conversation."""
    model = ServedModel.load(tiny_checkpoint, "cpu", num_slots=2)
    rng = np.random.default_rng(num_frames)
    voice = rng.integers(0, model.lm.card, (8, num_frames))
    read = read_voice_embeddings(packaged(model, voice, tmp_path / "NATF0.pt"), model.lm)
    model.voices = VoiceList({"codes": voice}, {"codes": voice}, embeddings={"NATF0": read})
    by_codes, by_embeddings = talked(model, voice="codes"), talked(model, voice="NATF0")
    assert by_embeddings[1] == by_codes[1]
    assert np.abs(by_embeddings[0] - by_codes[0]).max() < 1e-4
    plain = talked(model)
    assert plain[1] != by_codes[1] or np.abs(plain[0] - by_codes[0]).max() > 1e-3
    fed = model.begin(PROMPT, GREEDY, 1, voice="NATF0")
    assert (fed.frames[:, : num_frames - 1] == -1).all() and (
        fed.frames[:, num_frames - 1 :] >= 0
    ).all()
    assert list(fed.tokens) == model.tokenizer.encode(f"<system> {PROMPT} <system>")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad_voices(lm, evil):
    ring = torch.zeros(1, 17, 4, dtype=torch.long)
    good = torch.zeros(5, 1, 1, lm.dim)
    return {
        "pickle": evil,
        "list": [1, 2],
        "codes": {"codes": ring},
        "width": {"embeddings": torch.zeros(5, 1, 1, lm.dim + 1), "cache": ring},
        "rows": {"embeddings": good, "cache": torch.zeros(1, 16, 4, dtype=torch.long)},
        "card": {"embeddings": good, "cache": ring + 10**6},
        "nan": {"embeddings": good * torch.nan, "cache": ring},
        "empty": {"embeddings": torch.zeros(0, 1, 1, lm.dim), "cache": ring},
        "long": {"embeddings": torch.zeros(5000, 1, 1, lm.dim), "cache": ring},
        "flat": {"embeddings": torch.tensor(1.0), "cache": torch.tensor(1)},
    }


@pytest.mark.parametrize(
    "name",
    ["pickle", "list", "codes", "width", "rows", "card", "nan", "empty", "long", "flat", "junk"],
)
def test_what_is_no_packaged_voice_is_refused(tiny_speaker, tmp_path, name):
    path = tmp_path / "voice.pt"
    if name == "junk":
        path.write_bytes(b"junk" * 50)
    else:
        torch.save(bad_voices(tiny_speaker.lm, Evil(tmp_path / "touched"))[name], path)
    with pytest.raises(RequestError, match=r"voice\.pt: must be a voice"):
        read_voice_embeddings(path, tiny_speaker.lm)
    assert not (tmp_path / "touched").exists()
