"""The 17 rows: prompt layout, frame 0, and delays as `LMModel.forward` applies them."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from moshi.models.lm_utils import _delay_sequence

from duplex.streams import (
    AGENT_ROWS,
    CODEBOOKS,
    DELAYS,
    NUM_ROWS,
    TEXT_PAD,
    USER_ROWS,
    CodecTokens,
    apply_delays,
    build_prompt,
    check_codes,
    system_text,
)

CODEC = CodecTokens(silence=tuple(range(8)), sine=tuple(range(8, 16)))


def test_the_closing_tag_is_the_opening_one():
    assert system_text("  You are Ann. ") == "<system> You are Ann. <system>"


@given(st.lists(st.integers(4, 999), max_size=60))
def test_prompt_is_silence_text_silence(tokens):
    prompt = build_prompt(tokens, CODEC)
    assert prompt.codes.shape == (NUM_ROWS, 12 + len(tokens))
    assert prompt.codes[0].tolist() == [TEXT_PAD] * 6 + tokens + [TEXT_PAD] * 6
    assert (prompt.codes[AGENT_ROWS] == np.arange(8)[:, None]).all()
    assert (prompt.codes[USER_ROWS] == np.arange(8, 16)[:, None]).all()
    assert prompt.spans[-1][2] == prompt.num_frames


@given(st.lists(st.integers(4, 999), max_size=60))
def test_training_starts_with_the_second_frame(tokens):
    prompt = build_prompt(tokens, CODEC)
    assert (prompt.training_codes() == prompt.codes[:, 1:]).all()
    spans = prompt.training_spans()
    assert spans[0][1] == 0 and spans[0][2] == 5
    assert spans[-1][2] == prompt.training_codes().shape[1]


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_delays_are_those_of_the_library(num_frames, seed):
    codes = np.random.default_rng(seed).integers(0, 500, (NUM_ROWS, num_frames))
    initial = torch.full((1, NUM_ROWS, 1), 512)
    initial[:, 0] = 1000
    delayed = _delay_sequence(list(DELAYS), torch.from_numpy(codes)[None], initial)
    reference = torch.cat([initial, delayed], dim=2)[0].numpy()
    assert (apply_delays(codes, 512, 1000) == reference).all()


def test_each_kind_of_bad_code_is_found():
    good = np.zeros((NUM_ROWS, 4), dtype=np.int64)
    assert check_codes(good, card=512, text_card=1000) == []
    for row, value, word in (
        (0, 1000, "text"),
        (0, -1, "text"),
        (5, 512, "audio"),
        (16, -2, "audio"),
    ):
        bad = good.copy()
        bad[row, 2] = value
        (fault,) = check_codes(bad, card=512, text_card=1000)
        assert word in fault and f"found {value} in row {row}, frame 2" in fault
    assert "shape" in check_codes(good[:CODEBOOKS], card=512, text_card=1000)[0]
    assert "at least one frame" in check_codes(good[:, :0], card=512, text_card=1000)[0]
