"""Free speech is full of words that look like faults: what people really say must pass."""

from __future__ import annotations

import pytest

from duplex.records import Turn
from duplex.wording import foreign_letters, longest_run, number, shingles, words
from pipeline.engines.scripted_check import claims
from tests.unit.test_dialogue_checks import check, good
from tests.unit.test_scripted_writer import MENU, PERSONAS

# Who says it (of a dialogue of the persona), and what.
INNOCENT = [
    ("angry-brenda", "agent", "I'm not Brenda's sister, I'm the one with the order."),
    ("angry-brenda", "agent", "No, they call me crazy, and I call that exact."),
    ("angry-brenda", "agent", "Anything else? Yes. A clean spoon."),
    ("angry-brenda", "agent", "You're welcome to keep the cinnamon for yourself."),
    ("angry-brenda", "agent", "I don't have sugar, how often must I say it?"),
    ("angry-brenda", "agent", "That will be all. Welcome to retirement, they said."),
    ("angry-brenda", "agent", "My name is on the cup, so read it."),
    ("angry-marcus", "agent", "That'll be the day. I'm Irish, we know how to wait."),
    ("angry-marcus", "agent", "And then she says, what can I get you, and walks off!"),
    ("angry-marcus", "agent", "It's Monday. I had twenty dollars before the parking meter."),
    ("angry-marcus", "agent", "Ten dollars? For that? I've got five dollars, take it or leave it."),
    ("angry-marcus", "agent", "I've got ten minutes before the crew starts without me."),
    ("angry-marcus", "agent", "I asked for a black coffee, and this is an iced latte."),
    ("angry-marcus", "agent", "I'd like to know if the mocha next to it has peanuts in it."),
    ("angry-marcus", "agent", "I can eat anything except peanuts, remember that."),
    ("angry-marcus", "agent", "Sure, take your time, I only have a roofing crew waiting."),
    ("angry-marcus", "agent", "Wait, wait, wait, is that cup even clean?"),
    ("friendly-rosa", "agent", "Can I get a mocha for my neighbour as well? She said please."),
    ("friendly-rosa", "agent", "I'm not only a florist, I also bake on Sundays."),
    ("friendly-rosa", "agent", "I'm no florist's daughter, I learned it all by myself."),
    ("friendly-rosa", "agent", "Let me know when it's ready, I'll be at the window."),
    ("friendly-callum", "agent", "I'm in London next week, it's a long way from Inverness."),
    ("friendly-callum", "agent", "For Sunday I need two dozen \N{EM DASH} can you do that?"),
    ("friendly-desmond", "agent", "Is it just me, or did the caf\u00e9 get smaller?"),
    ("indecisive-nadia", "agent", "I'd like a mocha, no, wait, perhaps the chai latte after all."),
    ("indecisive-nadia", "agent", "Maybe I'll have the cappuccino \N{HORIZONTAL ELLIPSIS} or not."),
    ("nervous-mei", "agent", "\N{LEFT DOUBLE QUOTATION MARK}Luck\N{RIGHT DOUBLE QUOTATION MARK}"
     ", she said, and I don\N{RIGHT SINGLE QUOTATION MARK}t feel lucky."),
    ("nervous-mei", "agent", "I'm not in your way here, am I? I'm not used to crowds."),
    ("enthusiast-kenji", "agent", "At home I don't have a proper machine, only the hand grinder."),
    ("enthusiast-kenji", "agent", "Is there an AI in that machine? I'm only joking."),
    ("angry-marcus", "user", "Would you like a large black coffee, or shall we say tea?"),
    ("friendly-june", "user", "In June we sit outside, of course, once you've told me your name."),
    ("nervous-odette", "user", "Your total? It'll be on the screen in a second."),
    ("friendly-rosa", "user", "Feel free to ask me, I'm here to help you choose."),
]  # fmt: skip


@pytest.mark.parametrize(("persona", "role", "text"), INNOCENT, ids=range(len(INNOCENT)))
def test_what_people_say_is_not_taken_for_a_fault(persona: str, role: str, text: str) -> None:
    turns = good(persona)
    assert check(turns, persona) is None
    index = next(i for i in range(len(turns) - 4, 0, -1) if turns[i].role == role)
    turns[index] = Turn(role=turns[index].role, text=f"{text} {turns[index].text}")
    assert check(turns, persona) is None


def test_who_serves_may_name_the_drink_unasked_and_hear_what_a_cut_left_unsaid() -> None:
    turns = good("nervous-tobias", "remake")
    turns[1] = Turn(role="user", text="Oh no, what is wrong with your flat white?")
    turns[0] = Turn(role="agent", text="Er, pardon me, this is cold, if I may.")
    assert check(turns, "nervous-tobias", "remake") is None
    turns = good("nervous-tobias")
    index = next(i for i, turn in enumerate(turns) if "Tobias" in turn.text)
    assert turns[index].role == "agent"
    turns[index] = Turn(role="agent", text="I'm the one called Tobias.", cut_after_words=4)
    fault = check(turns, "nervous-tobias")
    assert fault is None or fault.code != "untold-knowledge"


def test_a_customer_may_confirm_an_order_in_the_barista_s_words() -> None:
    turns = good("nervous-elliot")
    index = next(i for i in range(len(turns) - 4, 0, -1) if turns[i].role == "user")
    order = "a small oat milk hot chocolate"
    turns[index] = Turn(role="user", text=f"So that's {order}?")
    turns[index + 1] = Turn(role="agent", text=f"Yes, that's {order}.")
    assert check(turns, "nervous-elliot") is None


def test_a_pattern_or_thanks_may_come_again() -> None:
    turns = good("friendly-rosa")
    agents = [i for i, turn in enumerate(turns) if turn.role == "agent"]
    for index in agents[4:6]:
        turns[index] = Turn(role="agent", text="You're a star.")
    assert check(turns, "friendly-rosa") is None


WRITTEN_FREELY = """\
user: Morning! Sorry, it's a bit of a madhouse in here today. What are you after?
agent: Come on, I've been staring at that pastry case for ten minutes. Large black coffee.
user: Large black coffee, got it. Room for milk?
agent: Did I say milk? Black. As in, nothing in it.
user: Fair enough \N{EM DASH} black it is. Anything to eat? The almond croissants just came out.
agent: What's in them, peanuts? Because I'm allergic to peanuts and I've had it with guessing.
user: Just almonds, but I'd rather you skipped them, to be safe.
agent: Smart. Skip it. I don't have all day.
user: No problem. Can I grab a name for the cup?
agent: Marcus. M, A, R, C \N{HORIZONTAL ELLIPSIS} you know how it goes.
user: Thanks, Marcus. That's three seventy five.
agent: Three seventy five! Fine. Here's a five, it's all I've got on me.
user: And one twenty five back. It'll be two minutes, three tops.
agent: You said that to the guy in front of me, and he grew a beard.
user: Ha! He came in with it, I swear.
agent: Look, I've got a roofing crew waiting out there and they bill by the minute.
user: Then you go first. Here you go, large black coffee, careful with the lid.
agent: Finally. It's hot, at least. You're not the worst, you know that?
user: I'll put that on my wall. Good luck with the roof!
agent: Yeah, yeah. Thanks."""


def test_a_whole_dialogue_in_free_words_passes() -> None:
    turns = []
    for line in WRITTEN_FREELY.splitlines():
        role, _, text = line.partition(": ")
        turns.append(Turn.model_validate({"role": role, "text": text}))
    assert check(turns, "angry-marcus", "rush-hour") is None


@pytest.mark.parametrize(
    ("persona", "asked", "said", "code"),
    [
        ("angry-marcus", "And the name for the cup?", "It's Gordon. Spell it right.", "other-name"),
        ("angry-marcus", "Who is this for?", "I'm Dave, obviously.", "other-name"),
        ("angry-brenda", "And the name?", "It's Bren. Spell it right.", None),
        ("angry-brenda", "Busy today?", "It's Friday. Of course it is.", None),
        ("nervous-odette", "Far from home?", "I'm not from Grenada, dear.", "denied-fact"),
        ("friendly-rosa", "Off work?", "I'm not a florist any more.", "denied-fact"),
        ("friendly-rosa", "Card or cash?", "I've got twenty-five dollars here.", "other-amount"),
        ("friendly-rosa", "Card or cash?", "I have about ten bucks.", None),
        ("friendly-rosa", "Card or cash?", "I don't have twenty dollars, sorry.", None),
    ],
)
def test_names_denials_and_amounts_depend_on_their_place(persona, asked, said, code) -> None:
    turns = good(persona)
    index = next(i for i in range(len(turns) - 4, 0, -1) if turns[i].role == "user")
    turns[index] = Turn(role="user", text=asked)
    turns[index + 1] = Turn(role="agent", text=f"{said} {turns[index + 1].text}")
    fault = check(turns, persona)
    assert (fault.code if fault else None) == code, fault


@pytest.mark.parametrize(
    ("spelled", "value"),
    [("five", 5), ("twenty five", 25), ("one hundred and ten", 110), ("two thousand six", 2006),
     ("fifteen hundred", 1500), ("lots", None), ("", None)],
)  # fmt: skip
def test_numbers_are_read_from_words(spelled: str, value: int | None) -> None:
    assert number(spelled.split()) == value


@pytest.mark.parametrize(
    ("text", "language", "foreign"),
    [
        ("A caf\u00e9 cr\u00e8me, please.", "en", ""),
        ("Latte \u4e00\u676f", "en", "\u4e00\u676f"),
        ("\u30e9\u30c6\u3092\u4e00\u3064\u304f\u3060\u3055\u3044", "ja", ""),
        ("Latte \u3092\u304f\u3060\u3055\u3044\u306d\u3048\u306d", "ja", ""),
        ("One latte please", "ja", "Onelatteplease"),
        ("\u041e\u0434\u0438\u043d latte", "ru", "latte"),
    ],
)
def test_letters_of_another_language_are_foreign(text: str, language: str, foreign: str) -> None:
    assert foreign_letters(text, language) == foreign


def test_words_shingles_and_runs() -> None:
    assert words("Don\N{RIGHT SINGLE QUOTATION MARK}t, I said!") == ["don't", "i", "said"]
    assert shingles("a b c d") == {"a b c", "b c d"}
    assert shingles("a b") == {"a b"} and shingles("...") == set()
    assert longest_run(["x", "a", "b", "c", "y"], ["a", "b", "c", "x", "y"]) == ["a", "b", "c"]


def test_the_coffee_shop_s_rules_find_plain_claims_alone() -> None:
    who = PERSONAS["angry-marcus"]

    def found(text: str) -> int:
        return len(claims(who, (Turn(role="agent", text=text),), MENU))

    assert found("Give me a large iced latte.") == 1
    assert found("My usual is an earl grey tea.") == 1
    assert found("I'm allergic to soy.") == 1
    assert found("No allergies, just make it.") == 1
    assert found("Give me a large black coffee.") == 0
    assert found("Give me a mocha and I'll scream, but a black coffee is fine.") == 0
    assert found("No allergies but peanuts.") == 0
