"""The parts of the LLM writer by themselves: replies read, pauses, budget, log."""

from __future__ import annotations

import json
import threading
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duplex.base import Role
from duplex.errors import BudgetError
from duplex.records import Turn
from pipeline.engines.llm.budget import Budget, Cost, Price, prompt_bound
from pipeline.engines.llm.exchanges import Exchanges, Reply, account, keep_log, logs_of
from pipeline.engines.llm.pace import Pace, backoff_s, exhausted_s, retry_after_s
from pipeline.engines.llm.replies import read_object, read_turns
from pipeline.engines.writers import Fault
from tests.factories import persona

ROLES: dict[str, Role] = {"agent": "agent", "user": "user", "barista": "user"}
OBJECT = {"turns": [{"role": "user", "text": "Hi."}, {"role": "agent", "text": "Well, hello."}]}
TEXT = json.dumps(OBJECT)


def turns_of(*lines: dict[str, Any], seed: int = 1) -> tuple[Turn, ...]:
    found = read_turns(json.dumps({"turns": lines}), persona(), ROLES, seed)
    assert not isinstance(found, Fault), found
    return found


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"```json\n{TEXT}\n```",
        f"Sure! Here it is:\n{TEXT}\nEnjoy.",
        f"<think>{{maybe}} [so]</think>{TEXT}",
        TEXT[:-2] + ",]}",
        TEXT.replace('"user", ', '"user" '),
        TEXT.replace('"', "'"),
    ],
)
def test_what_can_be_meant_in_one_way_is_repaired(text: str) -> None:
    assert read_object(text) == OBJECT


@pytest.mark.parametrize(
    "text",
    [
        TEXT[:-12],
        TEXT[: TEXT.index("}") + 1],
        TEXT.replace('"Hi."', '"Hi." "you"'),  # json-repair drops the second
        TEXT.replace('"Hi."', '/* or hey */ "Hi."}').replace("}}", "}"),
        TEXT.replace('"text": "Hi."', '"text": "Hi.", "text": "Ho.",'),  # and the first
        "{}}{",
        "no",
        "[" * 50_000,
        "{" * 9 + "}" * 9,
        '"x"',
    ],
)
def test_what_may_have_lost_something_is_not(text: str) -> None:
    assert isinstance(read_object(text), Fault)


def test_places_out_of_their_turn_are_moved_or_dropped() -> None:
    first, second, third = turns_of(
        {"role": "BARISTA", "text": "one two\nthree four", "cut_after_words": 2, "intensity": 9,
         "emotion": "bored", "backchannels": [{"text": "mm", "after_word": 70}, "mm",
         {"text": "a b c d e", "after_word": 1}, {"text": 7, "after_word": 1}]},
        {"role": "agent", "text": "five six", "cut_after_words": 5, "pause": "long",
         "emotion": "Angry", "intensity": 0.1, "backchannels": "none"},
        {"role": "user", "text": "seven", "cut_after_words": 1, "pause": "long", "intensity": "x"},
    )  # fmt: skip
    assert (first.role, first.text, first.cut_after_words) == ("user", "one two three four", 2)
    assert (first.emotion, first.intensity, first.gap_frames) == (None, 2.0, None)
    assert [(b.text, b.after_word) for b in first.backchannels] == [("mm", 2)]
    assert (second.cut_after_words, second.emotion, second.intensity) == (None, "angry", 0.5)
    assert second.gap_frames is None  # it cuts in: that has a timing of its own
    assert (third.cut_after_words, third.gap_frames, third.intensity) == (None, 4, None)


def test_pauses_are_the_personas() -> None:  # after the user 1-3, other 1-4
    lines = [{"role": "user", "text": "a b"}]
    for pause in ("quick", "long", "overlap", "normal"):
        lines += [{"role": "agent", "text": "c d", "pause": pause}, {"role": "user", "text": "e f"}]
    lines += [{"role": "agent", "text": "g", "gap_s": 60}, {"role": "user", "text": "h"},
              {"role": "agent", "text": "g", "gap_frames": float(-80)}]  # fmt: skip
    gaps = [turn.gap_frames for turn in turns_of(*lines) if turn.role == "agent"]
    assert gaps[:2] == [1, 3] and gaps[3:] == [None, 3, -6]
    assert gaps[2] is not None and -4 <= gaps[2] <= -1


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
_line = st.fixed_dictionaries(
    {"role": st.sampled_from(["agent", "user"]), "text": st.text(min_size=1, max_size=20)},
    optional=dict.fromkeys(
        ("emotion", "intensity", "pause", "gap_s", "gap_frames", "cut_after_words",
         "backchannels"), _json),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(_line, min_size=1, max_size=4))
def test_no_reply_crashes_the_reader(lines: list[dict[str, Any]]) -> None:
    found = read_turns(json.dumps({"turns": lines}), persona(), ROLES, 1)
    if isinstance(found, Fault):
        assert any(not line["text"].split() for line in lines)
    else:
        assert [turn.role for turn in found] == [line["role"] for line in lines]


NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2.5"}, 2.5),
        ({"retry-after": formatdate(NOW + 7, usegmt=True)}, 7),
        ({"retry-after": formatdate(NOW - 7, usegmt=True)}, 0),
        ({"retry-after-ms": "120", "retry-after": "9"}, 0.12),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_the_pause_that_a_reply_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOW) == seconds


@pytest.mark.parametrize(
    ("left", "reset", "seconds"),
    [("0", "1m30s", 90), ("0", "120ms", 0.12), ("0", "6", 6), ("0", str(NOW + 3), 3),
     ("0", str(int((NOW + 3) * 1000)), 3), ("0", "2023-11-14T22:13:30Z", 10), ("1", "60", None),
     ("0", "later", None), ("nan", "60", None)],
)  # fmt: skip
def test_a_rate_limit_that_is_used_up(left: str, reset: str, seconds: float | None) -> None:
    for kind in ("-requests", ""):
        headers = {f"x-ratelimit-remaining{kind}": left, f"x-ratelimit-reset{kind}": reset}
        assert exhausted_s(headers, 100, NOW) == seconds
    headers = {"x-ratelimit-remaining-tokens": "90", "x-ratelimit-reset-tokens": "5s"}
    assert exhausted_s(headers, 100, NOW) == 5 and exhausted_s(headers, 80, NOW) is None


def test_a_hold_is_kept_by_all_threads_and_the_longest_counts() -> None:
    clock = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    pace = Pace(monotonic=lambda: clock[0], sleep=sleep)
    pace.hold(3)
    pace.hold(1)
    pace.wait()
    pace.wait()
    assert slept == [3]


def test_backoff_doubles_and_is_drawn_from_the_request() -> None:
    for number in (1, 2, 3):
        assert 0.25 * 2**number / 2 <= backoff_s("a", number) <= 0.5 * 2 ** (number - 1)
        assert backoff_s("a", number) == backoff_s("a", number) != backoff_s("b", number)


def test_a_request_waits_for_those_in_flight_before_the_budget_refuses_it() -> None:
    budget = Budget(tokens=100)
    first, second = Cost(60), Cost(50)
    budget.reserve(first)
    got = threading.Event()
    thread = threading.Thread(target=lambda: (budget.reserve(second), got.set()), daemon=True)
    thread.start()
    time.sleep(0.05)
    assert not got.is_set()  # 60 + 50 may be too much, until the first one's bill is there
    budget.settle(first, Cost(20))
    assert got.wait(2)
    budget.settle(second, None)
    assert (budget.spent, budget.unknown, budget.reserved) == (Cost(20), Cost(50), Cost())
    with pytest.raises(BudgetError, match=r"at most 100 tokens.*20 are used, 50 more may"):
        budget.reserve(Cost(31))
    budget.reserve(Cost(30))


def test_dollars_are_refused_before_they_are_passed() -> None:
    price = Price(1.0, 4.0)
    budget = Budget(usd=1.0, before=(price.cost(100_000, 100_000), Cost(0, 0.3)))
    with pytest.raises(BudgetError, match=r"1\.00 USD.*0\.5000 is spent, 0\.3000 more"):
        budget.reserve(Cost(10, 0.21))
    budget.reserve(Cost(10, 0.2))


def test_the_bound_of_a_prompt_is_never_below_its_bytes() -> None:
    messages = [{"role": "user", "content": "héllo \N{GRINNING FACE}"}]
    assert prompt_bound(messages, None) > len(messages[0]["content"].encode())
    assert prompt_bound(messages, {"a": 1}) > prompt_bound(messages, None)


BODY = {"model": "m"}


def test_what_a_kill_left_in_flight_is_unknown_and_torn_lines_are_passed_over(
    tmp_path: Path,
) -> None:
    path = tmp_path / "02-dialogues-0" / "exchanges.jsonl"
    log = Exchanges(path)
    bound = Cost(500, 0.01)
    send = log.sent("a" * 64, "t", BODY, bound)
    log.replied(send, "a" * 64, Reply("hi", tokens_in=3, tokens_out=4), 0.002, 0.1)
    log.failed(log.sent("b" * 64, "t", BODY, bound), "b" * 64, "http-429", billed="no")
    log.failed(log.sent("b" * 64, "t", BODY, bound), "b" * 64, "timed-out", billed="unknown")
    log.sent("c" * 64, "t", BODY, bound)
    with path.open("ab") as file:
        file.write(b'{"event": "reply", "send": "cc')

    again = Exchanges(path)
    assert again.before.spent == Cost(7, 0.002)
    assert again.before.unknown == Cost(1000, 0.02) and again.before.unknown_requests == 2
    assert again.before.failures == {"http-429": 1, "timed-out": 1, "killed": 1}
    assert again.find("a" * 64, "t") == Reply("hi", tokens_in=3, tokens_out=4)
    assert again.find("c" * 64, "t") is None
    # The line after a torn one is whole, and a send has a name of its own in each run.
    again.replied(again.sent("c" * 64, "t", BODY, bound), "c" * 64, Reply("yo"), 0.0, 0.1)
    assert Exchanges(path).find("c" * 64, "t") == Reply("yo")
    assert len({line["send"] for line in _lines(path) if line["event"] == "sent"}) == 5
    assert Exchanges(path).before.unknown_requests == 3  # no usage came with the last one


def test_a_cleaned_folders_log_is_still_found(tmp_path: Path) -> None:
    own, old = (tmp_path / f"02-dialogues-{n}" / "exchanges.jsonl" for n in (0, 1))
    log = Exchanges(old)
    send = log.sent("a" * 64, "t", BODY, Cost(9))
    log.replied(send, "a" * 64, Reply("hi", tokens_in=1, tokens_out=1), 0.0, 0.1)
    keep_log(old.parent)
    keep_log(old.parent)
    found = Exchanges(own, logs_of(tmp_path, [own.parent], own))
    assert found.before.spent == Cost(2)
    assert found.find("a" * 64, "t") and found.find("a" * 64, "t")
    assert account(_lines(own)).reused == 1


def _lines(path: Path) -> list[dict[str, Any]]:
    from duplex.files import read_lines

    return list(read_lines(path))


def test_the_same_request_cut_off_in_two_folders_counts_twice(tmp_path: Path) -> None:
    own, other = (tmp_path / f"02-dialogues-{n}" / "exchanges.jsonl" for n in (0, 1))
    for path in (own, other):
        Exchanges(path).sent("f" * 64, "t", BODY, Cost(1000, 0.6))
    before = Exchanges(own, [other]).before
    assert (before.unknown, before.unknown_requests) == (Cost(2000, 1.2), 2)
    with pytest.raises(BudgetError):
        Budget(usd=1.5, before=(before.spent, before.unknown)).reserve(Cost(1000, 0.6))


@pytest.mark.parametrize("refused_first", [True, False])
def test_a_free_refusal_in_one_folder_clears_nothing_of_another(
    tmp_path: Path, refused_first: bool
) -> None:
    own, other = (tmp_path / f"02-dialogues-{n}" / "exchanges.jsonl" for n in (0, 1))
    Exchanges(own).sent("f" * 64, "t", BODY, Cost(1000, 0.6))
    log = Exchanges(other)
    log.failed(log.sent("f" * 64, "t", BODY, Cost(9)), "f" * 64, "http-429", billed="no")
    paths = (other, own) if refused_first else (own, other)
    before = Exchanges(paths[0], paths[1:]).before
    assert before.unknown == Cost(1000, 0.6)
    assert before.failures == {"http-429": 1, "killed": 1}
