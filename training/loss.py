"""Cross-entropy of the ten things that the model predicts, and the loss made of it. Pure.

Each frame holds a text token and the agent's eight Mimi codes; the user's codes carry no
loss. Let n be a stream's count of frames with loss and S its summed negative log-likelihood
in nats. Text frames are split into words (w) and padding (p: PAD or EPAD):

    text  = (S_w + u·S_p) / (n_w + u·n_p)                       u = text_padding_weight
    audio = (a·S_1 + b·ΣS_k) / (a·n_1 + b·Σn_k),  k = 2..8      a, b = semantic, acoustic weight
    loss  = text + audio

With `normalize: false`, as the predecessor had it, the audio term is a sum of means instead:

    audio = a·S_1/n_1 + b·mean_k(S_k/n_k),  k = 2..8

In the first form both terms are means, so a = 100 shifts the audio term towards the semantic
code and leaves the text half of the loss. In the second, text is about 1.3 % of the loss at the
start (FACTS, section 4). Source: kyutai-labs/moshi-finetune, `finetune/loss.py` and its config.

Everything is linear in sums and counts, so these are what is passed around: sums of batches
add up to the exact loss of a whole data set.

Legend: B clips, K = 17 rows, T frames, N frames with loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from duplex.config import LossSection
from duplex.streams import AGENT_ROWS, CODEBOOKS, TEXT_EPAD, TEXT_PAD, TEXT_ROW

if TYPE_CHECKING:
    from moshi.models.lm import LMOutput

MASK_ROWS = 1 + CODEBOOKS  # text, then the agent's codebooks
STREAMS = ("text", "text_nonpad", "semantic", *(f"acoustic_{k}" for k in range(1, CODEBOOKS)))
# Parts of a `StreamSums`, in order.
_WORDS, _PADDING, _SEMANTIC, _ACOUSTIC = 0, 1, 2, slice(3, 2 + CODEBOOKS)


@dataclass(frozen=True)
class StreamSums:
    """Summed negative log-likelihood and frame count of each part.

    nll: float32 [10], nats, with its graph: text words, text padding, agent codebooks 1-8.
    count: float32 [10].
    """

    nll: torch.Tensor
    count: torch.Tensor

    def __add__(self, other: StreamSums) -> StreamSums:
        return StreamSums(self.nll + other.nll, self.count + other.count)

    def detached(self) -> StreamSums:
        """float64 on the CPU, without the graph: for adding up over a whole split."""
        return StreamSums(self.nll.detach().double().cpu(), self.count.detach().double().cpu())


def stream_sums(output: LMOutput, codes: torch.Tensor, loss_mask: torch.Tensor) -> StreamSums:
    """Negative log-likelihood of `codes` under `output`, part by part.

    Args:
        output: logits [B, dep_q, T, card] and text_logits [B, 1, T, text_card]; NaN where their
            masks are False, which is why frames are picked before anything is computed.
        codes: int64 [B, 17, T], undelayed.
        loss_mask: bool [B, 9, T], text and the agent's codebooks; False carries no loss.
    """
    text_mask = output.text_mask[:, 0] & loss_mask[:, 0]  # [B, T]
    text_codes = codes[:, TEXT_ROW]  # [B, T]
    is_padding = (text_codes == TEXT_PAD) | (text_codes == TEXT_EPAD)
    parts = [
        _sum_of_nll(output.text_logits[:, 0], text_codes, text_mask & ~is_padding),
        _sum_of_nll(output.text_logits[:, 0], text_codes, text_mask & is_padding),
    ]
    agent = codes[:, AGENT_ROWS]  # [B, 8, T]
    for k in range(CODEBOOKS):
        mask = output.mask[:, k] & loss_mask[:, 1 + k]
        parts.append(_sum_of_nll(output.logits[:, k], agent[:, k], mask))
    nll, count = zip(*parts, strict=True)
    return StreamSums(torch.stack(nll), torch.stack(count))


def _sum_of_nll(
    logits: torch.Tensor, codes: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the frames of `mask`, and their number. logits [B, T, card]; others [B, T]."""
    picked = logits[mask].float()  # [N, card]
    nll = functional.cross_entropy(picked, codes[mask], reduction="sum")
    return nll, mask.sum().to(nll.dtype)


def text_loss(sums: StreamSums, padding_weight: float) -> torch.Tensor:
    """Scalar: mean text NLL in nats, words at weight 1, padding at `padding_weight`."""
    weight = torch.zeros_like(sums.count)
    weight[_WORDS], weight[_PADDING] = 1.0, padding_weight
    return _weighted_mean(sums, weight)


def audio_loss(sums: StreamSums, semantic_weight: float, acoustic_weight: float) -> torch.Tensor:
    """Scalar: mean NLL of the agent's eight codebooks in nats, weighted as named."""
    weight = torch.zeros_like(sums.count)
    weight[_SEMANTIC], weight[_ACOUSTIC] = semantic_weight, acoustic_weight
    return _weighted_mean(sums, weight)


def audio_sum_of_means(
    sums: StreamSums, semantic_weight: float, acoustic_weight: float
) -> torch.Tensor:
    """Scalar: the predecessor's audio term, means of the codebooks added with their weights."""
    means = sums.nll / sums.count.clamp(min=1)
    return semantic_weight * means[_SEMANTIC] + acoustic_weight * means[_ACOUSTIC].mean()


def training_loss(sums: StreamSums, section: LossSection) -> torch.Tensor:
    """Scalar: text term + audio term, as the module's docstring writes them."""
    text = text_loss(sums, section.text_padding_weight)
    audio = audio_loss if section.normalize else audio_sum_of_means
    return text + audio(sums, section.semantic_weight, section.acoustic_weight)


def _weighted_mean(sums: StreamSums, weight: torch.Tensor) -> torch.Tensor:
    """Σ w·nll / Σ w·count; 0 (with a graph) where no frame has weight."""
    total = (weight * sums.count).sum()
    return (weight * sums.nll).sum() / torch.where(total > 0, total, torch.ones_like(total))


def stream_means(sums: StreamSums) -> dict[str, float | None]:
    """Unweighted mean NLL of each stream of `STREAMS`, in nats; None where it has no frame."""
    nll, count = sums.nll.tolist(), sums.count.tolist()
    values = [(nll[_WORDS] + nll[_PADDING], count[_WORDS] + count[_PADDING])]
    values += [(nll[i], count[i]) for i in range(len(nll)) if i != _PADDING]
    return {
        name: part / number if number else None
        for name, (part, number) in zip(STREAMS, values, strict=True)
    }
