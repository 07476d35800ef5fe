"""The heads that are told what is being said: their labels, their score, and that they learn."""

import random

import numpy as np
import pytest
import torch

from duplex.streams import TEXT_PAD, TEXT_ROW
from pipeline.engines.pocket import build_lm
from tests.stages.conftest import TINY_LM_CONFIG
from training.attention import causal_attention, rotate
from training.fast import FastForward, delayed
from training.pocket.base_aloud import LEADS
from training.pocket.base_clips import ClipMaker, lesson, place
from training.pocket.base_dialogue import draw_dialogue
from training.pocket.base_labels import LOOKED, SPOKEN, no_labels
from training.pocket.base_phones import Sounds
from training.pocket.base_pointer import (
    HEADS,
    READ,
    Pointer,
    letters_in,
    pieces_by_word,
    point,
    readable,
    shares_before,
    sounding,
)
from training.pocket.base_source import LoopSettings, Source
from training.pocket.base_units import ALOUD_ACT
from training.pocket.codec_labels import IGNORED
from training.projection import rms_norm


@pytest.fixture(scope="module")
def source(grammar, bank, tokenizer, phones):
    return Source(grammar, ClipMaker(bank, tokenizer, phones), LoopSettings(9, batch_size=2))


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def test_through_the_frames_of_a_word_its_pieces_are_pointed_at_in_order(
    grammar, bank, tokenizer, phones, source
):
    whole = late = 0
    for seed in range(12):
        rng = random.Random(seed)
        dialogue = draw_dialogue(grammar, source.index, rng)
        state = rng.getstate()
        one = source.maker.clip(dialogue, rng, "words")
        rng.setstate(state)
        first, text = one.clip.prompt_frames, one.clip.codes[TEXT_ROW]
        read = delayed(torch.from_numpy(one.clip.codes[None].astype(np.int64)), 0, 0)[0]
        read = read[0, TEXT_ROW].tolist()  # by each place
        labelled = np.zeros(one.clip.num_frames, dtype=bool)
        for turn, pieces in place(dialogue, bank, rng):
            tokens = tokenizer.encode(turn.text)
            stands = text[first + turn.start :][: len(tokens)]
            if turn.role != "agent" or not np.array_equal(stands, tokens):
                late += turn.role == "agent"  # an earlier text still stands there, or it was cut
                continue
            for start, _, unit in pieces:
                at = first + start
                words = bank.units[unit].text.split()
                for word, end in zip(words, phones.sounds[unit].word_ends, strict=True):
                    behind = first + start + end + 1
                    places = one.labels[at : min(behind, first + turn.end), LOOKED]
                    labelled[at : at + len(places)] = True
                    if len(places):
                        low, high = places[0, 0], places[:, 1].max()
                        said = letters(tokenizer.decode(read[low:high]))
                        if len(places) == behind - at:
                            assert said == letters(word)
                            whole += 1
                        assert letters(word).startswith(said)
                        assert (np.diff(places, axis=0) >= 0).all()
                    at = behind
        assert ((one.labels[:, LOOKED] != IGNORED).all(1) == labelled).all()
        assert not labelled[(one.labels[:, SPOKEN] == IGNORED).all(1)].any()
    assert whole > 200 and late < 20


def test_what_is_read_aloud_follows_a_sentence_and_its_text_is_there_before_it(source, bank):
    readable_frames = labelled_frames = 0
    for number in range(20):
        one = source.read(f"lead-{number}")
        for role, start, end in one.clip.turns:
            text = one.clip.codes[TEXT_ROW, start:end]
            said = source.maker.tokenizer.decode([int(piece) for piece in text if piece > TEXT_PAD])
            ends = [u for u in bank.units if u.act == ALOUD_ACT and said.endswith(u.text)]
            leads = [u for u in bank.units if u.act.startswith(LEADS) and said.startswith(u.text)]
            assert role == "agent" and ends and leads
            assert {u.speaker for u in ends} & {u.speaker for u in leads}
        places = torch.from_numpy(one.labels[:, LOOKED])
        labelled_frames += int((places[:, 0] != IGNORED).sum())
        readable_frames += int(readable(places[None]).sum())
    assert labelled_frames > 400 and readable_frames > 0.7 * labelled_frames


def test_a_turns_words_are_those_of_the_synthesiser(tokenizer):
    tokens = tokenizer.encode("One two three.")
    words = pieces_by_word(tokenizer, tokens)
    assert [tokenizer.decode(tokens[word]) for word in words] == ["One", "two", "three."]
    phones = np.zeros((12, 2), dtype=np.int16)

    def labels(*ends):
        found = no_labels(40)
        point(found, tokenizer, tokens, 10, 22, [(10, Sounds(phones, ends))])
        return found[:, LOOKED]

    with pytest.raises(ValueError, match="each of 3 words, it said 2"):
        labels(3, 9)
    known = labels(3, 5, 9)
    assert (known[10:20] != IGNORED).all() and (known[20:] == IGNORED).all()
    assert (np.diff(known[10:20, 0]) >= 0).all()
    spelt = ("One", "two", "three")
    for start, behind, word in zip((10, 14, 16), (14, 16, 20), spelt, strict=True):
        low, high = known[start, 0] - 10 - READ, known[start:behind, 1].max() - 10 - READ
        assert tokenizer.decode(tokens[low:high]) == word


def test_a_piece_sounds_as_long_as_its_letters(tokenizer):
    assert shares_before([3, 1, 3, 0]) == [0, 3 / 7, 4 / 7, 1, 1]
    assert shares_before([0, 0]) == [0, 0.5, 1]
    tokens = tokenizer.encode("ß its.")  # the first is not in its alphabet: two bytes
    assert sum(tokenizer.is_byte(token) for token in tokens) == 2
    assert sum(letters_in(tokenizer, token) for token in tokens) == 2 + 3
    edges = [0, 0.5, 0.6, 1, 1]  # the last has no letters
    assert [sounding(edges, n / 4, (n + 1) / 4) for n in range(4)] == [
        (0, 1),
        (0, 1),
        (1, 3),
        (2, 3),
    ]
    assert sounding(edges, 0, 1) == (0, 3)


def weights_of(layer, head, x, turns) -> torch.Tensor:
    """A head's attention [T, T]: each frame's value is one-hot of its place, so what attention
    gives is where it looks."""
    attention, frames = layer.layer.self_attn, x.shape[1]
    heads = attention.num_heads
    qkv = attention.in_projs[0](rms_norm(x, layer.layer.norm1)).unflatten(-1, (3, heads, -1))
    qkv = rotate(qkv.contiguous(), turns, attention.rope.interleave)
    width = qkv.shape[-1]
    looks = []  # as many places a pass as a head is wide
    for start in range(0, frames, width):
        qkv[:, :, 2] = torch.eye(frames + width)[start : start + width, :frames].T[None, :, None]
        looks.append(causal_attention(qkv, None).unflatten(-1, (heads, width))[0, :, head])
    return torch.cat(looks, 1)[:, :frames]


def test_the_scored_attention_is_that_of_its_heads(source):
    lm = build_lm({**TINY_LM_CONFIG, "num_layers": 6}, 1)
    forward = FastForward(lm)
    pointer = Pointer(forward.layers)
    seen: dict[int, tuple] = {}
    for number, layer in enumerate(forward.layers):
        layer.register_forward_hook(lambda _module, args, _out, at=number: seen.update({at: args}))
    batch = lesson([source.read("attention")])
    with torch.no_grad():
        forward(batch.batch.codes, batch.batch.loss_mask, torch.zeros(10))
        nats, there = pointer.nll(batch.by_task["looked"])
        weights = [weights_of(forward.layers[at], head, *seen[at]) for at, head in HEADS]
    assert (weights[0] - weights[1]).abs().max() > 1e-3
    torch.testing.assert_close(weights[0].sum(1), torch.ones(len(weights[0])))
    places = batch.by_task["looked"][0]
    known = readable(places[None])[0]
    assert 20 < known.sum() < (places[:, 0] != IGNORED).sum()
    wanted = torch.stack(
        [
            one[frame, low:high].sum()
            for one in weights
            for frame, (low, high) in enumerate(places.tolist())
            if known[frame]
        ]
    )
    torch.testing.assert_close(there, wanted.sum() / 2)
    torch.testing.assert_close(nats, -wanted.log().sum() / 2)


def test_a_word_that_is_not_yet_read_is_not_asked_for():
    places = torch.tensor([[[IGNORED, IGNORED], [2, 4], [2, 4], [3, 5], [5, 6]]]).short()
    assert readable(places)[0].tolist() == [False, False, True, True, False]


def test_the_heads_learn_to_look_where_they_are_told(source):
    """By its loss alone, which reaches the layers below it as well."""
    lm = build_lm(TINY_LM_CONFIG, 1).train().requires_grad_(True)
    forward = FastForward(lm)
    pointer = Pointer(forward.layers)
    batch = lesson([source.read("learns")])
    adam = torch.optim.Adam(lm.parameters(), lr=3e-3)
    shares = []
    for _ in range(40):
        forward(batch.batch.codes, batch.batch.loss_mask, torch.zeros(10))
        nats, there = pointer.nll(batch.by_task["looked"])
        count = readable(batch.by_task["looked"]).sum()
        (nats / count).backward()
        assert lm.emb[0].weight.grad.abs().sum() > 0
        adam.step()
        adam.zero_grad()
        shares.append(float(there / count))
    assert shares[0] < 0.2 and shares[-1] > 2 * shares[0] and shares[-1] > 0.4
