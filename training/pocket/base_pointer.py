"""Heads of attention that look at the piece of text that is being said.

Text stands at a turn's onset, a piece a frame, and a piece is spoken for two frames on average: who
says its text must know at which piece it is. Nothing in the loss tells that directly, and what a
base without this lesson says are sentences it knows by heart. One head each of the fourth and the
fifth layer is told: in each frame in which the agent says a word, its attention belongs on the
pieces of that word that sound in this frame, by their letters: a word of a value is often spelt in
five pieces, and who looks at all of them at once sees no order.

The weights stay the model's own: nothing is added to it, and nothing is taken out at the end.

Shapes: B clips, T frames, C width, H heads, d width of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.serving.text import WORD_START
from training.attention import rotate
from training.pocket.base_labels import LOOKED
from training.pocket.base_phones import Sounds
from training.pocket.codec_labels import IGNORED
from training.projection import rms_norm

# Layer and head, from 0. In the base of the third training, which was not told, these looked at the
# word that was being said with 27 % of their attention in dialogues. For another base any would do.
HEADS = ((3, 1), (4, 1))
ROUNDING = 1e-9
READ = 1  # frames behind its own in which a piece is read, and so attended to


def pieces_by_word(tokenizer: Any, tokens: Sequence[int]) -> list[slice]:
    """The pieces of each word, in order; each word but the first begins with a space."""
    starts = [
        number
        for number, token in enumerate(tokens)
        if not number or tokenizer.id_to_piece(token).startswith(WORD_START)
    ]
    ends = [*starts[1:], len(tokens)]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]


def point(
    labels: np.ndarray,
    tokenizer: Any,
    tokens: Sequence[int],
    first: int,
    end: int,
    said: Sequence[tuple[int, Sounds]],
) -> None:
    """Fill the columns `LOOKED` of a clip's labels, int16 [T, 8], for one turn of the agent's.

    In each frame in which a word is said: the places that read the first and the one behind the
    last of its pieces that sound in the frame.

    Args:
        tokens: of the whole turn; the first stands in frame `first`, each in a frame of its own.
        end: the frame behind the turn's last.
        said: first frame of each utterance and when its words end.

    Raises:
        ValueError: a turn whose words the synthesiser counted otherwise.
    """
    words = pieces_by_word(tokenizer, tokens)
    counted = sum(len(sounds.word_ends) for _, sounds in said)
    if counted != len(words):
        raise ValueError(f"the synthesiser must say each of {len(words)} words, it said {counted}")
    number = 0
    for start, sounds in said:
        at = start
        for ends in sounds.word_ends:
            length = start + ends + 1 - at
            pieces = words[number]
            edges = shares_before([letters_in(tokenizer, token) for token in tokens[pieces]])
            for frame in range(at, min(at + length, end, len(labels))):
                low, high = sounding(edges, (frame - at) / length, (frame - at + 1) / length)
                place = first + READ + pieces.start
                labels[frame, LOOKED] = place + low, place + high
            at, number = at + length, number + 1


def letters_in(tokenizer: Any, token: int) -> int:
    """Of a piece. A letter that the vocabulary lacks is a byte."""
    if tokenizer.is_byte(token):
        return 1
    return sum(character.isalnum() for character in tokenizer.id_to_piece(token))


def shares_before(letters: Sequence[int]) -> list[float]:
    """Where each piece of a word begins, and where the last one ends, as shares of its letters."""
    if not any(letters):
        letters = [1] * len(letters)
    return [sum(letters[:number]) / sum(letters) for number in range(len(letters) + 1)]


def sounding(edges: Sequence[float], start: float, end: float) -> tuple[int, int]:
    """The first piece, and the one behind the last, that share letters with [start, end)."""
    found = [
        number
        for number, (low, high) in enumerate(itertools.pairwise(edges))
        if low < end - ROUNDING and high > start + ROUNDING
    ]
    return found[0], found[-1] + 1


class Pointer:
    """What the heads look at in a forward.

    Args:
        layers: of a `FastForward`.
    """

    def __init__(self, layers: Any):
        last = len(layers) - 1  # of a smaller model it does for all
        self._heads = [_Head(layers[min(layer, last)], head) for layer, head in HEADS]

    def remove(self) -> None:
        for head in self._heads:
            head.hook.remove()

    def nll(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed nats of the attention that is where it belongs, and its sum, of the last forward;
        the mean of the heads.

        Args:
            places: int16 [B, T, 2], as `point` gives them. A frame counts when the first piece
                has been read: `readable`.
        """
        known = readable(places)
        nats = there = torch.zeros((), device=places.device)
        if not known.any():
            return nats, there
        column = torch.arange(places.shape[1], device=places.device)
        first, behind = places[known].long().unsqueeze(-1).unbind(1)
        belongs = (column >= first) & (column < behind)
        for head in self._heads:
            found = head.attention()[known].masked_fill(~belongs, -torch.inf).logsumexp(-1)
            nats = nats - found.sum() / len(self._heads)
            there = there + found.detach().exp().sum() / len(self._heads)
        return nats, there


class _Head:
    """One head of a layer, whose input is kept."""

    def __init__(self, layer: Any, head: int):
        self._layer, self._head = layer, head
        self._read: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.hook = layer.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, args: Any, _out: torch.Tensor) -> None:
        self._read = args

    def attention(self) -> torch.Tensor:
        """Its log: float32 [B, T, T]."""
        assert self._read is not None, "a forward comes first"
        x, turns = self._read
        layer = self._layer.layer
        attention = layer.self_attn
        heads = attention.num_heads
        width = x.shape[-1] // heads
        weight = attention.in_projs[0].weight.unflatten(0, (3, heads, width))[:, self._head]
        qkv = rms_norm(x, layer.norm1) @ weight.flatten(0, 1).T
        qkv = qkv.unflatten(-1, (3, 1, width)).contiguous()
        if turns is not None:
            qkv = rotate(qkv, turns, attention.rope.interleave)
        query, key, _ = qkv.squeeze(3).float().unbind(2)
        scores = query @ key.transpose(1, 2) * width**-0.5
        later = torch.ones_like(scores[0], dtype=torch.bool).triu_(1)
        return scores.masked_fill(later, -torch.inf).log_softmax(-1)


def readable(places: torch.Tensor) -> torch.Tensor:
    """bool [B, T]: frames whose pieces are known, and the first of them has been read by then."""
    first = places[..., 0]
    frame = torch.arange(places.shape[1], device=places.device)
    return (first != IGNORED) & (first <= frame)
