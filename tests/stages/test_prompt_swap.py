"""The prompt-swap margin: above 0 for a model that reads its prompt, about 0 for one that
does not, and plain arithmetic for forwards whose likelihoods are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from moshi.utils.compile import no_compile

from duplex.config_train import LossSection
from duplex.streams import TEXT_PAD, TEXT_ROW
from pipeline.engines.checkpoint import Checkpoint
from tests.stages.training_factories import make_codes
from training.batches import Clip, make_batch
from training.forward import LibraryForward
from training.loss import AUDIO, WORDS, StreamSums, coefficients, part_counts
from training.prompt_swap import (
    held_out_clips,
    plan_swaps,
    prompt_tokens,
    score_swaps,
    swapped,
)

CPU = torch.device("cpu")


def persona_clip(name, persona, num_frames=24, seed=0, said=None, prompt_frames=8):
    """A prompt that holds token 20 + persona, and a dialogue that says `said`, or that token."""
    codes = make_codes(seed, num_frames)
    codes[TEXT_ROW, :prompt_frames] = [TEXT_PAD] + [20 + persona] * (prompt_frames - 1)
    codes[TEXT_ROW, prompt_frames:] = 20 + persona if said is None else said
    codes[TEXT_ROW, prompt_frames::4] = TEXT_PAD
    return Clip(name, codes.astype(np.int16), prompt_frames, prompt_frames)


def hand_made_forward(cost):
    """A forward whose NLL of each word is `cost(prompt token, word)`, of each code 2."""

    def forward(codes, loss_mask, weights):
        assert loss_mask.shape[0] == 1
        count = part_counts(codes, loss_mask)
        nll = 2.0 * count
        prompt = int(codes[0, TEXT_ROW, 1])
        text = codes[0, TEXT_ROW][loss_mask[0, 0]]
        nll[WORDS] = sum(cost(prompt, int(token)) for token in text if token > TEXT_PAD)
        return (weights * nll).sum(), StreamSums(nll, count)

    return forward


CLIPS = [persona_clip(f"p{i}", i, num_frames=20 + 4 * i, prompt_frames=5 + i) for i in range(4)]


def score(forward, clips=CLIPS, swaps=3):
    return score_swaps(forward, plan_swaps(clips, [clips], swaps, seed=1), CPU)


def test_the_margin_is_the_difference_of_the_means():
    """0.5 nats for the own prompt's word; under another's prompt 0.5 + their distance."""
    found = score(hand_made_forward(lambda prompt, word: 0.5 + abs(prompt - word)))
    distances = [np.mean([abs(i - j) for j in range(4) if j != i]) for i in range(4)]
    assert found.words is not None and found.semantic is not None
    assert found.words.mean == pytest.approx(np.mean(distances))
    assert found.words.num_clips == 4 and found.num_swaps == 12
    half = 3.18245 * np.std(distances, ddof=1) / 2
    assert found.words.interval == pytest.approx(
        (np.mean(distances) - half, np.mean(distances) + half), rel=1e-4
    )
    assert found.semantic.mean == 0 and found.semantic.interval == (0, 0)
    own = found.own
    assert float(own.nll[WORDS] / own.count[WORDS]) == pytest.approx(0.5)
    assert str(found.words).startswith("+1.667 nats [")


def test_a_forward_that_sees_the_dialogue_alone_has_no_margin():
    found = score(hand_made_forward(lambda prompt, word: 0.01 * word))
    assert found.words is not None and found.words.mean == pytest.approx(0, abs=1e-6)


def test_only_the_dialogue_is_scored_and_it_is_kept():
    clip = Clip("own", CLIPS[0].codes, CLIPS[0].prompt_frames, 0)  # prompt frames carry loss
    other = swapped(clip, CLIPS[3])
    end = CLIPS[3].prompt_frames
    assert np.array_equal(other.codes[:, :end], CLIPS[3].codes[:, :end])
    assert np.array_equal(other.codes[:, end:], clip.codes[:, clip.prompt_frames :])
    (task,) = plan_swaps([clip], [CLIPS], 2, seed=1)
    counts = [
        part_counts(batch.codes, batch.loss_mask)
        for batch in (make_batch([c]) for c in (task.own, other))
    ]
    assert torch.equal(counts[0], counts[1]), "the same predictions under each prompt"
    assert counts[0][AUDIO] == clip.num_frames - clip.prompt_frames


def test_clips_with_one_prompt_text_are_not_swapped():
    twin = persona_clip("twin", 0, seed=9)
    stranger = persona_clip("stranger", 7)
    assert prompt_tokens(twin) != prompt_tokens(CLIPS[0]), "its prompt is longer"
    same = persona_clip("same", 0, seed=5, prompt_frames=CLIPS[0].prompt_frames)
    assert prompt_tokens(same) == prompt_tokens(CLIPS[0])
    (task,) = plan_swaps([CLIPS[0]], [[CLIPS[0], same], [stranger, twin, twin]], 9, seed=1)
    assert sorted(other.id for other in task.others) == ["stranger", "twin"]
    assert plan_swaps([CLIPS[0]], [[same]], 3, seed=1)[0].others == ()
    found = score_swaps(
        hand_made_forward(lambda *_: 1), plan_swaps([same], [[same]], 3, seed=1), CPU
    )
    assert found.words is None and found.num_swaps == 0 and found.own.count[WORDS] > 0


def test_a_persona_is_never_swapped_with_itself():
    """Another wording of its own prompt tells the same facts."""
    named = [replace(clip, persona_id=f"q{place // 2}") for place, clip in enumerate(CLIPS)]
    training = [replace(persona_clip(f"t{i}", 10 + i), persona_id="q0") for i in range(3)]
    for task in plan_swaps(named, [named, training], 9, seed=1):
        own = next(clip.persona_id for clip in named if clip.id == task.own.id)
        assert task.others and own not in {other.persona_id for other in task.others}
    assert plan_swaps(named[:2], [named[:2], training], 9, seed=1)[0].others == ()


def test_held_out_prompts_come_before_training_prompts():
    training = [persona_clip(f"t{i}", 10 + i) for i in range(5)]
    (task,) = plan_swaps([CLIPS[0]], [CLIPS, training], 4, seed=1)
    assert {other.id for other in task.others[:3]} == {"p1", "p2", "p3"}
    assert task.others[3].id.startswith("t")


def test_a_clip_without_a_prompt_is_not_swapped():
    bare = Clip("bare", CLIPS[0].codes, 0, 0)
    assert plan_swaps([bare], [CLIPS], 3, seed=1)[0].others == ()
    assert all(other.id != "bare" for other in plan_swaps([CLIPS[0]], [[bare]], 3, 1)[0].others)


def test_the_clips_watched_hold_many_prompts_and_hang_on_no_order():
    clips = [persona_clip(f"{i}-{k}", i, seed=k) for i in range(3) for k in range(5)]
    chosen = held_out_clips(clips, 4, seed=1)
    assert len({prompt_tokens(clip) for clip in chosen[:3]}) == 3
    assert held_out_clips(clips[::-1], 4, seed=1) == chosen
    assert held_out_clips(clips, 99, seed=1)[:4] == chosen


def trained(folder, says_its_prompt, steps=20):
    """Some steps on all weights: each persona says its own prompt's token, or all say one."""
    said = None if says_its_prompt else 50
    lm = Checkpoint.open(folder).load_lm().requires_grad_(True).train()
    forward = LibraryForward(lm)
    clips = [persona_clip(f"t{i}", i % 4, seed=100 + i, said=said) for i in range(16)]
    valid = [persona_clip(f"v{i}", i % 4, seed=500 + i, said=said) for i in range(6)]
    adam = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    with no_compile():
        for step in range(steps):
            batch = make_batch(clips[step % 2 * 8 :][:8])
            weights = coefficients(part_counts(batch.codes, batch.loss_mask), LossSection())
            forward(batch.codes, batch.loss_mask, weights)[0].backward()
            adam.step()
            adam.zero_grad()
        lm.eval()
        return score_swaps(forward, plan_swaps(valid, [valid], 3, seed=1), CPU)


def test_a_model_that_learnt_to_read_its_prompt_is_told_from_one_that_did_not(tiny_checkpoint):
    reads, ignores, fresh = (
        trained(tiny_checkpoint, True).words,
        trained(tiny_checkpoint, False).words,
        trained(tiny_checkpoint, True, steps=0).words,
    )
    assert reads.interval[0] > 0.2 and reads.num_clips == 6
    for other in (ignores, fresh):
        assert other.interval[0] <= 0 <= other.interval[1] or abs(other.mean) < 0.02
        assert other.mean < reads.interval[0]
