"""Many conversations, one model: each in a slot of one batch, joining and leaving at any frame.

Letters: N slots, K = 17 rows (text, 8 agent, 8 user), P prompt frames, d a row's delay.

`LMGen` steps all slots at once; a mask says for which of them the step counts, and the others'
state stays as it was. What a slot says hangs on its own prompt, seed, sampling and audio alone:

- positions are each slot's own, so prompts of any length stand beside each other;
- a prompt is filled in apart from the batch and copied in (`prefill`);
- every slot draws from its own generator (`sampling`);
- the step always has all N rows, so that sums are rounded the same whoever is there.

A prompt's last call (s = P - 1) is a step of the batch: it samples the first free tokens, while
the agent's delayed codebooks are still given. See `duplex.streams` for calls and positions.

One call at a time, always from the same thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMGen
from moshi.utils.compile import no_compile

from duplex.config import SamplingSection
from duplex.frames import FRAME_SAMPLES
from duplex.streams import AGENT_ROWS, CODEBOOKS, DELAYS, TEXT_EPAD, TEXT_PAD, TEXT_ROW, USER_ROWS
from pipeline.serving.prefill import FilledPrompt
from pipeline.serving.sampling import SlotSampler

NOT_FORCED = -1


class _Generator(LMGen):
    """`LMGen` whose tokens are drawn by a `SlotSampler`, and may be given for single slots."""

    def __init__(self, lm: Any, num_slots: int):
        super().__init__(
            lm, use_sampling=False, on_audio_hook=self._force, support_out_of_sync=True
        )
        self.sampler = SlotSampler(
            num_slots, lm.text_linear.out_features, lm.card, lm.dep_q, lm.device
        )
        self.forced = torch.full((num_slots, lm.dep_q), NOT_FORCED, device=lm.device)
        self.on_text_logits_hook = self._mark_text

    def _mark_text(self, logits: torch.Tensor) -> None:  # [N, 1, 1, V]
        """`LMGen` takes the likeliest token next: make that the drawn one."""
        drawn = self.sampler.text(logits[:, 0, 0])
        logits.zero_().scatter_(-1, drawn[:, None, None, None], 1)

    def _force(self, audio: torch.Tensor) -> None:  # [N, 8]
        audio.copy_(torch.where(self.forced == NOT_FORCED, audio, self.forced))

    def depformer_step(
        self, text_token: torch.Tensor, transformer_out: torch.Tensor
    ) -> torch.Tensor:
        """int64 [N, 8]: the codebooks of a frame, one after the other."""
        lm, token, tokens = self.lm_model, text_token, []
        assert lm.depformer is not None
        with lm.depformer.streaming(len(text_token)):
            for step in range(lm.dep_q):
                logits = lm.forward_depformer(step, token[:, None, None], transformer_out)
                token = self.sampler.audio(logits[:, 0, 0], step)
                tokens.append(token)
        return torch.stack(tokens, dim=1)


class Slots:
    """The batch: LM and codec with the state of N conversations.

    Args:
        lm, mimi: of one checkpoint, not streaming yet; both are set to stream for good.
    """

    def __init__(self, lm: Any, mimi: Any, num_slots: int):
        self.num_slots = num_slots
        self.lm, self.mimi, self.device = lm, mimi, lm.device
        self._generator = _Generator(lm.eval(), num_slots)
        self._generator.streaming_forever(num_slots)
        mimi.streaming_forever(num_slots)
        self._lengths = [0] * num_slots  # positions read so far
        self._codes = torch.zeros(num_slots, CODEBOOKS, 1, dtype=torch.long, device=self.device)

    # -- a conversation

    @torch.no_grad()
    def open(
        self, slot: int, filled: FilledPrompt, sampling: SamplingSection, seed: int
    ) -> np.ndarray:
        """Start a conversation in a slot, whatever was in it before.

        Returns:
            int64 [K, P]: what the model was fed, delayed. The last position is read back from
            `LMGen`'s cache, the others are those that the prefill noted.
        """
        mask = self._mask([slot])
        self._generator.reset_streaming(mask)
        self.mimi.reset_streaming(mask)
        self._copy_in(slot, filled)
        self._generator.sampler.begin(slot, sampling, seed)
        frames = filled.prompt.codes
        last = frames.shape[1] - 1
        for book, delay in enumerate(DELAYS[AGENT_ROWS]):
            if delay and last >= 1:  # position P reads frame P - d; frame 0 is never seen
                self._generator.forced[slot, book] = int(frames[AGENT_ROWS][book, last])
        codes = torch.from_numpy(frames[USER_ROWS, last : last + 1]).to(self.device)
        try:
            self._step_lm([slot], {slot: codes})
        finally:
            self._generator.forced[slot] = NOT_FORCED
        return np.concatenate([filled.fed, self.last_input(slot)[:, None]], axis=1)

    @torch.no_grad()
    def step(self, heard: Mapping[int, np.ndarray]) -> dict[int, tuple[np.ndarray, int | None]]:
        """One frame of the conversations in `heard`; the other slots stay as they are.

        Args:
            heard: float32 [1920] by slot, what its user said.

        Returns:
            By slot float32 [1920], what the agent says in the same frame, and its text token
            there: None for padding.
        """
        slots = sorted(heard)
        chunk = torch.zeros(self.num_slots, 1, FRAME_SAMPLES)
        for slot in slots:
            assert heard[slot].shape == (FRAME_SAMPLES,), heard[slot].shape
            chunk[slot, 0] = torch.from_numpy(heard[slot])
        with self._eager():
            self.mimi.set_exec_mask(self._mask(slots))  # of its decoder too
            user = self.mimi.encode(chunk.to(self.device))[:, :CODEBOOKS]  # [N, 8, 1]
            out = self._step_lm(slots, {slot: user[slot] for slot in slots})
            # Slots that take part have all codebooks: the prompt's last call went before. Of the
            # others there are none, and their decoders stay as they were.
            decoded = self.mimi.decode(out[:, AGENT_ROWS].clamp(min=0))  # [N, 1, 1920]
        audio = decoded[:, 0].float().cpu().numpy()
        text = out[:, TEXT_ROW, 0].tolist()
        return {slot: (audio[slot], _spoken(text[slot])) for slot in slots}

    def left(self, slot: int) -> int | None:
        """Frames until the conversation fills the model's context; None without a limit."""
        context = self.lm.context
        return None if context is None else max(0, context - self._lengths[slot])

    def last_input(self, slot: int) -> np.ndarray:
        """int64 [K]: what the model was fed for a slot in its last step.

        `LMGen` reads column s % CT of its cache, and initial tokens where s <= d; a step writes
        to other columns only, so the column still holds what was read.
        """
        state = self._state
        position = self._lengths[slot] - 1
        column = state.cache[slot, :, position % state.cache.shape[2]]
        is_initial = position <= self._generator.delays_cuda
        return torch.where(is_initial, state.initial[0, :, 0], column).cpu().numpy()

    # -- inside

    def _copy_in(self, slot: int, filled: FilledPrompt) -> None:
        """Give a slot the state behind a prompt's positions 0 to P - 2."""
        length = filled.fed.shape[1]
        layers = iter(filled.layers)
        for state in self.lm.get_streaming_state().values():
            ring = getattr(state, "kv_cache", None)
            if ring is not None:
                ring.cache[:, slot, :, :length] = next(layers)
                ring.end_offset[slot] = length
                state.offset[slot] = length
            elif hasattr(state, "offsets"):
                state.offsets[slot] = length
        assert next(layers, None) is None
        state = self._state
        state.offsets[slot] = length
        column = torch.from_numpy(filled.delayed[:, length]).to(self.device)
        state.cache[slot, :, length % state.cache.shape[2]] = column
        self._lengths[slot] = length

    def _step_lm(self, slots: Sequence[int], user: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """int64 [N, 9, 1]: text and agent codes; below 0 where a slot took no part."""
        for slot in slots:
            self._codes[slot] = user[slot]
        self._generator.sampler.draw(list(slots))
        self._generator.set_exec_mask(self._mask(slots))
        with self._eager():
            out = self._generator.step(self._codes)
        assert out is not None  # with support_out_of_sync it never is
        for slot in slots:
            self._lengths[slot] += 1
        return out

    def _mask(self, slots: Sequence[int]) -> torch.Tensor:
        mask = torch.zeros(self.num_slots, dtype=torch.bool)
        mask[list(slots)] = True
        return mask.to(self.device)

    def _eager(self) -> AbstractContextManager[None]:
        """moshi compiles one norm on a CPU too, which needs a C++ compiler; not here."""
        return no_compile() if self.device.type == "cpu" else nullcontext()

    @property
    def _state(self) -> Any:
        state = self._generator._streaming_state
        assert state is not None
        return state


def _spoken(token: int) -> int | None:
    return None if token in (TEXT_PAD, TEXT_EPAD) else token
