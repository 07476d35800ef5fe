"""What a dialogue must show before it is kept: planted faults are found, each for its reason.

The planted dialogues are scripted ones with one edit. That a check is needed is shown by leaving
it out: then its kind passes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from duplex.config_data import DialogueChecks
from duplex.datafiles import load_domain
from duplex.dialogue_checks import CHECKS, CODES, OTHER_CODES, Fault, dialogue_check
from duplex.records import Backchannel, Turn
from pipeline.engines.scripted import ScriptedWriter
from pipeline.engines.scripted_check import claims
from tests.unit.test_scripted_writer import MENU, PERSONAS, ROOT, SCENARIOS

DOMAIN = load_domain(ROOT / "data/domains/coffee-shop.yaml")
WRITER = ScriptedWriter(domain=DOMAIN)
Turns = list[Turn]
WHO, WHERE = "angry-marcus", "quiet-afternoon"  # large black coffee, five dollars, peanuts


def coffee_rule(persona, turns):
    return claims(persona, turns, MENU)


def check(turns, persona=WHO, scenario=WHERE, *, without: str | None = None) -> Fault | None:
    kept = tuple(one for one in CHECKS if one.code != without)
    rules = () if without == "contradiction" else (coffee_rule,)
    look = dialogue_check(
        DOMAIN, DialogueChecks(), min_turns=15, max_turns=25, checks=kept, rules=rules
    )
    return look(PERSONAS[persona], SCENARIOS[scenario], tuple(turns))


def good(persona: str = WHO, scenario: str = WHERE, seed: int = 0) -> Turns:
    written = WRITER.write(
        PERSONAS[persona], SCENARIOS[scenario], seed=seed, min_turns=17, max_turns=23
    )
    return list(written.turns)


def put(turns: Turns, index: int, **changes: object) -> None:
    plain = {"cut_after_words": None, "backchannels": ()}
    turns[index] = turns[index].model_copy(update=plain | changes)


def say(role: str, text: str) -> Callable[[Turns], None]:
    """Puts `text` before a turn near the end."""

    def edit(turns: Turns) -> None:
        # The last turn of a role before the goodbye: facts were told by then.
        index = next(i for i in range(len(turns) - 5, 0, -1) if turns[i].role == role)
        put(turns, index, text=f"{text} {turns[index].text}")

    return edit


def other_first_speaker(turns: Turns) -> None:
    del turns[0]


def same_role_twice(turns: Turns) -> None:
    turns.insert(4, Turn(role=turns[4].role, text="Well, well, here we go."))


def unknown_role(turns: Turns) -> None:
    turns[4] = turns[4].model_copy(update={"role": "narrator"})


def too_few(turns: Turns) -> None:
    del turns[14:]
    told = "It's Marcus, a large black coffee, come on, I've only got five dollars."
    put(turns, 13, text=told)


def too_many(turns: Turns) -> None:
    chat = ("It rains a lot, by the way.", "Oh yes, it does.", "My umbrella broke too.",
            "Mine did in the spring.", "Winter is worse for the wait.", "Summer comes some day.",
            "Not a day too soon for me.", "I like the cold, to be fair.", "You would like the sea.",
            "I was there once, by ferry.")  # fmt: skip
    for line in chat:
        turns.append(Turn(role="user" if turns[-1].role == "agent" else "agent", text=line))


def empty(turns: Turns) -> None:
    put(turns, 6, text="...")


def monologue(turns: Turns) -> None:
    words = "and then the line went round the corner past the shop with the hats "
    put(turns, 6, text=f"You know, {words * 7}and nobody minded.")


def long_backchannel(turns: Turns) -> None:
    long = "yes, that is what I always say too"
    put(turns, 6, text="One moment please, it is on its way to you now.",
        backchannels=(Backchannel(text=long, after_word=3),))  # fmt: skip


def one_sided(turns: Turns) -> None:
    for index, turn in enumerate(turns):
        if turn.role == "agent":
            long = (
                f"{turn.text} That is number {WORDS[index]} on my list of things that went wrong."
            )
            put(turns, index, text=long)
        else:
            put(turns, index, text=f"{WORDS[index].title()}.")


WORDS = (
    "okay", "right", "sure", "fine", "good", "yes", "well", "true", "nice", "indeed", "quite",
    "maybe", "perhaps", "never", "often", "always", "soon", "later", "now", "then", "here", "there",
)  # fmt: skip


def repeat_a_turn(turns: Turns) -> None:
    long = "I came here for a large black coffee and not for a lecture."
    agents = [i for i, turn in enumerate(turns) if turn.role == "agent"]
    put(turns, agents[3], text=long)
    put(turns, agents[6], text=long)


def repeat_an_exchange(turns: Turns) -> None:
    put(turns, 8, text="It needs time.")
    put(turns, 9, text="Then hurry up.")
    put(turns, 12, text="It needs time.")
    put(turns, 13, text="Then hurry up.")


def echo(turns: Turns) -> None:
    put(turns, 8, text="The milk is in the little jug over by the window.")
    put(turns, 9, text="The milk is in the little jug over by the window.")


def off_topic(turns: Turns) -> None:
    """Two friends on a football match, who say the facts once."""
    lines = ("Did you watch the match last night?", "Come on, who didn't.",
             "That second goal was something.", "It was offside by a mile.",
             "The referee never looked.", "He never does.", "My brother was in the stadium.",
             "Lucky man, your brother.", "He lost his scarf there.", "That happens in a crowd.",
             "Who are they playing on Sunday?", "Some team from up north.",
             "I hope their keeper is ill.", "Their keeper is my cousin.", "No way, is he any good?",
             "He lets in everything.", "Then we will win.", "We never win on Sundays.",
             "That is true, sadly.")  # fmt: skip
    for index, line in enumerate(lines[: len(turns)]):
        put(turns, index, text=line)
    del turns[len(lines) :]
    put(turns, 9, text="I'm allergic to peanuts, so a crowd is bad, and a roofing crew waiting.")


def no_facts(turns: Turns) -> None:
    for index, turn in enumerate(turns):
        if turn.role == "agent":
            put(turns, index, text=f"Come on, that cup is the {WORDS[index]} kind of small drink.")
        else:
            put(turns, index, text=turn.text.replace("Marcus", "sir"))


def no_pattern(turns: Turns) -> None:
    for index, turn in enumerate(turns):
        text = turn.text
        for pattern in PERSONAS[WHO].speech_patterns:
            text = text.replace(f"{pattern} ", "Hm, ").replace(pattern, "").strip()
        put(turns, index, text=text)


def cut_at_the_end(turns: Turns) -> None:
    put(turns, -1, text="So I will be on my way.", cut_after_words=4)


def told_after_the_cut(turns: Turns) -> None:
    """The facts are there to read, and nobody hears them."""
    no_facts(turns)
    agents = [i for i, turn in enumerate(turns) if turn.role == "agent"][:-1]
    tail = "a large black coffee for Marcus with five dollars and no peanuts"
    put(turns, agents[2], text=f"Come on, that cup is small and {tail}", cut_after_words=6)


def knows_the_name(turns: Turns) -> None:
    put(turns, 0, text="Hello Marcus, come on up to the counter.")


def knows_a_fact(turns: Turns) -> None:
    put(turns, 0, text="Hello, is your roofing crew waiting outside?")


PLANTED: list[tuple[str, Callable[[Turns], None]]] = [
    ("unknown-role", unknown_role),
    ("first-speaker", other_first_speaker),
    ("same-role-twice", same_role_twice),
    ("too-few-turns", too_few),
    ("too-many-turns", too_many),
    ("empty-turn", empty),
    ("long-turn", monologue),
    ("long-turn", long_backchannel),
    ("one-sided", one_sided),
    ("cut-at-the-end", cut_at_the_end),
    ("url", say("user", "It's all on www.our-shop.example.")),
    ("stage-direction", say("agent", "*rolls his eyes* Fine.")),
    ("stage-direction", say("user", "[puts down the cup] There.")),
    ("emoji", say("agent", "Great \N{GRINNING FACE}.")),
    ("markup", say("user", "**Okay**, one moment.")),
    ("markup", say("user", "That costs a few $.")),
    ("digits", say("user", "Give me 5 minutes.")),
    ("foreign-script", say("agent", "\u041f\u0440\u0438\u0432\u0435\u0442, hello.")),
    ("other-name", say("agent", "My name is Gordon, by the way.")),
    ("denied-fact", say("agent", "I'm not allergic to peanuts, you know.")),
    ("denied-fact", say("agent", "I don't have a roofing crew waiting, no.")),
    ("other-amount", say("agent", "I only have twelve dollars on me.")),
    ("assistant-speak", say("agent", "As an AI, I do not drink.")),
    ("role-inversion", say("agent", "How can I help you?")),
    ("role-inversion", say("agent", "What can I get you today?")),
    ("prompt-leak", say("agent", f"You know, {PERSONAS[WHO].prompts[0]}".split(".")[0] + ".")),
    ("untold-knowledge", knows_the_name),
    ("untold-knowledge", knows_a_fact),
    ("repeated-turn", repeat_a_turn),
    ("repeated-turn", repeat_an_exchange),
    ("echo", echo),
    ("off-topic", off_topic),
    ("too-few-facts", no_facts),
    ("too-few-facts", told_after_the_cut),
    ("no-pattern", no_pattern),
    ("contradiction", say("agent", "I'll have a small iced latte, please.")),
    ("contradiction", say("agent", "I'm allergic to soy, by the way.")),
]
NAMES = [f"{code}-{number}" for number, (code, _) in enumerate(PLANTED)]


@pytest.mark.parametrize(("code", "edit"), PLANTED, ids=NAMES)
def test_a_planted_fault_is_found_for_its_reason(code: str, edit: Callable[[Turns], None]) -> None:
    turns = good()
    assert check(turns) is None
    edit(turns)
    fault = check(turns)
    assert fault is not None and (fault.code, bool(fault.message)) == (code, True), fault


@pytest.mark.parametrize(("code", "edit"), PLANTED, ids=NAMES)
def test_without_its_check_a_planted_fault_passes(code: str, edit: Callable[[Turns], None]) -> None:
    turns = good()
    edit(turns)
    assert check(turns, without=code) is None


def test_every_code_has_a_planted_fault_and_twenty_kinds_are_covered() -> None:
    planted = {code for code, _ in PLANTED}
    assert {one.code for one in CHECKS} | {"contradiction"} == planted
    assert len(planted) >= 20
    assert len(set(CODES)) == len(CODES) and set(OTHER_CODES) <= set(CODES)


@pytest.mark.parametrize("turns", [(8, 10), (15, 25)])
def test_of_two_hundred_scripted_dialogues_under_two_percent_are_lost(
    turns: tuple[int, int],
) -> None:
    look = dialogue_check(
        DOMAIN, DialogueChecks(), min_turns=turns[0], max_turns=turns[1], rules=(coffee_rule,)
    )
    lost = []
    for persona in PERSONAS.values():
        for scenario in SCENARIOS.values():
            written = WRITER.write(
                persona, scenario, seed=5, min_turns=turns[0], max_turns=turns[1]
            )
            if fault := look(persona, scenario, written.turns):
                lost.append((persona.id, scenario.id, fault))
    assert len(lost) < 0.02 * 200, lost


def test_what_only_a_regular_is_known_by_is_known_in_that_scenario_alone() -> None:
    turns = good(scenario="regular-order")
    assert "Marcus" in turns[0].text
    assert check(turns, scenario="regular-order") is None
    fault = check(turns, scenario="quiet-afternoon")
    assert fault is not None and fault.code == "untold-knowledge"
