"""The predecessor's form and the current one: each made from the other without a token lost."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.coffee import (
    TextCoder,
    missing_tokens,
    read_prompt,
    retag,
    to_coffee,
    to_current,
    turn_spans,
)
from duplex.streams import (
    AGENT_ROWS,
    COFFEE_CLOSING_TAG,
    SYSTEM_TAG,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    ZERO_TOKEN,
    CodecTokens,
    build_prompt,
    coffee_text,
    system_text,
)

CODEC = CodecTokens(tuple(range(10, 18)), tuple(range(30, 38)))
FIRST_ID = 4  # after unk, bos, eos and pad
LETTERS = [chr(code) for code in range(32, 127)]


def pieces(text):
    """A tokenizer that keeps words apart, as SentencePiece does: a letter is an id."""
    return [FIRST_ID + LETTERS.index(letter) for letter in text]


def letters(ids):
    if any(not FIRST_ID <= i < FIRST_ID + len(LETTERS) for i in ids):
        raise ValueError("a foreign id")
    return "".join(LETTERS[i - FIRST_ID] for i in ids)


CODER = TextCoder(pieces, letters)

words = st.text(alphabet="abcdefgh,.", min_size=1, max_size=8)
prompts = st.lists(words, max_size=12).map(" ".join)


@st.composite
def dialogues(draw, fill):
    """int64 [17, T] with runs of text between frames of `fill`."""
    num_frames = draw(st.integers(1, 60))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 64, (17, num_frames))
    text = generator.integers(FIRST_ID, 90, num_frames)
    silent = generator.random(num_frames) < draw(st.sampled_from([0.0, 0.7, 1.0]))
    codes[TEXT_ROW] = np.where(silent, fill, text)
    return codes


def coffee_file(prompt, dialogue, fill=TEXT_PAD):
    """The predecessor's layout, written out by itself."""
    tokens = pieces(coffee_text(prompt))
    text_frames = max(25, len(tokens))
    head = np.empty((17, 6 + text_frames + 6), dtype=np.int64)
    head[TEXT_ROW] = fill
    head[TEXT_ROW, 6 : 6 + len(tokens)] = tokens
    head[AGENT_ROWS] = np.array(CODEC.silence)[:, None]
    head[USER_ROWS] = np.array(CODEC.sine)[:, None]
    return np.concatenate([head, dialogue], axis=1)


def current_file(prompt, dialogue):
    head = build_prompt(pieces(system_text(prompt)), CODEC).training_codes()
    return np.concatenate([head, dialogue], axis=1)


@settings(deadline=None)
@given(prompts, dialogues(ZERO_TOKEN), st.sampled_from([TEXT_PAD, ZERO_TOKEN]))
def test_coffee_to_current_is_what_the_contract_says_and_comes_back_bit_for_bit(
    prompt, dialogue, fill
):
    original = coffee_file(prompt, dialogue, fill)
    made = to_current(original, CODER)
    wanted = dialogue.copy()
    wanted[TEXT_ROW][wanted[TEXT_ROW] == ZERO_TOKEN] = TEXT_PAD
    assert np.array_equal(made.codes, current_file(prompt, wanted))
    back = to_coffee(made.codes, CODER, fill=fill)
    assert np.array_equal(back.codes, original)


@settings(deadline=None)
@given(prompts, dialogues(TEXT_PAD))
def test_current_to_coffee_is_the_predecessors_layout_and_comes_back(prompt, dialogue):
    original = current_file(prompt, dialogue)
    made = to_coffee(original, CODER)
    zeroed = dialogue.copy()
    zeroed[TEXT_ROW][zeroed[TEXT_ROW] == TEXT_PAD] = ZERO_TOKEN
    assert np.array_equal(made.codes, coffee_file(prompt, zeroed))
    assert np.array_equal(to_current(made.codes, CODER).codes, original)


def speech(num_frames=20, fill=ZERO_TOKEN):
    codes = np.random.default_rng(0).integers(0, 64, (17, num_frames))
    codes[TEXT_ROW] = fill
    codes[TEXT_ROW, 5:9] = pieces("abcd")
    return codes


def test_the_spans_of_the_prompt_cover_it_phase_by_phase():
    made = to_current(coffee_file("hello", speech()), CODER)
    count = len(made.tokens)
    assert made.prompt == (
        ("silence", 0, 5), ("text", 5, 5 + count), ("silence", 5 + count, 11 + count),
    )  # fmt: skip
    assert letters(made.tokens) == "<system> hello <system>"
    back = to_coffee(made.codes, CODER)
    assert back.prompt == (("silence", 0, 6), ("text", 6, 31), ("silence", 31, 37))


def shift(codes):
    return codes[:, 1:]


def add_pad(codes):
    codes[TEXT_ROW, -1] = TEXT_PAD
    return codes


def other_audio(rows):
    def change(codes):
        codes[rows, 12] += 1
        return codes

    return change


def break_text(codes):
    codes[TEXT_ROW, 9] = TEXT_PAD
    return codes


def cut(codes):
    return codes[:, :37]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shift, "6 frames before the prompt's text, found 5: this may be in the current form"),
        (add_pad, "must hold -1 where nothing is said, found PAD in frame 56"),
        (other_audio(AGENT_ROWS), "agent rows must repeat one frame up to frame 37, found another"),
        (other_audio(USER_ROWS), "user rows must repeat one frame up to frame 37, found another"),
        (break_text, "one run of tokens and padding up to frame 37"),
        (cut, "a dialogue must follow the prompt's 37 frames, found 37"),
        (lambda codes: codes[:9], re.escape("the shape must be [17, T]")),
        (lambda codes: codes[:, :0], re.escape("the shape must be [17, T]")),
        (lambda codes: codes[:, 6:], "must start with padding"),
        (lambda codes: codes[:, 40:], "must have 6 frames before the prompt's text, found 2"),
        (lambda codes: codes[:, 48:], "found no text at all"),
    ],
)
def test_what_is_not_the_predecessors_form_is_refused(change, said):
    codes = coffee_file("hello", speech())
    assert codes.shape[1] == 57
    with pytest.raises(ValueError, match=said):
        to_current(change(codes.copy()), CODER)


def test_a_prompt_of_another_tag_is_refused():
    codes = coffee_file("hello", speech())
    tokens = pieces("<system> hello <system>")
    codes[TEXT_ROW, 6 : 37 - 6] = TEXT_PAD
    codes[TEXT_ROW, 6 : 6 + len(tokens)] = tokens
    with pytest.raises(ValueError, match=r"must read `<system> TEXT </system>`.*'<system> hello"):
        to_current(codes, CODER)


def test_epad_has_no_place_in_the_predecessors_form_but_an_unknown_id_has():
    dialogue = speech(fill=TEXT_PAD)
    dialogue[TEXT_ROW, 4] = 0
    codes = current_file("hello", dialogue)
    with pytest.raises(ValueError, match=r"has no EPAD, found 1, the first in frame"):
        to_coffee(codes, CODER)
    kept = to_coffee(codes, CODER, has_epad=False)
    assert np.array_equal(to_current(kept.codes, CODER).codes, codes)


def test_a_voice_sample_has_no_place_in_the_predecessors_form():
    voice = np.random.default_rng(0).integers(0, 64, (8, 20))
    head = build_prompt(pieces(system_text("hello")), CODEC, voice=voice).training_codes()
    codes = np.concatenate([head, speech(fill=TEXT_PAD)], axis=1)
    with pytest.raises(ValueError, match="found 25: a voice sample"):
        to_coffee(codes, CODER)


def test_each_form_names_the_other_when_it_is_that_already():
    with pytest.raises(ValueError, match="found 6: this may be in the predecessor's form"):
        to_coffee(coffee_file("hello", speech()), CODER)
    with pytest.raises(ValueError, match="found 5: this may be in the current form"):
        to_current(current_file("hello", speech(fill=TEXT_PAD)), CODER)


def test_a_tokenizer_that_joins_tag_and_text_is_refused():
    """`a <s` is one id: it is cut apart before `</system>`, and joined before `<system>`."""
    joined = 999

    def encode(text):
        parts = text.split("a <s")
        ids = pieces(parts[0])
        for part in parts[1:]:
            ids += [joined, *pieces(part)]
        return ids

    coder = TextCoder(encode, letters)
    with pytest.raises(ValueError, match="must keep tag and text apart"):
        retag(encode("<system> a </system>"), coder, COFFEE_CLOSING_TAG, SYSTEM_TAG)
    assert retag(encode("<system> b </system>"), coder, COFFEE_CLOSING_TAG, SYSTEM_TAG)


def test_missing_tokens_are_counted_turn_by_turn():
    row = np.full(40, ZERO_TOKEN)
    row[3:6], row[20:22] = pieces("hel"), pieces("ok")
    assert missing_tokens(row, [pieces("hello"), [], pieces("ok")]) == [2, 0, 0]
    with pytest.raises(ValueError, match="for each of 1 agent turns, found 2"):
        missing_tokens(row, [pieces("hello")])
    with pytest.raises(ValueError, match="found another in agent turn 2"):
        missing_tokens(row, [pieces("hello"), pieces("yes")])


def test_turns_are_read_from_the_codes():
    codes = coffee_file("hello", np.zeros((17, 50), dtype=np.int64))
    first = read_prompt(codes, coffee=True).num_frames
    quiet = np.array(CODEC.silence)[:, None]
    codes[AGENT_ROWS, first:] = quiet
    codes[USER_ROWS, first:] = quiet
    codes[TEXT_ROW, first:] = ZERO_TOKEN
    codes[USER_ROWS, first : first + 8] = 1  # user, a pause inside
    codes[USER_ROWS, first + 3] = CODEC.silence
    codes[AGENT_ROWS, first + 10 : first + 20] = 2
    codes[TEXT_ROW, first + 10 : first + 13] = pieces("abc")
    codes[USER_ROWS, first + 22 : first + 30] = 1
    codes[AGENT_ROWS, first + 33 : first + 45] = 2
    codes[TEXT_ROW, first + 33 : first + 36] = pieces("def")
    spans = turn_spans(codes, first, CODEC.silence)
    assert [(role, start - first, end - first) for role, start, end in spans] == [
        ("user", 0, 8), ("agent", 10, 20), ("user", 22, 30), ("agent", 33, 45),
    ]  # fmt: skip
