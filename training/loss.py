"""Cross-entropy of everything that the model predicts, and the loss made of it. Pure.

A *part* is a set of predictions that share one weight. Let n be the number of predictions of a
part and S their summed negative log-likelihood in nats:

    w, p       text, split into words and padding (PAD or EPAD)
    1 … 8      the agent's Mimi codebooks; 1 is the semantic one
    9 … 16     the user's, where the model predicts them (dep_q 16) and they are asked for

With a, b, u = semantic, acoustic and text padding weight, and a user's codebook weighted as the
agent's of the same number, v_k = a for k = 1, 9 and b for the others:

    terms  loss = (S_w + u·S_p) / (n_w + u·n_p) + Σ v_k·S_k / Σ v_k·n_k
    all    loss = (S_w + u·S_p + Σ v_k·S_k) / (n_w + u·n_p + Σ v_k·n_k)
    none   loss = (S_w + u·S_p) / (n_w + u·n_p) + a·S_1/n_1 + b·mean_{k=2..8}(S_k/n_k)

`terms` is moshi-finetune's, and ours (profiles `workbench` and `moshi`): both terms are means,
so a = 100 shifts the audio term towards the semantic code and leaves the text half of the loss.
`all` is the paper's of PersonaPlex: a, b, u = 1, .02, .3. `none` is the predecessor's
(`coffee-compat`): text is about 1.3 % of the loss at the start.
Source: kyutai-labs/moshi-finetune, `finetune/loss.py` and its config; the PersonaPlex paper.

Each of them is linear in S once the n are known, and those follow from the codes and the mask
alone: `loss = Σ c·S` with `c = coefficients(n)`. So coefficients are made before the forward pass,
from the counts of a whole batch, and its parts (accumulation, processes) add up to it exactly.

Legend: B clips, K = 17 rows, T frames, P = 10 parts, or 18 with the user's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from duplex.config_train import LossSection
from duplex.streams import CODEBOOKS, TEXT_EPAD, TEXT_PAD, TEXT_ROW

if TYPE_CHECKING:
    from moshi.models.lm import LMOutput

MASK_ROWS = 1 + CODEBOOKS  # text, then the agent's codebooks
MASK_ROWS_WITH_USER = 1 + 2 * CODEBOOKS
WORDS, PADDING, AUDIO = 0, 1, 2  # places of the parts; AUDIO is the first codebook's
_SEMANTIC = (AUDIO, AUDIO + CODEBOOKS)  # the agent's, and the user's where there is one
_AGENT = ("semantic", *(f"acoustic_{k}" for k in range(1, CODEBOOKS)))
STREAMS = ("text", "text_nonpad", *_AGENT)
USER_STREAMS = tuple(f"user_{name}" for name in _AGENT)
GROUPS = ("words", "padding", "semantic", "acoustic")  # what a loss budget tells apart


@dataclass(frozen=True)
class StreamSums:
    """Summed negative log-likelihood and number of predictions of each part.

    nll: float32 [P], nats, with its graph where one is wanted; count: float32 [P].
    """

    nll: torch.Tensor
    count: torch.Tensor

    def __add__(self, other: StreamSums) -> StreamSums:
        return StreamSums(self.nll + other.nll, self.count + other.count)

    def detached(self) -> StreamSums:
        """float64 on the CPU, without the graph: for adding up over a whole split."""
        return StreamSums(self.nll.detach().double().cpu(), self.count.detach().double().cpu())


def part_masks(codes: torch.Tensor, loss_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Where each part has predictions: P masks, bool [B, T]. `-1` is never predicted.

    Args:
        codes: int64 [B, 17, T], undelayed.
        loss_mask: bool [B, 9, T] (text, agent) or [B, 17, T] (user too); False carries no loss.
    """
    text = codes[:, TEXT_ROW]
    is_padding = (text == TEXT_PAD) | (text == TEXT_EPAD)
    due = loss_mask & (codes[:, : loss_mask.shape[1]] >= 0)  # [B, 9 or 17, T]
    return (due[:, 0] & ~is_padding, due[:, 0] & is_padding, *due[:, 1:].unbind(1))


def part_counts(codes: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """Number of predictions of each part, float32 [P]: the n of the formulas."""
    return torch.stack([mask.sum() for mask in part_masks(codes, loss_mask)]).float()


def coefficients(count: torch.Tensor, section: LossSection) -> torch.Tensor:
    """c [P] with `loss = Σ c·S`, as the module's docstring writes it; 0 for a part without any.

    Args:
        count: [P], of the whole batch: of all its parts and processes.
    """
    weight = part_weights(count, section)
    text, audio = weight.clone(), weight.clone()
    text[AUDIO:], audio[:AUDIO] = 0, 0
    if section.normalize == "all":
        return weight / _or_one((weight * count).sum())
    text = text / _or_one((text * count).sum())
    if section.normalize == "terms":
        return text + audio / _or_one((audio * count).sum())
    means = audio / _or_one(count)
    acoustic = torch.ones_like(means)
    acoustic[AUDIO:] = CODEBOOKS - 1
    for place in _SEMANTIC:
        acoustic[place : place + 1] = 1
    return text + means / acoustic


def part_weights(like: torch.Tensor, section: LossSection) -> torch.Tensor:
    """The weight of one prediction of each part before normalisation: [P], of `like`'s type."""
    weight = torch.full_like(like, section.acoustic_weight)
    weight[WORDS], weight[PADDING] = 1.0, section.text_padding_weight
    for place in _SEMANTIC:
        weight[place : place + 1] = section.semantic_weight
    return weight


def _or_one(total: torch.Tensor) -> torch.Tensor:
    """`total`, with 1 for 0: a sum of nothing is divided by it."""
    return torch.where(total > 0, total, torch.ones_like(total))


def training_loss(sums: StreamSums, section: LossSection) -> torch.Tensor:
    """Scalar loss of `sums`, as the module's docstring writes it; 0 (with a graph) of nothing."""
    return (coefficients(sums.count, section) * sums.nll).sum()


def stream_sums(output: LMOutput, codes: torch.Tensor, loss_mask: torch.Tensor) -> StreamSums:
    """Negative log-likelihood of `codes` under the library's output, part by part.

    Args:
        output: logits [B, dep_q, T, card] and text_logits [B, 1, T, text_card]; NaN where their
            masks are False, which is why predictions are picked before anything is computed.
        codes: int64 [B, 17, T], undelayed.
        loss_mask: bool [B, 9 or 17, T]; False carries no loss.
    """
    words, padding, *audio = part_masks(codes, loss_mask)
    text_mask, text_logits = output.text_mask[:, 0], output.text_logits[:, 0]
    parts = [
        _sum_of_nll(text_logits, codes[:, TEXT_ROW], text_mask & mask) for mask in (words, padding)
    ]
    for k, mask in enumerate(audio):
        parts.append(_sum_of_nll(output.logits[:, k], codes[:, 1 + k], output.mask[:, k] & mask))
    nll, count = zip(*parts, strict=True)
    return StreamSums(torch.stack(nll), torch.stack(count))


def _sum_of_nll(
    logits: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the frames of `mask`, and their number. logits [B, T, card]; others [B, T]."""
    picked = logits[mask].float()  # [N, card]
    nll = functional.cross_entropy(picked, codes[mask], reduction="sum")
    return nll, mask.sum().to(nll.dtype)


def stream_means(sums: StreamSums) -> dict[str, float | None]:
    """Unweighted mean NLL of each stream, in nats; None where it has no prediction.

    `STREAMS`, and `USER_STREAMS` where the user's were counted.
    """
    nll, count = sums.nll.tolist(), sums.count.tolist()
    values = [(nll[WORDS] + nll[PADDING], count[WORDS] + count[PADDING])]
    values += [(nll[i], count[i]) for i in range(len(nll)) if i != PADDING]
    names = STREAMS if len(values) == len(STREAMS) else STREAMS + USER_STREAMS
    return {
        name: part / number if number else None
        for name, (part, number) in zip(names, values, strict=True)
    }


def group_of_part(place: int) -> str:
    """The name in `GROUPS` of the part at `place`."""
    if place in (WORDS, PADDING):
        return GROUPS[place]
    return "semantic" if place in _SEMANTIC else "acoustic"
