"""First weights with which a small base reads its prompt from its first steps on.

A base of this size has to copy: the fact that it is asked for stands in its prompt, and its words
follow one another there. Large models find out how by themselves, after billions of tokens; how
soon this one does, with the library's first weights and with these, stands in
docs/results/pocket_initial.md.

What is put in (`induction heads`, arXiv 2209.11895):

- one dimension of the width is the same for every piece, so that attention can go by distance
  alone; three heads of the first layer look one, two and three frames back;
- two heads of the second layer look for frames *behind* an equal piece, and pass on what stands
  there; the text head reads it.

The rest is drawn so that the layers add to what is embedded instead of drowning it: as the
library draws them, embeddings have std .07 and layers add more than that. All of it is trained
further.

Legend: C width, H heads, d = C / H their width; pairs are turned together by rotary positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from training.fast import gates_of

SAME = 0  # the dimension that is the same for every piece
SAME_LEVEL = 4.0
TEXT_LEVEL, SEMANTIC_LEVEL, ACOUSTIC_LEVEL = 1.0, 0.4, 0.1  # std of what is embedded
LAYER_LEVEL = 0.3  # of what a layer adds
DISTANCES = (1, 2, 3)
SHARPNESS, NEAR_PAIRS = 2.5, 8  # how surely a head looks at its distance; pairs that turn fast
LIKENESS = 2.5  # how surely an equal piece is found
PASSED_ON = 0.12  # of a passed-on piece to its logit
DEPTH_LEVEL = 0.7


@torch.no_grad()
def prepare(lm: Any, seed: int) -> None:
    """Set the weights of a fresh `LMModel` in place, float32 on the CPU.

    It wants rotary positions. With one layer there is no second one to find equal pieces.
    """
    generator = torch.Generator().manual_seed(seed)
    _scale(lm)
    _Circuit(lm, generator).write()
    _scale_depth(lm)


def _scale(lm: Any) -> None:
    _to_level(lm.text_emb.weight, TEXT_LEVEL)
    lm.text_emb.weight[:, SAME] = SAME_LEVEL
    for row, table in enumerate(lm.emb):
        _to_level(table.weight, ACOUSTIC_LEVEL if row % 8 else SEMANTIC_LEVEL)
        table.weight[:, SAME] = 0
    for layer in lm.transformer.layers:
        for weight in (layer.self_attn.out_projs[0].weight, layer.gating.linear_out.weight):
            weight.mul_(LAYER_LEVEL)
            weight[SAME] = 0


def _to_level(weight: torch.Tensor, level: float) -> None:
    weight.mul_(level / weight.std())


class _Circuit:
    """The heads that find what stood behind an equal piece."""

    def __init__(self, lm: Any, generator: torch.Generator):
        self.lm, self.generator = lm, generator
        attention = lm.transformer.layers[0].self_attn
        self.width, self.heads = lm.text_emb.weight.shape[1], attention.num_heads
        self.head_width = self.width // self.heads
        self.num_pairs = self.head_width // 2
        self.interleave = attention.rope.interleave
        period = lm.transformer.rope.max_period
        self.turns = [period ** (-2 * pair / self.head_width) for pair in range(self.num_pairs)]

    def write(self) -> None:
        piece = self._basis()  # [C, d]: what tells a piece from another
        behind = self._look_back(piece)
        if len(self.lm.transformer.layers) > 1:
            self._match(piece, behind)

    def _look_back(self, piece: torch.Tensor) -> torch.Tensor:
        """Heads of the first layer; where the first of them writes the piece before: [C, d]."""
        places = []
        for head, distance in zip(range(self.heads), DISTANCES, strict=False):
            query, key, value, out = self._parts(layer=0, head=head)
            query.zero_()
            key.zero_()
            for pair in range(min(NEAR_PAIRS, self.num_pairs)):
                real, imaginary = self._pair(pair)
                angle = distance * self.turns[pair]
                query[real, SAME] = SHARPNESS
                key[real, SAME] = SHARPNESS * math.cos(angle)
                key[imaginary, SAME] = SHARPNESS * math.sin(angle)
            value.copy_((piece if head == 0 else self._basis()).T)
            places.append(self._basis())
            out.copy_(places[-1])
        return places[0]

    def _match(self, piece: torch.Tensor, behind: torch.Tensor) -> None:
        """Heads of the second layer, and the text head that reads what they pass on."""
        head_weight = self.lm.text_linear.weight
        pieces = self.lm.text_emb.weight[: len(head_weight)].clone()
        pieces[:, SAME] = 0
        head_weight.mul_(0.5)
        # Pairs that turn slowly: likeness must not depend on distance.
        slow = [
            row for pair in range(self.num_pairs // 2, self.num_pairs) for row in self._pair(pair)
        ]
        for head in range(min(2, self.heads)):
            query, key, value, out = self._parts(layer=1, head=head)
            query.zero_()
            key.zero_()
            query[slow] = LIKENESS * piece.T[slow]
            key[slow] = LIKENESS * behind.T[slow]
            read, written = self._basis(), self._basis()
            value.copy_(read.T)
            out.copy_(written)
            head_weight.add_(PASSED_ON * pieces @ read @ written.T)

    def _parts(self, layer: int, head: int) -> tuple[torch.Tensor, ...]:
        """Views of a head's query, key and value [d, C] and of its output [C, d]."""
        attention = self.lm.transformer.layers[layer].self_attn
        own = slice(head * self.head_width, (head + 1) * self.head_width)
        rows = attention.in_projs[0].weight.unflatten(0, (3, self.width))[:, own]
        return (*rows.unbind(0), attention.out_projs[0].weight[:, own])

    def _pair(self, pair: int) -> tuple[int, int]:
        """Rows of a head that rotary positions turn together."""
        return (2 * pair, 2 * pair + 1) if self.interleave else (pair, pair + self.num_pairs)

    def _basis(self) -> torch.Tensor:
        """[C, d] with orthonormal columns, none of them in the dimension of sameness."""
        drawn = torch.randn(self.width - 1, self.head_width, generator=self.generator)
        basis = torch.zeros(self.width, self.head_width)
        basis[1:] = torch.linalg.qr(drawn)[0]
        return basis


def _scale_depth(lm: Any) -> None:
    """The codes so far weigh as much as the frame's context, and layers add to both."""
    for table in (lm.depformer_text_emb, *lm.depformer_emb):
        _to_level(table.weight, DEPTH_LEVEL)
    for layer in lm.depformer.layers:
        gates = gates_of(layer)
        for weight in (
            *(out.weight for out in layer.self_attn.out_projs),
            *(gate.linear_out.weight for gate in gates),
        ):
            weight.mul_(LAYER_LEVEL)
