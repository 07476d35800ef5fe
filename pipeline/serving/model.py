"""A checkpoint as it is served: LM, codec, tokenizer and voices, with the slots of a batch.

Letters: K = 17 rows (text, 8 agent, 8 user), P prompt frames.

One call at a time, always from the same thread: `plan` alone may be asked from any.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from duplex.config import SamplingSection
from duplex.errors import RequestError, ServerError
from duplex.files import sha256_bytes, sha256_file
from duplex.frames import FRAME_SAMPLES
from duplex.streams import (
    CODEBOOKS,
    DELAYS,
    NUM_ROWS,
    TEXT_PAD,
    TEXT_ROW,
    CodecTokens,
    Prompt,
    bare_prompt,
    build_prompt,
)
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import measure_tokens
from pipeline.serving.prefill import FilledPrompt, Prefill, PromptCache
from pipeline.serving.slots import Slots
from pipeline.serving.stock import load_by_moshi, stock_files
from pipeline.serving.voice_embeddings import VoiceEmbeddings
from pipeline.serving.voices import VoiceList
from pipeline.serving.wire import prompt_digest, prompt_tokens

if TYPE_CHECKING:
    import sentencepiece
    from moshi.models.compression import MimiModel
    from moshi.models.lm import LMModel

WARM_UP_FRAMES = 4
CACHE_BYTES = 1 << 30  # of filled prompts


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt in frames. key: what its filled state hangs on."""

    prompt: Prompt
    voice: VoiceEmbeddings | None
    key: str


@dataclass(frozen=True)
class FedPrompt:
    """What the model was fed: noted where it looked ids up, and read from its input cache.

    frames: int64 [K, P], delayed: row k of position s holds `codes[k, s - d]`, or the initial
        token where s <= d. Equal to `duplex.streams.apply_delays`; -1 where stored embeddings
        of a voice were fed.
    tokens: the text row without the padding at its ends.
    from_cache: the state behind it was kept from an earlier conversation, which took `prefill_s`.
    """

    frames: np.ndarray
    tokens: tuple[int, ...]
    seed: int
    prefill_s: float
    from_cache: bool = False

    @property
    def digest(self) -> str:
        return prompt_digest(self.tokens)

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def frames_digest(self) -> str:
        return prompt_digest(self.frames)

    def metadata(self, model_digest: str) -> dict[str, Any]:
        """What a client is told of it."""
        return {
            "digest": self.digest,
            "count": self.count,
            "frames": self.frames.shape[1],
            "frames_digest": self.frames_digest,
            "model_digest": model_digest,
            "prefill_s": round(self.prefill_s, 4),
            "prefill_kept": self.from_cache,
            "seed": self.seed,
        }


class ServedModel:
    """LM, codec and tokenizer of one checkpoint, for `num_slots` conversations.

    When a conversation outgrows the LM's context, its oldest frames drop out; `left` says when.
    """

    def __init__(
        self,
        lm: LMModel,
        mimi: MimiModel,
        tokenizer: sentencepiece.SentencePieceProcessor,
        *,
        model_digest: str,
        tokenizer_file: bytes,
        voices: dict[str, Path] | None = None,
        bare: bool = False,
        num_slots: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ):
        _check_layout(lm.dep_q, lm.n_q, lm.delays)
        if lm.fuser is not None:
            raise ServerError(
                "the model must take no conditions, found a conditioned one; use a Moshi checkpoint"
            )
        self.lm, self.mimi, self.tokenizer = lm, mimi, tokenizer
        self.model_digest = model_digest
        self.tokenizer_file = tokenizer_file
        self.codec_tokens: CodecTokens = measure_tokens(mimi)
        self.voices = VoiceList.load(voices or {}, mimi, lm)
        self.bare = bare
        self.device = lm.device
        self.slots = Slots(lm, mimi, num_slots)
        self.cache = PromptCache(cache_bytes)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "auto",
        voices: dict[str, Path] | None = None,
        *,
        bare: bool = False,
        num_slots: int = 1,
        adapter: Path | None = None,
    ) -> ServedModel:
        """Load a checkpoint folder: float32 on a CPU, bfloat16 on a GPU.

        Args:
            adapter: folder of a LoRA adapter, in PEFT's form or moshi's, that stays unmerged:
                moshi's own LoRA layers compute it beside the base's weights.
            voices: recordings by the names that a query may give them, or PersonaPlex's `.pt`.
            bare: the model was trained without prompts, so none is fed.

        Raises:
            RequestError: a voice that is none.
            MissingInputError, CorruptFileError: from the checkpoint.
            MergeError: the adapter is none, or one of another base.
            ServerError: its layout is not one that this server speaks, or no such device.
        """
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config
        _check_layout(config.get("dep_q", 8), config.get("n_q", 16), config.get("delays", DELAYS))
        place = pick_device(device)
        dtype = torch.float32 if place == "cpu" else torch.bfloat16
        with ThreadPoolExecutor(1) as pool:  # 15 GB take as long to hash as to load
            digest = pool.submit(_digest_of, checkpoint, adapter)
            lm = _load_lm(checkpoint, adapter, place, dtype)
            return cls(
                lm,
                checkpoint.load_mimi(place),
                checkpoint.load_tokenizer(),
                model_digest=digest.result(),
                tokenizer_file=checkpoint.files()["tokenizer"].read_bytes(),
                voices=voices,
                bare=bare,
                num_slots=num_slots,
            )

    # -- a conversation

    def plan(self, prompt_text: str, voice: str = "", greeting: str = "") -> PlannedPrompt:
        """The prompt in frames. Touches no state, so that it may be asked for at any time.

        Raises:
            RequestError: it does not fit into the model's context, or names no voice of ours; or
                the model takes no prompts and is given one.
        """
        if self.bare:
            if prompt_text.strip() or voice or greeting:
                raise RequestError(
                    "this model was trained without prompts (tensors.prompt: false) and takes "
                    "none, found one. Leave text_prompt, voice_prompt and greeting out."
                )
            return self.planned(bare_prompt(self.codec_tokens))
        embeddings = self.voices.embeddings(voice)
        if embeddings is None:
            codes = self.voices.voice(voice)
        else:
            codes = embeddings.placeholder(self.codec_tokens)
        prompt = build_prompt(
            prompt_tokens(self.tokenizer, prompt_text),
            self.codec_tokens,
            voice=codes,
            greeting=self.voices.greeting(greeting),
        )
        context = self.lm.context
        if context is not None and prompt.num_frames >= context:
            raise RequestError(
                f"text_prompt must fit into the model's context of {context} frames with room to "
                f"talk; found {len(prompt.tokens)} tokens, {prompt.num_frames} frames. Shorten it "
                f"by {prompt.num_frames - context + 1} tokens and more: a frame of talk is one."
            )
        return self.planned(prompt, embeddings)

    def planned(self, prompt: Prompt, voice: VoiceEmbeddings | None = None) -> PlannedPrompt:
        """A prompt in frames with its key."""
        stored = b"" if voice is None else voice.digest
        parts = [self.model_digest.encode(), prompt.codes.tobytes(), stored]
        return PlannedPrompt(prompt, voice, sha256_bytes(b"\0".join(parts)))

    def filled(self, planned: PlannedPrompt) -> FilledPrompt | None:
        """The state behind a prompt, if it is kept from before."""
        return self.cache.get(planned.key)

    def prefill(self, planned: PlannedPrompt) -> Prefill:
        """To be advanced until it is filled, then kept (`cache`) and opened."""
        return Prefill(self.lm, planned.prompt, planned.voice)

    def open(
        self,
        slot: int,
        filled: FilledPrompt,
        sampling: SamplingSection,
        seed: int,
        *,
        from_cache: bool = False,
    ) -> FedPrompt:
        """Start a conversation in a slot, behind its prompt."""
        frames = self.slots.open(slot, filled, sampling, seed)
        tokens = _strip_padding(frames[TEXT_ROW, 1:])
        return FedPrompt(frames, tokens, seed, filled.prefill_s, from_cache)

    def step(self, heard: Mapping[int, np.ndarray]) -> dict[int, tuple[np.ndarray, int | None]]:
        """`Slots.step`: a frame of each conversation in `heard`."""
        return self.slots.step(heard)

    def begin(
        self,
        prompt_text: str,
        sampling: SamplingSection,
        seed: int,
        *,
        slot: int = 0,
        voice: str = "",
        greeting: str = "",
    ) -> FedPrompt:
        """Plan, fill and open in one call, for callers without neighbours to care for.

        An empty `prompt_text` gives a conversation without a system text; the silence around
        it is fed all the same. The same seed, prompt and audio give the same conversation.

        Raises:
            RequestError: as `plan`.
        """
        planned = self.plan(prompt_text, voice, greeting)
        kept = self.filled(planned)
        if kept is not None:
            return self.open(slot, kept, sampling, seed, from_cache=True)
        prefill = self.prefill(planned)
        while (filled := prefill.advance()) is None:
            pass
        self.cache.put(planned.key, filled)
        return self.open(slot, filled, sampling, seed)

    def warm_up(self) -> None:
        """A few frames, so that kernels and CUDA graphs are there before the first client."""
        self.begin("", SamplingSection(), seed=0)
        for _ in range(WARM_UP_FRAMES):
            self.step({0: np.zeros(FRAME_SAMPLES, dtype=np.float32)})


def _load_lm(checkpoint: Checkpoint, adapter: Path | None, device: str, dtype: torch.dtype) -> Any:
    if adapter is None:
        return checkpoint.load_lm(device, dtype)
    with TemporaryDirectory(prefix="duplex-adapter-") as name:
        return load_by_moshi(stock_files(checkpoint, adapter, Path(name)), device, dtype)


def _digest_of(checkpoint: Checkpoint, adapter: Path | None) -> str:
    """sha256 of the weights; with an adapter, of both."""
    digest = checkpoint.digest("moshi")
    if adapter is None:
        return digest
    parts = [sha256_file(path) for path in sorted(adapter.glob("*.safetensors"))]
    return sha256_bytes(" ".join([digest, *parts]).encode())


def pick_device(device: str) -> str:
    """`auto` is the GPU if there is one.

    Raises:
        ServerError: a GPU is asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ServerError(f"device {device} must be there, torch finds no GPU; use --device cpu")
    if device != "cpu" and not device.startswith("cuda"):
        raise ServerError(f"device must be auto, cpu or cuda, found {device}")
    return device


def _check_layout(dep_q: int, n_q: int, delays: Any) -> None:
    if dep_q == 2 * CODEBOOKS:
        raise ServerError(
            "the checkpoint must predict the 8 codebooks of the agent, found dep_q 16 (PersonaPlex "
            "as published). Cut it first: duplex convert checkpoint FOLDER OUT."
        )
    if dep_q != CODEBOOKS or n_q != NUM_ROWS - 1 or tuple(delays) != DELAYS:
        raise ServerError(
            f"the checkpoint must have dep_q 8, n_q 16 and delays {list(DELAYS)}, "
            f"found dep_q {dep_q}, n_q {n_q} and delays {list(delays)}: not a Moshi model"
        )


def _strip_padding(row: np.ndarray) -> tuple[int, ...]:
    spoken = np.flatnonzero((row != TEXT_PAD) & (row >= 0))
    if spoken.size == 0:
        return ()
    return tuple(int(token) for token in row[spoken[0] : spoken[-1] + 1])
