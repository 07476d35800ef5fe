"""A prompt fed in blocks, beside the batch, and copied into a slot later.

Frame by frame a prompt takes as many steps of the temporal transformer as it has frames; a block
is one. It happens on key-value rings of its own, no longer than the prompt: in the slots' rings
a block would be written into every neighbour's too. The depth transformer is not run, since all
that it would say is given.

What the model was fed is noted by hooks on its embedding tables: an id that was not looked up
there is not reported as fed.

A filled prompt depends on nothing but model, prompt and voice, so it is kept (`PromptCache`).
Letters: K = 17 rows, P prompt frames, H heads, D their width, C the model's.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention, _MHAState
from moshi.utils.compile import no_compile, no_cuda_graph

from duplex.streams import NUM_ROWS, TEXT_ROW, Prompt, apply_delays
from pipeline.serving.voice_embeddings import VoiceEmbeddings

# Neighbours wait for a block, so on a CPU it is short.
BLOCK_FRAMES = {"cpu": 32, "cuda": 512}
NOT_LOOKED_UP = -1


@dataclass(frozen=True)
class FilledPrompt:
    """The model's state behind positions 0 to P - 2, and what the last prompt call is given.

    layers: keys and values of each layer, [2, H, P - 1, D].
    delayed: int64 [K, P], what the model is to read at each position (`apply_delays`).
    fed: int64 [K, P - 1], what its embedding tables were asked for; -1 where the stored
        embeddings of a voice stood in.
    """

    prompt: Prompt
    layers: tuple[torch.Tensor, ...]
    delayed: np.ndarray
    fed: np.ndarray
    prefill_s: float

    @property
    def num_bytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self.layers)


class Prefill:
    """Feeds one prompt, a block at each `advance`; in between the LM is as it was.

    Args:
        lm: an `LMModel` in streaming mode; its own streaming state is put back after each block.
        voice: stored input embeddings that stand for the prompt's first frames.
    """

    def __init__(self, lm: Any, prompt: Prompt, voice: VoiceEmbeddings | None = None):
        self._lm, self._prompt, self._voice = lm, prompt, voice
        self._delayed = apply_delays(prompt.training_codes(), lm.card, lm.text_card)
        if voice is not None:
            voice.complete(self._delayed)
        self._length = self._delayed.shape[1] - 1  # the last position is the last call's
        self._fed = np.full((NUM_ROWS, self._length), NOT_LOOKED_UP)
        self._place = 0
        self._seconds = 0.0
        self._state = self._fresh_state()

    @torch.no_grad()
    def advance(self) -> FilledPrompt | None:
        """Feed a block; the filled prompt once there is nothing left."""
        started_s = time.perf_counter()
        if self._place < self._length:
            lm = self._lm
            own = lm.get_streaming_state()
            lm.set_streaming_state(self._state)
            try:
                with no_compile(), no_cuda_graph():
                    self._feed_block()
            finally:
                lm.set_streaming_state(own)
        self._seconds += time.perf_counter() - started_s
        if self._place < self._length:
            return None
        rings = [
            state.kv_cache.cache[:, 0, :, : self._length]
            for state in self._state.values()
            if isinstance(state, _MHAState) and state.kv_cache is not None
        ]
        return FilledPrompt(
            self._prompt, tuple(rings), self._delayed, self._fed, round(self._seconds, 4)
        )

    def _feed_block(self) -> None:
        lm, start = self._lm, self._place
        end = min(start + BLOCK_FRAMES[lm.device.type], self._length)
        stored = 0 if self._voice is None else self._voice.num_positions
        if start < stored:
            assert self._voice is not None
            end = min(end, stored)
            lm.transformer(self._voice.embeddings[start:end][None].to(lm.device, lm.dtype))
        else:
            block = torch.from_numpy(self._delayed[None, :, start:end]).to(lm.device)
            with _Watch(lm, self._fed[:, start:end]):
                lm.forward_text(block)
        self._place = end

    def _fresh_state(self) -> dict[str, Any]:
        """Streaming states of one conversation, with rings of the prompt's length."""
        found: dict[str, Any] = {}

        def add(name: str, module: Any) -> None:
            if not isinstance(module, StreamingMultiheadAttention):
                found[name] = module._init_streaming_state(1)
                return
            slots: Any = module._streaming_state
            ring = slots.kv_cache.cache  # [2, N, H, context, D]
            own = RingKVCache(
                1, ring.shape[2], ring.shape[4], max(1, self._length), device=ring.device,
                dtype=ring.dtype,
            )  # fmt: skip
            offset = torch.zeros(1, dtype=torch.long, device=ring.device)
            found[name] = _MHAState(1, ring.device, own, offset, 0)  # pyright: ignore[reportCallIssue]

        self._lm._apply_named_streaming(add)
        return found


class _Watch:
    """Notes in `fed` [K, T] what the embedding tables are asked for, while it is entered."""

    def __init__(self, lm: Any, fed: np.ndarray):
        self._tables = {TEXT_ROW: lm.text_emb} | {n + 1: emb for n, emb in enumerate(lm.emb)}
        self._fed = fed
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for row, table in self._tables.items():

            def note(_: Any, args: tuple[torch.Tensor, ...], row: int = row) -> None:
                self._fed[row] = args[0][0].cpu().numpy()

            self._hooks.append(table.register_forward_pre_hook(note))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


class PromptCache:
    """The last filled prompts, by what they are made of, up to so many bytes of state."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._filled: OrderedDict[str, FilledPrompt] = OrderedDict()
        self.hits = self.misses = 0

    def get(self, key: str) -> FilledPrompt | None:
        found = self._filled.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._filled.move_to_end(key)
        return found

    def put(self, key: str, filled: FilledPrompt) -> None:
        if filled.num_bytes > self._max_bytes:
            return
        self._filled[key] = filled
        self._filled.move_to_end(key)
        while self.num_bytes > self._max_bytes:
            self._filled.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        return sum(filled.num_bytes for filled in self._filled.values())
