"""What the inspector says of tensors in the form of each profile, and of each fault in one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.findings import FINDINGS
from duplex.judgement import inspect_codes, loudness_findings
from duplex.phases import Known
from duplex.records import FrameSpan
from duplex.streams import (
    AGENT_ROWS,
    KYUTAI_TOKENS,
    TEXT_PAD,
    TEXT_ROW,
    USER_ROWS,
    ZERO_TOKEN,
    build_prompt,
)
from tests import tensorfiles as make

READ = Known(decode=make.decode, vocabulary=32_000)
MODEL = replace(READ, tokens=KYUTAI_TOKENS, codec_digest="a" * 64, tokenizer_digest="b" * 64)


def codes_of(inspection):
    return {found.code for found in inspection.findings}


def harm_of(inspection):
    return {found.code for found in inspection.findings if found.severity == "harm"}


def recorded(codes, **changes):
    return replace(MODEL, clip=make.record(codes, **changes))


# -- the clean forms


@pytest.mark.parametrize("codec", [KYUTAI_TOKENS, make.OTHER_CODEC], ids=["kyutai", "other"])
@pytest.mark.parametrize(
    ("form", "name"),
    [(make.workbench, "workbench"), (make.personaplex, "personaplex"), (make.moshi, "moshi"),
     (make.coffee, "coffee-compat")],
)  # fmt: skip
def test_each_profile_is_recognised(form, name, codec):
    inspection = inspect_codes(form(codec=codec), READ)
    assert inspection.profile.name == name
    assert inspection.profile.evidence
    assert bool(harm_of(inspection)) == (name == "coffee-compat")


def test_a_clean_clip_has_no_finding_with_record_and_model():
    codes = make.workbench()
    assert inspect_codes(codes, recorded(codes)).findings == ()


def test_a_clean_bare_file_has_no_finding_with_a_tokenizer():
    assert inspect_codes(make.workbench(), READ).findings == ()


def test_without_a_tokenizer_the_tags_are_told_by_their_ids():
    assert codes_of(inspect_codes(make.workbench(), Known())) == {"tags-unread"}
    assert "closing-tag" in harm_of(inspect_codes(make.coffee(), Known()))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 30), st.booleans(), st.integers(0, 99))
def test_phases_are_found_where_the_builder_put_them(words, voice_frames, first_kept, seed):
    voice = make.speech(voice_frames, np.random.default_rng(seed)) if voice_frames > 1 else None
    prompt = build_prompt(make.prompt_tokens(words), make.OTHER_CODEC, voice=voice)
    codes = prompt.codes if first_kept else prompt.training_codes()
    spans = prompt.spans if first_kept else prompt.training_spans()
    whole = np.concatenate([codes, make.dialogue(codec=make.OTHER_CODEC, seed=seed)], axis=1)
    measures = inspect_codes(whole, READ).measures
    found = [(phase.label, phase.start, phase.end) for phase in measures.phases]
    assert found == [*spans, ("dialogue", codes.shape[1], whole.shape[1])]
    if voice is None:
        assert measures.frame_0 == ("kept" if first_kept else "dropped")


@pytest.mark.parametrize("words", [3, 18, 19, 60])
def test_the_predecessors_phases(words):
    """Its text phase has at least 25 frames; the tokens are the ids without the padding."""
    measures = inspect_codes(make.coffee(words), READ).measures
    text = max(25, words + 6)
    assert [(p.label, p.start, p.end) for p in measures.phases[:3]] == [
        ("silence", 0, 6), ("text", 6, 6 + text), ("silence", 6 + text, 12 + text),
    ]  # fmt: skip
    assert measures.prompt.tokens == make.prompt_tokens(words, make.CLOSING)
    assert measures.prompt.padded == (words + 6 < 25)


def test_turns_of_a_bare_file_are_inferred_where_they_are():
    measures = inspect_codes(make.workbench(), READ).measures
    assert measures.turns_from == "inferred from the codes"
    offset = measures.phases[-1].start
    assert [(t.role, t.start - offset, t.end - offset, t.tokens) for t in measures.turns] == list(
        make.TURNS
    )


def test_shares_of_a_phase_add_up():
    measures = inspect_codes(make.personaplex(), READ).measures
    for phase in measures.phases:
        assert phase.words + phase.pad + phase.epad + phase.zero == phase.num_frames
    assert sum(phase.num_frames for phase in measures.phases) == measures.num_frames


def test_onset_shares_are_per_turn():
    """The seeds' test 1 over a whole conversation can never pass for a second turn."""
    onset = inspect_codes(make.workbench(), READ).measures
    spread = inspect_codes(make.workbench(mode="uniform"), READ).measures
    assert onset.onset_shares == (1, 1)
    assert spread.onset_shares == pytest.approx((0.3, 0.4), abs=0.06)


def test_a_dialogue_that_begins_with_a_still_user_has_no_prompt():
    codes = make.dialogue((("agent", 0, 100, 20), ("user", 120, 200, 0)), wavering=False)
    inspection = inspect_codes(codes, READ)
    assert inspection.measures.prompt is None and "no-prompt" in codes_of(inspection)


# -- one fault each: absent on the clean file, found on the faulty one

DIALOGUE = 11 + len(make.prompt_tokens())  # where it starts


def _zero(codes):
    text = codes[TEXT_ROW, DIALOGUE:]
    text[text == TEXT_PAD] = ZERO_TOKEN


def _closing(codes):
    codes[TEXT_ROW, 5 + len(make.prompt_tokens()) - 3] = make.CLOSING[0]


def _no_tags(codes):
    codes[TEXT_ROW, 5:8] = codes[TEXT_ROW, DIALOGUE - 9 : DIALOGUE - 6] = 1500, 1501, 1502


def _silence_agent(codes):
    codes[AGENT_ROWS, DIALOGUE:] = np.asarray(KYUTAI_TOKENS.silence)[:, None]


def _silence_user(codes):
    codes[USER_ROWS, DIALOGUE:] = np.asarray(KYUTAI_TOKENS.silence)[:, None]


def _put(row, frame, value):
    def change(codes):
        codes[row, frame] = value

    return change


def _words_gone(codes):
    codes[TEXT_ROW, DIALOGUE:] = TEXT_PAD


FAULTS = {
    "zero-text": _zero,
    "closing-tag": _closing,
    "no-tags": _no_tags,
    "silent-agent": _silence_agent,
    "silent-agent, no words": _words_gone,
    "user-silent": _silence_user,
    "out-of-range, audio": _put(3, 100, 2048),
    "out-of-range, audio -1": _put(9, 100, -1),
    "out-of-range, text": _put(0, 200, 32_000),
    "out-of-range, ungenerated": _put(0, 200, -2),
    "foreign-tokenizer": _put(0, 100, 31_999),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_codes(fault):
    known = replace(MODEL, vocabulary=20_000)
    codes = make.workbench()
    code = fault.split(",")[0]
    assert code not in codes_of(inspect_codes(codes, known))
    FAULTS[fault](codes)
    inspection = inspect_codes(codes, known)
    assert code in codes_of(inspection)
    assert inspection.harm == (FINDINGS[code].severity == "harm")
    message = next(f.message for f in inspection.findings if f.code == code)
    assert FINDINGS[code].must in message and "found" in message


OTHERS = {
    "frame-0-kept": lambda c: np.concatenate([c[:, :1], c], axis=1),
    "prompt-silence": lambda c: np.concatenate([c[:, :1], c[:, :1], c], axis=1),
    "no-dialogue": lambda c: c[:, :DIALOGUE],
    "no-prompt": lambda c: c[:, DIALOGUE:],
    "too-long": lambda c: np.concatenate([c] * 9, axis=1),
    "shape": lambda c: c[:9],
    "shape ": lambda c: c.T,
    "shape  ": lambda c: c[:, :0],
    "shape   ": lambda c: c[None],
}


@pytest.mark.parametrize("fault", OTHERS)
def test_a_fault_in_the_layout(fault):
    codes = make.workbench()
    assert fault.strip() not in codes_of(inspect_codes(codes, MODEL))
    assert fault.strip() in codes_of(inspect_codes(OTHERS[fault](codes), MODEL))


RECORDS = {
    "dropped-tokens": {"dropped_tokens": 3, "text_tokens": 37},
    "late-tokens": {"late_tokens": 4},
    "foreign-codec": {"codec_digest": "c" * 64},
    "foreign-tokenizer": {"tokenizer_digest": "c" * 64},
    "record-mismatch": {"num_frames": 17},
    "record-mismatch ": {"text_tokens": 35},
    "record-mismatch  ": {"turns": (FrameSpan(label="agent", start=60, end=9_000),)},
    "record-mismatch   ": {
        "prompt": tuple(
            FrameSpan(label=label, start=a, end=b)
            for label, a, b in [("silence", 0, 6), ("text", 6, 42), ("silence", 42, 48)]
        )
    },
    "frame-0-mismatch": {"layout": "coffee"},
    "turn-without-text": {
        "turns": tuple(FrameSpan(label="agent", start=a, end=b) for a, b in [(50, 52), (97, 297)])
    },
}


@pytest.mark.parametrize("fault", RECORDS)
def test_a_fault_that_the_record_shows(fault):
    codes = make.workbench()
    assert codes_of(inspect_codes(codes, recorded(codes))) == set()
    inspection = inspect_codes(codes, recorded(codes, **RECORDS[fault]))
    assert fault.strip() in codes_of(inspection)


def test_the_first_frame_wrongly_kept_is_a_mismatch_under_a_record():
    codes = make.workbench()
    shifted = np.concatenate([codes[:, :1], codes], axis=1)
    assert {"frame-0-mismatch", "record-mismatch"} <= harm_of(
        inspect_codes(shifted, recorded(shifted))
    )


def test_late_text_is_for_onset_alone():
    codes = make.workbench(mode="uniform")
    assert "late-text" in codes_of(inspect_codes(codes, recorded(codes)))
    assert "late-text" not in codes_of(inspect_codes(codes, recorded(codes, alignment="uniform")))


def test_a_prompt_of_another_codec_and_one_of_near_ties():
    foreign = make.workbench(codec=make.OTHER_CODEC)
    assert "prompt-rows" in harm_of(inspect_codes(foreign, MODEL))
    near = make.workbench()
    near[3, :DIALOGUE] = 5
    inspection = inspect_codes(near, MODEL)
    assert codes_of(inspection) == {"prompt-ties"} and not inspection.harm


def test_a_prompt_that_fills_the_context():
    codes = make.workbench()
    short = replace(MODEL, context=2 * DIALOGUE - 10)
    assert {"long-prompt", "too-long"} <= codes_of(inspect_codes(codes, short))


def test_a_window_cut_by_the_predecessor_is_noticed():
    """Its first turn has 30 tokens for 18 frames: they stop with the window."""
    assert "window-full" in codes_of(inspect_codes(make.coffee(), READ))
    roomy = tuple((role, a, b, min(n, 5)) for role, a, b, n in make.COFFEE_TURNS)
    assert "window-full" not in codes_of(inspect_codes(make.coffee(turns=roomy), READ))
    assert "constant-silence" in codes_of(inspect_codes(make.coffee(), READ))


@pytest.mark.parametrize(
    ("dtype", "expected"), [("int16", set()), ("int64", set()), ("int32", {"dtype"})]
)
def test_the_type(dtype, expected):
    assert codes_of(inspect_codes(make.workbench(), MODEL, dtype=dtype)) == expected


def test_loudness():
    clean = list(loudness_findings({"agent": -24.0, "user": -29.0}))
    loud = list(loudness_findings({"agent": -10.0, "user": None}))
    silent = list(loudness_findings({"agent": None}))
    assert clean == []
    assert [found.code for found in loud] == ["loudness", "loudness"]
    assert [found.code for found in silent] == ["silent-agent"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_rubbish_is_judged_and_never_raises(data):
    """Codes of any size, with anything in them."""
    frames = data.draw(st.integers(1, 60))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    low, high = data.draw(st.sampled_from([(-3, 5), (0, 3), (-(2**62), 2**62), (0, 2050), (3, 4)]))
    codes = rng.integers(low, high, (17, frames))
    if data.draw(st.booleans()):
        codes[USER_ROWS] = codes[USER_ROWS, :1]
    if data.draw(st.booleans()):
        codes[AGENT_ROWS] = codes[AGENT_ROWS, :1]
    whole = make.workbench()
    known = data.draw(st.sampled_from([Known(), MODEL, recorded(whole)]))
    inspection = inspect_codes(codes, known)
    assert inspection.to_json()["harm"] == inspection.harm
    severities = [found.severity for found in inspection.findings]
    assert severities == sorted(severities, key=["harm", "warn", "note"].index)


def test_the_document_lists_the_findings_as_they_are():
    text = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (\w+) \| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    assert {row[0]: row[1:] for row in rows} == {
        code: (kind.severity, kind.must, kind.remedy) for code, kind in FINDINGS.items()
    }
