"""How scripted conversations are performed: moods, cuts, backchannels, no invented answers."""

from __future__ import annotations

import time
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from duplex.characters import Mood
from duplex.datafiles import load_domain
from duplex.wording import facts_told, has_words, patterns_used, spoken
from pipeline.engines.scripted import ScriptedWriter
from pipeline.engines.scripted_performance import LONG_TURN_WORDS, meet
from pipeline.engines.writers import WrittenDialogue
from tests.unit.test_scripted_writer import PERSONAS, ROOT, SCENARIOS

DOMAIN = load_domain(ROOT / "data/domains/coffee-shop.yaml")
WRITER = ScriptedWriter(domain=DOMAIN)
DARK, BRIGHT = {"angry", "sad"}, {"happy", "excited"}


def write(persona: str, scenario: str, seed: int = 0, writer: ScriptedWriter = WRITER):
    return writer.write(
        PERSONAS[persona], SCENARIOS[scenario], seed=seed, min_turns=15, max_turns=25
    )


@cache
def dialogues() -> list[tuple[str, str, WrittenDialogue]]:
    return [
        (persona, scenario, write(persona, scenario, seed))
        for persona in PERSONAS
        for scenario in SCENARIOS
        for seed in (1, 2)
    ]


def per_type(count) -> dict[str, float]:
    """What `count` finds in a dialogue, on average for each type of persona."""
    totals, numbers = Counter(), Counter()
    for persona, _, dialogue in dialogues():
        kind = PERSONAS[persona].type
        totals[kind] += count(dialogue)
        numbers[kind] += 1
    return {kind: totals[kind] / numbers[kind] for kind in numbers}


# -- moods


def test_every_turn_has_a_mood_and_without_a_domain_none() -> None:
    for _, _, dialogue in dialogues():
        assert all(turn.emotion and turn.intensity for turn in dialogue.turns)
        assert {turn.intensity for turn in dialogue.turns} != {1.0}
    bare = write("angry-marcus", "rush-hour", writer=ScriptedWriter())
    assert all(turn.emotion is None and turn.intensity is None for turn in bare.turns)


def test_the_domain_changes_no_word_of_it() -> None:
    bare = write("friendly-june", "remake", writer=ScriptedWriter())
    moody = write("friendly-june", "remake")
    assert [turn.text for turn in bare.turns] == [turn.text for turn in moody.turns]


def test_a_type_has_its_own_emotion_most_of_all_and_never_the_opposite() -> None:
    for kind, mood in DOMAIN.types.items():
        found = Counter(
            turn.emotion
            for persona, _, dialogue in dialogues()
            for turn in dialogue.turns
            if turn.role == "agent" and PERSONAS[persona].type == kind
        )
        assert found.most_common(1)[0][0] == mood.emotion, (kind, found)
        for side, other in ((DARK, BRIGHT), (BRIGHT, DARK)):
            assert mood.emotion not in side or not other & set(found), (kind, found)


def test_a_scene_turns_the_mood_from_its_beat_on() -> None:
    """A friendly customer with a wrong drink is not happy, and is when the right one comes."""
    for seed in range(5):
        turns = write("friendly-june", "remake", seed).turns
        moods = [turn.emotion for turn in turns if turn.role == "agent"]
        assert moods[0] == "neutral" and moods[-1] == "happy"
    angry = write("angry-marcus", "remake").turns[0]
    assert angry.emotion == "angry" and (angry.intensity or 0) > DOMAIN.types["angry"].intensity


@pytest.mark.parametrize(
    ("own", "scene", "met"),
    [
        (("angry", 1.2), ("angry", 1.0), ("angry", 1.7)),
        (("angry", 1.9), ("sad", 1.0), ("angry", 2.0)),
        (("happy", 1.0), ("angry", 1.0), ("neutral", 1.0)),
        (("happy", 1.0), ("neutral", 1.0), ("happy", 0.8)),
        (("neutral", 1.0), ("sad", 0.8), ("sad", 0.9)),
    ],
)
def test_a_character_stays_who_it_is_in_a_scene(own, scene, met) -> None:
    moods = [Mood(emotion=emotion, intensity=intensity) for emotion, intensity in (own, scene, met)]
    found = meet(moods[0], moods[1])
    assert found.emotion == moods[2].emotion
    assert found.intensity == pytest.approx(moods[2].intensity)


# -- interruptions


def test_a_cut_loses_no_fact_no_pattern_and_no_price() -> None:
    cuts = 0
    for persona, scenario, dialogue in dialogues():
        who = PERSONAS[persona]
        for turn in dialogue.turns:
            if turn.cut_after_words is None:
                continue
            cuts += 1
            said, whole = spoken(turn), turn.text
            lost = len(whole.split()) - turn.cut_after_words
            assert 2 <= lost <= 6 and len(whole.split()) >= LONG_TURN_WORDS, whole
            assert facts_told(who, said) == facts_told(who, whole), (persona, scenario, turn)
            assert patterns_used(who, said) == patterns_used(who, whole) or turn.role == "user"
            rest = " ".join(whole.split()[turn.cut_after_words :])
            assert not has_words(rest, "dollars") and not has_words(rest, "minutes"), whole
            assert not any(has_words(rest, drink) for drink in WRITER.grammar.menu.drinks), whole
    assert cuts > 300


def test_nobody_is_cut_twice_in_a_row_or_at_the_end() -> None:
    for _, _, dialogue in dialogues():
        assert dialogue.turns[-1].cut_after_words is None
        for turn, after in pairwise(dialogue.turns):
            assert not (turn.cut_after_words and after.cut_after_words)


def test_who_cuts_in_begins_with_a_word_on_it() -> None:
    lines = {kind: WRITER.grammar.lines[kind]["cut-in"] for kind in (*DOMAIN.types, "barista")}
    openers = {
        kind: {word for line in options for word in _first_words(line)}
        for kind, options in lines.items()
    }
    for persona, _, dialogue in dialogues():
        for turn, after in pairwise(dialogue.turns):
            if turn.cut_after_words:
                kind = "barista" if after.role == "user" else PERSONAS[persona].type
                first = after.text.split()[0].strip(",.")
                assert first in openers[kind] | {"Oh"}, after.text


def _first_words(line) -> set[str]:
    import random

    drawn = (line.say({}, random.Random(seed), set()) for seed in range(60))
    return {text.split()[0].strip(",.") for text in drawn}


def test_the_angry_cut_in_most_and_scenes_have_their_interruptions() -> None:
    def cuts_in(dialogue: WrittenDialogue) -> int:
        return sum(t.role == "user" and t.cut_after_words is not None for t in dialogue.turns)

    found = per_type(cuts_in)
    assert found["angry"] > 1.3 * max(rate for kind, rate in found.items() if kind != "angry")
    calm, busy = (
        sum(t.cut_after_words is not None for p, s, d in dialogues() if s == scene
            and PERSONAS[p].type == "friendly" for t in d.turns)
        for scene in ("dietary-request", "rush-hour")
    )  # fmt: skip
    assert busy > 2 * calm
    both = {turn.role for _, _, d in dialogues() for turn in d.turns if turn.cut_after_words}
    assert both == {"user", "agent"}


# -- backchannels


def test_backchannels_are_the_listener_s_own_and_within_what_is_said() -> None:
    barista = {line.say({}, None, set()) for line in WRITER.grammar.lines["barista"]["backchannel"]}  # type: ignore[arg-type]
    found = 0
    for persona, _, dialogue in dialogues():
        for turn in dialogue.turns:
            for murmur in turn.backchannels:
                found += 1
                heard = len(spoken(turn).split())
                assert 3 <= murmur.after_word < heard - 1
                own = PERSONAS[persona].backchannel_words
                assert murmur.text in (barista if turn.role == "agent" else own)
                before = turn.text.split()[murmur.after_word - 1]
                after = turn.text.split()[murmur.after_word].lower()
                assert before[-1] in ",.;?!" or after in (
                    "and", "but", "so", "because", "if", "which", "when", "then",
                ), turn.text  # fmt: skip
    assert found > 500


def test_the_friendly_and_the_nervous_murmur_most() -> None:
    found = per_type(lambda d: sum(len(t.backchannels) for t in d.turns if t.role == "user"))
    assert min(found["friendly"], found["nervous"]) > 2 * found["angry"]


# -- what nobody can know


def test_a_question_without_an_answer_is_met_with_not_knowing() -> None:
    asked = Counter[str]()
    for persona, scenario, dialogue in dialogues():
        who, questions = PERSONAS[persona], SCENARIOS[scenario].unanswerable
        for turn, after in pairwise(dialogue.turns):
            if turn.role == "user" and any(question in turn.text for question in questions):
                asked[scenario] += 1
                assert any(
                    words in after.text.lower()
                    for words in ("know", "no idea", "a clue", "couldn't", "can't", "wish i knew")
                ), (who.id, turn.text, after.text)
    assert set(asked) == set(SCENARIOS) and asked.total() > 200


def test_a_scenario_without_such_questions_asks_none() -> None:
    plain = SCENARIOS["quiet-afternoon"].model_copy(update={"unanswerable": ()})
    for seed in range(10):
        written = WRITER.write(
            PERSONAS["friendly-june"], plain, seed=seed, min_turns=20, max_turns=25
        )
        questions = SCENARIOS["quiet-afternoon"].unanswerable
        assert not any(q in turn.text for q in questions for turn in written.turns)


def test_candidates_that_fail_are_followed_by_others_until_one_is_kept() -> None:
    from duplex.dialogue_checks import Fault
    from duplex.errors import RecordError

    seen, rejected = [], []

    def check(persona, scenario, turns):
        seen.append(turns)
        return Fault("digits", "no") if len(seen) < 3 else None

    writer = ScriptedWriter(check=check, on_reject=rejected.append, max_candidates=3)
    kept = writer.write(
        PERSONAS["friendly-june"], SCENARIOS["remake"], seed=1, min_turns=8, max_turns=10,
        task_id="june.remake.00", attempt=2,
    )  # fmt: skip
    assert kept.turns == seen[2] and len(set(seen)) == 3
    assert [(c.task_id, c.attempt, c.number) for c in rejected] == [
        ("june.remake.00", 2, 0), ("june.remake.00", 2, 1),
    ]  # fmt: skip
    seen.clear()
    with pytest.raises(RecordError, match="none of 2 did; the last: digits"):
        ScriptedWriter(check=check, max_candidates=2).write(
            PERSONAS["friendly-june"], SCENARIOS["remake"], seed=1, min_turns=8, max_turns=10
        )


def test_a_dialogue_takes_milliseconds() -> None:
    write("angry-marcus", "rush-hour")
    started = time.process_time()
    for seed in range(20):
        write("nervous-mei", "remake", seed)
    # 3 ms on one core; ten times that would be another program.
    assert time.process_time() - started < 20 * 0.03
