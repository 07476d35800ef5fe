"""PersonaPlex's packaged voices: input embeddings of the model instead of codes.

Its `.pt` files hold what the temporal transformer was fed while a voice sample was played, and the
token cache as it stood behind that. Codes of the sample are not in them, so the embeddings are fed
again. With V frames of sample: `embeddings` are of positions 0 to V - 2, and `cache`
[1, 17, columns], a ring by position, holds positions V - 1 (whole) and V (rows of delay 1).

Read as tensors only (`weights_only=True`); a file of another model's width is refused.
Letters: K = 17 rows, C the model's width.
"""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duplex.errors import RequestError
from duplex.streams import CODEBOOKS, DELAYS, NUM_ROWS, CodecTokens

LONGEST_FRAMES = 750  # a minute


@dataclass(frozen=True)
class VoiceEmbeddings:
    """embeddings: [V - 1, C]; cache: int64 [K, columns]; digest: of the file."""

    embeddings: torch.Tensor
    cache: np.ndarray
    digest: bytes

    @property
    def num_positions(self) -> int:
        return len(self.embeddings)

    def placeholder(self, codec: CodecTokens) -> np.ndarray:
        """int64 [8, V]: codes that keep the place of the sample in a prompt; none is fed."""
        silence = np.asarray(codec.silence, dtype=np.int64)[:, None]
        return np.repeat(silence, self.num_positions + 1, axis=1)

    def complete(self, delayed: np.ndarray) -> None:
        """Put the end of the sample into a prompt's delayed codes [K, P], in place."""
        columns, last = self.cache.shape[1], self.num_positions
        delayed[:, last] = self.cache[:, last % columns]
        late = [row for row, delay in enumerate(DELAYS) if delay == 1]
        delayed[late, last + 1] = self.cache[late, (last + 1) % columns]


def read_voice_embeddings(path: Path, lm: Any) -> VoiceEmbeddings:
    """
    Args:
        lm: the `LMModel` that will be fed.

    Raises:
        RequestError: the file is no such voice, or one of another model.
    """
    must = f"{path.name}: must be a voice as PersonaPlex packages them, tensors `embeddings` and "
    must += "`cache`"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise RequestError(f"{must}; it cannot be read as tensors: {reason}") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name), torch.Tensor) for name in ("embeddings", "cache")
    ):
        raise RequestError(f"{must}, found others. Recordings are .wav or .flac.")
    embeddings, cache = content["embeddings"], content["cache"]
    if embeddings.ndim < 2 or embeddings.shape[-1] != lm.dim:
        raise RequestError(
            f"{must} for a model of width {lm.dim}, found embeddings {list(embeddings.shape)}"
        )
    embeddings = embeddings.reshape(-1, lm.dim)
    if not 1 <= len(embeddings) <= LONGEST_FRAMES or not embeddings.is_floating_point():
        raise RequestError(f"{must} of 1 to {LONGEST_FRAMES} frames, found {len(embeddings)}")
    if not torch.isfinite(embeddings).all():
        raise RequestError(f"{must} with finite numbers, found others")
    ring = cache.reshape(-1, cache.shape[-1]) if cache.ndim >= 2 else cache
    if ring.ndim != 2 or ring.shape[0] != NUM_ROWS or ring.shape[1] < 2:
        raise RequestError(f"{must} [1, {NUM_ROWS}, columns], found {list(cache.shape)}")
    digest = hashlib.sha256(path.read_bytes()).digest()
    found = VoiceEmbeddings(embeddings, ring.long().numpy(), digest)
    _check_codes(found, lm, must)
    return found


def _check_codes(voice: VoiceEmbeddings, lm: Any, must: str) -> None:
    """The codes that will be looked up must be in the model's tables."""
    probe = np.zeros((NUM_ROWS, voice.num_positions + 2), dtype=np.int64)
    voice.complete(probe)
    text, audio = probe[0], probe[1 : 1 + 2 * CODEBOOKS]
    if text.min() < -1 or text.max() > lm.text_card or audio.min() < -1 or audio.max() > lm.card:
        raise RequestError(f"{must} with codes of this model's vocabulary, found others")
