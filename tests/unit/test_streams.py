"""The 17 rows: prompt layout, frame 0, and delays as `LMModel.forward` applies them."""

import numpy as np
import pytest
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
    coffee_text,
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


@given(st.integers(1, 30), st.integers(1, 30), st.lists(st.integers(4, 999), max_size=20))
def test_voice_and_greeting_stand_at_the_ends(voice_frames, greeting_frames, tokens):
    voice = np.random.default_rng(1).integers(0, 99, (8, voice_frames))
    greeting = np.random.default_rng(2).integers(0, 99, (8, greeting_frames))
    prompt = build_prompt(tokens, CODEC, voice=voice, greeting=greeting)
    spans = {(label, end - start) for label, start, end in prompt.spans}
    assert {("voice", voice_frames), ("greeting", greeting_frames)} < spans
    assert np.array_equal(prompt.codes[AGENT_ROWS, :voice_frames], voice)
    assert np.array_equal(prompt.codes[USER_ROWS, -greeting_frames:], greeting)
    # The sine is heard all along but during the greeting, the agent is silent but for its voice.
    sine, silence = (np.asarray(row)[:, None] for row in (CODEC.sine, CODEC.silence))
    assert (prompt.codes[USER_ROWS, :-greeting_frames] == sine).all()
    assert (prompt.codes[AGENT_ROWS, voice_frames:] == silence).all()
    plain = build_prompt(tokens, CODEC).codes
    assert np.array_equal(prompt.codes[:, voice_frames:-greeting_frames], plain)
    text = prompt.codes[0]
    assert (text[:voice_frames] == TEXT_PAD).all() and (text[-greeting_frames:] == TEXT_PAD).all()


def test_the_predecessors_prompt_has_25_text_frames_at_least():
    assert build_prompt([7] * 3, CODEC, min_text_frames=25).num_frames == 6 + 25 + 6
    assert build_prompt([7] * 30, CODEC, min_text_frames=25).num_frames == 6 + 30 + 6
    assert coffee_text(" You are Ann. ") == "<system> You are Ann. </system>"


def test_a_voice_of_another_shape_is_refused():
    for bad in (np.zeros((7, 3)), np.zeros((8, 0)), np.zeros(8)):
        with pytest.raises(ValueError, match=r"codes \[8, frames\]"):
            build_prompt([7], CODEC, voice=bad)


def test_minus_one_in_the_text_row_is_for_the_predecessors_files_only():
    codes = np.zeros((NUM_ROWS, 4), dtype=np.int64)
    codes[0, 2] = -1
    assert check_codes(codes, card=9, text_card=9)
    assert check_codes(codes, card=9, text_card=9, zero_text=True) == []
    codes[3, 2] = -1
    assert check_codes(codes, card=9, text_card=9, zero_text=True)
