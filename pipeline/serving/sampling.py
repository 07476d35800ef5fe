"""A token for each slot, by the slot's own temperature, top-k and seed. Pure but for the draws.

torch's own sampling takes numbers for a whole batch from one generator, so what one conversation
is given hangs on who else is there. Here each slot has a generator; argmax over logits plus
Gumbel noise is a draw from their softmax (Gumbel, 1954; "perturb and MAP"), and noise is made
before the model runs, so that nothing random happens inside a captured CUDA graph.

Shapes: N slots, V tokens.
"""

from __future__ import annotations

import torch

from duplex.config import SamplingSection

LEAST_TEMPERATURE = 1e-4  # below it logits / temperature would overflow bfloat16's exponent


def pick(
    logits: torch.Tensor, noise: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor
) -> torch.Tensor:
    """int64 [N]: one token a row, among its `top_k` likeliest; the likeliest at temperature 0.

    Args:
        logits: [N, V], any float type.
        noise: float32 [N, V], standard Gumbel.
        temperature: float32 [N].
        top_k: int64 [N], at least 1; more than V means all.
    """
    logits = logits.float()
    ranked = logits.sort(dim=-1, descending=True).values
    last = ranked.gather(1, (top_k.clamp(max=logits.shape[1]) - 1)[:, None])
    warm = logits / temperature.clamp(min=LEAST_TEMPERATURE)[:, None] + noise
    scores = torch.where(temperature[:, None] > 0, warm, logits)
    return scores.masked_fill(logits < last, -torch.inf).argmax(dim=-1)


class SlotSampler:
    """Settings and noise of all slots, in tensors that keep their place in memory.

    `draw` must be called once before each step of the model, with the slots that take part: a
    slot's generator moves only then, so its neighbours' coming and going changes nothing.
    """

    def __init__(self, num_slots: int, text_card: int, card: int, steps: int, device: torch.device):
        self.text_temperature = torch.zeros(num_slots, device=device)
        self.audio_temperature = torch.zeros(num_slots, device=device)
        self.text_topk = torch.ones(num_slots, dtype=torch.int64, device=device)
        self.audio_topk = torch.ones(num_slots, dtype=torch.int64, device=device)
        self.text_noise = torch.zeros(num_slots, text_card, device=device)
        self.audio_noise = torch.zeros(num_slots, steps, card, device=device)
        self._generators = [torch.Generator(device) for _ in range(num_slots)]

    def begin(self, slot: int, sampling: SamplingSection, seed: int) -> None:
        """A new conversation."""
        self.text_temperature[slot] = sampling.text_temperature
        self.audio_temperature[slot] = sampling.audio_temperature
        self.text_topk[slot] = sampling.text_topk
        self.audio_topk[slot] = sampling.audio_topk
        self._generators[slot].manual_seed(seed)

    def draw(self, slots: list[int]) -> None:
        """Fresh noise for these slots: float32 Gumbel."""
        for slot in slots:
            for noise in (self.text_noise[slot], self.audio_noise[slot]):
                noise.exponential_(generator=self._generators[slot]).log_().neg_()

    def text(self, logits: torch.Tensor) -> torch.Tensor:
        """int64 [N] of logits [N, V]."""
        return pick(logits, self.text_noise, self.text_temperature, self.text_topk)

    def audio(self, logits: torch.Tensor, step: int) -> torch.Tensor:
        """int64 [N] of a depth step's logits [N, V]."""
        noise = self.audio_noise[:, step]
        return pick(logits, noise, self.audio_temperature, self.audio_topk)
