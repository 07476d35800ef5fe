"""A model in conversation: the prompt is forced in, then one user frame gives one agent frame.

Letters: B = 1 batch, K = 17 rows (text, 8 agent, 8 user), P prompt frames, d a row's delay.

At call s (from 0) `LMGen` reads position s from its cache and predicts position p = s + 1.
The user codes of prompt frame s are passed at call s; hooks overwrite what was predicted
with text `frame[p]` and agent codebook k `frame[p - d]` where 1 <= p - d < P. So the last
prompt call (p = P) still forces the delayed codebooks, and frame 0 is never seen (see
`duplex.streams`). After P calls the model has read positions 0 to P - 1, which are read back
from its own cache: what a server says about its prompt is what the model was fed.

The prompt goes in frame by frame, one step of the temporal transformer each; the depth
transformer is spared, since all that it would say is overwritten: pocket model on one core,
3 ms a frame against 15 in conversation. (In one block is faster still: with slots.)

One call at a time, always from the same thread: seeds are torch's global generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import no_compile

from duplex.config import SamplingSection
from duplex.errors import RequestError, ServerError
from duplex.frames import FRAME_SAMPLES
from duplex.streams import (
    AGENT_ROWS,
    CODEBOOKS,
    DELAYS,
    NUM_ROWS,
    TEXT_EPAD,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    CodecTokens,
    Prompt,
    bare_prompt,
    build_prompt,
)
from pipeline.engines.checkpoint import Checkpoint
from pipeline.engines.codec import measure_tokens
from pipeline.serving.voices import VoiceList
from pipeline.serving.wire import prompt_digest, prompt_tokens

if TYPE_CHECKING:
    import sentencepiece
    from moshi.models.compression import MimiModel
    from moshi.models.lm import LMModel

AGENT_DELAYS = DELAYS[AGENT_ROWS]
WARM_UP_FRAMES = 4


class Cancelled(Exception):
    """Whoever asked for this conversation has gone; the speaker is free again."""


@dataclass(frozen=True)
class FedPrompt:
    """What the model was fed, read from its input cache.

    frames: int64 [17, P], delayed: row k of position s holds `codes[k, s - d]`, or the
        initial token where s <= d. Equal to `duplex.streams.apply_delays`.
    tokens: the text row without the padding at its ends.
    """

    frames: np.ndarray
    tokens: tuple[int, ...]
    seed: int
    prefill_s: float

    @property
    def digest(self) -> str:
        return prompt_digest(self.tokens)

    @property
    def count(self) -> int:
        return len(self.tokens)

    @property
    def frames_digest(self) -> str:
        return prompt_digest(self.frames)


class Speaker:
    """LM, codec and tokenizer of one checkpoint, for one conversation at a time.

    `begin` starts a conversation, whatever state the one before was left in; `step` goes on
    by one frame. When a conversation outgrows the LM's context, the oldest frames drop out.
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
    ):
        _check_layout(lm.dep_q, lm.n_q, lm.delays)
        if lm.fuser is not None:
            raise ServerError(
                "the model must take no conditions, found a conditioned one; use a Moshi checkpoint"
            )
        self.lm = lm
        self.mimi = mimi
        self.tokenizer = tokenizer
        self.model_digest = model_digest
        self.tokenizer_file = tokenizer_file
        self.codec_tokens: CodecTokens = measure_tokens(mimi)
        self.voices = VoiceList.load(voices or {}, mimi)
        self.bare = bare
        self.device = lm.device
        self._prompt_codes: torch.Tensor | None = None  # [17, P] while a prompt is forced
        self._sampling = SamplingSection()
        self._generator = LMGen(
            lm.eval(), on_text_hook=self._force_text, on_audio_hook=self._force_audio
        )
        self._generator.streaming_forever(1)
        self.mimi.streaming_forever(1)

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str = "auto",
        voices: dict[str, Path] | None = None,
        *,
        bare: bool = False,
    ) -> Speaker:
        """Load a checkpoint folder: float32 on a CPU, bfloat16 on a GPU.

        Args:
            voices: recordings by the names that a query may give them.
            bare: the model was trained without prompts, so none is fed.

        Raises:
            RequestError: a voice that is none.
            MissingInputError, CorruptFileError: from the checkpoint.
            ServerError: its layout is not one that this server speaks, or no such device.
        """
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.config
        _check_layout(config.get("dep_q", 8), config.get("n_q", 16), config.get("delays", DELAYS))
        place = pick_device(device)
        dtype = torch.float32 if place == "cpu" else torch.bfloat16
        with ThreadPoolExecutor(1) as pool:  # 15 GB take as long to hash as to load
            digest = pool.submit(checkpoint.digest, "moshi")
            lm = checkpoint.load_lm(place, dtype)
            return cls(
                lm,
                checkpoint.load_mimi(place),
                checkpoint.load_tokenizer(),
                model_digest=digest.result(),
                tokenizer_file=checkpoint.files()["tokenizer"].read_bytes(),
                voices=voices,
                bare=bare,
            )

    # -- a conversation

    def plan(self, prompt_text: str, voice: str = "", greeting: str = "") -> Prompt:
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
            return bare_prompt(self.codec_tokens)
        prompt = build_prompt(
            prompt_tokens(self.tokenizer, prompt_text),
            self.codec_tokens,
            voice=self.voices.voice(voice),
            greeting=self.voices.greeting(greeting),
        )
        context = self.lm.context
        if context is not None and prompt.num_frames >= context:
            raise RequestError(
                f"text_prompt must fit into the model's context of {context} frames with room to "
                f"talk; found {len(prompt.tokens)} tokens, {prompt.num_frames} frames. Shorten it."
            )
        return prompt

    def begin(
        self,
        prompt_text: str,
        sampling: SamplingSection,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        voice: str = "",
        greeting: str = "",
    ) -> FedPrompt:
        """Start a conversation: reset everything, then feed the prompt.

        An empty `prompt_text` gives a conversation without a system text; the silence around
        it is fed all the same. The same seed, prompt and audio give the same conversation.

        Raises:
            RequestError: the prompt is too long.
            Cancelled: `cancelled()` became true; asked once a frame.
        """
        prompt = self.plan(prompt_text, voice, greeting)
        started_s = time.perf_counter()
        self._set_sampling(sampling)
        self._generator.reset_streaming()
        self.mimi.reset_streaming()
        fed: list[torch.Tensor] = []
        codes = torch.from_numpy(prompt.codes).to(self.device)
        self._prompt_codes = codes
        try:
            for call in range(prompt.num_frames):
                if cancelled():
                    raise Cancelled
                audio = torch.zeros_like(codes[None, AGENT_ROWS, :1])  # [B, 8, 1]
                if call == prompt.num_frames - 1:
                    # The last prompt call draws the first free tokens. Seeding here makes them
                    # independent of how many numbers a CUDA graph's capture used up before.
                    torch.manual_seed(seed)
                    audio = None
                with self._eager():
                    # The hooks overwrite all of `audio`, but for what position 1 never reads,
                    # so before the last call there is nothing for the depth transformer to do.
                    self._generator.step(codes[None, USER_ROWS, call : call + 1], audio)
                fed.append(self._last_input())
        finally:
            self._prompt_codes = None
        frames = torch.stack(fed, dim=1).cpu().numpy()  # [17, P]
        return FedPrompt(
            frames, _strip_padding(frames[TEXT_ROW, 1:]), seed, time.perf_counter() - started_s
        )

    @torch.no_grad()
    def step(self, pcm: np.ndarray) -> tuple[np.ndarray, int | None]:
        """One frame of the conversation.

        Args:
            pcm: float32 [1920], what the user said.

        Returns:
            float32 [1920], what the agent says in the same frame, and its text token there:
            None for padding.
        """
        assert pcm.shape == (FRAME_SAMPLES,), pcm.shape
        chunk = torch.from_numpy(pcm)[None, None].to(self.device)  # [B, 1, 1920]
        with self._eager():
            user = self.mimi.encode(chunk)[:, :CODEBOOKS]  # [B, 8, 1]
            out = self._generator.step(user)  # [B, 1 + 8, 1]
            if out is None or bool((out < 0).any()):  # not generated yet: nothing to decode
                return np.zeros(FRAME_SAMPLES, dtype=np.float32), None
            audio = self.mimi.decode(out[:, 1:])  # [B, 1, 1920]
        token = int(out[0, TEXT_ROW, 0])
        said = None if token in (TEXT_PAD, TEXT_EPAD) else token
        return audio[0, 0].float().cpu().numpy(), said

    def warm_up(self) -> None:
        """A few frames, so that kernels and CUDA graphs are there before the first client."""
        self.begin("", SamplingSection(), seed=0)
        for _ in range(WARM_UP_FRAMES):
            self.step(np.zeros(FRAME_SAMPLES, dtype=np.float32))

    # -- inside

    def _set_sampling(self, sampling: SamplingSection) -> None:
        generator = self._generator
        generator.temp_text, generator.top_k_text = sampling.text_temperature, sampling.text_topk
        generator.temp, generator.top_k = sampling.audio_temperature, sampling.audio_topk
        audio = (sampling.audio_temperature, sampling.audio_topk)
        if audio != (self._sampling.audio_temperature, self._sampling.audio_topk):
            # A captured CUDA graph holds the audio temperature and top-k that it was captured
            # with; without this, another conversation's would be used in silence.
            self._state.graphed_depth.reset(warmup_steps=1)
        self._sampling = sampling

    def _eager(self) -> AbstractContextManager[None]:
        """moshi compiles one norm on a CPU too, which needs a C++ compiler; not here."""
        return no_compile() if self.device.type == "cpu" else nullcontext()

    @property
    def _state(self) -> Any:
        state = self._generator._streaming_state
        assert state is not None
        return state

    def _position(self) -> int:
        """p: what the call in progress predicts."""
        return self._state.offset_cpu + 1

    def _force_text(self, text: torch.Tensor) -> None:  # text: [B]
        codes, position = self._prompt_codes, self._position()
        if codes is not None and position < codes.shape[1]:
            text.copy_(codes[TEXT_ROW, position])

    def _force_audio(self, audio: torch.Tensor) -> None:  # audio: [B, 8]
        codes, position = self._prompt_codes, self._position()
        if codes is None:
            return
        for book, delay in enumerate(AGENT_DELAYS):
            frame = position - delay
            if 1 <= frame < codes.shape[1]:
                audio[:, book] = codes[AGENT_ROWS][book, frame]

    def _last_input(self) -> torch.Tensor:
        """int64 [17]: what the model was fed in the call that just ended.

        `LMGen` reads column s % CT of its cache, and initial tokens where s <= d; a call
        writes to other columns only, so the column still holds what was read.
        """
        state = self._state
        position = state.offset_cpu - 1
        column = state.cache[0, :, position % state.cache.shape[2]]
        is_initial = position <= self._generator.delays_cuda
        return torch.where(is_initial, state.initial[0, :, 0], column)


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
    spoken = np.flatnonzero(row != TEXT_PAD)
    if spoken.size == 0:
        return ()
    return tuple(int(token) for token in row[spoken[0] : spoken[-1] + 1])
