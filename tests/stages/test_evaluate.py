"""Evaluation against planted servers: the client, the measures, the stage and its files."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from duplex.config import SamplingSection
from duplex.errors import DataFileError, ServerError, WorkError
from duplex.frames import FRAME_SAMPLES
from duplex.metrics import Segment
from pipeline.evaluation.client import BusyError, converse
from pipeline.evaluation.items import load_items, speak_item
from pipeline.evaluation.measures import sums_of
from pipeline.evaluation.play import PlaySettings, evaluate_urls
from pipeline.evaluation.report import report_data
from pipeline.evaluation.scoring import split_replies, timed_words
from pipeline.evaluation.verdicts import verdicts
from tests.stages.planted_server import Plan, item, planted, spoken

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan():
    return Plan()


def talk(url, num_frames=4, **options):
    user = np.linspace(-1, 1, num_frames * FRAME_SAMPLES)
    return asyncio.run(converse(url, user, text_prompt="You are Ann.", **options))


# -- the user's side


def test_turns_stand_on_frames_with_their_pauses_and_nothing_else():
    made = spoken()
    # Lead-in 4 frames, 4 words of 3, pause 20, 2 words of 3, and the last pause.
    assert made.turns == (Segment(4, 16), Segment(36, 42))
    assert (made.num_frames, made.dropped) == (62, 0)
    assert made.texts == ("What would you like", "Your name")
    loud = np.abs(made.samples).reshape(62, FRAME_SAMPLES).max(axis=1) > 0
    assert np.flatnonzero(loud).tolist() == [*range(4, 16), *range(36, 42)]
    level = np.sqrt(np.mean(made.samples[4 * FRAME_SAMPLES : 16 * FRAME_SAMPLES] ** 2))
    assert 20 * np.log10(level) == pytest.approx(-24, abs=0.01)


def test_a_turn_without_time_for_its_answer_is_left_out_whole():
    exact = spoken(seconds=62 * 0.08)
    assert (len(exact.turns), exact.dropped) == (2, 0)
    short = spoken(seconds=61 * 0.08)
    assert (short.turns, short.dropped, short.num_frames) == ((Segment(4, 16),), 1, 36)
    assert short.samples[16 * FRAME_SAMPLES :].max() == 0
    nothing = spoken(seconds=2)
    assert (nothing.turns, nothing.dropped, nothing.samples.max()) == ((), 2, 0)


def test_an_agent_that_speaks_first_is_given_time_to():
    assert spoken(first_speaker="agent").turns[0] == Segment(20, 32)


def test_an_engine_that_says_nothing_is_an_error_that_names_the_item():
    engine = SimpleNamespace(synthesize=lambda *_: SimpleNamespace(samples=np.zeros(9600)))
    with pytest.raises(WorkError, match=r"angry-ann.*What would you like"):
        speak_item(item(), engine, {}, seconds=8, answer_s=1)


def test_all_faults_of_the_items_file_are_told_at_once(tmp_path):
    path = tmp_path / "items.yaml"
    good = item().model_dump(mode="json")
    bad = good | {"id": "Not A Slug", "persona_type": "Rather bored", "user_turns": [], "mood": "?"}
    path.write_text(json.dumps({"items": [good, bad]}))
    with pytest.raises(DataFileError) as caught:
        load_items(path)
    for part in ("items.yaml", "items.1.id", "items.1.persona_type", "items.1.user_turns", "mood"):
        assert part in str(caught.value)
    for content, fault in (
        ([good, good], "found twice: angry-ann"),
        ([], "items"),
    ):
        path.write_text(json.dumps({"items": content}))
        with pytest.raises(DataFileError, match=fault):
            load_items(path)
    path.write_text("- just a list")
    with pytest.raises(DataFileError, match="mapping"):
        load_items(path)
    with pytest.raises(DataFileError, match="must exist"):
        load_items(tmp_path / "none.yaml")


def test_the_shipped_items_are_valid_and_their_prompts_hold_their_facts():
    for shipped in load_items(ROOT / "data/prompts/seeds.yaml"):
        for fact in shipped.facts:
            assert fact.value.split()[-1].casefold() in shipped.text_prompt.casefold()


# -- the client


def test_lockstep_gives_back_what_was_played_frame_for_frame(plan):
    plan.echo, plan.watchful, plan.says = 0, True, {0: "Hel", 2: "lo "}
    user = np.linspace(-1, 1, 3 * FRAME_SAMPLES + 5)
    with planted(plan) as url:
        found = asyncio.run(
            converse(
                url, user, text_prompt="a & b + c?", seed=7, token="secret",
                sampling=SamplingSection(text_topk=3),
            )
        )  # fmt: skip
    assert found.agent.shape == (4 * FRAME_SAMPLES,)
    assert found.agent[: len(user)] == pytest.approx(user, abs=1e-4)
    assert found.text == ((0, "Hel"), (2, "lo "))
    assert found.transcript == "Hello"
    asked = plan.seen[0]
    assert asked["text_prompt"] == "a & b + c?"
    assert (asked["seed"], asked["format"], asked["text_topk"]) == ("7", "pcm", "3")
    assert asked["authorization"] == "Bearer secret"
    assert len(found.wall.frame_s) == 4
    assert found.prompt is not None and found.prompt["type"] == "prompt"


def test_what_the_url_says_stays_unless_it_is_given(plan):
    with planted(plan) as url:
        asyncio.run(converse(f"{url}/?text_prompt=of%20the%20URL", np.zeros(FRAME_SAMPLES)))
        asyncio.run(converse(f"{url}/?text_prompt=old", np.zeros(1), text_prompt="new"))
    assert [query["text_prompt"] for query in plan.seen] == ["of the URL", "new"]


def test_real_time_sends_a_frame_every_80_ms(plan):
    plan.echo = 0
    with planted(plan) as url:
        started = time.perf_counter()
        found = talk(url, 6, lockstep=False)
        assert time.perf_counter() - started >= 6 * 0.08
        fast = talk(url, 6)
    assert np.array_equal(found.agent, fast.agent)
    assert fast.wall.total_s < found.wall.total_s


@pytest.mark.parametrize("lockstep", [True, False])
@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("close", "after 2 of 4 frames.*1011.*the model fell over"),
        ("error", "reported an error after 2 of 4 frames: the model fell over"),
        ("vanish", "after 2 of 4 frames"),
        ("short", "3840 bytes of PCM, found 100.*format=pcm"),
        ("words", "must send binary messages, found text"),
        ("latin", "text must be UTF-8"),
        ("not-json", "metadata must be JSON"),
        ("stall", "must answer frame 2 within 0.3"),
    ],
)
def test_each_way_to_break_a_conversation_is_told_apart(plan, breakage, message, lockstep):
    plan.break_at, plan.breakage = 2, breakage
    with planted(plan) as url, pytest.raises(ServerError, match=message) as caught:
        talk(url, frame_timeout_s=0.3, lockstep=lockstep)
    assert "text_prompt" not in str(caught.value)


def test_a_frame_that_was_not_asked_for_is_an_error(plan):
    plan.break_at, plan.breakage = 2, "double"
    with (
        planted(plan) as url,
        pytest.raises(ServerError, match=r"for each .* found 9 for 8"),
    ):
        talk(url, 8)


@pytest.mark.parametrize(
    ("refuse", "error", "message"),
    [
        ("busy", BusyError, "no free slot.*one conversation at a time"),
        ("busy-silently", BusyError, "no free slot.*1013"),
        ("never-ready", ServerError, "must be ready within 0.3 s"),
        ("400", ServerError, "HTTP 400: text_prompt must fit, found 9000 tokens"),
        ("401", ServerError, "HTTP 401.*token"),
    ],
)
def test_each_refusal_is_told_apart(plan, refuse, error, message):
    plan.refuse = refuse
    with planted(plan) as url, pytest.raises(error, match=message):
        talk(url, ready_timeout_s=0.3)


def test_a_server_that_is_not_there_is_told(plan):
    with planted(plan) as url:
        pass
    with pytest.raises(ServerError, match=r"must be reachable.*duplex serve"):
        talk(url)


# -- playing and measuring


def play(plan, items=None, **changes):
    settings = PlaySettings(tokenizer=plan.tokenizer, **changes)
    with planted(plan) as url:
        return evaluate_urls({"one": url}, items or [spoken()], settings, lambda line: None)[0]


def test_a_silent_server_is_measured_as_silent(plan):
    played = play(plan)
    metrics = played.conversations[0].metrics()
    assert played.conversations[0].proof.proven
    assert played.repeats is True
    assert metrics == pytest.approx({
        "user_turns": 2, "responses": 0, "response_delay_median_s": None, "overlap_s": 0,
        "dead_air_s": 1.6 + 1.6, "agent_speech_s": 0, "agent_speech_share": 0, "words": 0,
        "words_per_s": None, "facts": 2, "facts_said": 0, "replies": 0, "echoes": 0,
        "out_of_role": 0, "ungrounded": 0, "repeated_share": None, "interruptions": 0, "yields": 0,
        "backchannels": 0, "due": 0, "due_said": 0, "off_topic": 0, "made_up": 0,
        "compression_ratio": None, "loops": 0, "foreign_share": None, "unspoken_share": None,
        "unwritten_share": None, "word_error_rate": None, "dnsmos": None, "clipped_share": 0,
        "speech_dbfs": None, "floor_dbfs": -120, "dc_offset": 0,
    })  # fmt: skip
    assert (played.conversations[0].grade, played.conversations[0].silence) == ("poor", "silent")


def test_a_server_on_the_wrong_side_and_one_that_invents_are_found_out(plan):
    plan.says = {
        17: "Hello,",
        18: " what can I get you?",
        50: " It is seven dollars,",
        60: " Priya.",
    }
    lines = ("what can I get",)
    (wrong,) = play(plan, [spoken(must_not_say=lines)]).conversations
    assert [exchange.out_of_role for exchange in wrong.exchanges] == [True, False]
    assert [exchange.invented for exchange in wrong.exchanges] == [(), ("7", "priya")]
    assert (wrong.metrics()["out_of_role"], wrong.metrics()["ungrounded"]) == (1, 1)
    plan.says = {17: "A large latte.", 50: " I am Ann, what else."}
    (right,) = play(plan, [spoken(must_not_say=lines)]).conversations
    assert (right.metrics()["out_of_role"], right.metrics()["ungrounded"]) == (0, 0)


@pytest.mark.parametrize("num_items", [4, 11])
def test_a_verdict_needs_items_enough(plan, num_items):
    """A silent model against one that answers every turn: sure with eleven items, not with four."""
    items = [spoken(item_id=f"item-{number}") for number in range(num_items)]
    silent = play(plan, items)
    plan.echo = 13
    answers = replace(play(plan, items), label="answers")
    conversations = [
        {"item": one.spoken.item.id, "model": played.label, "sums": sums_of(one)}
        for played in (silent, answers)
        for one in played.conversations
    ]
    (found,) = verdicts(conversations, ["one", "answers"])
    rows = {row["key"]: row for row in found["rows"]}
    answered = rows["response_rate"]
    assert (answered["value_a"], answered["value_b"]) == (0, 1) and answered["n"] == num_items
    assert answered["p"] == pytest.approx(2 / 2**num_items, abs=1e-6)
    assert answered["word"] == ("improved" if num_items == 11 else "inconclusive")
    assert rows["dead_air_s"]["word"] == ("improved" if num_items == 11 else "inconclusive")
    assert rows["facts_said"]["word"] == "inconclusive" and "prompt_proven" not in rows


def test_an_echoing_server_is_found_out(plan):
    # The user's audio comes back 13 frames later: after the first turn, into the second.
    plan.echo = 13
    plan.says = {
        0: "Hi. ",
        17: "What would",
        18: " you like",
        50: " your name",
        60: " Ann large latte",
    }
    measured = play(plan).conversations[0]
    assert measured.opening == "Hi."
    assert [exchange.reply for exchange in measured.exchanges] == [
        "What would you like", "your name Ann large latte",
    ]  # fmt: skip
    assert [exchange.echo for exchange in measured.exchanges] == [True, False]
    assert [exchange.delay_s for exchange in measured.exchanges] == [0.08, 0.56]
    metrics = measured.metrics()
    assert (metrics["responses"], metrics["replies"], metrics["echoes"]) == (2, 2, 1)
    assert (metrics["facts"], metrics["facts_said"], metrics["words"]) == (2, 2, 10)
    assert metrics["response_delay_median_s"] == pytest.approx(0.32)
    assert metrics["agent_speech_s"] == pytest.approx(18 * 0.08)
    assert metrics["overlap_s"] == 0


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"digest": "0" * 64}, "other tokens were fed: digest 000000000000…"),
        ({"count_off_by": -1}, "tokens were fed"),
        ({"proves": False}, "said nothing"),
    ],
)
def test_a_prompt_that_was_not_fed_is_not_proven(plan, changes, note):
    for key, value in changes.items():
        setattr(plan, key, value)
    proof = play(plan).conversations[0].proof
    assert not proof.proven
    assert note in proof.note


def test_the_servers_own_tokenizer_serves_where_we_have_none(plan):
    with planted(plan) as url:
        played = evaluate_urls({"one": url}, [spoken()], PlaySettings(), lambda line: None)[0]
    assert played.conversations[0].proof.proven


def test_a_broken_conversation_names_its_item(plan):
    plan.break_at = 5
    with pytest.raises(ServerError, match=r"^angry-ann: .*after 5 of 62 frames"):
        play(plan)


def test_a_slot_that_is_freed_late_is_waited_for_and_a_taken_one_is_not(plan):
    plan.busy_for = 2
    assert play(plan).conversations[0].proof.proven
    plan.refuse = "busy"
    with pytest.raises(ServerError, match=r"angry-ann.*no free slot"):
        play(plan, busy_timeout_s=0.2)


def test_changes_are_put_down_to_the_model_only_if_both_repeat(plan):
    items = [spoken(), spoken(item_id="angry-bob")]
    other = Plan(echo=20, model_digest="b" * 64)
    restless = Plan(drift=True)
    silent, echoing, drifting = (play(p, items) for p in (plan, other, restless))

    def changed(*played):
        return report_data(played, about={}, protocol={})["changed"]

    found = changed(silent, echoing)
    assert (found["conversations"], found["differ"], found["texts_differ"]) == (2, 2, 0)
    assert found["attributable"]
    assert changed(silent, silent)["differ"] == 0
    assert drifting.repeats is False
    assert not changed(silent, drifting)["attributable"]
    assert changed(silent) is None


def test_words_are_put_together_and_belong_to_the_turn_they_begin_in():
    text = [(0, " He"), (1, "llo"), (5, " my"), (6, "self "), (7, "and"), (9, "\nyou"), (9, "  ")]
    assert timed_words(text) == [(0, "Hello"), (5, "myself"), (7, "and"), (9, "you")]
    assert split_replies(text, [1, 6]) == ("Hello", ("myself", "and you"))
    assert split_replies([(4, "on"), (5, " the edge")], [5]) == ("on", ("the edge",))
    assert split_replies([], [1, 6]) == ("", ("", ""))
    assert split_replies(text, []) == ("Hello myself and you", ())


def test_each_item_draws_by_a_seed_of_its_own(plan):
    items = [spoken(item_id=f"item-{number}") for number in range(3)]
    play(plan, items, seeds=(0, 1), again=False)
    asked = [query["seed"] for query in plan.seen]
    assert len(set(asked)) == 6  # by item and seed
    play(plan, items, seeds=(0, 1), again=False)
    assert [query["seed"] for query in plan.seen][6:] == asked
