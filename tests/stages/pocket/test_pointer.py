"""The heads that are told what is being said: their labels, their score, and that they learn."""

import random

import numpy as np
import pytest
import torch

from duplex.streams import TEXT_ROW
from pipeline.engines.pocket import build_lm
from tests.stages.conftest import TINY_LM_CONFIG
from training.attention import causal_attention, rotate
from training.fast import FastForward
from training.pocket.base_clips import ClipMaker, lesson, place
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_phones import AGENT, WORD, Sounds
from training.pocket.base_pointer import (
    HEADS,
    READ,
    Pointer,
    letter_edges,
    point,
    sounding,
    told,
    words_of,
)
from training.pocket.base_source import LoopSettings, Source
from training.pocket.codec_labels import IGNORED
from training.projection import rms_norm


@pytest.fixture(scope="module")
def source(grammar, bank, tokenizer, phones):
    return Source(grammar, ClipMaker(bank, tokenizer, phones), LoopSettings(9, batch_size=2))


def test_through_the_frames_of_a_word_its_pieces_are_pointed_at_in_order(
    grammar, bank, tokenizer, phones, source
):
    words_seen = frames_seen = 0
    for seed in range(12):
        rng = random.Random(seed)
        dialogue = draw_dialogue(grammar, source.index, rng)
        state = rng.getstate()
        one = source.maker.clip(dialogue, rng, "words")
        rng.setstate(state)
        assert one.phones is not None
        first, text = one.clip.prompt_frames, one.clip.codes[TEXT_ROW]
        labelled = np.zeros(one.clip.num_frames, dtype=bool)
        for turn, pieces in place(dialogue, bank, rng):
            if turn.role != "agent":
                continue
            for start, _, unit in pieces:
                at = first + start
                ends = phones.sounds[unit].word_ends
                spoken = bank.units[unit].text.split()
                if len(ends) != len(spoken) or one.phones[at, WORD.start] == IGNORED:
                    continue
                for word, end in zip(spoken, ends, strict=True):
                    behind = min(first + start + end + 1, first + turn.end)
                    places = one.phones[at:behind, WORD] - READ
                    if len(places):
                        low, high = places[0, 0], places[:, 1].max()
                        said = tokenizer.decode([int(piece) for piece in text[low:high]])
                        whole = behind == first + start + end + 1
                        letters = "".join(filter(str.isalnum, said))
                        spelt = "".join(filter(str.isalnum, word))
                        assert letters == spelt if whole else spelt.startswith(letters)
                        assert (np.diff(places, axis=0) >= 0).all()
                        frames_seen += len(places)
                    labelled[at:behind] = True
                    words_seen += behind > at
                    at = max(at, behind)
        assert (one.phones[~labelled][:, WORD] == IGNORED).all()
        # Nothing is labelled where the agent says nothing.
        silent = (one.phones[:, AGENT] == IGNORED).all(1)
        assert (one.phones[silent][:, WORD] == IGNORED).mean() > 0.9
    assert words_seen > 60 and frames_seen > 200


def test_a_turn_whose_words_are_counted_otherwise_has_no_labels(tokenizer):
    tokens = tokenizer.encode("One two three.")
    words = words_of(tokenizer, tokens)
    assert [tokenizer.decode(tokens[word]) for word in words] == ["One", "two", "three."]
    phones = np.zeros((12, 2), dtype=np.int16)

    def labels(*ends):
        found = np.full((40, WORD.stop), IGNORED, dtype=np.int16)
        point(found, tokenizer, tokens, 10, 22, [(10, Sounds(phones, ends))])
        return found[:, WORD]

    assert (labels(3, 9) == IGNORED).all()
    known = labels(3, 5, 9)
    assert (known[10:20] != IGNORED).all() and (known[20:] == IGNORED).all()
    assert (np.diff(known[10:20, 0]) >= 0).all()
    spelt = ("One", "two", "three")
    for start, behind, word in zip((10, 14, 16), (14, 16, 20), spelt, strict=True):
        low, high = known[start, 0] - 10 - READ, known[start:behind, 1].max() - 10 - READ
        assert tokenizer.decode(tokens[low:high]) == word


def test_a_piece_sounds_as_long_as_its_letters():
    assert letter_edges(["▁far", "m", "ers", "."]) == [0, 3 / 7, 4 / 7, 1, 1]
    assert letter_edges(["▁-", "-"]) == [0, 0.5, 1]
    edges = [0, 0.5, 0.6, 1, 1]  # the last has no letters
    assert [sounding(edges, n / 4, (n + 1) / 4) for n in range(4)] == [
        (0, 1),
        (0, 1),
        (1, 3),
        (2, 3),
    ]
    assert sounding(edges, 0, 1) == (0, 3)


def test_the_scored_attention_is_the_heads_own(source):
    """Each frame's value is one-hot of its place, so what attention gives is where it looks. Of two
    layers the last stands for both."""
    lm = build_lm(TINY_LM_CONFIG, 1)
    forward = FastForward(lm)
    pointer = Pointer(forward.layers)
    seen = {}
    own = forward.layers[-1]
    own.register_forward_hook(lambda _module, args, _out: seen.update(args=args))
    batch = lesson([source.read("attention")])
    with torch.no_grad():
        forward(batch.batch.codes, batch.batch.loss_mask, torch.zeros(10))
        nats, there = pointer.nll(batch.labels["looked"])
    x, turns = seen["args"]
    attention = own.layer.self_attn
    heads, frames = attention.num_heads, x.shape[1]
    qkv = attention.in_projs[0](rms_norm(x, own.layer.norm1)).unflatten(-1, (3, heads, -1))
    qkv = rotate(qkv.contiguous(), turns, attention.rope.interleave)
    width = qkv.shape[-1]
    looks = []  # as many places a pass as a head is wide
    for start in range(0, frames, width):
        qkv[:, :, 2] = torch.eye(frames + width)[start : start + width, :frames].T[None, :, None]
        given = causal_attention(qkv, None).unflatten(-1, (heads, width))
        looks.append(given[0, :, min(HEADS[0][1], heads - 1)])
    weights = torch.cat(looks, 1)[:, :frames]
    torch.testing.assert_close(weights.sum(1), torch.ones(frames))
    places = batch.labels["looked"][0]
    known = told(places[None])[0]
    assert 20 < known.sum() < (places[:, 0] != IGNORED).sum()
    wanted = [
        weights[frame, low:high].sum()
        for frame, (low, high) in enumerate(places.tolist())
        if known[frame]
    ]
    torch.testing.assert_close(there, torch.stack(wanted).sum())
    torch.testing.assert_close(nats, -torch.stack(wanted).log().sum())


def test_a_word_that_is_not_yet_read_is_not_asked_for():
    places = torch.tensor([[[IGNORED, IGNORED], [2, 4], [2, 4], [3, 5], [5, 6]]]).short()
    assert told(places)[0].tolist() == [False, False, True, True, False]


def test_the_head_learns_to_look_where_it_is_told(source):
    """By its loss alone, which reaches the layers below it as well."""
    lm = build_lm(TINY_LM_CONFIG, 1).train().requires_grad_(True)
    forward = FastForward(lm)
    pointer = Pointer(forward.layers)
    batch = lesson([source.read("learns")])
    adam = torch.optim.Adam(lm.parameters(), lr=3e-3)
    shares = []
    for _ in range(40):
        forward(batch.batch.codes, batch.batch.loss_mask, torch.zeros(10))
        nats, there = pointer.nll(batch.labels["looked"])
        count = told(batch.labels["looked"]).sum()
        (nats / count).backward()
        assert lm.emb[0].weight.grad.abs().sum() > 0
        adam.step()
        adam.zero_grad()
        shares.append(float(there / count))
    assert shares[0] < 0.2 and shares[-1] > 2 * shares[0] and shares[-1] > 0.4
