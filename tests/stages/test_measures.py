"""The table's rows on conversations whose values are worked out by hand, over the real wire."""

import pytest

from pipeline.evaluation.measures import summarize
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from tests.stages.planted_server import Plan, planted, spoken, tiny_tokenizer


def rows_of(script, **changes):
    """Measure -> (value, n) of one conversation. Turns are frames 4 to 16 and 36 to 42 of 62 where
    the user speaks first, script (frame, text, frames of tone)."""
    item = spoken(**changes)
    plan = Plan(tokenizer=tiny_tokenizer(), scripts={item.item.text_prompt: script})
    settings = PlaySettings(tokenizer=tiny_tokenizer(), again=False)
    with planted(plan) as url:
        (played,) = evaluate_urls({"m": url}, [item], settings, lambda line: None)
    rows = {row["key"]: row["by_model"]["m"] for row in summarize(played.conversations, ["m"])}
    return {key: (row["value"], row["n"]) for key, row in rows.items()}


@pytest.fixture(scope="module")
def talk():
    script = [
        (8, "", 4),  # "mhm" within the first turn
        (20, "I am so happy", 4),
        (30, "", 8),  # goes on into the second turn, which begins at 36, and ends at 38
        (45, " здесь", 5),
    ]
    return rows_of(script, emotion="happy")


@pytest.mark.parametrize(
    ("key", "value", "n"),
    [
        ("response_rate", 1, 2),
        ("response_delay_s", 0.28, 2),  # (20 - 16) and (45 - 42) frames
        ("response_delay_p95_s", 0.32, 2),
        ("answered_in_words", 1, 2),
        ("first_word_s", 0.32, 1),
        ("greeting", None, 0),  # the user opens
        ("yield_rate", 1, 1),
        ("yield_s", 0.16, 1),  # 36 to 38
        ("backchannels_per_min", 1 / (18 * 0.08 / 60), 1),  # of 12 + 6 frames of the user's
        ("agent_speech_share", 21 / 62, 1),
        ("overlap_s", 6 * 0.08, 1),  # 8 to 12, 36 to 38
        ("emotion_kept", 1, 1),
        ("foreign_share", 5 / 15, 1),
        ("wrong", None, 0),  # no turn has such a list
        ("abstained", None, 0),
        ("declined", None, 0),
        ("drift", None, 0),  # under six replies
    ],
)
def test_a_row_is_what_comes_out_by_hand(talk, key, value, n):
    assert talk[key] == (pytest.approx(value, abs=1e-6) if value is not None else None, n)


def test_who_is_to_open_and_does_not_gives_no_greeting():
    said = [(2, "Hello.", 4)]
    assert rows_of(said, first_speaker="agent")["greeting"] == (1, 1)
    assert rows_of([(2, "", 4)], first_speaker="agent")["greeting"] == (0, 1)


def test_sound_without_text_and_text_without_sound():
    loud = rows_of([(45, "", 8)])
    assert (loud["unwritten_share"], loud["unspoken_share"]) == ((1, 1), (None, 0))
    assert loud["answered_in_words"] == (0, 1)
    mute = rows_of([(45, "All right.", 0)])
    assert (mute["unspoken_share"], mute["unwritten_share"]) == ((1, 1), (None, 0))


def test_an_agent_that_talks_on_does_not_yield():
    found = rows_of([(30, "on and on", 20)])
    assert found["yield_rate"] == (0, 1) and found["yield_s"] == (None, 0)
