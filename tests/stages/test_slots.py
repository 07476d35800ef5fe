"""Conversations side by side: each says what it would say alone, whoever comes and goes."""

import numpy as np
import pytest
import torch

from duplex.config import SamplingSection
from duplex.streams import AGENT_ROWS, TEXT_ROW, apply_delays
from pipeline.serving import prefill
from pipeline.serving.model import ServedModel
from pipeline.serving.prefill import PromptCache
from pipeline.serving.sampling import SlotSampler, pick
from tests.factories import slow
from tests.stages.conftest import write_tiny_checkpoint

SLOTS = 3
GREEDY = SamplingSection(text_temperature=0, audio_temperature=0)
COOL = SamplingSection(text_temperature=0.4, audio_temperature=0.5, text_topk=3, audio_topk=9)
# Prompts of other lengths, so that positions differ; seeds and sampling of each its own.
TALKS = (
    ("You are Ann.", SamplingSection(), 5),
    ("You work for Sunrise Coffee, your name is Maria and you are tired of it.", COOL, 6),
    ("", GREEDY, 7),
)
FRAMES = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # A context that the longest conversation here outgrows.
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("slots"), context=90)
    return ServedModel.load(folder, "cpu", num_slots=SLOTS)


def audio(number, num_frames=FRAMES):
    """float32 [num_frames, 1920]: another user for each number."""
    rng = np.random.default_rng(number)
    return (0.2 * rng.standard_normal((num_frames, 1920))).astype(np.float32)


class Talk:
    """A conversation that is stepped by whoever holds it; `heard` what was answered so far."""

    def __init__(self, model, number, slot, user=None):
        prompt, sampling, seed = TALKS[number]
        self.slot, self.user, self.place = slot, audio(number) if user is None else user, 0
        self.fed = model.begin(prompt, sampling, seed, slot=slot).frames
        self.said: list[tuple[bytes, int | None]] = []
        self.read: list[list[int]] = []

    def next(self):
        self.place += 1
        return self.user[self.place - 1]

    @property
    def is_over(self):
        return self.place == len(self.user)


def step(model, talks):
    answers = model.step({talk.slot: talk.next() for talk in talks})
    for talk in talks:
        pcm, token = answers[talk.slot]
        talk.said.append((pcm.tobytes(), token))
        talk.read.append(model.slots.last_input(talk.slot).tolist())


def alone(model, number, slot=0):
    talk = Talk(model, number, slot)
    while not talk.is_over:
        step(model, [talk])
    return talk


@pytest.fixture(scope="module")
def references(model):
    return [alone(model, number) for number in range(len(TALKS))]


def test_the_three_are_three(references):
    said = [tuple(talk.said) for talk in references]
    assert len(set(said)) == 3
    for talk in references:
        assert any(token is not None for _, token in talk.said)
        assert any(np.frombuffer(pcm, np.float32).any() for pcm, _ in talk.said)


def test_neighbours_that_come_and_go_change_nothing(model, references):
    """Bit for bit: what is said, and every id that the model read."""
    started = {0: (0, 0), 3: (1, 1), 7: (2, 2)}  # frame -> conversation, slot
    running, over = [], []
    for frame in range(60):
        if frame in started:
            number, slot = started[frame]
            running.append((number, Talk(model, number, slot)))
        # Every second frame one of them has nothing to say: it is left out of the step.
        skipped = frame % 5 if len(running) > 1 else -1
        now = [talk for place, (_, talk) in enumerate(running) if place != skipped]
        if now:
            step(model, now)
        over += [(number, talk) for number, talk in running if talk.is_over]
        running = [(number, talk) for number, talk in running if not talk.is_over]
    assert [number for number, _ in sorted(over, key=lambda pair: pair[0])] == [0, 1, 2]
    for number, talk in over:
        assert np.array_equal(talk.fed, references[number].fed)
        assert talk.read == references[number].read, number
        assert talk.said == references[number].said, number


@pytest.mark.slow  # a seed decides one: test_conversation.py
def test_the_fifteenth_conversation_of_a_slot_is_the_first(model, references):
    for turn in range(14):
        talk = Talk(model, turn % 3, 1)
        for _ in range(2 + turn % 5):  # left in the middle
            step(model, [talk])
    assert alone(model, 0, slot=1).said == references[0].said


@pytest.mark.slow  # shorter neighbours: above
def test_a_long_neighbour_whose_ring_has_wrapped_is_not_touched_by_a_prompt(model):
    """Blocks of a prompt written into the shared ring would overwrite its oldest frames."""
    user = audio(9, 110)  # beyond the context of 90

    def long_talk(disturbed):
        talk = Talk(model, 0, 0, user)
        while not talk.is_over:
            if disturbed and talk.place in (70, 95):
                model.cache = PromptCache(0)  # so that it is fed, not copied
                Talk(model, 1, 1)
            step(model, [talk])
        return talk.said

    assert long_talk(disturbed=True) == long_talk(disturbed=False)


def test_nothing_is_ungenerated_not_even_in_the_first_frame_without_a_prompt(monkeypatch, tmp_path):
    """What a slot's decoder is given, from its first frame on and beside another, are codes."""
    bare = ServedModel.load(write_tiny_checkpoint(tmp_path), "cpu", num_slots=2, bare=True)
    given = []
    inner = bare.slots._step_lm
    monkeypatch.setattr(
        bare.slots, "_step_lm", lambda s, u: given.append((s, inner(s, u))) or given[-1][1]
    )
    bare.begin("", GREEDY, 1, slot=0)
    bare.step({0: audio(0)[0]})
    bare.begin("", GREEDY, 1, slot=1)
    bare.step({0: audio(0)[1], 1: audio(1)[0]})
    steps = [(slots, out) for slots, out in given if len(slots) == 2 or slots == [0]][1:]
    assert [slots for slots, _ in steps] == [[0], [0, 1]]
    for slots, out in steps:
        assert (out[slots] >= 0).all()


@pytest.mark.parametrize("block", [slow(1), 5, slow(1000)])
def test_a_prompt_in_blocks_is_the_prompt_frame_by_frame(model, references, monkeypatch, block):
    monkeypatch.setitem(prefill.BLOCK_FRAMES, "cpu", block)
    monkeypatch.setattr(model, "cache", PromptCache(0))
    for number, reference in enumerate(references):
        talk = alone(model, number)
        assert talk.read == reference.read
        pcm, expected = (
            np.concatenate([np.frombuffer(part, np.float32) for part, _ in one.said])
            for one in (talk, reference)
        )
        assert np.abs(pcm - expected).max() < 1e-4


def test_what_was_fed_is_what_the_embedding_tables_were_asked_for(model, monkeypatch):
    monkeypatch.setattr(model, "cache", PromptCache(0))
    planned = model.plan(TALKS[1][0])
    expected = apply_delays(planned.prompt.training_codes(), model.lm.card, model.lm.text_card)
    assert np.array_equal(model.begin(*TALKS[1]).frames, expected)

    # The planted fault: something else reaches the model.
    inner = model.lm.forward_text

    def deaf(sequence, *rest):
        wrong = sequence.clone()
        wrong[:, TEXT_ROW] = 3
        return inner(wrong, *rest)

    monkeypatch.setattr(model.lm, "forward_text", deaf)
    fed = model.begin(*TALKS[1]).frames
    assert not np.array_equal(fed[TEXT_ROW], expected[TEXT_ROW])
    assert np.array_equal(fed[AGENT_ROWS], expected[AGENT_ROWS])


def test_the_first_tokens_hang_on_the_seed_and_not_on_the_prompts_state(model):
    model.cache = PromptCache(1 << 20)
    first = alone(model, 0)
    again = alone(model, 0)
    assert model.cache.hits == 1 and model.cache.misses == 1
    assert again.said == first.said
    prompt, sampling, _ = TALKS[0]
    fed = model.begin(prompt, sampling, 99)
    assert fed.from_cache
    other = model.step({0: audio(0)[0]})[0]
    second = model.step({0: audio(0)[1]})[0]
    assert [(p.tobytes(), t) for p, t in (other, second)] != first.said[:2]


def test_the_prompt_cache_keeps_to_its_size_and_drops_the_oldest(model):
    filled = {}
    for number, (prompt, _, _) in enumerate(TALKS):
        run = model.prefill(model.plan(prompt))
        while (one := run.advance()) is None:
            pass
        filled[str(number)] = one
    sizes = [one.num_bytes for one in filled.values()]
    cache = PromptCache(sizes[0] + sizes[1])
    for key, one in filled.items():
        cache.put(key, one)
        assert cache.num_bytes <= sizes[0] + sizes[1]
    assert cache.get("2") is not None and cache.get("0") is None
    small = PromptCache(10)
    small.put("0", filled["0"])
    assert small.num_bytes == 0


# -- drawing


def test_a_draw_has_the_probabilities_of_its_softmax():
    """Chi-square of 20 000 draws against softmax at temperature .7 within the top 4 of 6."""
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, 1.9, -3.0])
    sampler = SlotSampler(1, 6, 6, 1, torch.device("cpu"))
    sampler.begin(0, SamplingSection(text_temperature=0.7, text_topk=4), seed=3)
    counts = np.zeros(6)
    for _ in range(20_000):
        sampler.draw([0])
        counts[int(sampler.text(logits[None])[0])] += 1
    kept = logits.clone()
    kept[[2, 5]] = -torch.inf
    expected = torch.softmax(kept / 0.7, 0).numpy() * counts.sum()
    assert counts[[2, 5]].sum() == 0
    inside = expected > 0
    chi = ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum()
    assert chi < 16.3  # 3 degrees of freedom, p = .001


def test_temperature_zero_top_one_and_half_precision_take_the_likeliest():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    noise = 100 * torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    best = logits.argmax(-1)
    zero, one = torch.zeros(4), torch.ones(4)
    many, single = torch.full((4,), 999), torch.ones(4, dtype=torch.long)
    assert torch.equal(pick(logits, noise, zero, many), best)
    assert torch.equal(pick(logits, noise, one, single), best)
    assert torch.equal(pick(logits.bfloat16(), noise, zero, single), logits.bfloat16().argmax(-1))
    assert not torch.equal(pick(logits, noise, one, many), best)


def test_a_slots_draws_do_not_hang_on_its_neighbours():
    def drawn(others):
        sampler = SlotSampler(3, 5, 7, 2, torch.device("cpu"))
        sampler.begin(1, SamplingSection(), seed=11)
        found = []
        for frame in range(6):
            if others and frame == 2:
                sampler.begin(0, SamplingSection(), seed=frame)
            sampler.draw([0, 1, 2] if others and frame % 2 else [1])
            found.append((sampler.text_noise[1].tolist(), sampler.audio_noise[1].tolist()))
        return found

    assert drawn(others=True) == drawn(others=False)
