"""The forward that is made for a GPU gives what the other one gives, on a CPU too."""

import pytest
import torch

from pipeline.engines.pocket import LM_CONFIG, build_lm
from tests.stages.conftest import TINY_CARD, TINY_TEXT_CARD
from training.fast import FastForward
from training.loss import coefficients, part_counts
from training.pocket.base_clips import ClipMaker, joined
from training.pocket.base_gpu import WideForward
from training.pocket.base_loop import ALONE, accumulate_gradients
from training.pocket.base_optimizer import Masters
from training.pocket.base_source import LOSS, LoopSettings, Source

SMALL = {"dim": 32, "num_heads": 2, "num_layers": 2, "depformer_dim": 16,
         "depformer_dim_feedforward": 64, "depformer_num_heads": 2,
         "card": TINY_CARD, "text_card": TINY_TEXT_CARD}  # fmt: skip


@pytest.fixture
def lm():
    return build_lm({**LM_CONFIG, **SMALL}, 3).train().requires_grad_(True)


def batch(audio=True):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 32, (3, 17, 40), generator=generator)
    codes[:, :, 5:25] = 7  # silence
    codes[:, 0, ::3] = 3
    codes[2, :, 30:] = -1
    mask = torch.zeros(3, 9, 40, dtype=torch.bool)
    mask[:, 0, 4:] = True
    if audio:
        mask[:2, 1:, 10:] = True
        mask[:2, 3:, -1] = False
    return codes, mask, coefficients(part_counts(codes, mask), LOSS)


@pytest.mark.parametrize("audio", [True, False])
def test_loss_sums_and_gradients_are_those_of_the_other_forward(lm, audio):
    found = []
    for kind in (FastForward, WideForward):
        lm.zero_grad()
        loss, sums = kind(lm)(*batch(audio))
        loss.backward()
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for n, p in lm.named_parameters()
        }
        found.append((loss.detach(), sums, grads))
    (loss, sums, grads), (other, other_sums, other_grads) = found
    assert torch.allclose(loss, other, rtol=1e-5)
    assert torch.allclose(sums.nll, other_sums.nll, rtol=1e-5)
    assert torch.equal(sums.count, other_sums.count)
    for name, grad in grads.items():
        assert torch.allclose(grad, other_grads[name], rtol=1e-3, atol=1e-6), name
    assert audio == bool(grads["linears.0.weight"].any())


def test_joined_lessons_give_the_gradients_of_both(lm, grammar, bank, tokenizer, phones):
    settings = LoopSettings(3, batch_size=2, longest_frames=200, reading_steps=0, word_steps=1)
    source = Source(grammar, ClipMaker(bank, tokenizer, phones), settings)
    forward, found = WideForward(lm), []
    for lessons in (source.batches(1), [joined(source.batches(1))]):
        lm.zero_grad()
        sums = accumulate_gradients(forward, lessons, settings.section(), ALONE)
        found.append((sums, [p.grad.clone() for p in lm.parameters() if p.grad is not None]))
    (sums, grads), (other, other_grads) = found
    assert torch.allclose(sums.nll, other.nll, rtol=1e-5) and len(grads) == len(other_grads) > 20
    for grad, other_grad in zip(grads, other_grads, strict=True):
        assert torch.allclose(grad, other_grad, rtol=1e-3, atol=1e-6)


def test_a_checkpoint_can_be_written_before_a_part_has_had_a_gradient(lm):
    """In steps of words alone the depth transformer is not reached."""
    masters = Masters(lm, LoopSettings(3).section())
    codes, mask, weights = batch(audio=False)
    WideForward(lm)(codes, mask, weights)[0].backward()
    masters.update(lm, 0, ALONE)
    tensors = masters.tensors()
    assert {f"exp_avg.{name}" for name, _ in lm.named_parameters()} <= tensors.keys()
    Masters(lm, LoopSettings(3).section()).restore(tensors)
