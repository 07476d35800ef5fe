"""What the server feeds the model equals what training feeds it, frame by frame.

Training reads the tensor that the tensors stage made, through `LMModel.forward`; what the model
gets is taken from there. The server gets the same prompt, voice and greeting by its own entry,
`ServedModel.begin`, and what the model was fed is read from its input cache. Frame 0 of the prompt
is passed and never seen, so training frame i is server call i + 1.

Letters: K = 17 rows, P prompt frames, T frames of a tensor.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moshi.utils.compile import no_compile

import pipeline.tensors
from duplex.config import Config, SamplingSection
from duplex.files import sha256_bytes
from duplex.records import Speech, SpokenTurn, TensorClip, Word, record_line
from duplex.sinks import FolderBlobs
from duplex.stage import StageContext
from duplex.store import StageFolder
from duplex.streams import TEXT_ROW, USER_ROWS, Prompt, coffee_text
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.pocket import train_tokenizer
from pipeline.serving.voices import VoiceList, files_of_run
from pipeline.serving.wire import (
    ChatRequest,
    chat_url,
    parse_chat_request,
    prompt_audio,
    query_pairs,
)
from pipeline.tensors import TensorsStage

GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)
WORDS = (
    "coffee",
    "large",
    "oat",
    "latte",
    "please",
    "not",
    "what",
    "ordered",
    "café",
    "☕",
    "你好",
)
FRAME = 1920


@dataclass(frozen=True)
class Case:
    """A conversation to make a tensor of: what is said when, in frames."""

    prompt: str
    turns: tuple[tuple[str, int, int, tuple[str, ...]], ...]  # role, start, end, words
    num_frames: int
    voice: bool
    greeting: bool
    alignment: str
    seed: int
    has_prompt: bool = True
    encoding: str = "conversation"


@st.composite
def cases(draw):
    turns, cursor = [], draw(st.integers(0, 4))
    role = draw(st.sampled_from(["agent", "user"]))
    for _ in range(draw(st.integers(2, 5))):
        length = draw(st.integers(12, 24)) if turns else draw(st.integers(2, 24))
        words = tuple(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)))
        turns.append((role, cursor, cursor + length, words))
        cursor += length + draw(st.integers(0, 6))
        role = "user" if role == "agent" else "agent"
    return Case(
        prompt=" ".join(draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=20))),
        turns=tuple(turns),
        num_frames=cursor + draw(st.integers(30, 36)),  # room for the last turn's tokens
        voice=(prompt := draw(st.sampled_from([True, True, True, False])))
        and any(role == "agent" and end - start >= 12 for role, start, end, _ in turns)
        and draw(st.booleans()),
        greeting=prompt and draw(st.booleans()),
        has_prompt=prompt,
        alignment=draw(st.sampled_from(["onset", "word", "uniform"])),
        encoding=draw(st.sampled_from(["conversation", "turn"])),
        seed=draw(st.integers(0, 2**16)),
    )


FIXED = Case(
    prompt="I ordered two shots please ☕",
    turns=(
        ("user", 2, 20, ("what", "please")),
        ("agent", 22, 40, ("large", "oat", "latte", "thanks")),
        ("user", 42, 60, ("two", "shots")),
    ),
    num_frames=66,
    voice=True,
    greeting=True,
    alignment="onset",
    seed=3,
)


def recording(case: Case) -> np.ndarray:
    """float32 [2, S]: noise of two loudnesses, so that no code hangs on digital silence."""
    rng = np.random.default_rng(case.seed)
    audio = 0.01 * rng.standard_normal((2, case.num_frames * FRAME))
    for role, start, end, _ in case.turns:
        span = slice(start * FRAME, end * FRAME)
        audio[0 if role == "agent" else 1, span] += 0.1 * rng.standard_normal((end - start) * FRAME)
    return audio.astype(np.float32)


class Workbench:
    """The tensors stage on one side, the server's speaker and a training model on the other."""

    def __init__(self, folder: Path, checkpoint: Path, speaker):
        self.folder = StageFolder(folder / "04-speech-x", "speech", "x")
        self.out = StageFolder(folder / "05-tensors-x", "tensors", "x")
        self.checkpoint = checkpoint
        self.speaker = speaker
        opened = Checkpoint.open(checkpoint)
        self.lm, self.mimi = opened.load_lm(), opened.load_mimi()
        self.stage = TensorsStage()

    def speech(self, case: Case) -> Speech:
        buffer = io.BytesIO()
        pcm = np.round(recording(case).T * 32768).astype(np.int16)
        soundfile.write(buffer, pcm, 24_000, format="WAV", subtype="PCM_16")
        return Speech(
            id="case",
            dialogue_id="case",
            persona_id="maria",
            scenario_id="none",
            system_prompt=case.prompt,
            first_speaker=case.turns[0][0],
            audio=FolderBlobs(self.folder).put(buffer.getvalue(), ".wav"),
            num_samples=len(pcm),
            turns=tuple(
                SpokenTurn(
                    role=role,
                    text=" ".join(words),
                    voice_id=f"{role}-voice",
                    start_s=start * 0.08,
                    end_s=end * 0.08,
                    words=tuple(
                        Word(text=word, start_s=(start + i) * 0.08, end_s=(start + i + 1) * 0.08)
                        for i, word in enumerate(words)
                    ),
                )
                for role, start, end, words in case.turns
            ),
        )

    def tensor(self, case: Case, **section) -> tuple[np.ndarray, TensorClip, dict[str, Path]]:
        """What training reads: codes int64 [17, T], the record, and the server's voices."""
        tensors = {"alignment": case.alignment, "greeting": case.greeting,
                   "voice_prompt_s": 2 if case.voice else 0, "prompt": case.has_prompt,
                   "encoding": case.encoding}  # fmt: skip
        config = Config.model_validate(
            {
                "name": "contract",
                "model": {"base": str(self.checkpoint)},
                "tensors": tensors | section | {"runtime": {"cache": False, "device": "cpu"}},
            }
        )
        context = StageContext(config, self.folder.path.parent, {"speech": self.folder})
        if self.stage._loaded is None:
            self.stage.setup(context)
        self.stage._loaded = replace(self.stage._loaded, context=context)
        counts = {"records": 1}
        self.folder.complete(
            [record_line(self.speech(case))], files=[], counts=counts, provenance={}
        )
        blobs = FolderBlobs(self.out)
        records = [
            record
            for task in self.stage.tasks(context)
            for record in self.stage.process(task, 0, blobs)
        ]
        lines = [record_line(record) for record in records]
        self.out.complete(lines, files=[], counts=counts, provenance={})
        clip = next(record for record in records if isinstance(record, TensorClip))
        content = self.out.read_blob(clip.tensor, ".pt")
        codes = torch.load(io.BytesIO(content), weights_only=True).numpy()
        return codes, clip, files_of_run(self.out)

    def read_by_training(self, codes: np.ndarray) -> np.ndarray:
        """int64 [17, T]: what `LMModel.forward` gives its transformer."""
        seen = []
        inner = self.lm.forward_text
        self.lm.forward_text = lambda sequence, *rest: (seen.append(sequence), inner(sequence))[1]
        try:
            with torch.no_grad(), no_compile():
                self.lm(torch.from_numpy(codes)[None])
        finally:
            del self.lm.forward_text
        return seen[0][0].numpy()

    def asked(self, case: Case, voices: dict[str, Path]) -> ChatRequest:
        """What a server reads in the URL that a run gives for this persona."""
        text = case.prompt if case.has_prompt else ""
        url = chat_url("http://127.0.0.1:1", text_prompt=text, **prompt_audio("maria", voices))
        self.speaker.voices = VoiceList.load(voices, self.mimi, self.lm)
        self.speaker.bare = not case.has_prompt
        return parse_chat_request(query_pairs(url))

    def read_by_server(self, case: Case, voices: dict[str, Path]) -> np.ndarray:
        """int64 [17, P]: what a conversation with this prompt feeds the model."""
        wanted = self.asked(case, voices)
        voice, greeting = wanted.voice_prompt, wanted.greeting
        begin = self.speaker.begin
        return begin(wanted.text_prompt, GREEDY, 1, voice=voice, greeting=greeting).frames

    def replayed_by_server(self, prompt: Prompt, codes: np.ndarray) -> np.ndarray:
        """int64 [17, T + 1]: the input cache when the tensor itself is forced, call by call."""
        whole = np.concatenate([prompt.codes[:, :1], codes], axis=1)
        plan = self.speaker.plan
        replayed = self.speaker.planned(replace(prompt, codes=whole))
        self.speaker.plan = lambda *_: replayed
        try:
            return self.speaker.begin("", GREEDY, 1).frames
        finally:
            self.speaker.plan = plan


def contract_faults(bench: Workbench, case: Case, **section) -> list[str]:
    """Where training and server disagree; empty when the contract holds."""
    codes, clip, voices = bench.tensor(case, **section)
    training = bench.read_by_training(codes)
    served = bench.read_by_server(case, voices)
    faults = []
    prompt_frames = served.shape[1]
    differs = np.flatnonzero((training[:, :prompt_frames] != served).any(axis=0))
    if len(differs):
        faults.append(f"position {differs[0]} of the prompt")
    if max((span.end for span in clip.prompt), default=0) != prompt_frames - 1:
        faults.append("the record's prompt span")
    if (training[:, 1:] < 0).any():
        faults.append("an id below 0, which no server feeds")
    if not faults:
        wanted = bench.asked(case, voices)
        prompt = bench.speaker.plan(wanted.text_prompt, wanted.voice_prompt, wanted.greeting).prompt
        replayed = bench.replayed_by_server(prompt, codes)
        if not np.array_equal(replayed[:, : training.shape[1]], training):
            faults.append("a position of the dialogue")
    return faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory, tiny_checkpoint, tiny_speaker):
    return Workbench(tmp_path_factory.mktemp("contract"), tiny_checkpoint, tiny_speaker)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_training_reads_what_the_server_feeds(bench, case):
    assert contract_faults(bench, case) == []


def test_the_fixed_case_has_all_phases_and_holds(bench):
    _, clip, _ = bench.tensor(FIXED)
    phases = [span.label for span in clip.prompt]
    assert phases == ["voice", "silence", "text", "silence", "greeting"]
    assert contract_faults(bench, FIXED) == []


def test_the_users_rows_are_what_the_server_hears(bench):
    """The dialogue's user rows, encoded whole, against the server's frame-by-frame encoding."""
    codes, _, voices = bench.tensor(FIXED)
    served = bench.read_by_server(FIXED, voices)
    start = FIXED.turns[0][2] * FRAME  # the dialogue begins where the greeting ends
    audio = recording(FIXED)[1, start:]
    audio = (np.round(audio * 32768) / 32768).astype(np.float32)
    inputs = [served]
    for frame in audio.reshape(-1, FRAME):
        bench.speaker.step({0: frame})
        inputs.append(bench.speaker.slots.last_input(0)[:, None])
    fed = np.concatenate(inputs, axis=1)
    training = bench.read_by_training(codes)
    length = min(fed.shape[1], training.shape[1])
    assert length - served.shape[1] > 40
    assert np.array_equal(fed[USER_ROWS, :length], training[USER_ROWS, :length])


# -- what the test must notice


def closing_tag(monkeypatch, bench):
    def tokens(tokenizer, text):
        return tokenizer.encode(coffee_text(text))

    monkeypatch.setattr(pipeline.tensors, "prompt_tokens", tokens)


def shifted_prompt(monkeypatch, bench):
    monkeypatch.setattr(Prompt, "training_codes", lambda self: np.roll(self.codes, 1, 1)[:, 1:])


def kept_frame_0(monkeypatch, bench):
    monkeypatch.setattr(Prompt, "training_codes", lambda self: self.codes)


def dropped_frame_1(monkeypatch, bench):
    monkeypatch.setattr(Prompt, "training_codes", lambda self: self.codes[:, 2:])


def other_tokenizer(monkeypatch, bench):
    import sentencepiece

    text = Path("data/pocket/corpus.txt").read_text()
    tokenizer = sentencepiece.SentencePieceProcessor()
    tokenizer.LoadFromSerializedProto(train_tokenizer(text, 330))
    monkeypatch.setattr(bench.stage, "_loaded", replace(bench.stage._loaded, tokenizer=tokenizer))


def other_voice(monkeypatch, bench):
    def louder(samples, longest_s):
        return 0.5 * pipeline.engines.voicesample.voice_sample(samples, longest_s)

    monkeypatch.setattr(pipeline.tensors, "voice_sample", louder)
    monkeypatch.setattr(pipeline.serving.voices, "voice_sample", lambda samples, _: samples * 2)


@pytest.mark.parametrize(
    "plant",
    [closing_tag, shifted_prompt, kept_frame_0, dropped_frame_1, other_tokenizer, other_voice],
)
def test_a_broken_side_is_noticed(bench, monkeypatch, plant):
    bench.tensor(FIXED)  # loads the stage
    plant(monkeypatch, bench)
    assert contract_faults(bench, FIXED) != []


def test_minus_one_as_padding_is_noticed(bench):
    assert contract_faults(bench, FIXED, padding="zero") == ["an id below 0, which no server feeds"]


def test_the_predecessors_layout_breaks_the_contract(bench):
    plain = replace(FIXED, voice=False, greeting=False)
    assert contract_faults(bench, plain) == []
    assert contract_faults(bench, plain, layout="coffee")[0].startswith("position")


def test_the_text_row_of_the_prompt_holds_the_prompts_tokens(bench):
    codes, clip, _ = bench.tensor(FIXED)
    (span,) = (span for span in clip.prompt if span.label == "text")
    tokenizer = bench.speaker.tokenizer
    text = f"<system> {FIXED.prompt} <system>"
    assert codes[TEXT_ROW, span.start : span.end].tolist() == tokenizer.encode(text)
    assert sha256_bytes(tokenizer.serialized_model_proto()) == clip.tokenizer_digest
