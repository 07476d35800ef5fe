"""Stage 5: spoken conversations -> training tensors `[17, T]`.

A conversation's two channels are encoded whole, as one batch of two, by the codec of the
base model; silence is kept as encoded silence (benchmarks/tensors.py measures what turn by
turn would change). The text row holds the agent's words by `tensors.alignment`, and the
tensor starts with the prompt as the server will feed it, less frame 0 (`duplex/streams.py`).

Held out are whole personas, or whole conversations, never frames; the split is checked.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from duplex.alignment import align
from duplex.base import Record
from duplex.clips import (
    assemble,
    cut_windows,
    shift_turns,
    text_digest,
    text_turns,
    turn_frames,
    turn_spans,
)
from duplex.config import Config, TensorsSection
from duplex.errors import CorruptFileError, RecordError, RequestError
from duplex.frames import (
    FRAME_SAMPLES,
    frames_to_seconds,
    samples_at,
)
from duplex.memory import keep_freed_memory
from duplex.mixing import CHANNELS
from duplex.records import Speech, SpokenTurn, TensorClip, VoiceSample
from duplex.splits import Split
from duplex.stage import BlobSink, MapStage, StageContext, Task
from duplex.streams import (
    COFFEE_TEXT_FRAMES,
    TEXT_PAD,
    ZERO_TOKEN,
    Prompt,
    build_prompt,
    check_codes,
    coffee_text,
    prompt_tokens,
)
from pipeline.engines.checkpoint import model_identity, resolve_checkpoint
from pipeline.engines.clipplan import (
    Excerpt,
    agent_voices,
    check_names,
    check_streams,
    choose_excerpts,
    dialogue_start,
    fixed_batches,
    greeting_excerpt,
    opening,
    prompt_spans,
    split_of,
)
from pipeline.engines.encoding import Encoder, Recording, mono_wav_bytes, quantize, read_stereo
from pipeline.engines.voicesample import voice_sample

CACHE_FOLDER = ".cache/codes"


@dataclass(frozen=True)
class ClipTask:
    """A conversation with its split, the voice sample of its prompt, and its fixed batch."""

    speech: Speech
    split: Split
    sample: Excerpt | None
    batch: tuple[Speech, ...]


@dataclass(frozen=True)
class _Loaded:
    """What `setup` loads, once for each process."""

    context: StageContext
    encoder: Encoder
    tokenizer: Any
    tokens: Any
    config: dict[str, Any]
    digests: tuple[str, str]


class TensorsStage(MapStage):
    name = "tensors"
    number = 5
    version = 2
    reads = ("speech",)
    # A clip's split is among its task's sources.
    set_only = frozenset({"valid_fraction"})

    def __init__(self) -> None:
        self._loaded: _Loaded | None = None

    def engine(self, config: Config) -> str:
        return model_identity(config.model)

    def takes_workers(self, config: Config) -> bool:
        """Processes of one thread each on a CPU; a GPU is one engine, and takes batches."""
        import torch

        runtime = config.tensors.runtime
        on_gpu = runtime.device == "cuda" or (
            runtime.device == "auto" and torch.cuda.is_available()
        )
        return not on_gpu and config.tensors.batch == 1

    def tasks(self, context: StageContext) -> list[Task]:
        section, seed = context.config.tensors, context.config.seed
        speeches: list[Speech] = list(context.records("speech", Speech))
        split = split_of(speeches, section, seed)
        excerpts: dict[str, Excerpt | None] = dict.fromkeys(speech.id for speech in speeches)
        tasks = []
        if section.voice_prompt_s:
            excerpts |= choose_excerpts(speeches, split, seed)
            kept = {excerpt.id: excerpt for excerpt in excerpts.values() if excerpt}
            tasks += [Task(e.id, ("voice", e.speech.digest, str(e.turn)), e) for e in kept.values()]
        greeting = greeting_excerpt(speeches, split, seed) if section.greeting else None
        if greeting:
            sources = ("greeting", greeting.speech.digest, str(greeting.turn))
            tasks.append(Task(greeting.id, sources, greeting))
        batches = fixed_batches(speeches, section.batch)
        for speech in speeches:
            excerpt = excerpts[speech.id]
            sources = (speech.digest, split[speech.id])
            sources += (excerpt.id, excerpt.speech.digest, str(excerpt.turn)) if excerpt else ()
            batch = batches[speech.id]
            sources += tuple(mate.audio for mate in batch) if len(batch) > 1 else ()
            tasks.append(
                Task(speech.id, sources, ClipTask(speech, split[speech.id], excerpt, batch))
            )
        check_names(tasks, speeches)
        return tasks

    def prepare(self, context: StageContext) -> None:
        resolve_checkpoint(context.config.model, context.runs_root)

    def setup(self, context: StageContext) -> None:
        import torch

        from pipeline.engines.codec import measure_tokens

        runtime = context.config.tensors.runtime
        device = runtime.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise RequestError(
                "tensors.runtime.device: cuda needs a GPU, torch finds none; use cpu, or auto"
            )
        if device == "cpu":
            keep_freed_memory()
        checkpoint = resolve_checkpoint(context.config.model, context.runs_root)
        mimi = checkpoint.load_mimi(device)
        codec_digest, card = checkpoint.digest("codec"), checkpoint.config["card"]
        cache = context.runs_root / CACHE_FOLDER if runtime.cache else None
        self._loaded = _Loaded(
            context=context,
            encoder=Encoder(mimi, codec_digest, card, cache),
            tokenizer=checkpoint.load_tokenizer(),
            tokens=measure_tokens(mimi),
            config=checkpoint.config,
            digests=(codec_digest, checkpoint.digest("tokenizer")),
        )

    def process(self, task: Task, seed: int, blobs: BlobSink) -> list[Record]:
        assert self._loaded is not None, "setup comes first"
        try:
            if isinstance(task.payload, Excerpt):
                return [self._sample_record(task.payload, blobs)]
            return self._clips(task.payload, blobs)
        except ValueError as error:
            raise RecordError(str(error)) from error

    def close(self) -> None:
        self._loaded = None

    # -- voice samples and greetings

    def _sample_record(self, excerpt: Excerpt, blobs: BlobSink) -> VoiceSample:
        samples = self._excerpt_samples(excerpt)
        return VoiceSample(
            id=excerpt.id,
            kind=excerpt.kind,
            voice_id=excerpt.speech.turns[excerpt.turn].voice_id,
            persona_id=excerpt.speech.persona_id,
            speech_id=excerpt.speech.id,
            audio=blobs.put(mono_wav_bytes(samples), ".wav"),
            num_frames=len(samples) // FRAME_SAMPLES,
        )

    def _excerpt_samples(self, excerpt: Excerpt) -> np.ndarray:
        """float32 [S], whole frames on the 16-bit grid: what is stored is what is encoded."""
        speech, section = excerpt.speech, self._section
        turn = speech.turns[excerpt.turn]
        if excerpt.kind == "greeting":
            start, end = turn_frames(turn)
            stop = min(end * FRAME_SAMPLES, speech.num_samples)
            samples = read_stereo(self._audio(speech), start * FRAME_SAMPLES, stop)[1]
            return np.pad(quantize(samples), (0, (end - start) * FRAME_SAMPLES - len(samples)))
        stop = min(samples_at(turn.end_s), speech.num_samples)
        samples = read_stereo(self._audio(speech), samples_at(turn.start_s), stop)[0]
        return quantize(voice_sample(samples, section.voice_prompt_s))

    # -- clips

    @property
    def _section(self) -> TensorsSection:
        assert self._loaded is not None
        return self._loaded.context.config.tensors

    def _audio(self, speech: Speech) -> Path:
        assert self._loaded is not None
        return self._loaded.context.inputs["speech"].blob_path(speech.audio, ".wav")

    def _recording(self, speech: Speech) -> Recording:
        start = dialogue_start(speech, greeting=self._section.greeting)
        return Recording(partial(self._audio, speech), speech.audio, speech.num_samples, start)

    def _batch(self, clip: ClipTask) -> list[Recording]:
        """The clip's fixed batch, less those that cannot be encoded: they are refused by
        themselves, and must not take the others with them."""
        members = []
        for speech in clip.batch:
            try:
                recording = self._recording(speech)
                check_streams(speech, recording)
            except (RecordError, CorruptFileError):
                continue
            members.append(recording)
        return members

    def _prompt(self, clip: ClipTask) -> Prompt | None:
        section, loaded = self._section, self._loaded
        assert loaded is not None
        if not section.prompt:
            return None
        speech = clip.speech
        if section.layout == "coffee":
            tokens = loaded.tokenizer.encode(coffee_text(speech.system_prompt))
            return build_prompt(tokens, loaded.tokens, min_text_frames=COFFEE_TEXT_FRAMES)
        voice = greeting = None
        if clip.sample:
            voice = loaded.encoder.mono(self._excerpt_samples(clip.sample))
        if section.greeting and opening(speech):
            own = Excerpt(speech, 0, "greeting", "greeting")
            greeting = loaded.encoder.mono(self._excerpt_samples(own))
        tokens = prompt_tokens(loaded.tokenizer, speech.system_prompt)
        return build_prompt(tokens, loaded.tokens, voice=voice, greeting=greeting)

    def _clips(self, clip: ClipTask, blobs: BlobSink) -> list[Record]:
        loaded, section, speech = self._loaded, self._section, clip.speech
        assert loaded is not None
        prompt = self._prompt(clip)
        # The predecessor's files hold frame 0 too.
        head = prompt and (prompt.codes if section.layout == "coffee" else prompt.training_codes())
        recording = self._recording(speech)
        check_streams(speech, recording)
        longest = min(section.max_frames, loaded.config.get("context") or section.max_frames)
        budget = longest - (head.shape[1] if head is not None else 0)
        start_s = frames_to_seconds(recording.start_frame)
        turns = shift_turns(speech.turns, start_s, float("inf"))
        windows = self._windows(turns, recording.num_frames, budget, longest)
        audio = self._codes(recording, turns, clip)
        records: list[Record] = []
        for number, (start, end) in enumerate(windows):
            name = speech.id if len(windows) == 1 else f"{speech.id}.w{number:02d}"
            edges = frames_to_seconds(start), frames_to_seconds(end)
            inside = turns if len(windows) == 1 else shift_turns(turns, *edges)
            records.append(
                self._clip(name, clip, prompt, head, inside, audio[:, :, start:end], blobs)
            )
        return records

    def _windows(
        self, turns: tuple[SpokenTurn, ...], num_frames: int, budget: int, longest: int
    ) -> list[tuple[int, int]]:
        if num_frames <= budget:
            return [(0, num_frames)]
        prompt_frames = longest - budget
        if self._section.long == "reject" or budget < 1:
            limit, raised = "the model's context", ""
            if longest == self._section.max_frames:
                limit, raised = "tensors.max_frames", ", or raise tensors.max_frames"
            raise RecordError(
                f"a clip must have at most {longest} frames ({limit}), found "
                f"{num_frames + prompt_frames} ({prompt_frames} of them prompt). Set tensors.long: "
                "cut, or shorten the conversation (dialogues.max_turns), the system text or "
                f"tensors.voice_prompt_s{raised}."
            )
        windows = cut_windows(turns, num_frames, budget)
        if windows is None:
            raise RecordError(
                f"a conversation must pause within {budget} frames to be cut there, found speech "
                "without a pause. Raise tensors.max_frames or split the recording."
            )
        return windows

    def _codes(
        self, recording: Recording, turns: tuple[SpokenTurn, ...], clip: ClipTask
    ) -> np.ndarray:
        loaded, section = self._loaded, self._section
        assert loaded is not None
        if section.encoding == "turn":
            spans = [(CHANNELS.index(turn.role), *turn_frames(turn)) for turn in turns]
            return loaded.encoder.turns(recording, spans, loaded.tokens.silence)
        if len(clip.batch) < 2:
            return loaded.encoder.conversation(recording)
        planned = [mate.audio for mate in clip.batch]
        return loaded.encoder.conversation_of_batch(recording, planned, partial(self._batch, clip))

    def _clip(
        self,
        name: str,
        clip: ClipTask,
        prompt: Prompt | None,
        head: np.ndarray | None,
        turns: tuple[SpokenTurn, ...],
        audio: np.ndarray,
        blobs: BlobSink,
    ) -> TensorClip:
        import torch

        loaded, section, speech = self._loaded, self._section, clip.speech
        assert loaded is not None
        num_frames = audio.shape[2]
        by_word = section.alignment == "word"
        placed = text_turns(turns, num_frames, loaded.tokenizer.encode, by_word=by_word)
        text = align(
            placed,
            num_frames,
            section.alignment,
            onset_fraction=section.onset_fraction,
            drop=section.overflow == "drop",
            padding=ZERO_TOKEN if section.padding == "zero" else TEXT_PAD,
        )
        if text.dropped and section.overflow == "continue":
            raise RecordError(
                f"every text token must have a frame, found {text.dropped} after the clip's last. "
                "Raise speech.tail_s, or let them go with tensors.overflow: drop."
            )
        codes = assemble(head, text.row, audio)
        faults = check_codes(
            codes,
            card=loaded.config["card"],
            text_card=loaded.config["text_card"],
            zero_text=section.padding == "zero",
        )
        if faults:
            raise RecordError("; ".join(faults))
        buffer = io.BytesIO()
        torch.save(torch.from_numpy(codes), buffer)
        prompt_frames = codes.shape[1] - num_frames
        return TensorClip(
            id=name,
            speech_id=speech.id,
            dialogue_id=speech.dialogue_id,
            persona_id=speech.persona_id,
            voices=agent_voices(speech),
            text_digest=speech.text_digest or text_digest(speech.turns),
            voice_sample=clip.sample.id if clip.sample else None,
            tensor=blobs.put(buffer.getvalue(), ".pt"),
            num_frames=codes.shape[1],
            prompt=prompt_spans(prompt, section.layout),
            turns=turn_spans(turns, prompt_frames, codes.shape[1]),
            text_tokens=sum(len(turn.tokens) for turn in placed),
            dropped_tokens=text.dropped,
            late_tokens=text.late,
            alignment=section.alignment,
            padding=section.padding,
            layout=section.layout,
            split=clip.split,
            split_by=section.split,
            codec_digest=loaded.digests[0],
            tokenizer_digest=loaded.digests[1],
        )


if __name__ == "__main__":
    from pipeline.run import stage_main

    stage_main("tensors")
